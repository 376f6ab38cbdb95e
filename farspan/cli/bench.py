"""`farspan bench`: farspan beside its peers, in one process, in turn."""

from pathlib import Path
from typing import Annotated, Any

import typer

from farspan.lm.console import console

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure farspan beside its peers: in one process, in turn, after a check that both compute the same.

    Example: `farspan bench train --rounds 10`
    """


@app.command()
def train(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; both sides run in each.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a side per round.")] = 4,
    width: Annotated[int, typer.Option(min=8, help="Hidden size; the feed-forward part is 2.75 times as wide.")] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    vocabulary: Annotated[int, typer.Option(min=2)] = 4096,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a document.")] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Documents of a step.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder for train.json and train.png.")] = Path("benchmarks/results"),
) -> None:
    """Training throughput and memory of a `softmax` decoder against transformers' Llama of the same shape.

    Example: `farspan bench train --rounds 10`
    """
    import torch
    from rich.progress import track

    from farspan.eval.bench_train import Shape, bench_train, plot
    from farspan.eval.report import write_json

    if width % heads:
        raise ValueError(f"--width {width} is not divisible by --heads {heads}; use a multiple")
    shape = Shape(vocabulary, width, width * 11 // 4, layers, heads, max(1, heads // 2), length, rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = bench_train(shape, steps, device, track(range(rounds), "rounds", console=console))
    write_json(output / "train.json", result)
    plot(result, output / "train.png")
    console.print(table(result))
    console.print(f"written to {output / 'train.json'} and {output / 'train.png'}", style="dim", markup=False)


def table(result: dict[str, Any]) -> Any:
    """What `bench_train` found, as a rich table."""
    from rich.table import Table

    shown = Table("", box=None, pad_edge=False, header_style="dim")
    for title in ("tokens/s", "peak memory"):
        shown.add_column(title, justify="right")
    for name, speed in result["median_tokens_per_second"].items():
        shown.add_row(name, f"{speed:,.0f}", f"{result['peak_bytes'][name] / 1e6:,.0f} MB")
    ours, peer = result["peak_bytes"].values()
    shown.add_row("median ratio", f"{result['median_ratio']:.3f}", f"{ours / peer:.3f}", style="bold")
    return shown
