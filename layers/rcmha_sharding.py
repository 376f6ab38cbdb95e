"""Relative attention on a shard of a row: Ulysses inside a ring slot, gathered keys or a ring between slots.

Keys and values travel as in softmax attention; what is said about positions does not. Every block knows where its first
query and its first key are in their document: a table is asked for the distances in between, and sinusoids are channels
that a rank appends to the keys which reach it. The gradients of a table are added up over the blocks, in one order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from farspan.kernels.relative import Sinusoid, Span, Table, operands, passes, relative_attention
from farspan.layers.sequence import Sequence
from farspan.layers.sharded_attention import document_blocks
from farspan.parallel import Shard
from farspan.parallel.attention import gathered_attention, ring_attention
from farspan.parallel.heads import grouped_to_heads, own_heads, plan_heads, to_tokens


def sharded_relative(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    positions: Table | Sinusoid,
    sequence: Sequence,
    backend: str,
) -> torch.Tensor:
    """q: [1, n, H, D]; k, v: [1, n, Hk, D]: the tokens of this rank, convolved; u, positions: of all heads.
    Returns [1, n, H, D].
    """
    context, slot = sequence.shard.context, sequence.slot
    ulysses, ring = context.mesh.ulysses, context.mesh.ring
    plan = plan_heads(q.shape[2], k.shape[2], ulysses.size)
    q, k, v = grouped_to_heads(q, k, v, plan, ulysses)
    u, *learned = (own_heads(x, plan, ulysses) for x in (u, *vars(positions).values()))
    positions = type(positions)(*learned)
    if ring.size == 1:
        o, _ = relative_attention(q, k, v, u, positions, slot.lengths, slot.cu_seqlens, backend=backend)
        return to_tokens(o, plan.queries, ulysses)
    a, p, table, beta = operands(q, u, positions, slot.positions, max(slot.totals))
    attend = RelativeBlocks(slot.shard, table, beta, q.shape[3] ** -0.5, backend)
    both = torch.cat([a, p], dim=-1)
    if beta is not None:
        both = _Learned.apply(both, table, beta, attend)
    if context.attention == "ring":
        o = ring_attention(both, k, v, attend, ring)
    else:
        o = gathered_attention(both, k, v, attend, slot.shard.layout, ring)
    return to_tokens(o, plan.queries, ulysses)


class RelativeBlocks:
    """What `parallel.attention` is handed: the blocks of documents that this rank's queries see. Queries
    [1, n, H, D + R] carry what meets keys and what meets positions.

    table, beta: as `kernels.relative.operands` has them, of all heads that this rank has.
    """

    def __init__(self, shard: Shard, table, beta, scale: float, backend: str) -> None:
        self._shard, self._scale, self._backend = shard, scale, backend
        self._table, self._beta = table.detach(), None if beta is None else beta.detach()
        self._gradients: list[torch.Tensor] | None = None
        self._of, self._heads = self, slice(None)

    def of(self, heads: slice) -> RelativeBlocks:
        if self._beta is None:
            return self
        some = RelativeBlocks(self._shard, self._table[heads], self._beta[heads], self._scale, self._backend)
        some._of, some._heads = self, heads
        return some

    def forward(self, q, k, v, source) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        run, _ = passes(self._backend, q)
        for rows, keys, span in self._spans(source):
            a, p = self._split(q[:, rows], k)
            o, lse = run(a, p, k[:, keys], v[:, keys], self._table, self._beta, span, None, self._scale)
            yield rows, o, lse.t()[None]

    def backward(
        self, do, q, k, v, o, lse, source
    ) -> Iterator[tuple[slice, torch.Tensor, slice, torch.Tensor, torch.Tensor]]:
        _, run = passes(self._backend, q)
        for rows, keys, span in self._spans(source):
            inputs = *self._split(q[:, rows], k), k[:, keys], v[:, keys], self._table, self._beta
            saved = o[:, rows], lse[0, rows].t().contiguous()
            da, dp, dk, dv, *learned = run(do[:, rows], *inputs, *saved, span, None, self._scale)
            if self._beta is not None:
                self._of.add(self._heads, learned)
            yield rows, torch.cat([da, dp], dim=-1), keys, dk, dv

    def add(self, heads: slice, gradients: list[torch.Tensor]) -> None:
        """To the gradients of table and beta of some heads, in fp32 or wider."""
        if self._gradients is None:
            wide = [torch.promote_types(x.dtype, torch.float32) for x in (self._table, self._beta)]
            pairs = zip((self._table, self._beta), wide, strict=True)
            self._gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x, dtype in pairs]
        for total, gradient in zip(self._gradients, gradients, strict=True):
            total[heads] += gradient

    def take(self) -> list[torch.Tensor]:
        """The gradients of table and beta found since they were taken last."""
        found, self._gradients = self._gradients, None
        return [x.to(like.dtype) for x, like in zip(found, (self._table, self._beta), strict=True)]

    def _split(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q[..., : k.shape[3]], q[..., k.shape[3] :]

    def _spans(self, source: int | None) -> Iterator[tuple[slice, slice, list[int]]]:
        for block in document_blocks(self._shard, source):
            count, keys = (rows.stop - rows.start for rows in (block.queries, block.keys))
            span = Span(0, count, 0, keys, block.query_position, block.key_position)
            yield block.queries, block.keys, list(span)


class _Learned(torch.autograd.Function):
    """Passes queries on; backward, when the attention behind it has come by, hands the table its gradients."""

    @staticmethod
    def forward(ctx, q, table, beta, attend):
        ctx.attend = attend
        return q.view_as(q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq):
        return dq, *ctx.attend.take(), None
