"""Accuracy on the tasks of recall and state, by length: runs that were trained on them, side by side.

The rows are made by the generators that also made the training data (`lm/data/tasks.py`), from another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farspan.eval.needle.cells import wilson
from farspan.eval.report import COLORS
from farspan.lm.data.rows import IGNORED
from farspan.lm.data.spec import TaskSpec
from farspan.lm.data.task_loader import VALIDATION
from farspan.lm.data.tasks import chance, check_task, examples
from farspan.lm.recipe import Recipe, load_recipe

TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class Score:
    """accuracy: of the most likely token over all answers. low, high: its 95 % interval (Wilson), as if answers were
    independent. exact: share of rows without a wrong answer. nll: nats per answer.
    """

    length: int
    rows: int
    answers: int
    accuracy: float
    low: float
    high: float
    exact: float
    nll: float


@torch.no_grad()
def score(model: Any, task: TaskSpec, length: int, rows: int, seed: int) -> Score:
    """`rows` held-out rows of `length` tokens. The model is left in the mode it was in.

    Raises ValueError where rows of this length cannot hold the task.
    """
    check_task(task, length)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    right = answers = whole = 0
    nll = 0.0
    at_once = max(1, TOKENS_AT_ONCE // length)
    for first in range(0, rows, at_once):
        made = examples(task, length, (seed, VALIDATION), first, min(at_once, rows - first))
        labels = torch.from_numpy(made.labels).to(device)
        logits = model(torch.from_numpy(made.tokens).to(device), use_cache=False).logits
        asked = labels != IGNORED
        found = logits[asked].float()
        hit = torch.zeros_like(asked)
        hit[asked] = found.argmax(-1) == labels[asked]
        right, answers = right + int(hit.sum()), answers + int(asked.sum())
        whole += int((hit == asked).all(1).sum())
        nll += float(torch.nn.functional.cross_entropy(found, labels[asked], reduction="sum"))
    model.train(training)
    return Score(length, rows, answers, right / answers, *wilson(right / answers, answers), whole / rows, nll / answers)


def task_run(run: str) -> Recipe:
    """The recipe of a run on a task. ValueError, one line, for anything else."""
    recipe_file = Path(run) / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(f"{run} is not a run folder; name runs that were trained on a task (data.task)")
    recipe = load_recipe(recipe_file)
    if recipe.data.task is None:
        raise ValueError(f"{run} was trained on text; name runs that were trained on a task (data.task)")
    return recipe


def eval_recall(
    runs: Sequence[str],
    load: Callable[[str], Any],
    multiples: Sequence[int],
    rows: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Each run on its own task, at multiples of its training length. `load(run)` gives the model; `progress` is called
    with a line of text once for each run and length.
    """
    found = []
    for run, recipe in [(run, task_run(run)) for run in runs]:
        task, length = recipe.data.task, recipe.batch.sequence_length
        model = load(run)
        for multiple in multiples:
            progress(f"{run}: {multiple * length} tokens")
            result = score(model, task, multiple * length, rows, recipe.seed)
            mixers = list(dict.fromkeys(name for name, _ in model.config.mixers()))
            found.append(
                {
                    "run": recipe.name,
                    "mixers": mixers,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "task": task.model_dump(mode="json"),
                    "trained_length": length,
                    "chance": chance(task),
                    **vars(result),
                }
            )
    return {"rows_per_length": rows, "rows": found}


def picture(result: dict[str, Any]) -> Any:
    """Accuracy of each run at each length, with its interval and chance: a matplotlib figure."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    tasks = list(dict.fromkeys(row["task"]["name"] for row in rows))
    figure = Figure(figsize=(max(5.0, 4.2 * len(tasks)), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = [row for row in rows if row["task"]["name"] == task]
        for color, run in zip(COLORS[1:] * 9, dict.fromkeys(row["run"] for row in own), strict=False):
            line = [row for row in own if row["run"] == run]
            ends = [(row["accuracy"] - row["low"], row["high"] - row["accuracy"]) for row in line]
            error = [[max(0.0, end) for end in side] for side in zip(*ends, strict=True)]  # rounding, at 0 and 1
            label = "-".join(line[0]["mixers"])
            at = [row["length"] for row in line]
            axes.errorbar(at, [r["accuracy"] for r in line], error, fmt="o-", color=color, label=label, capsize=3)
        axes.axhline(own[0]["chance"], color="#a0a0a0", linestyle=":", linewidth=1.2)
        axes.axvline(own[0]["trained_length"], color="#a0a0a0", linestyle="--", linewidth=1)
        lengths = sorted({row["length"] for row in own})
        axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="tokens (dashed: trained; dotted: chance)")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_title(f"{task}: accuracy", loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure
