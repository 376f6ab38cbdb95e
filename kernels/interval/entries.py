"""From entries of a list to rows: sums over the entries of a row, in a fixed order and without atomics."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowOrder(NamedTuple):
    """order: int64 [N], the entries sorted by row, those of a row in the order of the list. counts: int64 [rows]."""

    order: torch.Tensor
    counts: torch.Tensor


def sorted_rows(entries: torch.Tensor, rows: int) -> RowOrder:
    """entries: int64 [N], the row of every entry, below `rows`."""
    order = entries.argsort(stable=True)
    bounds = torch.searchsorted(entries[order], torch.arange(rows + 1, device=entries.device))
    return RowOrder(order, bounds.diff())


def sum_rows(x: torch.Tensor, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """x: [N, D] by entry. Returns [rows, D]; 0 for rows without an entry."""
    return torch.segment_reduce(x[order], "sum", lengths=counts, axis=0, unsafe=True)


def merge(o: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """o: [N, D] by entry. Returns the means over the entries of every row, [rows, D]; differentiable."""
    return _Merge.apply(o, *order)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, order, counts):
        ctx.save_for_backward(order, counts)
        wide = torch.promote_types(o.dtype, torch.float32)
        return (sum_rows(o.to(wide), order, counts) / counts.clamp(min=1)[:, None]).to(o.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        order, counts = ctx.saved_tensors
        shares = do / counts.clamp(min=1)[:, None].to(do.dtype)
        by_row = shares.repeat_interleave(counts, dim=0, output_size=len(order))
        return torch.empty_like(by_row).index_copy_(0, order, by_row), None, None
