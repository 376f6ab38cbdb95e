"""`farspan eval needle`: does the model find what it read, by length and by depth?"""

from pathlib import Path
from typing import Annotated, Any

import typer

from farspan.cli.generate import Model
from farspan.cli.lengths import parse_lengths


def needle(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Tasks or groups (needle_core, needle_all), separated by commas.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer: 4k,8k; 1k is 1024.")] = "1k,2k,4k",
    depths: Annotated[str, typer.Option(help="Percent, as first:last:step or separated by commas.")] = "0:100:10",
    samples: Annotated[int, typer.Option(min=1, help="Documents of each cell.")] = 5,
    protocol: Annotated[str, typer.Option(help="gen, tf (teacher forced), mc (choice); several by commas.")] = "gen",
    file: Annotated[Path | None, typer.Option(help="Text for the haystacks, or the questions of needle_qa.")] = None,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch; a longer prompt runs alone.")] = 16_384,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and their tokens, and stop.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for samples, cells and heat maps.")] = Path("evaluations"),
) -> None:  # fmt: skip
    """Needles in haystacks of exact length, at controlled depth; a heat map for each task.

    An evaluation that was stopped goes on where it was. Exit status 3 where a length cannot hold a task (its cells are
    hatched).

    Example: `farspan eval needle runs/quickstart --tasks needle_s1 --lengths 512,1k --protocol tf`
    """
    from rich.progress import track

    from farspan.eval.needle.run import count, evaluate
    from farspan.lm.console import console
    from farspan.lm.load import load_any

    specs = specs_of(tasks or "needle_core", protocol, lengths, depths, samples, seed, file)
    if dry_run:
        _print_plan(specs)
        return
    decoder, tokenizer = load_any(model)
    if tokenizer is None and not tasks:
        specs = specs_of("needle_tok", protocol, lengths, depths, samples, seed, file)
    folder = output / f"needle-{Path(model).name}"
    steps = iter(track(range(count(specs)), "cells", console=console, transient=True))
    result = evaluate(decoder, tokenizer, specs, folder, model, batch_tokens, lambda _: next(steps))
    next(steps, None)
    console.print(needle_table(result))
    console.print(f"written to {folder}: heat maps, cells.csv, samples.jsonl, summary.json", style="dim", markup=False)
    if any(task["not_available"] for task in result["tasks"].values()):
        raise typer.Exit(3)


def specs_of(
    tasks: str, protocol: str, lengths: str, depths: str, samples: int, seed: int, file: Path | None
) -> list[Any]:
    """The tasks of the options, in each protocol. ValueError, one line, for what is no task or number."""
    from farspan.eval.needle.tasks import PROTOCOLS, task_names
    from farspan.eval.needle.tasks import tasks as tasks_of

    names, protocols = _split(tasks), _split(protocol)
    if unknown := [name for name in protocols if name not in PROTOCOLS]:
        raise ValueError(f"--protocol {unknown[0]} is not one of {', '.join(PROTOCOLS)}")
    changes = {
        "lengths": parse_lengths(lengths),
        "depths": _depths(depths),
        "samples": samples,
        "seed": seed,
    }
    found = []
    for name in names:
        for kind in protocols:
            suffix = "" if kind == "gen" or name.endswith(("_tf", "_mc")) else f"_{kind}"
            if kind == "mc" and f"{name}_mc" not in task_names() and name in task_names():
                raise ValueError(f"{name} has no multiple choice: it asks for several values; use --protocol gen or tf")
            found += tasks_of([name + suffix], **changes)
    used = {spec.name: spec for spec in found}.values()
    if file is None:
        return list(used)
    from dataclasses import replace

    return [
        replace(spec, file=str(file), **({"haystack": "file"} if spec.haystack == "prose" else {})) for spec in used
    ]


def _depths(text: str) -> tuple[float, ...]:
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            return tuple(first + step * i for i in range(int((last - first) / step + 1e-9) + 1))
        return tuple(float(part) for part in _split(text))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--depths {text} are not percents; write 0,50,100 or 0:100:10") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _print_plan(specs: list[Any]) -> None:
    from rich.table import Table

    from farspan.lm.console import console

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("task", "protocol", "lengths", "depths", "samples", "tokens in all"):
        table.add_column(title, justify="left" if title in ("task", "protocol") else "right")
    for spec in specs:
        total = sum(spec.lengths) * len(spec.depths) * spec.samples
        lengths = ", ".join(f"{length:,}" for length in spec.lengths)
        table.add_row(spec.name, spec.protocol, lengths, str(len(spec.depths)), str(spec.samples), f"{total:,}")
    console.print(table)


def needle_table(result: dict[str, Any]) -> Any:
    """The summary of `evaluate`, as a rich table: a row for each task, a column for each length."""
    from rich.table import Table

    lengths = sorted({length for task in result["tasks"].values() for length in task["mean_by_length"]})
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("task", "mean", *(f"{length:,}" for length in lengths), "worst cell", "effective length"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for name, task in result["tasks"].items():
        worst = task["worst"]
        cell = "" if worst is None else f"{worst['mean']:.2f} at {worst['length']:,}"
        if worst is not None and worst["depth"] is not None:
            cell += f", {worst['depth']:g} %"
        means = [task["mean_by_length"].get(length) for length in lengths]
        shown = [f"{mean:.3f}" if mean is not None else "n/a" for mean in means]
        mean = "n/a" if task["mean"] is None else f"{task['mean']:.3f}"
        effective = task["effective_length"]
        table.add_row(name, mean, *shown, cell, f"{effective:,}" if effective else f"below {task['threshold']:g}")
    return table
