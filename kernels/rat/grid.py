"""Documents of any length laid out on a grid of whole chunks.

Row c of the grid is one chunk of one document, slot l its l-th token. A document that continues a state in the middle
of a chunk leaves the first slots of its first row empty, one that ends inside a chunk the last slots of its last row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

# Tokens of an elementwise pass at a time: a few of its tensors fit a CPU's cache.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Document:
    """Where one document lies: rows `first .. first + rows` of the grid, of which `finished` end in this call; `before`
    chunks of it were finished earlier, `skipped` tokens of its first row came earlier.
    """

    first: int
    rows: int
    finished: int
    before: int
    skipped: int


@dataclass(frozen=True)
class Grid:
    """The grid of documents of `lengths` tokens, of which `offsets` tokens came earlier, in chunks of `chunk`."""

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    chunk: int
    device: torch.device

    @cached_property
    def documents(self) -> tuple[Document, ...]:
        found, first = [], 0
        for length, offset in zip(self.lengths, self.offsets, strict=True):
            before, skipped = divmod(offset, self.chunk)
            rows = -(-(skipped + length) // self.chunk)
            found.append(Document(first, rows, (skipped + length) // self.chunk, before, skipped))
            first += rows
        return tuple(found)

    @property
    def rows(self) -> int:
        last = self.documents[-1]
        return last.first + last.rows

    @cached_property
    def full(self) -> bool:
        """Whether every slot holds a token: then the grid is a view of the row."""
        return self.rows * self.chunk == sum(self.lengths)

    @cached_property
    def goes_on(self) -> torch.Tensor:
        """bool [documents]: whether the document's first row begins in the middle of a chunk."""
        return torch.tensor([document.skipped > 0 for document in self.documents], device=self.device)

    def blocks(self) -> Iterator[slice]:
        """Rows in runs of about `TOKENS_AT_ONCE` tokens."""
        size = max(1, TOKENS_AT_ONCE // self.chunk)
        return (slice(start, min(start + size, self.rows)) for start in range(0, self.rows, size))

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [tokens]: the slot of each token, counted through the grid."""
        starts = torch.tensor([document.first * self.chunk + document.skipped for document in self.documents])
        lengths = torch.tensor(self.lengths)
        shift = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return (torch.arange(sum(self.lengths)) + shift).to(self.device)

    @cached_property
    def chunk_index(self) -> torch.Tensor:
        """int64 [rows]: index of each row's chunk within its document."""
        return torch.cat([torch.arange(d.before, d.before + d.rows) for d in self.documents]).to(self.device)

    @cached_property
    def finished_rows(self) -> torch.Tensor:
        """int64: the rows whose last slot holds a token, document by document."""
        return torch.cat([torch.arange(d.first, d.first + d.finished) for d in self.documents]).to(self.device)

    @cached_property
    def first_rows(self) -> torch.Tensor:
        """int64 [documents]."""
        return torch.tensor([document.first for document in self.documents], device=self.device)

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """int64 [documents]."""
        return torch.tensor([document.first + document.rows - 1 for document in self.documents], device=self.device)

    def spread(self, x: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
        """[tokens, ...] -> [rows, chunk, ...], `empty` where no token is."""
        if not self.full:
            x = x.new_full((self.rows * self.chunk, *x.shape[1:]), empty).index_copy_(0, self.slots, x)
        return x.unflatten(0, (self.rows, self.chunk))

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, chunk, ...] -> [tokens, ...]."""
        x = x.flatten(0, 1)
        return x if self.full else x.index_select(0, self.slots)


@lru_cache(maxsize=16)
def make_grid(lengths: tuple[int, ...], offsets: tuple[int, ...], chunk: int, device: torch.device) -> Grid:
    """The grid of a step, made once and shared by all layers with this chunk size."""
    return Grid(lengths, offsets, chunk, device)
