"""`farspan eval regression`: estimators of attention on piecewise linear data, without training."""

from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("evaluations")


def regression(
    settings: Annotated[
        str, typer.Option(help="CHANNELS:SEGMENT, separated by commas; a segment is the tokens of one linear map.")
    ] = "16:128,16:256,16:512,32:128",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 1024,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of each setting.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the first sequence; the others follow.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the JSON, the table and the picture.")] = RESULTS,
) -> None:
    """Test-time regression: softmax attention, a global ridge regression and local linear attention predict the next
    target of piecewise linear data. Nothing is trained; each has the best of a grid of scales and ridges.

    Example: `farspan eval regression --settings 16:128,32:128`
    """
    from rich.console import Group
    from rich.progress import track

    from farspan.eval.regression import Protocol, Setting, picture, regress
    from farspan.eval.report import write_report
    from farspan.lm.console import console

    try:
        pairs = tuple(Setting(*map(int, pair.split(":"))) for pair in settings.split(","))
    except (TypeError, ValueError):
        raise ValueError(f"--settings {settings} are not CHANNELS:SEGMENT separated by commas, as in 16:128") from None
    protocol = Protocol(pairs, length, sequences, seed)
    steps = iter(track(range(len(pairs) * sequences), "sequences", console=console, transient=True))
    result = regress(protocol, lambda _: next(steps))
    next(steps, None)
    shown = Group(regression_table(result), "", targets_table(result))
    write_report(output, "regression", result, shown, picture(result))
    console.print(shown)
    console.print(f"written to {output / 'regression'}.json, .txt and .png", style="dim", markup=False)


def regression_table(result: dict[str, Any]) -> Any:
    """Errors of each estimator at its best scale and ridge, as a rich table."""
    table = _table("channels", "segment", "estimator", "scale", "ridge", "mse", "± stderr", "first end", "later ends")
    before = None
    for row in result["rows"]:
        setting = (f"{row['channels']}", f"{row['segment']}")
        if before not in (None, setting):
            table.add_section()
        shown, before = setting if setting != before else ("", ""), setting
        point = ("" if row[key] is None else f"{row[key]:g}" for key in ("scale", "ridge"))
        first, *later = row["last_quarters"]
        ends = f"{min(later):.2g} to {max(later):.2g}" if later else ""
        error = "" if row["stderr"] is None else f"{row['stderr']:.2g}"
        table.add_row(*shown, row["estimator"], *point, f"{row['mse']:.3g}", error, f"{first:.2g}", ends)
    return table


def targets_table(result: dict[str, Any]) -> Any:
    """What is claimed beside what was found, as a rich table."""
    table = _table("channels", "segment", "claim", "found", "expected about", "")
    before = None
    for row in result["targets"]:
        setting = (f"{row['channels']}", f"{row['segment']}")
        shown, before = setting if setting != before else ("", ""), setting
        expected = "" if row["expected"] is None else f"{row['expected']:.2g}"
        table.add_row(*shown, row["claim"], f"{row['found']:.3g}", expected, "holds" if row["holds"] else "no")
    return table


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in ("estimator", "claim", "") else "right")
    return table
