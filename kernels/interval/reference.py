"""Interval attention by its definition: for every query entry the keys of its interval, written out side by side."""

from __future__ import annotations

import torch

from farspan.kernels.interval.entries import RowOrder


def interval_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals,
    scale: float,
    q_order: RowOrder | None = None,
    k_order: RowOrder | None = None,
) -> torch.Tensor:
    """o_e = sum_f softmax_f(scale q_e k_f) v_f over the visible f. q: [R, D]; k, v: [S, D]; fp32 (float64 for float64).

    intervals: `kernels.interval.Intervals`. Returns o by row, [R, D], where the orders are None, else by query entry.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    entry = torch.arange(len(intervals.queries), device=q.device)
    place = intervals.first[:, None] + torch.arange(intervals.reach, device=q.device)
    seen = place < intervals.last[:, None]
    place = place.clamp(max=len(intervals.keys) - 1)
    if intervals.until is not None:
        seen &= entry[:, None] < intervals.until[place]
    rows = intervals.keys[place]
    z = scale * torch.einsum("ed,efd->ef", q[intervals.queries].to(wide), k[rows].to(wide))
    # the most negative finite number instead of -inf: an empty row's softmax and its gradient stay finite
    p = z.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
    o = torch.einsum("ef,efd->ed", p, v[rows].to(wide)).to(q.dtype)
    return o if q_order is not None else torch.zeros_like(q).index_copy(0, intervals.queries, o)
