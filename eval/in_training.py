"""What a training run evaluates beside its validation loss, as its recipe says."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from farspan.eval.needle.run import evaluate
from farspan.eval.needle.tasks import TaskSpec, tasks
from farspan.eval.recall import score
from farspan.lm.recipe import Recipe

Evaluator = Callable[[Any, int], dict[str, float]]
ROWS = 64  # of a task, at each validation


def evaluators(recipe: Recipe, tokenizer: Any, folder: Path) -> list[Evaluator]:
    """Those of the recipe, for `lm.train.loop.train`. Raises ValueError, one line, for what cannot be evaluated."""
    found: list[Evaluator] = []
    if recipe.data.task is not None:
        found.append(lambda model, step: _accuracy(recipe, model))
    if recipe.evaluation.needle is not None:
        specs = needle_specs(recipe)
        found.append(lambda model, step: _needles(specs, recipe.name, tokenizer, folder, model, step))
    return found


def needle_specs(recipe: Recipe) -> list[TaskSpec]:
    """The needle tasks of a recipe. Raises ValueError for unknown ones, and for text where there is no tokenizer."""
    asked, length = recipe.evaluation.needle, recipe.batch.sequence_length
    suffix = "" if asked.protocol == "gen" else f"_{asked.protocol}"
    lengths = asked.lengths or tuple(dict.fromkeys((max(1, length // 2), length)))
    changes = {"lengths": lengths, "depths": tuple(map(float, asked.depths)), "samples": asked.samples}
    specs = tasks([name + suffix for name in asked.tasks], **changes)
    if recipe.tokenizer is None and (text := [spec.name for spec in specs if spec.family != "tok"]):
        raise ValueError(f"evaluation.needle.tasks: {text[0]} is text, a run on data.task has none; use needle_tok")
    return specs


def _accuracy(recipe: Recipe, model: Any) -> dict[str, float]:
    found = score(model, recipe.data.task, recipe.batch.sequence_length, ROWS, recipe.seed)
    return {"accuracy": found.accuracy}


def _needles(specs: list[TaskSpec], name: str, tokenizer: Any, folder: Path, model: Any, step: int) -> dict[str, float]:
    """Every rank takes every pass, which ZeRO-3 needs; the main rank's files stay: needle/step-N and needle.png."""
    is_main = os.environ.get("RANK", "0") == "0"
    with nullcontext(folder / "needle" / f"step-{step}") if is_main else tempfile.TemporaryDirectory() as place:
        model.eval()
        result = evaluate(model, tokenizer, specs, Path(place), f"{name}, step {step}")
        picture = Path(place) / f"heatmap_{specs[0].name}.png"
        if is_main and picture.is_file():
            shutil.copyfile(picture, folder / "needle.png")
    means = {key.split()[0]: task["mean"] for key, task in result["tasks"].items()}
    return {task: mean for task, mean in means.items() if mean is not None}
