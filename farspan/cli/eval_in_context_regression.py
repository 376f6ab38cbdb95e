"""`farspan eval in-context-regression`: mixers trained to regress y on x from the pairs before it."""

from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("evaluations")


def in_context_regression(
    mixers: Annotated[
        str | None,
        typer.Option(help="Names, as in rat:chunk=16,softmax; softmax, local_linear, rat and titans if not given."),
    ] = None,
    segments: Annotated[str, typer.Option(help="Pairs of one linear map, separated by commas; each is trained.")] = (
        "16,32"
    ),
    channels: Annotated[int, typer.Option(min=1, help="Of x and of y.")] = 4,
    length: Annotated[int, typer.Option(min=4, help="Pairs of a sequence.")] = 64,
    width: Annotated[int, typer.Option(min=1, help="Of the models.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Of the mixers.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of AdamW, each on new sequences.")] = 600,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    lr: Annotated[float, typer.Option(help="The highest rate of AdamW.")] = 3e-3,
    held_out: Annotated[int, typer.Option(min=1, help="Sequences that errors are measured on.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and sequences; all mixers share it.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, the table and the picture.")] = RESULTS,
) -> None:
    """In-context regression: two layers of a mixer are trained to predict y from x and the pairs before it, where the
    linear map from x to y changes with every segment. All mixers see the same sequences.

    Example: `farspan eval in-context-regression --mixers softmax,local_linear --segments 32 --steps 300`
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from farspan.eval.in_context_regression import MIXERS, Protocol, Setting, check, picture
    from farspan.eval.in_context_regression import in_context_regression as measure
    from farspan.eval.report import write_report
    from farspan.lm.console import console

    try:
        settings = tuple(Setting(channels, int(segment)) for segment in segments.split(","))
    except ValueError:
        raise ValueError(f"--segments {segments} are not numbers separated by commas, as in 16,32") from None
    names = list(MIXERS) if mixers is None else [name.strip() for name in mixers.split(",") if name.strip()]
    protocol = Protocol(settings, length, width, heads, steps, rows, lr, held_out, seed)
    check(names, protocol)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(dict.fromkeys(names)) * len(settings) * steps)
        result = measure(names, protocol, lambda text: bar.update(task, description=text, advance=1))
    table = in_context_regression_table(result)
    write_report(output, "in_context_regression", result, table, picture(result))
    console.print(table)
    console.print(f"written to {output / 'in_context_regression'}.json, .txt and .png", style="dim", markup=False)


def in_context_regression_table(result: dict[str, Any]) -> Any:
    """Held-out errors, overall and by quarter of the segments, as a rich table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("channels", "segment", "mixer", "parameters", "mse", "± stderr", "quarters: 1", "2", "3", "4"):
        table.add_column(column, justify="left" if column == "mixer" else "right")
    before = None
    for row in result["rows"]:
        setting = (f"{row['channels']}", f"{row['segment']}")
        if before not in (None, setting):
            table.add_section()
        shown, before = setting if setting != before else ("", ""), setting
        told = row["parameters"] is None
        name = f"({row['mixer']})" if told else row["mixer"]
        error = "" if row["stderr"] is None else f"{row['stderr']:.2g}"
        quarters = (f"{quarter:.3g}" for quarter in row["quarters"])
        table.add_row(*shown, name, "" if told else f"{row['parameters']:,}", f"{row['mse']:.3g}", error, *quarters)
    return table
