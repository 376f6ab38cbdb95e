"""The interpolated bigram model that a trained run has to beat: counts, absolute discounting, no parameters to fit."""

from collections.abc import Iterable
from typing import Any

import numpy as np

DISCOUNT = 0.75
IGNORED = -100


class Bigram:
    """Counts of pairs of tokens, and the probabilities they give (Ney, Essen and Kneser 1994, interpolated).

    With d = 0.75, counts c, and n(v) the number of different followers of v:

        p(w|v) = max(c(v,w) - d, 0) / c(v) + d n(v) / c(v) p(w)         p(w|v) = p(w) where v was never followed
        p(w)   = max(c(w) - d, 0) / c + d n / c / vocabulary            c(w) counts w as a follower, n how many do
    """

    def __init__(self, vocab_size: int):
        self._vocabulary = vocab_size
        self._pairs = np.empty(0, np.int64)  # v * vocabulary + w, sorted
        self._counts = np.empty(0, np.int64)
        self._pending: list[np.ndarray] = []  # pairs not counted yet: one sort for many small batches
        self._pending_tokens = 0

    def update(self, input_ids: Any, shift_labels: Any) -> None:
        """Counts the pairs (input_ids[i], shift_labels[i]); int64 arrays or tensors of one shape; -100 is ignored."""
        self._pending.append(self._codes(input_ids, shift_labels))
        self._pending_tokens += len(self._pending[-1])
        if self._pending_tokens > max(1 << 20, len(self._pairs)):
            self._merge()

    def loss(self, batches: Iterable[tuple[Any, Any]]) -> float:
        """Mean negative log-likelihood, nats per valid token, of (input_ids, shift_labels) pairs as in `update`.

        Raises ValueError if there is no valid token.
        """
        self._merge()
        first, second = np.divmod(self._pairs, self._vocabulary)
        contexts = np.bincount(first, self._counts, self._vocabulary)  # c(v)
        followers = np.bincount(first, minlength=self._vocabulary)  # n(v)
        backoff = np.where(contexts > 0, DISCOUNT * followers / np.maximum(contexts, 1), 1.0)
        unigram = self._unigram(second)
        total, tokens = 0.0, 0
        for input_ids, shift_labels in batches:
            codes = self._codes(input_ids, shift_labels)
            v, w = np.divmod(codes, self._vocabulary)
            discounted = np.maximum(self._count(codes) - DISCOUNT, 0.0) / np.maximum(contexts[v], 1)
            total -= np.log(discounted + backoff[v] * unigram[w]).sum()
            tokens += len(codes)
        if tokens == 0:
            raise ValueError("the bigram loss needs at least one valid token; the batches have none")
        return float(total / tokens)

    def _codes(self, input_ids: Any, shift_labels: Any) -> np.ndarray:
        v, w = np.asarray(input_ids).reshape(-1), np.asarray(shift_labels).reshape(-1)
        valid = w != IGNORED
        return v[valid] * self._vocabulary + w[valid]

    def _merge(self) -> None:
        pairs, counts = np.unique(np.concatenate([self._pairs[:0], *self._pending]), return_counts=True)
        self._pending, self._pending_tokens = [], 0
        merged, inverse = np.unique(np.concatenate([self._pairs, pairs]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, inverse, np.concatenate([self._counts, counts]))
        self._pairs, self._counts = merged, total

    def _count(self, codes: np.ndarray) -> np.ndarray:
        """c(v,w) of each pair; 0 where the pair is new."""
        if len(self._pairs) == 0:
            return np.zeros(len(codes), np.int64)
        at = np.minimum(np.searchsorted(self._pairs, codes), len(self._pairs) - 1)
        return np.where(self._pairs[at] == codes, self._counts[at], 0)

    def _unigram(self, second: np.ndarray) -> np.ndarray:
        """[vocabulary] p(w)."""
        counts = np.bincount(second, self._counts, self._vocabulary)
        total = counts.sum()
        if total == 0:
            return np.full(self._vocabulary, 1.0 / self._vocabulary)
        uniform = DISCOUNT * np.count_nonzero(counts) / total / self._vocabulary
        return np.maximum(counts - DISCOUNT, 0.0) / total + uniform
