"""What a run reads: tokenizer and corpora, opened and checked against each other before anything is built."""

from dataclasses import dataclass
from typing import Any

from farspan.lm.data.corpus import Corpus, open_corpora
from farspan.lm.data.loader import Batch, Loader, validation_batches
from farspan.lm.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Corpora of the training split with their weights, those of the validation split, and the tokenizer of all."""

    train: list[Corpus]
    weights: list[float]
    validation: list[Corpus]
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        return self.train[0].vocab_size

    def loader(self, recipe: Recipe) -> Loader:
        rows = recipe.batch.tokens // recipe.batch.sequence_length
        return Loader(self.train, self.weights, recipe.batch.sequence_length, rows, recipe.seed)

    def validation_batches(self, recipe: Recipe, rows: int) -> list[Batch]:
        """`evaluation.tokens` of the validation split, an equal part of each corpus, in batches of `rows` rows."""
        share = max(recipe.batch.sequence_length, recipe.evaluation.tokens // len(self.validation))
        length = recipe.batch.sequence_length
        return [batch for corpus in self.validation for batch in validation_batches(corpus, length, rows, share)]


def open_inputs(recipe: Recipe) -> Inputs:
    """Opens what the recipe names; reads no tokens. One-line ValueError or OSError where something is missing or does
    not match.
    """
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
            f"{recipe.tokenizer.path}; leave model.vocab_size out"
        )
    return Inputs(train, weights, validation, load_tokenizer(recipe.tokenizer.path))
