"""The run folder: what it holds, who may write into it, and whether a recipe may continue it."""

import json
import os
import random
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from farspan.lm.environment import environment
from farspan.lm.recipe import Recipe
from farspan.lm.train.inputs import Inputs

# What may differ between a run and the recipe that resumes it: what is printed, measured and kept, but not what is
# learned.
_FREE = ("description", "expected", "evaluation", "train.log_every", "train.validate_every", "train.sample_every")
_FREE += ("train.checkpoint_every", "train.keep_checkpoints", "train.tensorboard", "train.wandb")
# How a row's tokens are shared out changes results by no more than rounding.
_FREE += tuple(f"parallel.{key}" for key in ("context", "ring", "ulysses", "layout", "attention", "timeout"))


# What may be there before the recipe, which makes a folder a run: logs of other ranks, what a killed `create` left.
_BEFORE_RECIPE = {"logs", "command.txt", "environment.json", "data.json"}


class TrainingFailed(RuntimeError):
    """The run cannot go on, through no fault of the command: exit code 1."""


class RunFolder:
    """`runs/<name>/`; making the object touches nothing."""

    def __init__(self, root: Path, name: str):
        self.path = root / name
        self.checkpoints = self.path / "checkpoints"
        self.exported = self.path / "hf"
        self._recipe = self.path / "recipe.yaml"
        self._data = self.path / "data.json"
        self._length = self.path / "length.json"
        self._summary = self.path / "summary.json"

    def check(self, recipe: Recipe, inputs: Inputs, resume: bool) -> None:
        """Raises ValueError or OSError, one line, if the run may not start (or continue) here.

        A new one may not where its model or tokenizer does not fit the weights it starts from.
        """
        if self._recipe.exists():
            if not resume:
                raise ValueError(
                    f"{self.path} holds a run already; continue it with --resume, or choose another --name"
                )
            self._check_same(recipe, inputs)
            return
        if self.path.is_dir() and {path.name for path in self.path.iterdir()} - _BEFORE_RECIPE:
            raise ValueError(f"{self.path} exists and is not a run; choose another --name, or remove it")
        inputs.check_start(recipe)
        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        writable = self.path if self.path.exists() else parent
        if not writable.is_dir() or not os.access(writable, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{writable} is not a folder that can be written to, so {self.path} cannot be made there"
            )

    def create(self, recipe: Recipe, inputs: Inputs, ranks: int) -> None:
        """Makes the folder and writes what is known before training; a resumed run adds its command."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        with open(self.path / "command.txt", "a") as file:
            file.write(shlex.join(sys.argv) + "\n")
        self._write(self.path / "environment.json", json.dumps(environment(ranks), indent=2) + "\n")
        self._write(self._data, json.dumps(inputs.identity, indent=2) + "\n")
        self._write(self._recipe, recipe.to_yaml())  # last: a folder with a recipe is a run

    def length(self) -> dict[str, Any] | None:
        """What `decide_length` wrote, or None."""
        return json.loads(self._length.read_text()) if self._length.exists() else None

    def decide_length(self, total_steps: int, seconds_per_step: float | None) -> None:
        """Fixes the number of steps for good; see lm/train/schedule.py."""
        self._write(self._length, json.dumps({"total_steps": total_steps, "seconds_per_step": seconds_per_step}) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The result of a finished run, or None."""
        return json.loads(self._summary.read_text()) if self._summary.exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the run as finished; the last thing that a run writes."""
        self._write(self._summary, json.dumps(summary, indent=2) + "\n")

    def _check_same(self, recipe: Recipe, inputs: Inputs) -> None:
        before = _flat(yaml.safe_load(self._recipe.read_text()))
        now = _flat(yaml.safe_load(recipe.to_yaml()))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE):
                raise ValueError(
                    f"{self.path} was trained with {key}={before.get(key)}, this recipe has {key}={now.get(key)}; "
                    "set it back to resume, or choose another --name"
                )
        trained, found = json.loads(self._data.read_text()), inputs.identity
        for what in found:
            if trained.get(what) != found[what]:
                raise ValueError(
                    f"{self.path} was trained with another {what} than there is now; bring the old one back to "
                    "resume, or choose another --name"
                )

    def _write(self, path: Path, text: str) -> None:
        aside = path.with_name(f".{path.name}.new")
        aside.write_text(text)
        aside.replace(path)


def random_state() -> dict[str, Any]:
    """The state of every generator that this process may draw from."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if isinstance(values, dict) and values:
        return {key: leaf for name, value in values.items() for key, leaf in _flat(value, f"{path}.{name}").items()}
    return {path.removeprefix("."): values}
