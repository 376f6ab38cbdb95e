"""`farspan eval recall`: runs on tasks of recall and state, in one table."""

from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("evaluations")


def recall(
    runs: Annotated[list[str], typer.Argument(help="Run folders that were trained on a task.", metavar="RUN...")],
    multiples: Annotated[str, typer.Option(help="Of the training length, separated by commas.")] = "1,2,4",
    rows: Annotated[int, typer.Option(min=1, help="Held-out rows of each length.")] = 256,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, the table and the picture.")] = RESULTS,
) -> None:
    """Accuracy of runs that were trained on a synthetic task (`data.task`), at multiples of their training length.

    Example: `farspan eval recall runs/recall-softmax runs/recall-rat --multiples 1,2,4`
    """
    from rich.progress import track

    from farspan.eval.recall import eval_recall, picture, task_run
    from farspan.eval.report import write_report
    from farspan.lm.console import console
    from farspan.lm.load import load_any

    try:
        lengths = tuple(int(multiple) for multiple in multiples.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--multiples {multiples} are not whole numbers separated by commas, as in 1,2,4")
    for run in runs:
        task_run(run)
    steps = iter(track(range(len(runs) * len(lengths)), "rows", console=console, transient=True))
    result = eval_recall(runs, lambda run: load_any(run)[0], lengths, rows, lambda _: next(steps))
    next(steps, None)
    table = recall_table(result)
    write_report(output, "recall", result, table, picture(result))
    console.print(table)
    console.print(f"written to {output / 'recall'}.json, .txt and .png", style="dim", markup=False)


def recall_table(result: dict[str, Any]) -> Any:
    """What `eval_recall` found, as a rich table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("task", "run", "mixers", "parameters", "tokens", "accuracy", "95 %", "rows all right", "chance"):
        table.add_column(title, justify="left" if title in ("task", "run", "mixers") else "right")
    before: tuple[str, ...] = ()
    for row in result["rows"]:
        own = (row["task"]["name"], row["run"], "-".join(row["mixers"]), f"{row['parameters']:,}")
        shown = [""] * 4 if own == before else own
        before = own
        trained = "" if row["length"] != row["trained_length"] else " (trained)"
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        numbers = (f"{row['accuracy']:.3f}", interval, f"{row['exact']:.3f}", f"{row['chance']:.3f}")
        table.add_row(*shown, f"{row['length']:,}{trained}", *numbers)
    return table
