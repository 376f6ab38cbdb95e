"""The map of interval attention: a softmax over the keys of a query's interval, 0 for all others.

A row whose interval is empty has mass 0. Mean distances are what the operator gives with positions for values.
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, first_tokens
from farspan.kernels.interval import Intervals
from farspan.kernels.interval.chunked import _forward, tile_size


class IntervalMap(EffectiveMap):
    """Whole documents, every row of which has one entry in the list of queries and one in that of keys."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, intervals: Intervals, documents: tuple[int, ...]) -> None:
        """q, k: [1, T, H, D], as `kernels.interval.interval_attention` takes them; scale D ** -0.5.

        Raises ValueError where rows have several entries: their mean has no single softmax.
        """
        rows = q.shape[1] * q.shape[2]
        if intervals.repeated or len(intervals.queries) != rows or len(intervals.keys) != rows:
            raise ValueError("lists in which a row has no entry or several have no attention statistics")
        wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k = (x[0].to(wide) for x in (q, k))
        self.intervals, self.documents = intervals, documents
        self.heads, self.device, self.scale = q.shape[2], q.device, q.shape[-1] ** -0.5
        self.lse: torch.Tensor | None = None

    def moments(self) -> Moments:
        lists, heads = self.intervals, self.heads
        position = torch.arange(self.tokens, device=self.device) - first_tokens(self.documents, self.device)
        position = position.to(self.q.dtype)
        values = self.q.new_zeros(self.q.shape)
        values[..., 0] = position[:, None]
        flat = (x.flatten(0, 1) for x in (self.q, self.k, values))
        orders, size = (None, None, None, None), tile_size(lists.length)
        places = lists.queries, lists.keys, lists.first, lists.last, lists.starts, lists.until
        o, lse = _forward(*flat, *places, *orders, self.scale, size)
        self.lse = _by_row(lse, lists.queries, heads)
        # entries in order of rows: [T, H]
        entries = torch.arange(len(lists.queries), device=self.device)
        self.first, self.last, self.entry = (
            _by_row(x, lists.queries, heads) for x in (lists.first, lists.last, entries)
        )
        self.key = _by_row(entries, lists.keys, heads)
        self.gone = None if lists.until is None else _by_row(lists.until, lists.keys, heads)
        mass = self.lse.isfinite().to(self.q.dtype)
        mean = o[:, 0].view(-1, heads)
        return Moments(((position[:, None] - mean) * mass).clamp(min=0), mass)

    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        scores = torch.einsum("rhd,khd->hrk", self.q[rows], self.k[keys]) * self.scale
        first, last, lse = (x[rows].t()[..., None] for x in (self.first, self.last, self.lse))
        place = self.key[keys].t()[:, None]
        hidden = (place < first) | (place >= last)
        if self.gone is not None:
            hidden |= self.entry[rows].t()[..., None] >= self.gone[keys].t()[:, None]
        return (scores - lse.masked_fill(lse.isinf(), 0.0)).masked_fill(hidden, float("-inf")).exp_()


def _by_row(x: torch.Tensor, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """x of the entries, whose rows are `rows`, as [T, H]."""
    return torch.empty_like(x).index_copy_(0, rows, x).view(-1, heads)
