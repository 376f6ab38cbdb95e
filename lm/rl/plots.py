"""`reward.png`: how an RL run went, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from farspan.lm.train import metrics

_RAW, _HELD_OUT, _LENGTH, _ENTROPY, _AMPLIFIED, _MOVED = (
    "#4878b0",
    "#d1495b",
    "#5b8c5a",
    "#e09f3e",
    "#7a5195",
    "#6b6b6b",
)


def plot_rl(run: Path) -> Path:
    """Draws `run/reward.png` from the run's metrics: reward and held-out accuracy, length and entropy, and the credit.

    Raw values with a moving mean: a running mean of the best value, as the publication draws, can only rise. Replaces
    the picture in one rename. Returns its path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = metrics.read(run)
    train = [r for r in records if r["kind"] == "train"]
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    reward, shape, credit = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2])
    _curve(reward, train, "reward", _RAW, "reward")
    held_out = [(r["step"], r["accuracy"]) for r in records if r["kind"] == "validation"]
    if held_out:
        points = np.array(held_out, float)
        label = f"held-out accuracy {points[-1, 1]:.3f}"
        reward.plot(*points.T, color=_HELD_OUT, marker="o", markersize=4.5, linewidth=1.2, label=label)
    reward.set_title(run.resolve().name, loc="left", fontsize=14, fontweight="bold")
    _curve(shape, train, "completions/mean_length", _LENGTH, "tokens of a response")
    other = shape.twinx()
    _curve(other, train, "entropy", _ENTROPY, "entropy (right)")
    other.spines["top"].set_visible(False)
    _curve(credit, train, "credit/amplified", _AMPLIFIED, "share of tokens with more weight")
    _curve(credit, train, "credit/moved", _MOVED, "share of the bonus moved back")
    credit.set_xlabel("step")
    for axes in (reward, shape, credit):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        handles = axes.get_lines() + (other.get_lines() if axes is shape else [])
        named = [line for line in handles if not line.get_label().startswith("_")]
        if named:
            axes.legend(handles=named, fontsize=10, frameon=False, loc="best")
    path = run / "reward.png"
    aside = path.with_name(".reward.png.new")
    figure.savefig(aside, format="png", dpi=110)
    aside.replace(path)
    return path


def _curve(axes: Any, train: list[dict[str, Any]], name: str, color: str, label: str) -> None:
    points = [(r["step"], r[name]) for r in train if r.get(name) is not None]
    if not points:
        return
    steps, values = np.array(points, float).T
    axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.9)
    width = max(1, len(values) // 10)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=color, linewidth=1.8, label=f"{label} {smooth[-1]:.3g}")
