"""The tokens of MAC: what is known of them beforehand, and documents cut at the ends of their segments, taken in turn:
the first open segment of each, then the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

Rope = tuple[torch.Tensor, torch.Tensor] | None
Pair = tuple[torch.Tensor, torch.Tensor]


class Row(NamedTuple):
    """What is known of every token before the segments are taken in turn.

    x: [T, width]. asked: [T, H, D], queries for h, of unit norm. opened: [T, H, D], the gate of h. q, k, v: [T, H, D],
    of the attention, rotated. rope: cos and sin by index in the segment, [T, 1, pairs], or None. persistent: keys and
    values [P, H, D], or None.
    """

    x: torch.Tensor
    asked: torch.Tensor
    opened: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rope: Rope
    persistent: Pair | None

    def rows(self, rows: slice) -> Row:
        """The same of some of the tokens."""
        rope = None if self.rope is None else tuple(x[rows] for x in self.rope)
        return Row(*(x[rows] for x in self[:6]), rope, self.persistent)

    def split(self, order: torch.Tensor | None, sizes: list[int]) -> Iterator[Row]:
        """The tokens in the given order, int64 [T] (as they are: None), in runs of these sizes.

        Split at once: the backward pass of every narrowing by itself would write a gradient as long as the row.
        """
        tensors = [*self[:6], *(self.rope or ())]
        if order is not None:
            tensors = [x.index_select(0, order) for x in tensors]
        for parts in zip(*(x.split(sizes) for x in tensors), strict=True):
            yield Row(*parts[:6], parts[6:] or None, self.persistent)


@dataclass(frozen=True)
class Turn:
    """One segment, or the part of one that is here, of each of some documents.

    documents: their numbers. starts: their first tokens in the row. lengths: tokens of each. phases: tokens of the
    segment that came before. later: whether the segment has another one before it.
    """

    documents: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    phases: tuple[int, ...]
    later: tuple[bool, ...]
    device: torch.device

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def reach(self) -> int:
        """Slots of the segment that any of them has filled by now."""
        return max(phase + length for phase, length in zip(self.phases, self.lengths, strict=True))

    @cached_property
    def rows(self) -> torch.Tensor:
        """int64 [n]: the tokens of the row, document after document."""
        runs = zip(self.starts, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + length) for start, length in runs]).to(self.device)

    @cached_property
    def _padded(self) -> torch.Tensor:
        """int64 [documents * longest]: which of the n tokens each slot shows; a document's last one at padding."""
        slots, found, first = torch.arange(self.longest), [], 0
        for length in self.lengths:
            found.append(first + slots.clamp(max=length - 1))
            first += length
        return torch.cat(found).to(self.device)

    @cached_property
    def _valid(self) -> torch.Tensor:
        """int64 [n]: the slots that are no padding."""
        numbered = enumerate(self.lengths)
        return torch.cat([i * self.longest + torch.arange(length) for i, length in numbered]).to(self.device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] -> [documents, longest, ...]."""
        if len(set(self.lengths)) > 1:
            x = x.index_select(0, self._padded)
        return x.unflatten(0, (len(self.documents), -1))

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """Inverts `pad`."""
        x = x.flatten(0, 1)
        return x if len(set(self.lengths)) == 1 else x.index_select(0, self._valid)

    @cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and slot of the segment of each of the n tokens, int64 [n]."""
        lengths = torch.tensor(self.lengths)
        own = torch.arange(len(lengths)).repeat_interleave(lengths)
        runs = zip(self.phases, self.lengths, strict=True)
        slots = torch.cat([torch.arange(phase, phase + length) for phase, length in runs])
        return own.to(self.device), slots.to(self.device)

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [documents, longest]: where in its segment each (padded) token is."""
        phases = torch.tensor(self.phases)[:, None]
        return (phases + torch.arange(self.longest)).to(self.device)


def turns(lengths: tuple[int, ...], offsets: tuple[int, ...], segment: int, device: torch.device) -> Iterator[Turn]:
    """The segments of documents of `lengths`, `offsets` tokens of which came earlier."""
    state, first = [], 0
    for number, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        state.append((number, first, length, offset))
        first += length
    while state:
        sizes = [min(length, segment - offset % segment) for _, _, length, offset in state]
        yield Turn(
            documents=tuple(number for number, *_ in state),
            starts=tuple(start for _, start, *_ in state),
            lengths=tuple(sizes),
            phases=tuple(offset % segment for *_, offset in state),
            later=tuple(offset >= segment for *_, offset in state),
            device=device,
        )
        state = [
            (number, start + size, length - size, offset + size)
            for (number, start, length, offset), size in zip(state, sizes, strict=True)
            if length > size
        ]
