"""Synthetic tasks of recall and state: seeded rows of tokens that are training data and evaluation alike.

Row i of a task is a function of (task, options, seed, i) alone. A label is what a token is followed by in the answer to
it, -100 where nothing is asked; `chance` is the accuracy of a guess that knows the task but not the context.

    recall        multi-query associative recall: key value pairs, then keys again, each to be followed by its value
    copy          a string, a mark, and the string again
    selective     a few data tokens among noise, then as many marks: the data in their order
    permutations  elements of a symmetric group: after each, the product of all so far
    swaps         objects in some order, then swaps of two places: after each, what stands at the first of the two
    regression    pairs x, a x + b modulo a prime, with a and b of the row: y after each x from the third pair on
    needle        a key and its value somewhere in filler, then the key again

Numbers come from Philox words, which numpy keeps stable: a run that resumes on another version sees the same rows.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from farspan.lm.data.rows import IGNORED, random_words
from farspan.lm.data.spec import TaskSpec

ELEMENTS = 5  # of permutations: S5 is the smallest group whose products no circuit of constant depth computes


class Examples(NamedTuple):
    """tokens, labels: int64 [rows, length]; labels are already shifted."""

    tokens: np.ndarray
    labels: np.ndarray


def examples(task: TaskSpec, length: int, seed: tuple[int, ...], first: int, count: int) -> Examples:
    """Rows first .. first + count of `length` tokens. Raises ValueError where the task does not fit in so many."""
    check_task(task, length)
    name = zlib.crc32(task.name.encode())
    rows = [_TASKS[task.name].make(task, length, Draw((*seed, name, first + row))) for row in range(count)]
    return Examples(*(np.stack(side) for side in zip(*rows, strict=True)))


def check_task(task: TaskSpec, length: int) -> None:
    """Raises ValueError, one line, unless rows of `length` tokens hold the task, and its vocabulary what it draws."""
    least = _TASKS[task.name].needs(task)
    if length < least:
        raise ValueError(
            f"data.task.name={task.name} with {task.items} items needs rows of {least} tokens or more, not {length}; "
            "raise batch.sequence_length, or lower data.task.items"
        )
    entries = _TASKS[task.name].entries(task)
    if task.vocab_size < entries:
        raise ValueError(
            f"data.task.name={task.name} with {task.items} items needs a vocabulary of {entries}, "
            f"data.task.vocab_size is {task.vocab_size}; raise it"
        )


def chance(task: TaskSpec) -> float:
    """Accuracy of the best guess that does not look at the context."""
    return 1.0 / _TASKS[task.name].answers(task)


class Draw:
    """Random numbers of one row, in order."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._seed, self._calls = seed, 0

    def words(self, count: int) -> np.ndarray:
        """uint64 [count]."""
        self._calls += 1
        return random_words((*self._seed, self._calls), count)

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        """int64 [count] in low .. high - 1; the bias of the remainder is below 2^-40."""
        return (low + self.words(count) % np.uint64(high - low)).astype(np.int64)

    def order(self, count: int) -> np.ndarray:
        """A permutation of 0 .. count - 1."""
        return np.argsort(self.words(count), kind="stable")

    def distinct(self, low: int, high: int, count: int) -> np.ndarray:
        """`count` different numbers of low .. high - 1, in random order."""
        return low + self.order(high - low)[:count]


def _recall(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Zoology's setting (arXiv 2312.04927): pairs first, then queries whose distances follow a power law."""
    half, pairs = task.vocab_size // 2, task.items
    keys, values = draw.distinct(1, half, pairs), draw.integers(half, task.vocab_size, pairs)
    tokens = draw.integers(1, task.vocab_size, length) if task.noise else np.zeros(length, np.int64)
    labels = np.full(length, IGNORED)
    tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
    # Each query a place of its own after the pairs, near ones more often: the weights i^(a - 1) of a power law.
    places = np.arange(2 * pairs, length)
    uniform = (draw.words(len(places)) >> np.uint64(11)).astype(np.float64) / 2.0**53
    weight = np.arange(1, len(places) + 1) ** (task.power - 1.0)
    asked = np.sort(places[np.argsort(-np.log(np.maximum(uniform, 1e-300)) / weight, kind="stable")[:pairs]])
    which = draw.order(pairs)
    if task.noise:  # no key by accident: its label would be missing
        noisy = np.isin(tokens[2 * pairs :], keys)
        tokens[2 * pairs :][noisy] = 0
    tokens[asked], labels[asked] = keys[which], values[which]
    return tokens, labels


def _copy(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    count = (length - 1) // 2
    text = draw.integers(2, task.vocab_size, count)
    tokens = np.concatenate([text, [1], text, np.zeros(length - 2 * count - 1, np.int64)])
    labels = np.full(length, IGNORED)
    labels[count : 2 * count] = text
    return tokens, labels


def _selective(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Token 0 is noise, 1 asks (arXiv 2312.00752, section 4.1.1)."""
    count = task.items
    places = np.sort(draw.order(length - count)[:count])
    data = draw.integers(2, task.vocab_size, count)
    tokens, labels = np.zeros(length, np.int64), np.full(length, IGNORED)
    tokens[places], tokens[length - count :] = data, 1
    labels[length - count :] = data
    return tokens, labels


@lru_cache(maxsize=1)
def _products() -> np.ndarray:
    """int64 [n!, n!]: the element that [second, first] makes, elements numbered in the order of their images."""
    group = list(itertools.permutations(range(ELEMENTS)))
    number = {element: index for index, element in enumerate(group)}
    return np.array([[number[tuple(b[i] for i in a)] for a in group] for b in group])


def _permutations(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    products = _products()
    tokens, labels, state = draw.integers(0, len(products), length), np.empty(length, np.int64), 0
    for place, element in enumerate(tokens):
        state = labels[place] = products[element, state]
    return tokens, labels


def _swaps(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """The objects are tokens 0 .. n - 1; token n + i (n - 1) + j swaps place i with the j-th of the others."""
    count = task.items
    standing = draw.order(count)
    swaps = draw.integers(0, count * (count - 1), length - count)
    tokens = np.concatenate([standing, count + swaps])
    labels = np.full(length, IGNORED)
    for place, (first, other) in enumerate(zip(*np.divmod(swaps, count - 1), strict=True), start=count):
        second = other + (other >= first)
        standing[[first, second]] = standing[[second, first]]
        labels[place] = standing[first]
    return tokens, labels


def _regression(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Two pairs with different x decide a and b; x is drawn without repetition while there are other values."""
    prime = _prime(task)
    a, b = int(draw.integers(1, prime, 1)[0]), int(draw.integers(0, prime, 1)[0])
    x = np.concatenate([draw.order(prime) for _ in range(-(-length // (2 * prime)))])[: -(-length // 2)]
    y = (a * x + b) % prime
    tokens, labels = np.stack([x, y], axis=1).reshape(-1)[:length], np.full(length, IGNORED)
    labels[4::2] = y[2:]
    return tokens, labels


def _needle(task: TaskSpec, length: int, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Token 0 marks a key: [0, key, value] in filler, [0, key] at the end. Keys are the first quarter of the
    vocabulary, values the second, filler the rest. More items are other keys with values of their own.
    """
    quarter, half = task.vocab_size // 4, task.vocab_size // 2
    keys, values = draw.distinct(1, quarter, task.items), draw.distinct(quarter, half, task.items)
    tokens, labels = draw.integers(half, task.vocab_size, length), np.full(length, IGNORED)
    gaps = np.sort(draw.order(length - 2 - 3 * task.items + 1)[: task.items])  # between the filler's tokens
    for place, key, value in zip(gaps + 3 * np.arange(task.items), keys, values, strict=True):
        tokens[place : place + 3] = 0, key, value
    asked = int(draw.integers(0, task.items, 1)[0])
    tokens[-2:] = 0, keys[asked]
    labels[-1] = values[asked]
    return tokens, labels


def _prime(task: TaskSpec) -> int:
    """The largest prime that the vocabulary has numbers for."""
    return next(n for n in range(task.vocab_size, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


class _Task(NamedTuple):
    """make: tokens and labels of a row. needs: its least length. entries: of the vocabulary. answers: as likely."""

    make: Callable[[TaskSpec, int, Draw], tuple[np.ndarray, np.ndarray]]
    needs: Callable[[TaskSpec], int]
    entries: Callable[[TaskSpec], int]
    answers: Callable[[TaskSpec], int]


_ORDER = math.factorial(ELEMENTS)
_TASKS = {
    "recall": _Task(
        _recall,
        needs=lambda task: 3 * task.items,
        entries=lambda task: 2 * (task.items + 1),
        answers=lambda task: task.vocab_size - task.vocab_size // 2,
    ),
    "copy": _Task(
        _copy,
        needs=lambda task: 3,
        entries=lambda task: 3,
        answers=lambda task: task.vocab_size - 2,
    ),
    "selective": _Task(
        _selective,
        needs=lambda task: 2 * task.items,
        entries=lambda task: 3,
        answers=lambda task: task.vocab_size - 2,
    ),
    "permutations": _Task(
        _permutations,
        needs=lambda task: 1,
        entries=lambda task: _ORDER,
        answers=lambda task: _ORDER,
    ),
    "swaps": _Task(
        _swaps,
        needs=lambda task: task.items + 1,
        entries=lambda task: task.items**2,
        answers=lambda task: task.items,
    ),
    "regression": _Task(
        _regression,
        needs=lambda task: 5,
        entries=lambda task: 3,
        answers=_prime,
    ),
    "needle": _Task(
        _needle,
        needs=lambda task: 4 * task.items + 1,
        entries=lambda task: 4 * (task.items + 1),
        answers=lambda task: task.vocab_size // 2 - task.vocab_size // 4,
    ),
}
