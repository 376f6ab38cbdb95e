"""How the queries of a piece are cut into blocks, and which tokens and cores each block reads: host arithmetic.

Blocks begin where a query starts to see one more core, so that all blocks of a kind have the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from farspan.kernels.blocks import hidden_mask
from farspan.kernels.cca.pieces import Piece, cores_seen

# Queries that read their tokens together: few, for each of them reads as many tokens too many, but enough for fast
# products.
QUERIES = 160
# Tokens of a block are a multiple of this where its document has as many: rows of scores begin at cache lines.
LINE = 16
# Queries that read their cores together: fewer of them would be read by all but a few, with a mask for these alone.
CORE_QUERIES = 1024
# Cores that all queries of a block see are read apart from those that some see, without a mask, where they are as many.
MANY_CORES = 128


class TokenBlock(NamedTuple):
    """Rows of q; rows of the keys that one of them sees, one by one; and masks for some of these keys' columns."""

    queries: slice
    keys: slice
    edges: tuple[tuple[slice, torch.Tensor], ...]


class CoreBlock(NamedTuple):
    """Rows of q, rows of cores, and an additive mask [queries, cores]; None where every query sees all of them. Each
    query sees at least one.
    """

    queries: slice
    cores: slice
    mask: torch.Tensor | None


def token_blocks(pieces: list[int], group: int, window: int, share: int, like: torch.Tensor) -> Iterator[TokenBlock]:
    """Every query of all pieces, given as their numbers one after the other, with the tokens that it sees.

    share: query heads of a key head; the more, the fewer queries make up a block. like: of the masks' dtype and device.
    """
    step, place = _steps(max(16, QUERIES // share), group), (like.dtype, like.device)
    for piece, row in _with_rows(pieces):
        before = piece.key + piece.prefix - piece.offset  # from positions to rows of k
        for start, stop in _cuts(piece.offset, piece.offset + piece.length, step, group + window - 1):
            begin, edges = group * cores_seen(start, group, window), []
            come_in = cores_seen(stop - 1, group, window) - begin // group
            hidden = min(-(stop - begin) % LINE, begin + before - piece.key)
            if come_in or hidden:
                phase = start + 1 - window - begin  # below 0 where the first query sees no core yet
                mask = _pooled_tokens(phase, stop - start, group, hidden, *place)
                edges.append((slice(0, hidden + group * come_in), mask))
            begin -= hidden
            if stop - start > 1:
                edges.append((slice(start - begin, stop - begin), _future_tokens(stop - start, *place)))
            yield TokenBlock(slice(row + start, row + stop), slice(before + begin, before + stop), tuple(edges))


def core_blocks(pieces: list[int], group: int, window: int, like: torch.Tensor) -> Iterator[CoreBlock]:
    """Every query that sees cores, with each of them once."""
    origin = group + window - 1  # the first position that sees a core
    step = _steps(CORE_QUERIES, group)
    for piece, row in _with_rows(pieces):
        for start, stop in _cuts(max(piece.offset, origin), piece.offset + piece.length, step, origin):
            queries = slice(row + start, row + stop)
            first, last = cores_seen(start, group, window), cores_seen(stop - 1, group, window)
            apart, mask = 0, None
            if first < last:
                apart = first - 1 if first > MANY_CORES else 0
                phase = start + 1 - window - group * first
                mask = _unseen_cores(phase, stop - start, group, first - apart, like.dtype, like.device)
            if apart:
                yield CoreBlock(queries, slice(piece.core, piece.core + apart), None)
            yield CoreBlock(queries, slice(piece.core + apart, piece.core + last), mask)


def _with_rows(pieces: list[int]) -> Iterator[tuple[Piece, int]]:
    """The pieces, each with what makes of its positions rows of q."""
    rows = 0
    for numbers in zip(*[iter(pieces)] * len(Piece._fields), strict=True):
        piece = Piece(*numbers)
        yield piece, rows - piece.offset
        rows += piece.length


def _cuts(start: int, end: int, step: int, origin: int) -> Iterator[tuple[int, int]]:
    """Positions start .. end - 1 in blocks of `step`, of which one begins at `origin`."""
    while start < end:
        stop = min(end, start + step - (start - origin) % step)
        yield start, stop
        start = stop


def _steps(queries: int, group: int) -> int:
    """About so many queries, a multiple of the group unless the group is far larger."""
    return queries if group > 2 * queries else group * max(1, round(queries / group))


@lru_cache(maxsize=16)
def _unseen_cores(
    phase: int, count: int, group: int, seen: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[count, seen + cores that come in]: query i sees the first seen + floor((phase + i) / group) of them."""
    cores = seen + (phase + torch.arange(count, device=device)).div(group, rounding_mode="floor")
    return hidden_mask(torch.arange(seen + (phase + count - 1) // group, device=device) >= cores[:, None], dtype)


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
