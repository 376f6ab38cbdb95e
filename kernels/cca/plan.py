"""How the queries of a piece are cut into blocks, and which cores and tokens each block reads: host arithmetic.

Blocks begin where a query starts to see one more core, so that all blocks of a kind have the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from farspan.kernels.blocks import hidden_mask
from farspan.kernels.cca.pieces import Piece, cores_seen

# Queries of a block: few, for each of them reads as many tokens too many, but enough for fast products.
QUERIES = 128
# Keys of a block are a multiple of this where its document has as many: rows of scores begin at cache lines.
LINE = 16
# Queries that read the cores which all of them see together, where those are many.
FAR_QUERIES, FAR_CORES = 1024, 128


class Keys(NamedTuple):
    """Rows of the keys (or cores) of which one of a block's queries sees each, and masks for some of their columns."""

    rows: slice
    edges: tuple[tuple[slice, torch.Tensor], ...]

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start


class Far(NamedTuple):
    """Rows of q, and rows of cores that every one of these queries sees."""

    queries: slice
    cores: slice


class Block(NamedTuple):
    """Rows of q, and the tokens and cores that they see but for those of `far_blocks`; None where that is nothing."""

    queries: slice
    tokens: Keys | None
    cores: Keys | None


def blocks(pieces: list[int], group: int, window: int, parts: str, share: int, like: torch.Tensor) -> Iterator[Block]:
    """The blocks of all pieces, given as their numbers one after the other: every query that sees anything is in one.

    share: query heads of a key head; the more, the fewer queries make up a block. like: of the masks' dtype and device.
    """
    step = _steps(max(16, QUERIES // share), group)
    origin = group + window - 1  # the first position that sees a core
    place, query = (like.dtype, like.device), 0
    for numbers in zip(*[iter(pieces)] * len(Piece._fields), strict=True):
        piece = Piece(*numbers)
        start, end = piece.offset, piece.offset + piece.length
        if parts == "cores":
            start = max(start, origin)
        while start < end:
            stop = min(end, _following(start, step, origin))
            tokens = None if parts == "cores" else _tokens(piece, start, stop, group, window, *place)
            cores = None
            if parts != "raw" and stop > origin:
                far = _far_cores(start, step, group, window, parts)
                cores = _cores(piece, start, stop, far, group, window, *place)
            shift = query - piece.offset
            yield Block(slice(start + shift, stop + shift), tokens, cores)
            start = stop
        query += piece.length


def far_blocks(pieces: list[int], group: int, window: int, parts: str, share: int) -> Iterator[Far]:
    """What `blocks` leaves out: cores that all of a thousand queries see, which need no mask."""
    step = _steps(max(16, QUERIES // share), group)
    origin, size, query = group + window - 1, _far_queries(step), 0
    for numbers in zip(*[iter(pieces)] * len(Piece._fields), strict=True):
        piece = Piece(*numbers)
        start, end, shift = max(piece.offset, origin), piece.offset + piece.length, query - piece.offset
        while start < end:
            stop = min(end, _following(start, size, origin))
            if cores := _far_cores(start, step, group, window, parts):
                yield Far(slice(start + shift, stop + shift), slice(piece.core, piece.core + cores))
            start = stop
        query += piece.length


def _far_queries(step: int) -> int:
    return step * max(1, round(FAR_QUERIES / step))


def _far_cores(position: int, step: int, group: int, window: int, parts: str) -> int:
    """How many cores the query at `position`, with the others of its thousand, reads apart from its block."""
    origin, size = group + window - 1, _far_queries(step)
    if parts != "both" or position < origin:
        return 0
    cores = cores_seen(position - (position - origin) % size, group, window)
    return cores if cores >= FAR_CORES else 0


def _steps(queries: int, group: int) -> int:
    """About so many queries, a multiple of the group unless the group is far larger."""
    return queries if group > 2 * queries else group * max(1, round(queries / group))


def _following(position: int, step: int, origin: int) -> int:
    """The next position at which a block of `step` queries begins; `origin` is one."""
    return position + step - (position - origin) % step


def _tokens(piece: Piece, start: int, stop: int, group: int, window: int, *place) -> Keys:
    """That the queries at positions start .. stop - 1 see one by one."""
    count, first = stop - start, cores_seen(start, group, window)
    come_in = cores_seen(stop - 1, group, window) - first
    begin, edges = group * first, []
    before = piece.key + piece.prefix - piece.offset  # from positions to rows of k
    hidden = min(-(stop - begin) % LINE, begin + before - piece.key)
    begin -= hidden
    if come_in or hidden:
        phase = start + 1 - window - group * first  # below 0 where the first query sees no core yet
        edges.append((slice(0, hidden + group * come_in), _pooled_tokens(phase, count, group, hidden, *place)))
    if count > 1:
        edges.append((slice(start - begin, stop - begin), _future_tokens(count, *place)))
    return Keys(slice(before + begin, before + stop), tuple(edges))


def _cores(piece: Piece, start: int, stop: int, far: int, group: int, window: int, *place) -> Keys | None:
    """That the same queries see, from core `far` on; those that come in after the first query are masked."""
    first, last = cores_seen(start, group, window), cores_seen(stop - 1, group, window)
    edges = []
    if first < last:
        phase = start + 1 - window - group * first
        edges.append((slice(first - far, last - far), _unseen_cores(phase, stop - start, group, *place)))
    return Keys(slice(piece.core + far, piece.core + last), tuple(edges)) if far < last else None


@lru_cache(maxsize=64)
def _unseen_cores(phase: int, count: int, group: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[count, cores that come in]: query i sees the first max(0, floor((phase + i) / group)) of them."""
    seen = (phase + torch.arange(count, device=device)).div(group, rounding_mode="floor").clamp(min=0)
    return hidden_mask(torch.arange((phase + count - 1) // group, device=device) >= seen[:, None], dtype)


@lru_cache(maxsize=64)
def _pooled_tokens(
    phase: int, count: int, group: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[count, hidden + tokens of the cores that come in]: query i does not see the first `hidden` tokens, and no longer
    those of max(0, floor((phase + i) / group)) cores.
    """
    cores = (phase + torch.arange(count, device=device)).div(group, rounding_mode="floor").clamp(min=0)
    tokens = torch.arange(-hidden, group * max(0, (phase + count - 1) // group), device=device)
    return hidden_mask(tokens < group * cores[:, None], dtype)


@lru_cache(maxsize=64)
def _future_tokens(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return hidden_mask(torch.ones(count, count, dtype=torch.bool, device=device).triu(1), dtype)
