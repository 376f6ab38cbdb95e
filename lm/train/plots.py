"""`loss.png`: how a run went, on one page."""

from pathlib import Path
from typing import Any

import numpy as np

from farspan.lm.train import metrics

_TRAIN, _VALIDATION, _BASELINE, _SKIPPED, _RATE = "#4878b0", "#d1495b", "#6b6b6b", "#e09f3e", "#5b8c5a"


def plot_loss(run: Path) -> Path:
    """Draws `run/loss.png` from the run's metrics: training and validation loss in nats per token, and learning rate.

    Reads "train" records (step, loss, learning_rate, and skipped: the total so far), "validation" records (step, loss)
    and "baseline" records (loss, name); missing ones leave their curve out. Replaces the picture in one rename.
    Returns its path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = metrics.read(run)
    train = [r for r in records if r["kind"] == "train"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_loss(loss, train, records)
    rate.plot([r["step"] for r in train], [r.get("learning_rate", np.nan) for r in train], color=_RATE, linewidth=1.5)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    loss.set_title(run.resolve().name, loc="left", fontsize=14, fontweight="bold")
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=10)
        axes.yaxis.label.set_fontsize(11)
        axes.xaxis.label.set_fontsize(11)

    path = run / "loss.png"
    aside = path.with_name(".loss.png.new")
    figure.savefig(aside, format="png", dpi=130)
    aside.replace(path)
    return path


def _draw_loss(axes: Any, train: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    steps = np.array([r["step"] for r in train], float)
    values = np.array([np.nan if r.get("loss") is None else r["loss"] for r in train], float)
    validation = [r for r in records if r["kind"] == "validation" and r.get("loss") is not None]
    baselines = {r.get("name", "baseline"): r["loss"] for r in records if r["kind"] == "baseline"}

    counts = np.array([r.get("skipped") or 0 for r in train])
    is_skipped = np.diff(counts, prepend=0) > 0
    smooth = _smooth(np.where(is_skipped, np.nan, values))  # what was not learnt from is not part of the trend
    axes.plot(steps, values, color=_TRAIN, alpha=0.4, linewidth=0.8)
    axes.plot(steps, smooth, color=_TRAIN, linewidth=1.8, label=f"training{_last(smooth)}")
    if validation:
        points = np.array([(r["step"], r["loss"]) for r in validation], float)
        label = f"validation{_last(points[:, 1])}"
        axes.plot(*points.T, color=_VALIDATION, marker="o", markersize=4.5, linewidth=1.2, label=label)
    for name, value in baselines.items():
        axes.axhline(value, color=_BASELINE, linestyle="--", linewidth=1.3, label=f"{name} {value:.3f}")
    if is_skipped.any():
        marks = np.full(is_skipped.sum(), 0.015)
        label = f"skipped steps {counts[-1]}"
        axes.plot(
            steps[is_skipped],
            marks,
            "^",
            color=_SKIPPED,
            markersize=7,
            transform=axes.get_xaxis_transform(),
            label=label,
        )

    shown = np.concatenate([smooth, [r["loss"] for r in validation], list(baselines.values())])
    shown = shown[np.isfinite(shown)]
    if len(shown):  # the smoothed curve sets the scale: one spike must not flatten the rest
        margin = 0.08 * (shown.max() - shown.min()) + 0.02
        axes.set_ylim(shown.min() - 2 * margin, shown.max() + margin)
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=11, frameon=False, loc="upper right")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian mean, without lag, of width about a hundredth of the run; non-finite values are passed over."""
    if len(values) == 0:
        return values
    width = max(1.0, len(values) / 100)
    kernel = np.exp(-0.5 * (np.arange(-int(3 * width), int(3 * width) + 1) / width) ** 2)
    finite = np.isfinite(values)
    reach = slice(len(kernel) // 2, len(kernel) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[reach]
    weight = np.convolve(finite.astype(float), kernel)[reach]
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-12)


def _last(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return f" {finite[-1]:.3f}" if len(finite) else ""
