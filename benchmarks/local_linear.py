"""Local linear attention against softmax attention: time and memory of a layer, and how its solver fares.

    python benchmarks/local_linear.py --lengths 1024,2048,4096 --output benchmarks/results/DEVICE-DATE/local-linear

with the Python that farspan is installed in. A layer of `--heads` heads of 64 and of 128, forward and backward on one
document: conjugate gradients at each ridge, and the direct solver, whose work does not depend on the ridge, where
`auto` takes it. All take turns; on a CPU the seconds are those of the process, to which other work adds little.
Iterations are those of every system of the forward pass, and the residual is the true one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from farspan.eval.bench_kernels import Layer
from farspan.eval.memory import peak_bytes
from farspan.eval.report import COLORS, write_report
from farspan.eval.timing import Work, alternate, median_ratio, stopwatch
from farspan.kernels.local_linear.solve import Tile, conjugate_gradients
from farspan.layers import Sequence, build

# iterations: the cap that the options' page names for a ridge of this size.
RIDGES = {0.1: 32, 1.0: 16, 10.0: 16}
DIRECT_RIDGE = 1.0  # where the direct solver has a row too: it takes the same time at any ridge
BLOCK = 256  # queries whose systems are looked at together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096", help="tokens of a document, separated by commas")
    parser.add_argument("--head-dims", default="64,128", help="separated by commas")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device, rows = torch.device(arguments.device), []
    for length in map(int, arguments.lengths.split(",")):
        for head_dim in map(int, arguments.head_dims.split(",")):
            rows += measured(length, arguments.heads, head_dim, arguments.rounds, device)
        result = {"heads": arguments.heads, "dtype": "float32", "rounds": arguments.rounds, "rows": rows}
        write_report(arguments.output, "local_linear", result, table(result), picture(result))
        print(f"{length:,} tokens: done", flush=True)
    print((arguments.output / "local_linear.txt").read_text())


def measured(length: int, heads: int, head_dim: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each ridge and solver: seconds, times softmax in time and peak memory, and the iterations."""
    torch.manual_seed(0)
    width = heads * head_dim
    sequence = Sequence.rows(1, length, device)
    x, dy = (torch.randn(1, length, width, device=device) for _ in range(2))
    mixers = {"softmax": build("softmax", width=width, heads=heads)}
    for ridge, cap in RIDGES.items():
        for solver in ("gram", "cg") if ridge == DIRECT_RIDGE else ("cg",):
            options = {"ridge_init": ridge, "ridge_min": ridge / 2, "iterations": cap, "solver": solver}
            mixers[f"{ridge:g} {solver}"] = build("local_linear", width=width, heads=heads, **options)
    works: dict[str, Work] = {name: work(mixer.to(device), x, dy, sequence) for name, mixer in mixers.items()}
    memory = {name: peak_bytes(run) for name, run in works.items()}  # warms up as well
    seconds = alternate(works, range(rounds), stopwatch(device) if device.type == "cuda" else process_seconds)
    found = []
    for name, mixer in mixers.items():
        if name == "softmax":
            continue
        ridge, solver = name.split()
        options = mixer.options
        statistics_of = solves(mixer, x, sequence) if solver == "cg" else {}
        found.append(
            {
                "length": length,
                "head_dim": head_dim,
                "ridge": float(ridge),
                "solver": solver,
                "seconds": seconds[name],
                "softmax_seconds": seconds["softmax"],
                "median_seconds": statistics.median(seconds[name]),
                "times_softmax": 1 / median_ratio(seconds["softmax"], seconds[name]),
                "peak_bytes": memory[name],
                "times_softmax_bytes": memory[name] / memory["softmax"],
                "cap": options.iterations,
                **statistics_of,
            }
        )
    return found


def process_seconds(run: Work) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def work(mixer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor, sequence: Sequence) -> Work:
    """One call of x + mixer(norm(x)) and all its gradients."""
    layer = Layer(mixer, x.shape[-1]).to(x.device)
    given = x.clone().requires_grad_()
    wanted = [given, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(given, sequence), wanted, dy)


@torch.no_grad()
def solves(mixer: torch.nn.Module, x: torch.Tensor, sequence: Sequence) -> dict[str, float]:
    """Mean, 99th percentile and largest number of iterations over all queries and heads, and the largest residual."""
    options, seen = mixer.options, []
    core = mixer.core
    mixer.core = lambda operands, *rest: (seen.append(operands), core(operands, *rest))[1]
    Layer(mixer, x.shape[-1]).to(x.device)(x, sequence)
    mixer.core = core
    q, k, ridge = (y[0].transpose(0, 1) for y in (seen[0].q, seen[0].k, seen[0].ridge[None, None]))
    used, residuals = [], []
    for first in range(0, q.shape[1], BLOCK):
        rows = q[:, first : first + BLOCK]
        keys = k[:, : first + rows.shape[1]]
        hidden = torch.ones(rows.shape[1], keys.shape[1], dtype=torch.bool, device=x.device).triu(first + 1)
        p = (rows @ keys.transpose(1, 2) * options.head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        mean = p @ keys
        tile = Tile(p, keys, mean, ridge[..., None])
        wanted = mean - rows
        solved = conjugate_gradients(tile, wanted, options.tolerance, options.iterations)
        left = torch.linalg.vector_norm(wanted - tile.times(solved.x)[0], dim=-1)
        used.append(solved.iterations.flatten())
        residuals.append((left / torch.linalg.vector_norm(wanted, dim=-1).clamp(min=1e-30)).flatten())
    iterations, residual = torch.cat(used), torch.cat(residuals)
    return {
        "iterations": iterations.mean().item(),
        "iterations_p99": iterations.quantile(0.99, interpolation="higher").item(),
        "iterations_max": iterations.max().item(),
        "residual": residual.max().item(),
    }


def table(result: dict[str, Any]) -> Any:
    """A line per length, head dim, ridge and solver."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="dim")
    titles = ("tokens", "head dim", "ridge", "solver", "ms", "time x softmax", "memory x softmax")
    for title in (*titles, "iterations", "p99", "max", "cap", "residual"):
        shown.add_column(title, justify="left" if title == "solver" else "right")
    before: tuple[str, ...] = ()
    for row in result["rows"]:
        own = (f"{row['length']:,}", str(row["head_dim"]))
        cells = [*(own if own != before else ("", "")), f"{row['ridge']:g}", row["solver"]]
        before = own
        cells += [f"{1e3 * row['median_seconds']:,.0f}", f"{row['times_softmax']:.3g}"]
        cells += [f"{row['times_softmax_bytes']:.2f}"]
        if row["solver"] == "cg":
            cells += [f"{row['iterations']:.1f}", f"{row['iterations_p99']:.0f}", f"{row['iterations_max']:.0f}"]
            cells += [str(row["cap"]), f"{row['residual']:.1e}"]
        shown.add_row(*cells)
    return shown


def picture(result: dict[str, Any]) -> Any:
    """Time and memory against softmax over the length, a panel for each head dim: a matplotlib figure."""
    from matplotlib.figure import Figure

    head_dims = list(dict.fromkeys(row["head_dim"] for row in result["rows"]))
    figure = Figure(figsize=(5.5 * len(head_dims), 7), layout="constrained")
    panels = figure.subplots(2, len(head_dims), sharex=True, sharey="row", squeeze=False)
    for column, head_dim in enumerate(head_dims):
        own = [row for row in result["rows"] if row["head_dim"] == head_dim]
        for color, kind in zip(COLORS[1:], dict.fromkeys((row["ridge"], row["solver"]) for row in own), strict=False):
            rows = [row for row in own if (row["ridge"], row["solver"]) == kind]
            at = [row["length"] for row in rows]
            for axes, key in zip(panels[:, column], ("times_softmax", "times_softmax_bytes"), strict=True):
                axes.plot(at, [row[key] for row in rows], "o-", color=color, label=f"ridge {kind[0]:g}, {kind[1]}")
        panels[0, column].set_title(f"heads of {head_dim}: time x softmax", loc="left", fontweight="bold")
        panels[1, column].set_title("peak memory x softmax", loc="left", fontweight="bold")
        panels[1, column].set(xlabel="tokens of a document")
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{length:,}" for length in at])
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[0]:
        axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
