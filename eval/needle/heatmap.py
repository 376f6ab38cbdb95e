"""Cells -> pictures: length from left to right, depth from top (start of the context) to bottom, colour for the score.

The colour limits are fixed, so that pictures can be compared. What was not measured is hatched grey, never a colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from farspan.eval.needle.cells import Cell, by_length, effective_length, mean_of, write_csv

DPI = 150
COLORS = "RdYlGn"  # "viridis" for colour-blind readers
_DIFFERENCE_COLORS = "PuOr"
_LARGEST_WITH_TEXT = 12  # rows and columns
_NONE = "#d4d4d4"


def write_heatmap(folder: Path, name: str, group: Sequence[Cell], **options: Any) -> list[Path]:
    """`name`.png, .svg and .csv of the cells of one task and protocol, each in one rename. options: as `heatmap`."""
    figure = heatmap(group, **options)
    paths = [folder / f"{name}.{ending}" for ending in ("png", "svg", "csv")]
    write_csv(paths[2], group)
    write_figure(paths[0], figure)
    write_figure(paths[1], figure)
    return paths


def write_figure(path: Path, figure: Any) -> None:
    """A picture in one rename; the format is the ending of the path, .png or .svg."""
    from matplotlib import rc_context

    from farspan.eval.report import renamed

    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no random names in it: the same cells give the same file.
    with renamed(path) as aside, rc_context({"svg.hashsalt": "needle", "svg.fonttype": "none"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(aside, format=path.suffix[1:], dpi=DPI, metadata=metadata)


def heatmap(
    group: Sequence[Cell],
    model: str = "",
    trained: int | None = None,
    extended: int | None = None,
    window: int | None = None,
    cmap: str = COLORS,
) -> Any:
    """The cells of one task and protocol: a matplotlib figure with the Agg canvas.

    model: named in the title. trained: longest training length, a dashed line after it. extended: a second one, where
    positions or memory were extended. window: a dotted line after the longest length that it covers. All in tokens.
    Raises ValueError for cells of several tasks or protocols, or none.
    """
    task, protocol = _one_task(group)
    lengths, depths, means = _grid(group)
    figure, axes = _axes(lengths, depths)
    samples = sorted({cell.n for cell in group if cell.n})
    image = _draw(axes, means, lengths, depths, cmap, (0.0, 1.0), "{:.2f}")
    _color_bar(figure, axes, image, "mean score")
    per_cell = "-".join(str(n) for n in sorted({samples[0], samples[-1]})) if samples else "0"
    overall, effective = mean_of(group), effective_length(group)
    axes.set_title(
        f"{' · '.join(filter(None, (model, task, protocol)))}\n"
        f"{per_cell} samples per cell · mean {'n/a' if math.isnan(overall) else f'{overall:.3f}'} · "
        f"effective length {'none' if effective is None else short_length(effective)}",
        fontsize=10,
        loc="left",
        pad=16,  # the labels of the lines are below it
    )
    marks = ((trained, "trained", "--"), (extended, "extended", "--"), (window, "window", ":"))
    drawn: dict[float, list[str]] = {}
    for length, label, style in marks:
        if length is not None:
            x = sum(other <= length for other in lengths) - 0.5
            axes.axvline(x, color="black", linestyle=style, linewidth=1.6, clip_on=False)
            drawn.setdefault(x, []).append(f"{label} {short_length(length)}")
    for x, labels in drawn.items():
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(", ".join(labels), (x, 1.0), **place, ha="center", va="bottom", fontsize=7)
    return figure


def difference(new: Sequence[Cell], old: Sequence[Cell], names: tuple[str, str] = ("new", "old")) -> Any:
    """Mean scores of `new` minus those of `old`, for cells that either has: a matplotlib figure, limits -1 and 1.

    Raises ValueError for cells of several tasks or protocols.
    """
    task, protocol = _one_task([*new, *old])
    lengths, depths, _ = _grid([*new, *old])
    left, right = (_grid(group, lengths, depths)[2] for group in (new, old))
    figure, axes = _axes(lengths, depths)
    image = _draw(axes, left - right, lengths, depths, _DIFFERENCE_COLORS, (-1.0, 1.0), "{:+.2f}")
    _color_bar(figure, axes, image, "difference of mean scores")
    gain = mean_of(new) - mean_of(old)
    axes.set_title(
        f"{names[0]} minus {names[1]} · {task} · {protocol}\n"
        f"difference of the means {'n/a' if math.isnan(gain) else f'{gain:+.3f}'}",
        fontsize=10,
        loc="left",
    )
    return figure


def curve(all_cells: Sequence[Cell], model: str = "", trained: int | None = None) -> Any:
    """Mean over the depths against the length, a line per task, of cells of one protocol: a matplotlib figure.

    trained: longest training length, a dashed line. Raises ValueError for cells of several protocols, or none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    protocols = sorted({cell.protocol for cell in all_cells})
    if len(protocols) != 1:
        raise ValueError(f"a curve shows one protocol; these cells are of: {', '.join(protocols) or 'none'}")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, task in enumerate(dict.fromkeys(cell.task for cell in all_cells)):
        means = by_length([cell for cell in all_cells if cell.task == task])
        # Ten colours and thirteen tasks: the second round is dashed.
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        axes.plot(list(means), list(means.values()), marker="o", markersize=4, label=task, **style)
    if trained is not None:
        axes.axvline(trained, color="black", linestyle="--", linewidth=1.2, label=f"trained {short_length(trained)}")
    lengths = sorted({cell.length for cell in all_cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_length(length) for length in lengths], rotation=45)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("mean score")
    axes.grid(alpha=0.3)
    axes.set_title(" · ".join(filter(None, (model, protocols[0]))), fontsize=10, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def short_length(tokens: int) -> str:
    """4096 -> "4K", 1048576 -> "1M", 1000 -> "1000"."""
    for unit, size in (("M", 1024**2), ("K", 1024)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _one_task(group: Sequence[Cell]) -> tuple[str, str]:
    found = sorted({(cell.task, cell.protocol) for cell in group})
    if len(found) != 1:
        what = ", ".join(" ".join(pair) for pair in found) or "none"
        raise ValueError(f"a heat map shows one task by one protocol; these cells are of: {what}")
    return found[0]


def _grid(group: Sequence[Cell], lengths: list | None = None, depths: list | None = None) -> tuple[list, list, Any]:
    """Lengths, depths and means [depths, lengths], nan where nothing was measured."""
    lengths = lengths or sorted({cell.length for cell in group})
    depths = depths or sorted({cell.depth for cell in group}, key=lambda depth: (depth is None, depth))
    means = np.full((len(depths), len(lengths)), np.nan)
    for cell in group:
        if cell.n:
            means[depths.index(cell.depth), lengths.index(cell.length)] = cell.mean
    return lengths, depths, means


def _axes(lengths: list, depths: list) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 0.8 * len(lengths)), max(4, 0.45 * len(depths))), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _draw(axes: Any, means: Any, lengths: list, depths: list, cmap: str, limits: tuple, form: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    if cmap not in colormaps:
        raise ValueError(f"there is no colour map {cmap!r}; use RdYlGn, viridis or another one of matplotlib")
    image = axes.imshow(means, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(np.isnan(means)):
        place = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(place, 1, 1, facecolor=_NONE, edgecolor="#9a9a9a", hatch="///", linewidth=0))
    if max(means.shape) <= _LARGEST_WITH_TEXT:
        for (row, column), mean in np.ndenumerate(means):
            label, color = "n/a", "#505050"
            if not math.isnan(mean):
                red, green, blue, _ = image.cmap(image.norm(mean))
                label = form.format(mean)
                color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), ["" if depth is None else f"{depth:g}" for depth in depths])
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("depth in percent" if depths != [None] else "")
    return image


def _color_bar(figure: Any, axes: Any, image: Any, label: str) -> None:
    height = figure.get_size_inches()[1]
    figure.colorbar(image, ax=axes, label=label, aspect=6 * height, pad=0.02)  # a sixth of an inch wide, always
