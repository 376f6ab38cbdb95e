"""What a run measured: one JSON object per line in `metrics.jsonl`, and TensorBoard or wandb beside it when asked."""

import json
import math
import os
from collections.abc import Callable
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to `run/metrics.jsonl`.

    A record is a flat dict of plain values with a "kind" ("train", "validation", "baseline", ...) and usually a "step".
    NaN and infinities, which JSON lacks, are written as null. `tensorboard` writes to `run/tensorboard`; `wandb` is the
    name of a project.
    Raises ValueError if a package that is asked for is not installed.
    """

    def __init__(self, run: Path, tensorboard: bool = False, wandb: str | None = None):
        self._path = run / FILE
        self._tensorboard = self._wandb = None
        if tensorboard:
            module = _import("torch.utils.tensorboard", "train.tensorboard", "tensorboard")
            self._tensorboard = module.SummaryWriter(str(run / "tensorboard"))
        if wandb is not None:
            # The run's own folder names it, so that a resumed run continues the same curve.
            self._wandb = _import("wandb", "train.wandb", "wandb").init(
                project=wandb, name=run.name, id=run.name, dir=str(run), resume="allow"
            )
        _drop(self._path, lambda record: True)
        self._file = open(self._path, "a")  # noqa: SIM115 - lives as long as the writer

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it is with the system (not lost when this process is killed) on return."""
        if "kind" not in record:
            raise ValueError(f"record {record} has no kind")
        self._file.write(json.dumps({name: _plain(value) for name, value in record.items()}) + "\n")
        self._file.flush()
        step = record.get("step")
        curves = {
            f"{record['kind']}/{name}": float(value)
            for name, value in record.items()
            if name not in ("kind", "step") and isinstance(value, Real) and not isinstance(value, bool)
        }
        if self._tensorboard is not None:
            for name, value in curves.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(curves, step=step)

    def rewind(self, step: int) -> None:
        """Forgets the records of later steps: those between the last checkpoint and the moment a run was killed."""
        self._file.close()
        _drop(self._path, lambda record: record.get("step", -1) <= step)
        self._file = open(self._path, "a")  # noqa: SIM115

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; none if it has written none. A last line cut short by a kill is left out."""
    try:
        lines = (run / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{run / FILE}, line {number} is not JSON: {line[:60]!r}; delete that line") from error
    return records


def _drop(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites the file, in one rename, with the records that stay; a half-written last line goes too."""
    if not path.exists():
        return
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in read(path.parent) if stays(record))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _import(module: str, option: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{option} needs the package {package}; install it with: pip install {package}") from error
