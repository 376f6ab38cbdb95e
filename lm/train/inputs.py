"""What a run reads: tokenizer and corpora, or a task; opened and checked before anything is built."""

from dataclasses import dataclass
from typing import Any

from farspan.lm.data.corpus import Corpus, open_corpora
from farspan.lm.data.loader import Batch, Loader, validation_batches
from farspan.lm.data.spec import TaskSpec
from farspan.lm.data.task_loader import TaskLoader, task_batches
from farspan.lm.data.tasks import check_task
from farspan.lm.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Corpora of the training split with their weights, those of the validation split, and the tokenizer of all; or a
    task, which has none of these.
    """

    train: list[Corpus]
    weights: list[float]
    validation: list[Corpus]
    tokenizer: Any
    task: TaskSpec | None = None

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size if self.task is not None else self.train[0].vocab_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a run depends on beside its recipe: by content, whatever the folders are called."""
        if self.task is not None:
            return {"task": self.task.model_dump(mode="json")}
        return {"tokenizer": self.train[0].tokenizer_hash, "corpus": [corpus.fingerprint for corpus in self.train]}

    def check_start(self, recipe: Recipe) -> None:
        """ValueError, one line, where model or tokenizer do not fit the weights that the recipe starts from."""
        if recipe.start is not None:
            from farspan.lm.initial import check_start

            check_start(recipe, self.tokenizer, self.vocab_size)

    def loader(self, recipe: Recipe) -> Loader:
        length = recipe.batch.sequence_length
        if self.task is not None:
            return TaskLoader(self.task, length, recipe.rows, recipe.seed)
        return Loader(self.train, self.weights, length, recipe.rows, recipe.seed)

    def validation_batches(self, recipe: Recipe, rows: int) -> list[Batch]:
        """`evaluation.tokens` of the validation split, an equal part of each corpus, in batches of `rows` rows."""
        length, tokens = recipe.batch.sequence_length, recipe.evaluation.tokens
        if self.task is not None:
            return task_batches(self.task, length, rows, recipe.seed, max(1, tokens // length))
        share = max(length, tokens // len(self.validation))
        return [batch for corpus in self.validation for batch in validation_batches(corpus, length, rows, share)]


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens what the recipe names; reads no tokens. One-line ValueError or OSError where something is missing or does
    not match.
    """
    if recipe.data.task is not None:
        check_task(recipe.data.task, recipe.batch.sequence_length)
        return Inputs([], [], [], None, recipe.data.task)
    from farspan.lm.data.tokenizer import load_tokenizer, tokenizer_hash

    train, weights = open_corpora(recipe.data, "train")
    validation, _ = open_corpora(recipe.data, "validation")
    hashed = tokenizer_hash(recipe.tokenizer.path)
    for corpus in train:
        corpus.check_tokenizer(hashed, recipe.tokenizer.path)
    asked = recipe.model.get("vocab_size")
    if asked is not None and asked < train[0].vocab_size:
        raise ValueError(
            f"model.vocab_size={asked} is less than the {train[0].vocab_size} entries of tokenizer "
            f"{recipe.tokenizer.path}; "
            + ("leave model.vocab_size out" if recipe.start is None else "use the tokenizer of start.weights")
        )
    return Inputs(train, weights, validation, load_tokenizer(recipe.tokenizer.path))
