"""`farspan train`: a recipe becomes a run folder."""

from typing import TYPE_CHECKING, Annotated

import typer

from farspan.cli.runs import RUNS, DryRun, Name, Processes, Recipe, Resume, checks_folder, start, with_name

if TYPE_CHECKING:
    from farspan.lm.recipe import Recipe as TrainingRecipe
    from farspan.lm.train.inputs import Inputs
    from farspan.lm.train.run import RunFolder


def train(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change: `optimizer.lr=0.01`.")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    nproc: Processes = None,
    name: Name = None,
) -> None:
    """Train a model from a recipe into the folder runs/NAME.

    Example: `farspan train recipes/quickstart.yaml train.minutes=2 --name first-try`
    """
    from farspan.lm.recipe import load_recipe

    given = with_name(overrides, name)
    loaded = load_recipe(recipe, given)
    if dry_run:
        _print_plan(loaded, nproc)
        return

    from farspan.lm.train import launch
    from farspan.lm.train.inputs import open_inputs
    from farspan.lm.train.run import RunFolder

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
    if checks_folder():
        folder.check(loaded, inputs, resume)
    summary = folder.summary()
    if summary is not None:
        from farspan.lm.train.report import print_summary

        print_summary(folder.path, summary)
        return
    start(["train", str(recipe), *given], resume, processes, folder, lambda: _work(loaded, inputs, folder, processes))


def _work(recipe: "TrainingRecipe", inputs: "Inputs", folder: "RunFolder", processes: int) -> None:
    """Trains in this process, which is all of the job or one of its workers."""
    from farspan.lm.train import launch
    from farspan.lm.train.stop import Stop

    stop = Stop()  # before anything that takes long
    launch.prepare_process(processes)
    from farspan.eval.in_training import evaluators
    from farspan.lm.train.loop import train as run

    own = evaluators(recipe, inputs.tokenizer, folder.path)
    launch.run_worker(lambda: run(recipe, inputs, folder, stop, own), folder.path / "logs")


def _processes(recipe: "TrainingRecipe", asked: int | None) -> int:
    from farspan.lm.train import launch

    return launch.default_processes(recipe.rows, recipe.parallel.context_size) if asked is None else asked


def _print_plan(recipe: "TrainingRecipe", processes: int | None) -> None:
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
