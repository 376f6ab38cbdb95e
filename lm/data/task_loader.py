"""Rows of a synthetic task in the form of the loader's batches: made when they are asked for, the same on any ranks."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from farspan.lm.data.loader import Batch, Loader, pack_rows
from farspan.lm.data.rows import IGNORED, Row
from farspan.lm.data.spec import TaskSpec
from farspan.lm.data.tasks import Examples, check_task, examples

TRAINING, VALIDATION = 0, 1  # second numbers of the seeds of rows


class TaskLoader(Loader):
    """The loader of a task: row r of the run is example r of the training seed, a document of its own.

    Raises ValueError where rows of `sequence_length` tokens cannot hold the task.
    """

    def __init__(self, task: TaskSpec, sequence_length: int, rows: int, seed: int):
        check_task(task, sequence_length)
        self.rows = rows
        self._make = lru_cache(maxsize=4 * rows)(
            lambda row: as_rows(examples(task, sequence_length, (seed, TRAINING), row, 1))[0]
        )

    def valid_tokens(self, step: int) -> int:
        return self.rows * self._row(0).valid_tokens  # all rows of a task ask equally often

    def epoch(self, step: int) -> float:
        return 0.0  # no row is ever repeated

    def _row(self, row: int) -> Row:
        return self._make(row)


def task_batches(task: TaskSpec, sequence_length: int, rows: int, seed: int, count: int) -> list[Batch]:
    """`count` rows that training never sees, in batches of `rows`."""
    held_out = as_rows(examples(task, sequence_length, (seed, VALIDATION), 0, count))
    return [pack_rows(held_out[first : first + rows]) for first in range(0, count, rows)]


def as_rows(made: Examples) -> list[Row]:
    """Each example as a row of one document."""
    rows = []
    for tokens, labels in zip(made.tokens, made.labels, strict=True):
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        valid = int((labels != IGNORED).sum())
        rows.append(Row(tokens, labels, np.array([len(tokens)]), digest, valid))
    return rows
