"""Interval attention in tiles of queries, in linear memory, forward and backward, on any device.

A tile is a run of query entries of one segment. Its keys are the run of key entries from the first one's first to the
last one's last; tiles with runs of the same length (in whole tiles) are computed together, as batches of matrix
products that fit a cache. Rows are read through the lists as they are needed, a few tiles at a time; nothing is copied
whole.

    forward   o, lse per entry                      saved: q, k, v, o, lse
    backward  p = exp(s - lse), ds = p (do v' - sum(do o)) scale, dq = ds k, dk = ds' q, dv = p' do
              dk and dv are added up in the order of the list of keys, tile after tile

The length of a tile's run of keys is rounded up as if the tile were full. What comes later in a group then changes no
shape, and so no bit, of what came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from farspan.kernels.interval.entries import RowOrder, sum_rows
from farspan.kernels.interval.tiles import query_tiles

# Scores computed at a time: 2 MB in fp32, what fits a core's cache.
SCORES = 2**19


def interval_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals,
    scale: float,
    q_order: RowOrder | None = None,
    k_order: RowOrder | None = None,
) -> torch.Tensor:
    """Arguments and result as `kernels.interval.reference.interval_reference`."""
    lists = intervals.queries, intervals.keys, intervals.first, intervals.last, intervals.starts, intervals.until
    orders = (*(q_order or (None, None)), *(k_order or (None, None)))
    return _forward(q, k, v, *lists, *orders, scale, tile_size(intervals.length))[0]


def tile_size(length: int) -> int:
    """Queries of a tile, for segments of about `length` entries: a quarter of it, a power of two from 16 to 128."""
    return 1 << max(4, min(7, (length // 4).bit_length() - 1))


@torch.library.custom_op("farspan::interval_forward", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    starts: torch.Tensor,
    until: torch.Tensor | None,
    q_order: torch.Tensor | None,
    q_counts: torch.Tensor | None,
    k_order: torch.Tensor | None,
    k_counts: torch.Tensor | None,
    scale: float,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o, by row [R, D] or with orders by entry [Nq, D], and lse [Nq] (fp32, float64 for float64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = len(q) if q_order is None else len(queries)
    o, lse = q.new_zeros(rows + 1, q.shape[1]), q.new_empty(len(queries) + 1, dtype=wide)  # the last takes what is not
    places = queries if q_order is None else torch.arange(rows, device=q.device)
    for tile in _tiles(queries, keys, first, last, starts, until, size):
        z, _ = tile.scores(q, k, queries, keys, scale, wide)
        top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
        total = z.sub_(top).exp_().sum(-1, keepdim=True)
        part = torch.bmm(z, tile.keys_of(v, keys, wide)) / total.clamp(min=torch.finfo(wide).tiny)
        o.index_copy_(0, tile.destination(places, rows), part.flatten(0, 1).to(o.dtype))
        lse[tile.entries_or(len(queries))] = (top + total.log()).flatten()
    return o[:rows].clone(), lse[:-1].clone()


@_forward.register_fake
def _(q, k, v, queries, keys, first, last, starts, until, q_order, q_counts, k_order, k_counts, scale, size):
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.shape[0] if q_order is None else queries.shape[0]
    return q.new_empty(rows, q.shape[1]), q.new_empty(queries.shape[0], dtype=wide)


@torch.library.custom_op("farspan::interval_backward", mutates_args=())
def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    starts: torch.Tensor,
    until: torch.Tensor | None,
    q_order: torch.Tensor | None,
    q_counts: torch.Tensor | None,
    k_order: torch.Tensor | None,
    k_counts: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide, rows = lse.dtype, len(o)
    places = queries if q_order is None else torch.arange(rows, device=q.device)
    dq = q.new_zeros(rows + 1, q.shape[1], dtype=q.dtype if q_order is None else wide)
    tiles = list(_tiles(queries, keys, first, last, starts, until, size))
    longest = max((tile.span for tile in tiles), default=0)
    dk, dv = (x.new_zeros(len(keys) + longest, x.shape[1], dtype=wide) for x in (k, v))
    for tile in tiles:
        p, (queries_here, keys_here) = tile.scores(q, k, queries, keys, scale, wide)
        norm = lse[tile.entry].unsqueeze(-1)
        p.sub_(norm.masked_fill(norm.isneginf(), 0.0)).exp_()
        own = tile.clamped(places)
        grad = do[own].to(wide)
        delta = (grad * o[own]).sum(-1, keepdim=True)
        part_v = torch.bmm(p.transpose(1, 2), grad)
        ds = torch.bmm(grad, tile.keys_of(v, keys, wide).transpose(1, 2)).sub_(delta).mul_(p).mul_(scale)
        part_k = torch.bmm(ds.transpose(1, 2), queries_here)
        part_q = torch.bmm(ds, keys_here).flatten(0, 1)
        dq.index_copy_(0, tile.destination(places, rows), part_q.to(dq.dtype))
        for i, start in enumerate(tile.lows):
            dk[start : start + tile.span] += part_k[i]
            dv[start : start + tile.span] += part_v[i]
    if q_order is not None:
        dq = sum_rows(dq[:rows], q_order, q_counts).to(q.dtype)
        return dq, *(sum_rows(x[: len(keys)], k_order, k_counts).to(k.dtype) for x in (dk, dv))
    by_row = (torch.zeros_like(x).index_copy_(0, keys, dx[: len(keys)].to(x.dtype)) for x, dx in ((k, dk), (v, dv)))
    return dq[:rows].clone(), *by_row


@_backward.register_fake
def _(do, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, do, _):
    gradients = _backward(do.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.size)
    return *gradients, *(None for _ in range(12))


_forward.register_autograd(_gradients, setup_context=_save)


class _Tiles(NamedTuple):
    """Tiles that are computed together.

    entry: int64 [G, M], their query entries, those of unfilled places any valid ones; filled: bool [G, M].
    place: int64 [G, N], their key entries from low on, clamped to the list; lows: the same starts on the host.
    hidden: bool [G, M, N].
    """

    entry: torch.Tensor
    filled: torch.Tensor
    place: torch.Tensor
    lows: list[int]
    span: int
    hidden: torch.Tensor

    def scores(self, q, k, queries, keys, scale, wide):
        """scale q k' [G, M, N], -inf where hidden; and the q and k that they are of."""
        rows = q[queries[self.entry]].to(wide)
        columns = self.keys_of(k, keys, wide)
        z = rows.new_empty(())
        z = torch.baddbmm(z, rows, columns.transpose(1, 2), beta=0, alpha=scale)
        return z.masked_fill_(self.hidden, float("-inf")), (rows, columns)

    def keys_of(self, x, keys, wide):
        rows = keys[self.place]
        return x.index_select(0, rows.flatten()).view(*rows.shape, -1).to(wide)

    def clamped(self, places):
        return places[self.entry]

    def destination(self, places, rows):
        """Where the results of the tiles go; `rows` for those of unfilled places."""
        return torch.where(self.filled, places[self.entry], rows).flatten()

    def entries_or(self, entries):
        return torch.where(self.filled, self.entry, entries).flatten()


def _tiles(queries, keys, first, last, starts, until, size) -> Iterator[_Tiles]:
    if not len(queries) or not len(keys):
        return
    start, count = query_tiles(starts, len(queries), size)
    used = count > 0
    start, count = start[used], count[used]
    low, nominal = first[start], last[start] + size - 1
    span = torch.maximum(last[start + count - 1], nominal) - low
    span = (span.clamp(min=1) + size - 1) // size
    order = span.argsort(stable=True)
    lows, spans = low[order].tolist(), span[order].tolist()
    slot = torch.arange(size, device=first.device)
    begin = 0
    while begin < len(spans):
        width = spans[begin] * size
        end = begin + 1
        while end < len(spans) and spans[end] == spans[begin] and (end + 1 - begin) * size * width <= SCORES:
            end += 1
        own = order[begin:end]
        filled = slot < count[own][:, None]
        entry = (start[own][:, None] + slot).where(filled, start[own][:, None])
        place = low[own][:, None] + torch.arange(width, device=first.device)
        ends = torch.where(filled, last[entry] - low[own][:, None], 0).to(torch.int32)[..., None]
        begins = (first[entry] - low[own][:, None]).to(torch.int32)[..., None]
        column = torch.arange(width, device=first.device, dtype=torch.int32)
        hidden = (column >= ends) | (column < begins)
        place = place.clamp(max=len(keys) - 1)
        if until is not None:
            hidden |= entry[..., None] >= until[place][:, None]
        yield _Tiles(entry, filled, place, lows[begin:end], width, hidden)
        begin = end
