"""Interval attention in Triton kernels: the algorithm is in fused_forward.py and fused_backward.py.

Saved for the backward pass: q, k, v, o, fp32 lse by entry, and the lists.
"""

from __future__ import annotations

import torch

from farspan.kernels.interval.entries import RowOrder, sum_rows
from farspan.kernels.interval.fused_backward import keys_backward_kernel, queries_backward_kernel
from farspan.kernels.interval.fused_forward import attend_kernel
from farspan.kernels.interval.fused_tiles import Launch, compilations
from farspan.kernels.interval.tiles import inverse, query_tiles
from farspan.kernels.launch import architecture

__all__ = ["compilations", "interval_fused"]


def interval_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals,
    scale: float,
    q_order: RowOrder | None = None,
    k_order: RowOrder | None = None,
) -> torch.Tensor:
    """Arguments and result as `kernels.interval.reference.interval_reference`; CUDA tensors (any under
    TRITON_INTERPRET=1). fp32, bf16 or fp16, head dims up to 256; else ValueError.
    """
    if q.shape[-1] > 256 or q.dtype == torch.float64:
        raise ValueError(
            f"backend='fused' takes head dims up to 256 in fp32, bf16 or fp16, not {q.shape[-1]} in {q.dtype}; "
            "use backend='chunked'"
        )
    lists = intervals.queries, intervals.keys, intervals.first, intervals.last, intervals.starts, intervals.until
    return _fused_forward(q, k, v, *lists, *(q_order or (None, None)), *(k_order or (None, None)), scale)[0]


@torch.library.custom_op("farspan::interval_fused_forward", mutates_args=())
def _fused_forward(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o, by row [R, D] or with orders by entry [Nq, D], and fp32 lse [Nq]."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    launch = Launch(q.shape[1], q.itemsize, architecture(q.device))
    tile, _, _ = launch.tiles
    o = q.new_zeros(len(q) if q_order is None else len(queries), q.shape[1])
    lse = q.new_empty(len(queries), dtype=torch.float32)
    places = queries if q_order is None else torch.arange(len(queries), device=q.device)
    table = torch.stack(query_tiles(starts, len(queries), tile.M))
    leaves = until is not None
    if table.shape[1]:
        attend_kernel[(table.shape[1],)](
            q, k, v, o, lse, queries, keys, first, last, until if leaves else last, places, table, table.shape[1],
            len(queries), len(keys), scale, **launch.constants(tile), LEAVES=leaves,
        )  # fmt: skip
    return o, lse


@_fused_forward.register_fake
def _(q, k, v, queries, keys, first, last, starts, until, q_order, q_counts, k_order, k_counts, scale):
    rows = q.shape[0] if q_order is None else queries.shape[0]
    return q.new_empty(rows, q.shape[1]), q.new_empty(queries.shape[0], dtype=torch.float32)


@torch.library.custom_op("farspan::interval_fused_backward", mutates_args=())
def _fused_backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, do = (x.contiguous() for x in (q, k, v, do))
    launch = Launch(q.shape[1], q.itemsize, architecture(q.device))
    repeated, leaves = q_order is not None, until is not None
    _, tile, key_tile = launch.tiles
    places, key_places = queries, keys
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    if repeated:
        places, key_places = (torch.arange(len(entries), device=q.device) for entries in (queries, keys))
        dq, dk, dv = (q.new_zeros(len(x), q.shape[1], dtype=torch.float32) for x in (queries, keys, keys))
    delta, sizes = torch.empty_like(lse), (len(queries), len(keys))
    table = torch.stack(query_tiles(starts, len(queries), tile.M))
    if table.shape[1]:
        queries_backward_kernel[(table.shape[1],)](
            q, k, v, o, do, lse, dq, delta, queries, keys, first, last, until if leaves else last, places, table,
            table.shape[1], *sizes, scale, **launch.constants(tile), LEAVES=leaves,
        )  # fmt: skip
    low, high = inverse(first, last, until, len(keys))
    if len(keys):
        keys_backward_kernel[(-(-len(keys) // key_tile.N),)](
            q, k, v, do, lse, delta, dk, dv, queries, keys, low, high, places, key_places, *sizes, scale,
            **launch.constants(key_tile),
        )  # fmt: skip
    if not repeated:
        return dq, dk, dv
    sides = (dq, q_order, q_counts), (dk, k_order, k_counts), (dv, k_order, k_counts)
    return tuple(sum_rows(x, order, counts).to(q.dtype) for x, order, counts in sides)


@_fused_backward.register_fake
def _(do, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    return *_fused_backward(do, *ctx.saved_tensors, ctx.scale), *(None for _ in range(11))


_fused_forward.register_autograd(_backward, setup_context=_save)
