"""What an RL run reads: questions, rewards, and the policy that it begins with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from farspan.lm.rl.rewards import REWARDS, Reward
from farspan.lm.rl.spec import GENERATED, RLRecipe
from farspan.lm.rl.tasks import HELD_OUT, TRAIN, Example, examples

_MOST_FAILED = 10  # rollouts in a row without one reward; then the run stops


@dataclass(frozen=True)
class RLInputs:
    """train, held_out: the questions of the two splits."""

    train: list[Example]
    held_out: list[Example]

    @property
    def identity(self) -> dict[str, Any]:
        """What a run depends on beside its recipe, by content."""
        return {"questions": _fingerprint(self.train), "held-out questions": _fingerprint(self.held_out)}

    def check_start(self, recipe: RLRecipe) -> None:
        """ValueError or OSError, one line, where the policy to begin with is not there; reads no tensors."""
        from farspan.lm.load import locate

        locate(recipe.start, tell=False)

    def dataset(self) -> Any:
        """trl's data set: columns prompt and reference."""
        from datasets import Dataset

        return Dataset.from_dict(
            {"prompt": [one.prompt for one in self.train], "reference": [one.reference for one in self.train]}
        )


def open_rl_inputs(recipe: RLRecipe) -> RLInputs:
    """The questions of a recipe. One-line ValueError or OSError where records are missing or of another form."""
    task, needed = recipe.task, recipe.train.steps * recipe.rollout.prompts
    train = examples(task, TRAIN, recipe.seed, needed)
    if task.name not in GENERATED and len(train) < recipe.rollout.prompts:
        raise ValueError(
            f"{task.jsonl or task.hub} leaves {len(train)} questions for training, fewer than rollout.prompts="
            f"{recipe.rollout.prompts}; lower it, or task.held_out"
        )
    return RLInputs(train, examples(task, HELD_OUT, recipe.seed, recipe.evaluation.prompts))


class RewardsFailed(RuntimeError):
    """No response of many rollouts in a row could be scored."""


class Scorer:
    """A reward for trl: one value per response, None for those that cannot be scored, which then have no part in it.

    A reward that raises, or returns what is not a finite number, loses its response, not the step: `tell` gets one
    line.
    """

    def __init__(self, name: str, tell: Callable[[str], None], reward: Reward | None = None) -> None:
        self.__name__ = name
        self._reward, self._tell = reward or REWARDS[name], tell
        self._failed_in_row = 0

    def __call__(self, prompts, completions, reference, log_metric=None, **_: Any) -> list[float | None]:
        values, problems = [], []
        for completion, wanted in zip(completions, reference, strict=True):
            value, problem = self._score(completion, wanted)
            values.append(value)
            problems += [problem] if problem else []
        if problems:
            self._tell(
                f"reward {self.__name__} failed for {len(problems)} of {len(values)} responses, which have no part in "
                f"this step: {problems[0]}"
            )
        if log_metric is not None:
            log_metric("rewards/unscored", sum(value is None for value in values) / len(values))
        self._failed_in_row = self._failed_in_row + 1 if len(problems) == len(values) else 0
        if self._failed_in_row >= _MOST_FAILED:
            raise RewardsFailed(
                f"reward {self.__name__} failed for every response of {_MOST_FAILED} rollouts in a row, the last with "
                f"{problems[0]}; mend it and continue with --resume"
            )
        return values

    def score(self, completion: Any, reference: str) -> float | None:
        return self._score(completion, reference)[0]

    def _score(self, completion: Any, reference: str) -> tuple[float | None, str]:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        try:
            value = self._reward(text, reference)
            if value is None:
                return None, ""
            value = float(value)
        except Exception as error:  # somebody else's function, on text that a model made up
            return None, f"{type(error).__name__}: {' '.join(str(error).split())}"
        return (value, "") if math.isfinite(value) else (None, f"it returned {value}")


def _fingerprint(questions: list[Example]) -> str:
    digest = hashlib.sha256()
    for one in questions:
        digest.update(repr((one.prompt, one.reference)).encode())
    return digest.hexdigest()
