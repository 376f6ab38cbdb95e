"""What `benchmarks/rl.sh` trained: held-out accuracy before and after, per strategy and seed, as a table and a picture.

    python benchmarks/rl.py --strategies uniform coupled --output benchmarks/results/DEVICE-DATE/rl-arithmetic

with the Python that farspan is installed in, from the folder that holds runs/. A run that is not finished is an error.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from farspan.eval.report import COLORS, write_report
from farspan.lm.train import metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=["uniform", "local", "anchor", "coupled"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    result = collected(arguments.runs, arguments.strategies, arguments.seeds)
    write_report(arguments.output, "rl", result, table(result), picture(result))
    print((arguments.output / "rl.txt").read_text())


def collected(runs: Path, strategies: list[str], seeds: list[int]) -> dict[str, Any]:
    """Validation curves [step, accuracy] of every run, and how many seeds of a strategy gained."""
    curves: dict[str, list[list[list[float]]]] = {}
    for strategy in strategies:
        for seed in seeds:
            run = runs / f"rl-{strategy}-{seed}"
            if not (run / "summary.json").is_file():
                raise SystemExit(f"error: {run} is not a finished run; train it with benchmarks/rl.sh")
            points = [[r["step"], r["accuracy"]] for r in metrics.read(run) if r["kind"] == "validation"]
            curves.setdefault(strategy, []).append(points)
    gained = {name: sum(points[-1][1] > points[0][1] for points in group) for name, group in curves.items()}
    return {"seeds": seeds, "curves": curves, "gained": gained}


def table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    made = Table(title="Held-out accuracy of arithmetic by reinforcement learning", title_justify="left")
    for column in ("credit", "before", "after", "deviation", "lowest", "highest", "gained"):
        made.add_column(column, justify="left" if column == "credit" else "right")
    for name, group in result["curves"].items():
        before, after = ([points[place][1] for points in group] for place in (0, -1))
        spread = statistics.stdev(after) if len(after) > 1 else float("nan")
        numbers = (statistics.mean(before), statistics.mean(after), spread, min(after), max(after))
        made.add_row(name, *(f"{number:.3f}" for number in numbers), f"{result['gained'][name]} of {len(group)}")
    made.caption = f"seeds {', '.join(map(str, result['seeds']))}; deviation over seeds"
    made.caption_justify = "left"
    return made


def picture(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for color, (name, group) in zip(COLORS, result["curves"].items(), strict=False):
        steps = [step for step, _ in group[0]]
        columns = list(zip(*([accuracy for _, accuracy in points] for points in group), strict=True))
        means = [statistics.mean(column) for column in columns]
        axes.plot(steps, means, color=color, marker="o", markersize=4, linewidth=1.8, label=name)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy, mean and range over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
