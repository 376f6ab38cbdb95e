"""Blocks of queries with the keys that they see, and their scores: what both passes of the chunked form share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from farspan.kernels.blocks import hidden_mask
from farspan.kernels.relative.spans import Span, unflat
from farspan.kernels.workspace import LOG2E, Workspace, with_column

# Queries of a block, and scores that it holds at once: a few MB of fp32, which stay in the cache.
ROWS = 128
SCORES = 1024 * 1024
HEADS_AT_ONCE = 8


@dataclass(frozen=True)
class Block:
    """rows: its queries. keys: all that one of them sees. far: of these the first ones, which to every row are at the
    table's last distance or beyond. table_rows: of the table in which distances run backwards. edges: (columns,
    additive mask [rows, columns]) where some row does not see a key. positions: of the keys in their document.
    """

    rows: slice
    keys: slice
    far: int
    table_rows: slice
    edges: tuple[tuple[slice, torch.Tensor], ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.keys.stop - self.keys.start


class Call:
    """Operands of one call by head, [heads, rows, channels], in the accumulation dtype, queries scaled.

    queries: [H, T, D], with sinusoids [H, T, D + R]. keys: [Hk, S, the same]. values: [Hk, S, D]. asked, table:
    [H, T, R + 1] and [H, distances, R + 1], the distances running backwards; None with sinusoids. Given an lse, the
    queries, keys and values have a column more, by which scores come out less lse and gradients less delta.
    """

    def __init__(self, a, p, k, v, table, beta, spans, window, scale, lse=None) -> None:
        self.spans, self.window = unflat(spans), window
        wide = torch.promote_types(a.dtype, torch.float32)
        a, p, k, v = (x[0].transpose(0, 1).to(wide) for x in (a, p, k, v))
        self.heads, self.key_heads, factor = len(a), len(k), scale * LOG2E
        self.asked = self.table = None
        if beta is None:
            a, k = torch.cat([a, p], dim=-1), torch.cat([k, self._positions(k, table.to(wide))], dim=-1)
        else:
            self.distances = table.shape[1]
            farthest = max((span.base + span.length for span in self.spans), default=1) - 1
            self.farthest = min(farthest, self.distances + ROWS - 2)
            index = torch.arange(self.farthest, -ROWS, -1, device=a.device).clamp_(0, self.distances - 1)
            self.asked = with_column(p * factor, factor)
            self.table = torch.cat([table.to(wide), beta[..., None].to(wide)], dim=-1).index_select(1, index)
        self.width = a.shape[2]
        if lse is None:
            self.queries, self.keys, self.values = a * factor, k, v
        else:
            self.queries, self.keys, self.values = (
                with_column(a * factor, lse * -LOG2E), with_column(k, 1.0), with_column(v, 1.0)
            )  # fmt: skip
        self.work = Workspace(self.queries)

    def _positions(self, k: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The rows of the table [P, R] at the keys' positions, [Hk, S, R]; the same for all heads."""
        found = k.new_zeros(k.shape[1], table.shape[1])
        for span in self.spans:
            first = span.key_position
            found[span.key : span.key + span.keys] = table[first : first + span.keys]
        return found.expand(len(k), -1, -1)

    def blocks(self) -> Iterator[tuple[Block, slice]]:
        """(block, query heads), until every query was in one."""
        share = self.heads // self.key_heads
        for span in self.spans:
            for start in range(0, span.length, ROWS):
                block = self._block(span, start, min(start + ROWS, span.length))
                most = min(HEADS_AT_ONCE, SCORES // math.prod(block.shape))
                step = share * max(1, most // share)
                for head in range(0, self.heads, step):
                    yield block, slice(head, min(head + step, self.heads))

    def _block(self, span: Span, start: int, end: int) -> Block:
        """Rows start .. end of a span."""
        near, last = span.base + start, span.base + end - 1  # of the first and the last row: distance from key 0
        stop = min(span.keys, last + 1)
        first = 0 if self.window is None else min(stop, max(0, near - self.window + 1))
        far = 0 if self.table is None else min(stop, max(first, near - self.distances + 1)) - first
        table_rows = slice(0, 0)
        if self.table is not None:
            top = self.farthest - (last - first - far)
            table_rows = slice(top, top + stop - first - far + end - start - 1)
        rows = slice(span.query + start, span.query + end)
        return Block(
            rows, slice(span.key + first, span.key + stop), far, table_rows, self._edges(near, last, first, stop)
        )

    def _edges(self, near: int, last: int, first: int, stop: int) -> tuple[tuple[slice, torch.Tensor], ...]:
        """Masks over the keys that the first row does not see yet, and those that the last one no longer sees."""
        device, found = self.queries.device, []
        at = torch.arange(near, last + 1, device=device)[:, None]
        left = first if self.window is None else min(stop, max(first, last - self.window + 1))
        for begin, end in ((first, left), (max(left, near + 1), stop)):
            if begin < end:
                key = torch.arange(begin, end, device=device)
                hidden = key > at
                if self.window is not None:
                    hidden |= key <= at - self.window
                found.append((slice(begin - first, end - first), hidden_mask(hidden, self.queries.dtype)))
        return tuple(found)

    def scores(self, block: Block, heads: slice) -> torch.Tensor:
        """[few, rows, keys], in base 2, -inf where hidden; given an lse less that."""
        count = heads.stop - heads.start
        buffer = self.work.get("scores", count, *block.shape)
        keys = self.of(self.keys, heads)[:, block.keys]
        torch.bmm(self.per_key_head(self.queries[heads, block.rows]), keys.mT, out=self.per_key_head(buffer))
        if self.table is not None:
            table = self.table[heads, block.table_rows]
            wide = self.work.get("positions", count, block.shape[0], table.shape[1])
            torch.bmm(self.asked[heads, block.rows], table.mT, out=wide)
            buffer[..., block.far :].add_(skewed(wide, block))
            if block.far:
                buffer[..., : block.far].add_(wide[..., :1])
        for columns, mask in block.edges:
            buffer[..., columns].add_(mask)
        return buffer

    def by_distance(self, block: Block, ds: torch.Tensor) -> torch.Tensor:
        """Gradients of scores [few, rows, keys] brought to the distances of `block.table_rows`."""
        wide = self.work.get("positions", *ds.shape[:2], block.table_rows.stop - block.table_rows.start).zero_()
        skewed(wide, block).copy_(ds[..., block.far :])
        if block.far:
            wide[..., 0].add_(ds[..., : block.far].sum(-1))
        return wide

    def fold(self, dtable: torch.Tensor) -> torch.Tensor:
        """The gradient of `table` as one of the table's own distances 0 .. L - 1: [H, L, R + 1]."""
        return fold(dtable[:, : dtable.shape[1] - ROWS + 1].flip(1), self.distances)

    def of(self, x: torch.Tensor, heads: slice) -> torch.Tensor:
        """Of keys or values [Hk, S, C], those that the query heads read."""
        share = self.heads // self.key_heads
        return x[heads.start // share : heads.stop // share]

    def per_key_head(self, x: torch.Tensor) -> torch.Tensor:
        """[few, m, C] -> [few / share, share m, C]: the rows of query heads that share a key head, one matrix."""
        return x.reshape(len(x) * self.key_heads // self.heads, -1, x.shape[-1])


def fold(found: torch.Tensor, distances: int) -> torch.Tensor:
    """Gradients [H, n, ...] of the distances 0 .. n - 1 as those of a table's rows, [H, distances, ...], whose last row
    is also that of larger distances.
    """
    kept = min(found.shape[1], distances)
    folded = found.new_zeros(len(found), distances, *found.shape[2:])
    folded[:, :kept] = found[:, :kept]
    folded[:, -1] += found[:, distances:].sum(1)
    return folded


def skewed(wide: torch.Tensor, block: Block) -> torch.Tensor:
    """The view [few, rows, keys - far] of wide [few, rows, W] in which row m begins rows - 1 - m elements later."""
    few, rows, width = wide.shape
    strides = (rows * width, width - 1, 1)
    return wide.as_strided((few, rows, width - rows + 1), strides, wide.storage_offset() + rows - 1)
