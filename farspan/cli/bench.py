"""`farspan bench`: farspan beside its peers, in one process, in turn."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from farspan.cli.bench_tables import compile_table, decode_table, kernels_table, parallel_table, train_table
from farspan.lm.console import console

app = typer.Typer(no_args_is_help=True)

Mixers = Annotated[str, typer.Option(help="Names, as in rat:chunk=64,window; softmax is measured too.")]
Heads = Annotated[int | None, typer.Option(min=1, help="8 on CPU, 16 on CUDA.")]
Width = Annotated[int | None, typer.Option(min=1, help="512 on CPU, 2048 on CUDA.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; what this machine has.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the first on CPU, the second on CUDA.")]
Output = Annotated[Path, typer.Option(help="Folder for the JSON, the table and the picture.")]
RESULTS = Path("benchmarks/results")
MIXERS = "softmax,window,rat,cca,softplus:power=0,softplus,routing,rcmha"


@app.callback()
def group() -> None:
    """Measure farspan beside its peers: in one process, in turn, after a check that both compute the same.

    Example: `farspan bench kernels --mixers softmax,rat --lengths 4096,16384`
    """


@app.command()
def kernels(
    mixers: Mixers = MIXERS,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a document, separated by commas.")] = None,
    width: Width = None,
    heads: Heads = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a call; one document on CPU.")] = None,
    backward: Annotated[bool, typer.Option(help="Also the backward pass.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every side runs once in each.")] = 7,
    alone: Annotated[bool, typer.Option("--alone", help="Only the named layers, without softmax and ratios.")] = False,
    compiled: Annotated[bool | None, typer.Option(help="Run all layers under torch.compile; on CUDA.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    compile_only: Annotated[bool, typer.Option("--compile-only", help="Only compile the Triton kernels.")] = False,
    arch: Annotated[str, typer.Option(help="Architecture for --compile-only: sm_80 or sm_90.")] = "sm_90",
    output: Output = RESULTS,
) -> None:
    """Time and memory of mixer layers, forward and backward, against torch's softmax attention.

    A layer whose outputs or gradients are wrong gets no numbers, and the exit status is 1. On CUDA the defaults are the
    published protocol of RAT: 262,144 tokens per call, in documents of 4096 to 131,072.

    `--compile-only` needs no GPU: it shows registers, spills, shared memory and matrix instructions of every Triton
    kernel, with exit status 1 if one spills or is too large.

    Example: `farspan bench kernels --mixers softmax,rat --lengths 4096,16384`
    """
    if compile_only:
        _compile_only(arch)
        return
    from farspan.eval.bench_kernels import Protocol, bench_kernels, picture, steps

    place, precision = _device(device), _dtype(dtype, device)
    cuda = place.type == "cuda"
    protocol = Protocol(
        width or (2048 if cuda else 512),
        heads or (16 if cuda else 8),
        _numbers("--lengths", lengths, "4096,16384")
        or ((4096, 8192, 16384, 32768, 65536, 131072) if cuda else (4096, 16384)),
        tokens or (262_144 if cuda else None),
        precision,
        place,
        backward,
        cuda if compiled is None else compiled,
    )
    with _progress(steps(protocol, rounds)) as progress:
        result = bench_kernels(_names(mixers), protocol, rounds, progress, alone)
    _finish(output, "kernels", result, kernels_table(result), picture(result))


@app.command()
def decode(
    mixers: Mixers = MIXERS,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows; 16 on CPU, 512 on CUDA.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens seen; 16,384 on CPU, 4096 on CUDA.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps; every side takes each in turn.")] = 50,
    width: Width = None,
    heads: Heads = None,
    device: Device = None,
    dtype: Dtype = None,
    output: Output = RESULTS,
) -> None:
    """Time of one decoding step of mixer layers at a long context, against softmax attention on a preallocated cache.

    A layer whose steps do not equal its forward pass gets no numbers, and the exit status is 1. On CUDA a step is
    replayed as a CUDA graph.

    Example: `farspan bench decode --batch 16 --context 16384`
    """
    from farspan.eval.bench_decode import Decoding, bench_decode, picture

    place, precision = _device(device), _dtype(dtype, device)
    cuda = place.type == "cuda"
    decoding = Decoding(
        width or (2048 if cuda else 512),
        heads or (16 if cuda else 8),
        batch or (512 if cuda else 16),
        context or (4096 if cuda else 16384),
        steps,
        precision,
        place,
    )
    with _progress(steps + 1) as progress:
        result = bench_decode(_names(mixers), decoding, progress)
    _finish(output, "decode", result, decode_table(result), picture(result))


@app.command()
def parallel(
    mixers: Annotated[
        str, typer.Option(help="Names, separated by commas.")
    ] = "softmax,window,rat,cca,softplus,routing,rcmha",
    ranks: Annotated[str | None, typer.Option(help="Numbers of processes; 1,2,4, on CUDA as GPUs allow.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of the document; 8192 on CPU, 65,536 on CUDA.")] = None,
    width: Width = None,
    heads: Heads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every side runs once in each.")] = 3,
    layout: Annotated[str, typer.Option(help="Of the tokens over the ranks: contiguous or zigzag.")] = "contiguous",
    device: Device = None,
    dtype: Dtype = None,
    output: Output = RESULTS,
) -> None:
    """Time, bytes sent and memory of a rank, of mixer layers on one document that several ranks share.

    softmax shares it in every way: by heads (Ulysses), with gathered keys, as a ring, and in two dimensions on 4 ranks.
    A layer whose outputs or gradients are wrong, or that does not send what its formula says to the byte, gets no
    numbers, and the exit status is 1. On a CPU a process has one thread; on CUDA a GPU.

    Example: `farspan bench parallel --mixers softmax,rat --ranks 1,2 --tokens 4096`
    """
    import torch

    from farspan.eval.bench_parallel import Protocol, bench_parallel, picture, pools, steps

    place, precision = _device(device), _dtype(dtype, device)
    cuda = place.type == "cuda"
    possible = tuple(n for n in (1, 2, 4) if not cuda or n <= torch.cuda.device_count())
    protocol = Protocol(
        tuple(dict.fromkeys(_names(mixers))),
        width or (2048 if cuda else 512),
        heads or (16 if cuda else 8),
        tokens or (65536 if cuda else 8192),
        tuple(sorted(set(_numbers("--ranks", ranks, "1,2,4")))) or possible,
        layout,
        precision,
        place,
    )
    with pools(protocol) as processes, _progress(steps(protocol, rounds)) as progress:
        result = bench_parallel(protocol, processes, rounds, progress)
    _finish(output, "parallel", result, parallel_table(result), picture(result))


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
    output: Output = RESULTS,
) -> None:
    """Training throughput and memory of a `softmax` decoder against transformers' Llama of the same shape.

    Example: `farspan bench train --rounds 10`
    """
    import torch
    from rich.progress import track

    from farspan.eval.bench_train import Shape, bench_train, picture

    if width % heads:
        raise ValueError(f"--width {width} is not divisible by --heads {heads}; use a multiple")
    shape = Shape(vocabulary, width, width * 11 // 4, layers, heads, max(1, heads // 2), length, rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = bench_train(shape, steps, device, track(range(rounds), "rounds", console=console))
    _finish(output, "train", result, train_table(result), picture(result))


def _finish(folder: Path, name: str, result: dict[str, Any], table: Any, figure: Any) -> None:
    """Print and write a result; exit status 1 if a row failed its check."""
    from farspan.eval.report import write_report

    write_report(folder, name, result, table, figure)
    console.print(table)
    for peer, reason in result.get("left_out", {}).items():
        console.print(f"left out: {peer} ({reason})", style="dim", markup=False)
    console.print(f"written to {folder / name}.json, .txt and .png", style="dim", markup=False)
    if not all(row["check"]["passed"] for row in result.get("rows", ())):
        raise typer.Exit(1)


def _compile_only(arch: str) -> None:
    """Print the table of compiled kernels, from a process in which Triton compiles and does not interpret."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "-P", "-c", "from farspan.cli import main; main()"]
        command += ["bench", "kernels", "--compile-only", "--arch", arch]
        raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
    from farspan.kernels.compile import compile_report

    with console.status(f"compiling for {arch}"):
        reports = compile_report(arch, workers=len(os.sched_getaffinity(0)))
    console.print(compile_table(reports))
    faulty = sum(bool(report.faults) for report in reports)
    console.print(f"{len(reports)} kernels for {arch}: {faulty or 'none'} with faults", style="red" if faulty else None)
    if faulty:
        raise typer.Exit(1)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar that takes `total` steps; each is announced by a line of text as it begins."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def begin(text: str) -> None:
            bar.update(task, description=text, advance=1)

        yield begin


def _names(mixers: str) -> list[str]:
    return [name.strip() for name in mixers.split(",") if name.strip()]


def _numbers(option: str, given: str | None, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in given.split(",")) if given else ()
    except ValueError:
        raise ValueError(f"{option} {given} are not numbers separated by commas, as in {example}") from None


def _device(name: str | None) -> Any:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not one of cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(name)


def _dtype(name: str | None, device: str | None) -> Any:
    import torch

    name = name or ("bfloat16" if _device(device).type == "cuda" else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {name} is not one of float32, bfloat16, float16")
    return getattr(torch, name)
