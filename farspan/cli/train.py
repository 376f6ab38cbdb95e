"""`farspan train`: a recipe becomes a run folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from farspan.lm.recipe import Recipe
    from farspan.lm.train.inputs import Inputs
    from farspan.lm.train.run import RunFolder

RUNS = Path("runs")


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change: `optimizer.lr=0.01`.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest whole checkpoint.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", help="Processes on this machine; default: one per GPU, or one.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run folder in runs/; default: the recipe's.")
    ] = None,
) -> None:
    """Train a model from a recipe into the folder runs/NAME.

    Example: `farspan train recipes/quickstart.yaml train.minutes=2 --name first-try`
    """
    from farspan.lm.recipe import load_recipe

    given = [*(overrides or []), *([f"name={name}"] if name else [])]
    loaded = load_recipe(recipe, given)
    if dry_run:
        _print_plan(loaded, nproc)
        return

    from farspan.lm.train import launch
    from farspan.lm.train.inputs import open_inputs
    from farspan.lm.train.run import RunFolder, TrainingFailed
    from farspan.parallel.watch import RankLost

    if launch.is_worker():
        processes = launch.local_processes()
    else:
        processes = _processes(loaded, nproc)
        launch.check_processes(processes)
        loaded.resolve(processes)
        loaded.parallelism(processes, processes)
    folder = RunFolder(RUNS, loaded.name)
    inputs = open_inputs(loaded)
    if loaded.evaluation.needle is not None:
        from farspan.eval.in_training import needle_specs

        needle_specs(loaded)
    if not launch.is_worker() or os.environ["RANK"] == "0":  # other ranks may already see what rank 0 makes
        folder.check(loaded, inputs, resume)
    summary = folder.summary()
    if summary is not None:
        from farspan.lm.train.report import print_summary

        print_summary(folder.path, summary)
        return
    try:
        if not launch.is_worker() and processes > 1:
            launch.launch(
                ["train", str(recipe), *given, *(["--resume"] if resume else [])], processes, folder.path / "logs"
            )
        else:
            _work(loaded, inputs, folder, processes)
    except (launch.LaunchFailed, RankLost, TrainingFailed) as error:
        typer.echo(f"failed: {error}", err=True)
        raise typer.Exit(1) from None


def _work(recipe: "Recipe", inputs: "Inputs", folder: "RunFolder", processes: int) -> None:
    """Trains in this process, which is all of the job or one of its workers."""
    from farspan.lm.train import launch
    from farspan.lm.train.stop import Stop

    stop = Stop()  # before anything that takes long
    launch.prepare_process(processes)
    from farspan.eval.in_training import evaluators
    from farspan.lm.train.loop import train as run

    own = evaluators(recipe, inputs.tokenizer, folder.path)
    launch.run_worker(lambda: run(recipe, inputs, folder, stop, own), folder.path / "logs")


def _processes(recipe: "Recipe", asked: int | None) -> int:
    from farspan.lm.train import launch

    return launch.default_processes(recipe.rows, recipe.parallel.context_size) if asked is None else asked


def _print_plan(recipe: "Recipe", processes: int | None) -> None:
    from rich.table import Table

    from farspan.lm.console import console
    from farspan.lm.train import launch
    from farspan.lm.train.estimate import estimate

    processes = launch.local_processes() if launch.is_worker() else _processes(recipe, processes)
    console.print(recipe.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None)
    for row in estimate(recipe, processes):
        table.add_row(*row)
    console.print(table)
