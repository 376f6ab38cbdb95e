"""How packed documents map to the programs of the fused kernels: host tables, built once per step.

A tile holds consecutive tokens of one document, as many as fit of whole refreshes. Documents go in groups, of which the
device carries the states at once, and a group's tiles in spans: between two spans the forward pass keeps the states,
and the backward pass computes a span again from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

# Numbers of state that a group carries, and that the tiles of a span begin with, at most (where one tile has less).
CARRIED, BOUNDARIES = 1 << 23, 1 << 27

# Tiles of a document in a span where the numbers allow it: enough programs for any device.
SPAN = 64


@dataclass(frozen=True, eq=False)
class Span:
    """table: int64 [3, tiles]: first token, tokens, tokens before the last refresh of each tile, those of a document
    together; sequences: int64 [2, documents]: first tile, and tiles, of each document that reaches into the span.
    """

    table: torch.Tensor
    sequences: torch.Tensor

    @property
    def tiles(self) -> int:
        return self.table.shape[1]

    @property
    def documents(self) -> int:
        return self.sequences.shape[1]


@dataclass(frozen=True, eq=False)
class Group:
    """documents: their indices, longest first, so that those of a span are the first ones."""

    documents: tuple[int, ...]
    spans: tuple[Span, ...]

    @cached_property
    def index(self) -> torch.Tensor:
        return torch.tensor(self.documents, device=self.spans[0].table.device)

    def start(self, state: torch.Tensor) -> torch.Tensor:
        """A copy of the group's part of a state [documents or 1, H, ...]."""
        if len(state) == 1:
            return state.repeat(len(self.documents), *[1] * (state.ndim - 1))
        return state.index_select(0, self.index)

    @property
    def boundaries(self) -> int:
        """States kept: of every document that goes on at each span but the first."""
        return sum(span.documents for span in self.spans[1:])


@lru_cache(maxsize=64)
def make_plan(
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    tile: int,
    refresh: int,
    state_size: int,
    device: torch.device,
) -> tuple[Group, ...]:
    """Groups of the documents that have tokens.

    starts, lengths: of each document in the row; tile: tokens of a tile, a multiple of refresh; state_size: numbers of
    one document's state.
    """
    order = sorted((d for d, length in enumerate(lengths) if length), key=lambda d: -lengths[d])
    size = max(1, CARRIED // state_size)
    groups = (tuple(order[first : first + size]) for first in range(0, len(order), size))
    return tuple(Group(g, tuple(_spans(g, starts, lengths, tile, refresh, state_size, device))) for g in groups)


def _spans(documents, starts, lengths, tile, refresh, state_size, device) -> Iterator[Span]:
    steps = -(-lengths[documents[0]] // tile)
    # the states that are kept and those of a span both grow with the root of the steps
    size = max(math.isqrt(steps - 1) + 1, min(SPAN, BOUNDARIES // (len(documents) * state_size)))
    for first in range(0, steps, size):
        tokens, sequences = [], []
        for d in documents:
            begin, end = first * tile, min((first + size) * tile, lengths[d])
            if begin < end:
                own = range(begin, end, tile)
                sequences.append((len(tokens), len(own)))
                tokens += [(starts[d] + t, min(tile, end - t)) for t in own]
        table = [(start, count, count // refresh * refresh) for start, count in tokens]
        columns = (torch.tensor(rows).T.contiguous().to(device) for rows in (table, sequences))
        yield Span(*columns)


def ending_gradient(dfinal: torch.Tensor | None, state: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The gradient of the initial state [documents or 1, H, ...] from documents that have no tokens."""
    dstate = torch.zeros_like(state, memory_format=torch.contiguous_format)
    idle = [d for d, length in enumerate(lengths) if not length]
    if dfinal is not None and idle:
        own = dfinal[idle]
        if len(state) == 1:
            dstate += own.sum(0, keepdim=True)
        else:
            dstate[idle] = own
    return dstate


def return_gradient(group: Group, carried: torch.Tensor, dstate: torch.Tensor) -> None:
    """Add the gradient of the documents' initial states to dstate [documents or 1, H, ...]."""
    if len(dstate) == 1:
        dstate += carried.sum(0, keepdim=True)
    else:
        dstate.index_copy_(0, group.index, carried)
