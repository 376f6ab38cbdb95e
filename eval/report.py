"""A measurement on disk: JSON that says where it comes from, the table that was printed, and a picture."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

TABLE_COLUMNS = 140
COLORS = ("#9a9a9a", "#4878b0", "#c8553d", "#5b8c5a", "#8e6c8a", "#d9a441", "#3f3f3f", "#6fb1b4")


def write_report(folder: Path, name: str, result: dict[str, Any], table: Any, figure: Any) -> None:
    """`name`.json (see `write_json`), .txt (a rich table) and .png (a matplotlib figure), each in one rename."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from rich.console import Console

    write_json(folder / f"{name}.json", result)
    with renamed(folder / f"{name}.txt") as aside, aside.open("w") as file:
        Console(file=file, width=TABLE_COLUMNS).print(table)
    with renamed(folder / f"{name}.png") as aside:
        FigureCanvasAgg(figure)
        figure.savefig(aside, format="png", dpi=130)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """`result` with the command, commit, device and versions of this process, in one rename; makes the folder."""
    from farspan.lm.environment import environment

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as aside:
        aside.write_text(json.dumps({"command": command, **environment(ranks=1), **result}, indent=1) + "\n")


def described(options: Any) -> dict[str, Any]:
    """A dataclass of options as JSON takes it."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype | torch.device) else value
        for name, value in asdict(options).items()
    }


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block."""
    aside = path.with_name(f".{path.name}.new")
    yield aside
    aside.replace(path)
