"""Attention over intervals of a sorted list: the one operator that content-selected groups of tokens reduce to.

Tokens are sorted so that those of a group lie side by side, in their order; each query then sees one interval of the
list of keys. A sliding window, causal attention in clusters, the w best of a cluster: only the lists differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.kernels.interval.chunked import interval_chunked
from farspan.kernels.interval.entries import merge, sorted_rows
from farspan.kernels.interval.reference import interval_reference
from farspan.kernels.interval.step import interval_step
from farspan.kernels.operator import Operator, choose_backend, declare, own_precision

__all__ = ["Intervals", "interval_attention", "interval_step"]

OPERATOR = declare(Operator("interval", per_head=("q", "k", "v"), replicated=("intervals",)))


@dataclass(frozen=True, eq=False)
class Intervals:
    """Which query sees which keys. All tensors int64, on the device of the inputs.

    A row is one head of one token: of x [1, T, H, D], head h of token t is row t * H + h. The lists of several heads
    are laid end to end; an entry of a list is a place in it.

    queries: [Nq], the row of q of every query entry. keys: [Nk], the row of k and v of every key entry.
    first, last: [Nq]; entry e sees the key entries first[e] .. last[e] - 1, possibly none. Neither ever falls from one
    entry to the next.
    starts: [segments + 1], entries of the query list at which groups begin, from 0 to Nq; equal ones are empty groups.
    Work is cut there, so that no bit of a result depends on another group, or on what follows in its own.
    until: [Nk] or None; query entries from until[f] on do not see key entry f.
    reach: at least the most keys in one interval. length: about how many entries a group has; sets the size of tiles,
    not the result.
    repeated: whether a row may have several entries in a list. It then gets the mean of their outputs.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    starts: torch.Tensor
    reach: int
    length: int
    until: torch.Tensor | None = None
    repeated: bool = False

    def __post_init__(self) -> None:
        lists = self.queries, self.first, self.last
        if any(x.ndim != 1 or x.dtype != torch.int64 for x in (*lists, self.keys, self.starts)):
            raise ValueError("the lists of Intervals must be int64 vectors")
        if len({len(x) for x in lists}) > 1 or (self.until is not None and len(self.until) != len(self.keys)):
            raise ValueError(
                f"lists disagree: {len(self.queries)} queries with {len(self.first)} and {len(self.last)} ends of "
                f"intervals; {len(self.keys)} keys{'' if self.until is None else f', {len(self.until)} ends'}"
            )
        if self.reach < 1 or self.length < 1:
            raise ValueError(f"reach={self.reach} and length={self.length} must be at least 1")


@own_precision
def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: Intervals,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Each query attends to the keys of its interval.

        o_e = sum_f softmax_f(scale q_e k_f) v_f    over first[e] <= f < last[e], e < until[f]

    q: [1, T, H, D]; k, v: [1, S, G, D], as many rows as the lists of keys speak of; any float dtype, softmax
    statistics in fp32 or wider. scale: D ** -0.5 when None.
    Returns o [1, T, H, D]: for every row the mean over its entries; 0 for rows without an entry, and for empty
    intervals. Differentiable in q, k and v; gradients are added up without atomics, in a fixed order.
    Raises ValueError where shapes disagree. Source: arXiv 2003.05997 for routing; the form as intervals is farspan's.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"shapes disagree: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_backend(OPERATOR, backend, q)
    rows = (x.reshape(-1, x.shape[-1]) for x in (q, k, v))
    if choice == "reference":
        attend = interval_reference
    elif choice == "chunked":
        attend = interval_chunked
    else:
        from farspan.kernels.interval.fused import interval_fused as attend
    if not intervals.repeated:
        return attend(*rows, intervals, scale).view(q.shape)
    q_order, k_order = (
        sorted_rows(entries, x.shape[1] * x.shape[2]) for entries, x in ((intervals.queries, q), (intervals.keys, k))
    )
    return merge(attend(*rows, intervals, scale, q_order, k_order), q_order).view(q.shape)
