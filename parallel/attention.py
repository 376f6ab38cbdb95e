"""Softmax attention over keys that other ranks hold: keys go round a ring, or are gathered a few heads at a time.

What attends is handed in: `Attend` knows which of this rank's queries see which keys, computes them block by block, and
gives each block's output with its log-sum-exp. Here is what moves the keys, merges the blocks in fp32, and brings the
gradients of the keys home.

ring      forward: keys and values go P - 1 hops; while a block is computed the next one is under way. backward: they
          go round again, and their fp32 gradients travel with them, one hop more, to their owner.
gathered  forward and backward: all-gather the keys and values of a few heads, the next few under way; one call for the
          keys before each piece instead of one per rank. backward: reduce-scatter of the gradients in fp32.

With the final output and log-sum-exp, the gradients of the blocks add up without any rescaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from farspan.parallel.comm import AsyncGather, Pass, reduce_scatter
from farspan.parallel.layout import Layout
from farspan.parallel.mesh import Axis

# Bytes of keys and values that one gather brings at least, if there are as many. Beyond that it brings no more than the
# rank's own are, so that memory falls as 1 / ranks, or one key head.
GATHERED_BYTES = 2**20

Rows = slice


class Attend(Protocol):
    """Which queries of this rank see which keys of `source`: a rank of the ring, or None for the keys of the whole
    row. q: [1, n, H, D]; k: [1, keys, Hk, C]; v: the same; o, do: [1, n, H, C]; lse: [1, n, H] fp32 or wider. D is C,
    or more where queries carry what is not compared with the keys that travel.
    """

    def of(self, heads: slice) -> Attend:
        """The same for some of the query heads, whose q, k and v it will be given."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, source: int | None
    ) -> Iterator[tuple[Rows, torch.Tensor, torch.Tensor]]:
        """(query rows, o, lse) of every block that has visible keys."""

    def backward(
        self,
        do: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        o: torch.Tensor,
        lse: torch.Tensor,
        source: int | None,
    ) -> Iterator[tuple[Rows, torch.Tensor, Rows, torch.Tensor, torch.Tensor]]:
        """(query rows, dq, key rows, dk, dv) of every block; o and lse are those of the whole softmax."""


def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: Attend, axis: Axis) -> torch.Tensor:
    """o [1, n, H, C] of q [1, n, H, D] over the keys and values [1, n, Hk, C] of all ranks that they see."""
    return _Ring.apply(q, k, v, attend, axis)


def gathered_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend: Attend, layout: Layout, axis: Axis
) -> torch.Tensor:
    """As `ring_attention`, with the keys and values of a few heads at a time gathered from all ranks."""
    return _Gathered.apply(q, k, v, attend, layout, axis)


class Merged:
    """Outputs of blocks merged into one softmax: o [1, n, H, C] and lse [1, n, H], fp32 or wider, from nothing."""

    def __init__(self, q: torch.Tensor, channels: int | None = None) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.o = torch.zeros(*q.shape[:3], channels or q.shape[3], dtype=wide, device=q.device)
        self.lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)

    def add(self, rows: Rows, o: torch.Tensor, lse: torch.Tensor) -> None:
        """The softmax of `rows` over more keys: o <- o + w (o_block - o), w = sigmoid(lse_block - lse).

        Finite for any gap between the two: the textbook lse + log(1 + exp(lse_block - lse)) overflows fp32 at 88.
        """
        mine, total = self.o[:, rows], self.lse[:, rows]
        lse = lse.to(total.dtype)
        weight = torch.where(lse == float("-inf"), 0.0, torch.sigmoid(lse - total))  # -inf twice: no keys at all
        torch.lerp(mine, o.to(mine.dtype), weight[..., None], out=mine)
        torch.logaddexp(total, lse, out=total)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, attend, axis):
        merged, moving = Merged(q, v.shape[3]), torch.stack([k, v])
        for hop in range(axis.size):
            last = hop == axis.size - 1
            under_way = None if last else Pass(moving, axis, name=f"ring pass {hop + 1} of keys")
            source = (axis.rank - hop) % axis.size
            for block in attend.forward(q, moving[0], moving[1], source):
                merged.add(*block)
            moving = moving if last else under_way.wait()
        o = merged.o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, merged.lse)
        ctx.attend, ctx.axis = attend, axis
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        axis, do = ctx.axis, do.contiguous()
        dq, moving = torch.zeros(q.shape, dtype=lse.dtype, device=q.device), torch.stack([k, v])
        returning = None
        for hop in range(axis.size):
            last = hop == axis.size - 1
            under_way = None if last else Pass(moving, axis, name=f"ring pass {hop + 1} of keys, backward")
            source = (axis.rank - hop) % axis.size
            # Added to what the ranks before found for the same keys, which arrives while this is computed.
            own = torch.zeros(moving.shape, dtype=lse.dtype, device=q.device)
            for rows, part, keys, dk, dv in ctx.attend.backward(do, q, moving[0], moving[1], o, lse, source):
                dq[:, rows] += part
                own[0][:, keys] += dk
                own[1][:, keys] += dv
            own = own if returning is None else returning.wait().add_(own)
            returning = Pass(own, axis, axis.returning, f"ring pass {hop + 1} of key gradients")
            moving = moving if last else under_way.wait()
        dk, dv = returning.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, attend, layout, axis):
        o, wide = q.new_empty(*q.shape[:3], v.shape[3]), torch.promote_types(q.dtype, torch.float32)
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        for queries, keys, values, _ in _gathered_heads(q, k, v, layout, axis):
            merged = Merged(q[:, :, queries], v.shape[3])
            for block in attend.of(queries).forward(q[:, :, queries], keys, values, None):
                merged.add(*block)
            o[:, :, queries], lse[:, :, queries] = merged.o.to(q.dtype), merged.lse
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.attend, ctx.layout, ctx.axis = attend, layout, axis
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        layout, axis = ctx.layout, ctx.axis
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for queries, keys, values, heads in _gathered_heads(q, k, v, layout, axis):
            channels = keys.shape[-1]
            gradients = torch.zeros(*keys.shape[1:3], 2 * channels, dtype=lse.dtype, device=q.device)
            dkeys, dvalues = (x[None] for x in gradients.split(channels, dim=-1))
            mine = (x[:, :, queries] for x in (do, q))
            saved = o[:, :, queries], lse[:, :, queries]
            for rows, part, where, dkey, dvalue in ctx.attend.of(queries).backward(*mine, keys, values, *saved, None):
                dq[:, rows, queries] += part
                dkeys[:, where] += dkey
                dvalues[:, where] += dvalue
            if not layout.is_ordered:
                gradients = gradients.index_select(0, layout.order.to(q.device))
            own = reduce_scatter(gradients.unflatten(0, (axis.size, -1)), axis)
            dk[0, :, heads], dv[0, :, heads] = own.to(k.dtype).split(channels, dim=-1)
        return dq.to(q.dtype), dk, dv, None, None, None


def _gathered_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, axis: Axis
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, slice]]:
    """(query heads, keys, values [1, tokens, few, D] in the order of the row, key heads), a few heads at a time, the
    next ones gathered while these are used.
    """
    share, heads = q.shape[2] // k.shape[2], k.shape[2]
    one_head = 2 * axis.size * k[:, :, 0].nbytes
    few = max(1, min(heads, max(GATHERED_BYTES, k.nbytes + v.nbytes) // max(1, one_head)))
    groups = [slice(first, min(first + few, heads)) for first in range(0, heads, few)]
    following = AsyncGather(torch.cat([k[0, :, groups[0]], v[0, :, groups[0]]], dim=-1), axis)
    for number, group in enumerate(groups):
        both = following.wait().flatten(0, 1)
        following = None  # or it keeps a second copy
        if not layout.is_ordered:
            both = both.index_select(0, layout.place.to(q.device))
        if number + 1 < len(groups):
            after = groups[number + 1]
            following = AsyncGather(torch.cat([k[0, :, after], v[0, :, after]], dim=-1), axis)
        keys, values = (x[None] for x in both.split(k.shape[-1], dim=-1))
        yield slice(group.start * share, group.stop * share), keys, values, group
