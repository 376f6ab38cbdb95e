"""Documents side by side: step s of a group holds block s of every document in it that is long enough.

A group has its documents sorted by length, the longest first, so that those active at a step are the first ones. Rows
(one block of one document) are numbered step by step; the steps of a segment are what a pass works on at once, between
two states that the forward pass keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

# Numbers of state (weights and momentum) that a group of documents carries from block to block, at most.
STATE_AT_ONCE = 1 << 23


class Step(NamedTuple):
    """Rows `first .. first + active`; the first `writing` of them end at a refresh and write the state."""

    first: int
    active: int
    writing: int


class Segment:
    """Steps that are worked on at once; rows are counted from the segment's first.

    tokens: per row the places of its tokens in the row of all documents, at most block of them. ends: tokens of each
    row before its last refresh, or None where that is the whole block in every row that writes.
    places: int64 [rows * H * block], where each token of each head lies in a row of tokens and heads; some token of the
    row where none is, which `empty` [rows * H, block] tells (None where all are there).
    """

    def __init__(
        self,
        steps: tuple[Step, ...],
        tokens: list[range],
        block: int,
        ends: list[int] | None,
        heads: int,
        device: torch.device,
    ) -> None:
        self.steps, self.rows, self.heads = steps, len(tokens), heads
        self.ends = None if ends is None else torch.tensor(ends, device=device)
        self.padded = min(map(len, tokens)) < block
        first, count = torch.tensor([(t.start if t else 0, len(t)) for t in tokens], device=device)[..., None].unbind(1)
        slots = torch.arange(block, device=device)
        empty = (slots >= count)[:, None].expand(-1, heads, -1).reshape(self.rows * heads, block)
        places = (first + torch.minimum(slots, count - 1).clamp(min=0))[:, None] * heads
        self.places = (places + torch.arange(heads, device=device)[:, None]).flatten()
        self.empty = empty if self.padded else None

    def gather(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[1, T, H, ...] -> [rows * H, block, ...], zero where no token is."""
        out = x.flatten(0, 2).index_select(0, self.places).to(dtype).unflatten(0, (self.rows * self.heads, -1))
        if self.padded:
            out.masked_fill_(self.empty.view(*self.empty.shape, *[1] * (out.ndim - 2)), 0)
        return out

    def scatter(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Put x [rows * H, block, ...] where the tokens lie in out [1, T, H, ...]."""
        x, places = x.flatten(0, 1).to(out.dtype), self.places
        if self.padded:
            kept = (~self.empty).flatten().nonzero()[:, 0]
            x, places = x.index_select(0, kept), places.index_select(0, kept)
        out.view(-1, *out.shape[3:]).index_copy_(0, places, x)

    def heads_of(self, step: Step, count: int | None = None) -> slice:
        """The rows * H that step has in this segment: those of its first `count` documents."""
        first = (step.first - self.steps[0].first) * self.heads
        return slice(first, first + (step.active if count is None else count) * self.heads)

    def begin(self, state: torch.Tensor, states: torch.Tensor) -> None:
        """Put the state of the segment's start, [documents, H, ...], at the first step's rows of states [n, ...]."""
        states[self.heads_of(self.steps[0])] = state[: self.steps[0].active].flatten(0, 1)

    def target(self, index: int, state: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Where step `index` writes the state to: the rows of the next step, or `state` where a document ends."""
        if self._goes_on(index):
            return states[self.heads_of(self.steps[index + 1])]
        return state[: self.steps[index].writing].flatten(0, 1)

    def settle(self, index: int, state: torch.Tensor, states: torch.Tensor) -> None:
        """After the writes of a step: what ends with it into `state`, what goes on to the rows of the next step."""
        step = self.steps[index]
        if step.writing < step.active:
            kept = states[self.heads_of(step)].unflatten(0, (step.active, self.heads))
            state[step.writing : step.active] = kept[step.writing :]
        if index + 1 < len(self.steps) and not self._goes_on(index):
            after = self.steps[index + 1]
            states[self.heads_of(after)] = state[: after.active].flatten(0, 1)

    def _goes_on(self, index: int) -> bool:
        """Whether all documents that write at a step are there at the next one of the segment."""
        return index + 1 < len(self.steps) and self.steps[index + 1].active == self.steps[index].writing


@dataclass(frozen=True, eq=False)
class Group:
    """documents: their indices, longest first; segments, first to last."""

    documents: tuple[int, ...]
    segments: tuple[Segment, ...]

    @cached_property
    def index(self) -> torch.Tensor:
        return torch.tensor(self.documents, device=self.segments[0].places.device)

    @property
    def rows(self) -> int:
        """Rows of the longest segment."""
        return max(segment.rows for segment in self.segments)

    @property
    def kept(self) -> int:
        """States that the forward pass keeps: of the documents that segments but the first begin with."""
        return sum(segment.steps[0].active for segment in self.segments[1:])

    def start(self, state: torch.Tensor) -> torch.Tensor:
        """A copy of the documents' states out of state [documents or 1, H, ...]."""
        if len(state) == 1:
            return state.repeat(len(self.documents), *[1] * (state.ndim - 1))
        return state.index_select(0, self.index)

    def room(self, state: torch.Tensor) -> torch.Tensor:
        """Uninitialised [n, ...] for a state [documents, H, ...] at every row of a segment, and then of the next: fresh
        pages are slow to come by.
        """
        return state.new_empty(self.rows * state.shape[1], *state.shape[2:])


@lru_cache(maxsize=8)
def make_groups(
    starts: tuple[int, ...],
    lengths: tuple[int, ...],
    block: int,
    refresh: int,
    heads: int,
    state_size: int,
    keep_final: bool,
    device: torch.device,
) -> tuple[Group, ...]:
    """Groups of the documents that have tokens.

    starts, lengths: of each document in the row; block: tokens of a row, a multiple of refresh (less in groups of short
    documents); state_size: numbers of one document's state; keep_final: whether the state after a document's last whole
    refresh is wanted, so that its last row may have to write too.
    """
    groups = []
    for documents, size in _groups(lengths, block, refresh, max(1, STATE_AT_ONCE // state_size)):
        own = [lengths[d] for d in documents]
        steps, ends, row = [], [], 0
        for s in range(-(-own[0] // size)):
            left = [length - s * size for length in own if length > s * size]
            end = [min(n, size) // refresh * refresh for n in left]
            writing = sum(e > 0 and (keep_final or n > size) for e, n in zip(end, left, strict=True))
            steps.append(Step(row, len(left), writing))
            ends += [e if rank < writing else size for rank, e in enumerate(end)]
            row += len(left)
        groups.append(Group(documents, tuple(_segments(steps, ends, starts, lengths, documents, size, heads, device))))
    return tuple(groups)


def _groups(lengths, block: int, refresh: int, most: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Documents of similar length, at most `most` of them, and the tokens of their rows."""
    order = sorted((d for d, length in enumerate(lengths) if length), key=lambda d: -lengths[d])
    while order:
        longest = lengths[order[0]]
        size = min(block, -(-longest // refresh) * refresh) if longest >= refresh else longest
        count = next((i for i, d in enumerate(order[:most]) if 2 * lengths[d] <= size), len(order[:most]))
        yield tuple(order[:count]), size
        order = order[count:]


def segment_length(steps: int) -> int:
    """Steps between two kept states: what is kept and what is computed again both grow with the square root."""
    return math.isqrt(max(steps - 1, 0)) + 1


def _segments(steps, ends, starts, lengths, documents, block, heads, device) -> Iterator[Segment]:
    size = segment_length(len(steps))
    for first in range(0, len(steps), size):
        own, tokens = tuple(steps[first : first + size]), []
        for s, step in enumerate(own, first):
            for d in documents[: step.active]:
                tokens.append(range(starts[d] + s * block, starts[d] + min(lengths[d], (s + 1) * block)))
        end = ends[own[0].first : own[-1].first + own[-1].active]
        yield Segment(own, tokens, block, end if min(end) < block else None, heads, device)
