"""Scores of samples -> cells -> summary. A cell is one (task, protocol, length, depth); it is never averaged with
another protocol or another version of the suite."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from farspan.eval.needle.score import MAIN_METRIC

EFFECTIVE = 0.85  # the mean that a length needs to count as usable, as do all shorter ones
_Z = 1.959964  # of a 95 % confidence interval
_AVERAGED = ("fill", "prompt_tokens", "exact", "nll", "wrong_value", "empty", "looped")
_NAN = float("nan")


@dataclass(frozen=True)
class Cell:
    """All samples of one (task, protocol, length, depth).

    depth: percent, None where the task has none. n: samples; 0 where the length cannot hold the task (n/a). mean: of
    recall, tf_exact or acc by protocol. stderr: of the mean. low, high: Wilson's 95 % confidence interval. The others
    are means, nan where the protocol does not measure them; nll in nats per token.
    """

    task: str
    protocol: str
    length: int
    depth: float | None
    n: int = 0
    mean: float = _NAN
    stderr: float = _NAN
    low: float = _NAN
    high: float = _NAN
    fill: float = _NAN
    prompt_tokens: float = _NAN
    exact: float = _NAN
    nll: float = _NAN
    wrong_value: float = _NAN
    empty: float = _NAN
    looped: float = _NAN


def cells(samples: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells of samples, in the order in which each is first met.

    samples: fields of a document (task, protocol, max_length, depth, fill, prompt_tokens, version) and its scores
    Raises ValueError for samples of different versions of the suite.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
    versions = set()
    for sample in samples:
        versions.add(sample["version"])
        groups[sample["task"], sample["protocol"], sample["max_length"], sample["depth"]].append(sample)
    if len(versions) > 1:
        raise ValueError(f"samples of suite versions {sorted(versions)} cannot be averaged; evaluate again with one")
    return [_cell(key, group) for key, group in groups.items()]


def _cell(key: tuple, samples: list[Mapping[str, Any]]) -> Cell:
    scores = np.asarray([sample[MAIN_METRIC[key[1]]] for sample in samples], float)
    mean, n = float(scores.mean()), len(scores)
    low, high = wilson(mean, n)
    present = {name: [s[name] for s in samples if name in s] for name in _AVERAGED}
    means = {name: float(np.mean(values)) for name, values in present.items() if values}
    # For scores of 0 and 1 this is sqrt(p (1 - p) / n); shares of several references vary less.
    return Cell(*key, n=n, mean=mean, stderr=float(scores.std() / math.sqrt(n)), low=low, high=high, **means)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of n samples (Wilson 1927); too wide where the scores are not 0 or 1."""
    center = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def mean_of(group: Iterable[Cell]) -> float:
    """The mean over the samples of cells; nan without any."""
    measured = [cell for cell in group if cell.n]
    return float(np.average([c.mean for c in measured], weights=[c.n for c in measured])) if measured else _NAN


def by_length(group: Sequence[Cell]) -> dict[int, float]:
    """Mean over the depths of each length, ascending; lengths without a sample (n/a) are left out."""
    lengths = sorted({cell.length for cell in group if cell.n})
    return {length: mean_of(cell for cell in group if cell.length == length) for length in lengths}


def effective_length(group: Sequence[Cell], threshold: float = EFFECTIVE) -> int | None:
    """The largest length whose mean reaches the threshold together with all shorter ones; None where none does."""
    longest = None
    for length, mean in by_length(group).items():
        if mean < threshold:
            break
        longest = length
    return longest


def summary(all_cells: Sequence[Cell], threshold: float = EFFECTIVE) -> dict[str, dict[str, Any]]:
    """By "task protocol": mean, mean per length, worst cell, effective length, and the cells that are n/a."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in all_cells:
        groups[cell.task, cell.protocol].append(cell)
    result = {}
    for (task, protocol), group in groups.items():
        worst = min((cell for cell in group if cell.n), key=lambda cell: cell.mean, default=None)
        mean = mean_of(group)
        result[f"{task} {protocol}"] = {
            "mean": None if math.isnan(mean) else mean,
            "mean_by_length": by_length(group),
            "worst": worst and {"length": worst.length, "depth": worst.depth, "mean": worst.mean, "n": worst.n},
            "effective_length": effective_length(group, threshold),
            "threshold": threshold,
            "not_available": [{"length": cell.length, "depth": cell.depth} for cell in group if not cell.n],
        }
    return result


def write_csv(path: Path, all_cells: Iterable[Cell]) -> None:
    """One line per cell, full precision, in one rename; nan and None are empty."""
    from farspan.eval.report import renamed

    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        for cell in all_cells:
            row = asdict(cell)
            writer.writerow({name: "" if value is None or value != value else value for name, value in row.items()})


def read_csv(path: Path) -> list[Cell]:
    """What `write_csv` wrote. Raises ValueError for another file."""
    kinds = {"task": str, "protocol": str, "length": int, "n": int}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != [field.name for field in fields(Cell)]:
            raise ValueError(f"{path} is not a table of needle cells; use a cells.csv of a needle evaluation")
        return [
            Cell(**{n: kinds.get(n, float)(v) if v else (None if n == "depth" else _NAN) for n, v in row.items()})
            for row in rows
        ]
