"""What the commands that make a run folder share: options, and how a run is started or handed to several processes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from farspan.lm.train.run import RunFolder

RUNS = Path("runs")

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its newest whole checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")]
Processes = Annotated[
    int | None,
    typer.Option("--nproc", help="Processes on this machine; default: one per GPU, or one.", show_default=False),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run folder in runs/; default: the recipe's.")]


def with_name(overrides: list[str] | None, name: str | None) -> list[str]:
    """The overrides of a recipe, the name of the run among them."""
    return [*(overrides or []), *([f"name={name}"] if name else [])]


def start(command: list[str], resume: bool, processes: int, folder: "RunFolder", work: Callable[[], None]) -> None:
    """`work()` in this process, if it is all of the job or one of its workers; else `command`, with `--resume` where
    that was given, in so many processes.
    """
    from farspan.lm.train import launch
    from farspan.lm.train.run import TrainingFailed
    from farspan.parallel.watch import RankLost

    try:
        if not launch.is_worker() and processes > 1:
            launch.launch([*command, *(["--resume"] if resume else [])], processes, folder.path / "logs")
        else:
            work()
    except (launch.LaunchFailed, RankLost, TrainingFailed) as error:
        typer.echo(f"failed: {error}", err=True)
        raise typer.Exit(1) from None


def checks_folder() -> bool:
    """Whether this process looks at the run folder first: other ranks may already see what rank 0 makes."""
    from farspan.lm.train import launch

    return not launch.is_worker() or os.environ["RANK"] == "0"
