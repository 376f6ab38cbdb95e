"""Documents of token ids: needles without text or tokenizer, for smoke tests and for models of a tiny vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from farspan.eval.needle.document import choices, generator, spread, uid
from farspan.eval.needle.haystack import LengthTooSmall, boundaries
from farspan.eval.needle.tasks import VERSION, TaskSpec


@dataclass(frozen=True)
class TokenVocabulary:
    """The ids, in this order: one marker, the keys, the values, the fillers. 64 in all by default."""

    keys: int = 15
    values: int = 16
    fillers: int = 32

    @property
    def size(self) -> int:
        return 1 + self.keys + self.values + self.fillers


MARKER = 0


def token_document(
    spec: TaskSpec, length: int, depth: float, index: int, vocabulary: TokenVocabulary | None = None
) -> dict[str, Any]:
    """Random fillers, `spec.n_keys` times (marker, key, value), the asked one at `depth`, then (marker, asked key).

    Has `ids` (length - 1 of them) and `answer` (one id) in place of the text fields of `generate.document`; for the
    protocol mc also `choices` (ids that occur in the context) and `gold`.
    Raises LengthTooSmall, and ValueError where the vocabulary has fewer keys or values than are inserted.
    """
    vocabulary = vocabulary or TokenVocabulary()
    n = spec.n_keys
    if n > min(vocabulary.keys, vocabulary.values):
        raise ValueError(f"{spec.name}: n_keys={n} needs as many keys and values; the vocabulary is {vocabulary}")
    fillers = length - 1 - 2 - 3 * n
    if fillers < 0:
        raise LengthTooSmall(spec.name, length, length - fillers)
    key = uid(spec, length, depth, index)
    rng = generator(key)
    keys = 1 + rng.permutation(vocabulary.keys)[:n]
    values = 1 + vocabulary.keys + rng.permutation(vocabulary.values)[:n]
    fractions, which, first = spread(depth, n - 1, rng)
    at = boundaries(np.arange(fillers + 1), fractions, first)
    filler_ids = rng.integers(vocabulary.size - vocabulary.fillers, vocabulary.size, fillers)
    triples = [[MARKER, keys[i], values[i]] for i in which]
    context = np.insert(filler_ids, np.repeat(at, 3), np.ravel(triples))
    document = {
        "uid": key,
        "task": spec.name,
        "protocol": spec.protocol,
        "ids": [*map(int, context), MARKER, int(keys[0])],
        "answer": int(values[0]),
        "metric": spec.metric,
        "max_length": length,
        "gen_tokens": 1,
        "prompt_tokens": length - 1,
        "depth": depth,
        "depth_actual": 100 * at[first] / fillers if fillers else 0.0,
        "needle_tokens": [boundary + 3 * i for i, boundary in enumerate(at)],
        "fill": 1.0,
        "version": VERSION,
    }
    if spec.protocol == "mc":
        document |= choices(document["answer"], [int(value) for value in values[1:]], generator(key, "choices"))
    return document
