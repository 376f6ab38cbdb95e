"""`farspan rl`: reinforcement learning from a recipe, demonstrations for its warm start, a look at its credit."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from farspan.cli import rl_inspect
from farspan.cli.runs import RUNS, DryRun, Name, Processes, Recipe, Resume, checks_folder, start, with_name

if TYPE_CHECKING:
    from farspan.lm.rl.inputs import RLInputs
    from farspan.lm.rl.spec import RLRecipe
    from farspan.lm.train.run import RunFolder


class _RecipeFirst(TyperGroup):
    """`farspan rl RECIPE` means `farspan rl train RECIPE`."""

    def resolve_command(self, ctx, args):
        if args and args[0] not in self.commands:
            args = ["train", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_RecipeFirst,
    help="Reinforcement learning of reasoning: `farspan rl RECIPE [KEY=VALUE ...]`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command()(rl_inspect.inspect)


@app.command()
def train(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change: `credit.strategy=local`.")] = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    nproc: Processes = None,
    name: Name = None,
) -> None:
    """Train a policy by GRPO with credit from attention, into the folder runs/NAME. `farspan rl RECIPE` is the same.

    Example: `farspan rl train recipes/rl/arithmetic.yaml credit.strategy=anchor --name anchor`
    """
    from farspan.lm.recipe_file import read_recipe
    from farspan.lm.rl.spec import RLRecipe
    from farspan.lm.train import launch

    given = with_name(overrides, name)
    loaded = read_recipe(RLRecipe, recipe, given)
    if launch.is_worker():
        processes = int(os.environ["WORLD_SIZE"])
    else:
        rows = loaded.rollout.prompts * loaded.rollout.group // loaded.update.minibatches
        processes = launch.default_processes(rows) if nproc is None else nproc
    shares = loaded.resolve(processes)
    if dry_run:
        _print_plan(loaded, shares)
        return

    from farspan.lm.rl.inputs import open_rl_inputs
    from farspan.lm.train.run import RunFolder

    if not launch.is_worker():
        launch.check_processes(processes)
    folder = RunFolder(RUNS, loaded.name)
    inputs = open_rl_inputs(loaded)
    if checks_folder():
        folder.check(loaded, inputs, resume)
    summary = folder.summary()
    if summary is not None:
        from farspan.lm.rl.loop import print_rl_summary

        print_rl_summary(folder.path, summary)
        return
    start(["rl", str(recipe), *given], resume, processes, folder, lambda: _work(loaded, inputs, folder, processes))


@app.command()
def demonstrations(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file, of a generated task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to write: prompt and answer.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Values to change: `task.numbers=4`.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    slips: Annotated[
        float, typer.Option(min=0, max=0.9, help="Probability that an operation of arithmetic is carried out wrongly.")
    ] = 0.0,
) -> None:
    """Write solved questions of a generated task, none of them held out, for a warm start by `farspan train`.

    With `--slips`, the policy learns to be wrong at times, which leaves something to gain.

    Example: `farspan rl demonstrations recipes/rl/arithmetic.yaml -o corpora/arithmetic.jsonl`
    """
    from farspan.lm.recipe_file import read_recipe
    from farspan.lm.rl.spec import GENERATED, RLRecipe
    from farspan.lm.rl.tasks import TRAIN, examples

    loaded = read_recipe(RLRecipe, recipe, overrides or [])
    task = loaded.task
    if task.name not in GENERATED or task.chat:
        raise ValueError(f"task {task.name} has no demonstrations of its own; generated are {', '.join(GENERATED)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.new")
    with open(aside, "w", encoding="utf-8") as file:
        for example in examples(task, TRAIN, loaded.seed, count, slips):
            file.write(json.dumps({"prompt": example.prompt, "answer": example.demonstration}) + "\n")
    aside.replace(output)
    typer.echo(f"{output}: {count:,} demonstrations of {task.name}")


def _work(recipe: "RLRecipe", inputs: "RLInputs", folder: "RunFolder", processes: int) -> None:
    """Trains in this process, which is all of the job or one of its workers."""
    from farspan.lm.train import launch
    from farspan.lm.train.stop import Stop

    stop = Stop()  # before anything that takes long
    if launch.is_worker() or recipe.parallel.zero:
        launch.prepare_process(processes)
    else:
        launch.share_cores(processes)
    try:
        from farspan.lm.rl.loop import train_rl
    except ImportError as error:
        raise ValueError(f"rl needs the package {error.name}; install it with: pip install 'farspan[rl]'") from None
    launch.run_worker(lambda: train_rl(recipe, inputs, folder, stop, processes), folder.path / "logs")


def _print_plan(recipe: "RLRecipe", shares) -> None:
    from rich.table import Table

    from farspan.lm.console import console
    from farspan.lm.rl.spec import GENERATED

    console.print(recipe.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    rollout, steps = recipe.rollout, recipe.train.steps
    table = Table(show_header=False, box=None)
    table.add_row("a step", shares.reason)
    table.add_row(
        "in all", f"{steps} steps, {steps * recipe.updates_per_step} updates, {steps * shares.rows:,} responses"
    )
    table.add_row(
        "at most", f"{steps * shares.rows * rollout.tokens:,} tokens written, {rollout.tokens:,} of a response"
    )
    if recipe.task.name in GENERATED:
        from farspan.lm.rl.tasks import TRAIN, examples

        table.add_row("a question", repr(examples(recipe.task, TRAIN, recipe.seed, 1)[0].prompt))
    else:
        table.add_row("questions", f"{recipe.task.jsonl or recipe.task.hub}, not looked at")
    table.add_row("credit", recipe.credit.strategy)
    console.print(table)
