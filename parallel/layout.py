"""Which tokens of a row each rank holds: layouts as lists of segments, and the arithmetic on them.

A layout gives every rank an ordered list of segments `(start, length)` of the row. Everything that is said about a
shard (positions, pieces of documents, who holds a token) follows from that list, so contiguous and zigzag layouts are
the same code. All of it is host arithmetic, the same on every rank.

    contiguous   rank r holds [r n, (r + 1) n), n = tokens / ranks
    zigzag       the row is cut into 2 R parts; ring slot r holds parts r and 2 R - 1 - r, so that under a causal mask
                 all slots have the same work; the Ulysses ranks of a slot take equal consecutive runs of its tokens
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

LAYOUTS = ("contiguous", "zigzag")


class Segment(NamedTuple):
    """Tokens `start .. start + length` of the row."""

    start: int
    length: int


class Piece(NamedTuple):
    """What one segment holds of one document: `length` tokens from the document's token `offset` on, which are the
    row's tokens from `start` on and the rank's own from `local` on.
    """

    document: int
    offset: int
    start: int
    local: int
    length: int


@dataclass(frozen=True)
class Layout:
    """segments: for each rank the segments that it holds, in the order in which it holds them."""

    segments: tuple[tuple[Segment, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.segments)

    @cached_property
    def local(self) -> int:
        """Tokens of each rank, the same for all."""
        return sum(segment.length for segment in self.segments[0])

    @property
    def tokens(self) -> int:
        return self.local * self.ranks

    @cached_property
    def edges(self) -> list[int]:
        """Where segments begin, in order, 0 included; the row's end is not."""
        return sorted(segment.start for segments in self.segments for segment in segments)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 [tokens]: for the ranks' tokens laid end to end, which token of the row each one is."""
        parts = [torch.arange(s.start, s.start + s.length) for segments in self.segments for s in segments]
        return torch.cat(parts)

    @cached_property
    def place(self) -> torch.Tensor:
        """int64 [tokens]: where in the ranks' tokens laid end to end each token of the row is; inverts `order`."""
        return torch.empty_like(self.order).scatter_(0, self.order, torch.arange(self.tokens))

    @cached_property
    def is_ordered(self) -> bool:
        """Whether the ranks' tokens laid end to end are the row."""
        return [s.start for segments in self.segments for s in segments] == self.edges

    def own(self, rank: int) -> torch.Tensor:
        """int64 [local]: the tokens of one rank."""
        return self.order[rank * self.local : (rank + 1) * self.local]

    def pieces(self, rank: int, lengths: tuple[int, ...]) -> tuple[Piece, ...]:
        """The pieces of documents of `lengths` (which fill the row) that a rank holds, in the order of its tokens."""
        starts = _starts(lengths)
        found, local = [], 0
        for segment in self.segments[rank]:
            end = segment.start + segment.length
            document = bisect_right(starts, segment.start) - 1
            while document < len(lengths) and starts[document] < end:
                first = max(starts[document], segment.start)
                count = min(starts[document] + lengths[document], end) - first
                found.append(Piece(document, first - starts[document], first, local, count))
                local, document = local + count, document + 1
        return tuple(found)


@lru_cache(maxsize=8)  # its tables are as long as the row
def make_layout(kind: str, tokens: int, ring: int = 1, ulysses: int = 1) -> Layout:
    """The layout `kind` of `tokens` tokens over ring x Ulysses ranks, rank = ring slot * ulysses + Ulysses rank.

    Raises ValueError for an unknown kind, or tokens that do not divide (`multiple` says by what they must).
    """
    if kind not in LAYOUTS:
        raise ValueError(f"layout={kind!r} is not one of {', '.join(LAYOUTS)}")
    if tokens < 1 or tokens % multiple(kind, ring, ulysses):
        raise ValueError(
            f"{tokens} tokens do not divide over ring {ring} x ulysses {ulysses} in a {kind} layout; "
            f"pad them to a multiple of {multiple(kind, ring, ulysses)}"
        )
    slot = tokens // ring
    if kind == "contiguous" or ring == 1:
        slots = [[Segment(r * slot, slot)] for r in range(ring)]
    else:
        part = slot // 2
        slots = [[Segment(r * part, part), Segment((2 * ring - 1 - r) * part, part)] for r in range(ring)]
    return Layout(tuple(run for segments in slots for run in _cut(segments, slot // ulysses)))


def multiple(kind: str, ring: int, ulysses: int, grid: int = 1) -> int:
    """What the tokens of a row must be a multiple of, for every segment to be a multiple of `grid` tokens."""
    if kind == "contiguous" or ring == 1:
        return ring * ulysses * grid
    return ring * math.lcm(2, ulysses) * grid


def place_documents(lengths: tuple[int, ...], edges: list[int], grid: int) -> tuple[tuple[int, ...], int]:
    """First tokens of documents laid one after the other, and the end of the last one.

    A document that an edge cuts starts at a multiple of `grid`: as edges are multiples of it too, no chunk of `grid`
    tokens, counted from the document's start, is cut. All others follow each other without a gap.
    """
    starts, cursor = [], 0
    for length in lengths:
        start = cursor
        if start % grid:
            following = bisect_right(edges, start)
            if following < len(edges) and edges[following] < start + length:
                start += -start % grid
        starts.append(start)
        cursor = start + length
    return tuple(starts), cursor


def padding(starts: tuple[int, ...], lengths: tuple[int, ...], layout: Layout) -> list[Segment]:
    """The gaps that `place_documents` left and the rest of the row, cut at the edges."""
    ends = [0, *(start + length for start, length in zip(starts, lengths, strict=True))]
    gaps = zip(ends, [*starts, layout.tokens], strict=True)
    found = []
    for begin, end in gaps:
        inner = layout.edges[bisect_right(layout.edges, begin) : bisect_left(layout.edges, end)]
        found += [Segment(a, b - a) for a, b in pairwise([begin, *inner, end]) if b > a]
    return found


def _cut(segments: list[Segment], size: int) -> list[tuple[Segment, ...]]:
    """The tokens of `segments` in consecutive runs of `size`."""
    runs, run, room = [], [], size
    for start, length in segments:
        while length:
            taken = min(length, room)
            run.append(Segment(start, taken))
            start, length, room = start + taken, length - taken, room - taken
            if not room:
                runs.append(tuple(run))
                run, room = [], size
    return runs


def _starts(lengths: tuple[int, ...]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
