"""Local linear attention on a shard of a row: Ulysses inside a ring slot, gathered keys between slots.

The fit of a query needs all its keys in every iteration of its solver, so keys come to queries: after Ulysses' exchange
a rank has the tokens of its ring slot for its own heads, and gathers the keys and values of these heads, a few heads at
a time, the next ones under way. Every piece of a document sees the document's earlier keys as what came before it.
Solvers stay on their ranks. Kept for the backward pass are the rank's own tensors and the solutions x alone: it gathers
the keys again, solves the adjoint systems, and sends the gradients of the keys home by a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from farspan.kernels.local_linear import Settings, Statistics, local_linear_attention, prepared, two_passes
from farspan.layers.sequence import Sequence
from farspan.parallel import Shard
from farspan.parallel import attention as gathered
from farspan.parallel.comm import AsyncGather, gather, reduce_scatter
from farspan.parallel.heads import grouped_to_heads, own_heads, plan_heads, to_tokens
from farspan.parallel.mesh import Axis


class Operands(NamedTuple):
    """q: [1, T, H, D]; k, v: [1, T, Hk, D]; ridge: [H]; scale: [H], or a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ridge: torch.Tensor
    scale: torch.Tensor | float


def sharded_local_linear(
    operands: Operands, sequence: Sequence, settings: Settings, backend: str
) -> tuple[torch.Tensor, Statistics]:
    """o [1, n, H, D] for the tokens of this rank, and the statistics of the heads and tokens that it solved."""
    context, slot = sequence.shard.context, sequence.slot
    ulysses, ring = context.mesh.ulysses, context.mesh.ring
    plan = plan_heads(operands.q.shape[2], operands.k.shape[2], ulysses.size)
    q, k, v = grouped_to_heads(operands.q, operands.k, operands.v, plan, ulysses)
    ridge, scale = (
        own_heads(x, plan, ulysses) if isinstance(x, torch.Tensor) else x for x in (operands.ridge, operands.scale)
    )
    if ring.size > 1 and backend != "reference":
        keys = slot.table("gathered keys", lambda: GatheredKeys(slot.shard, ring))
        o, statistics = _Gathered.apply(q, k, v, *prepared(q, ridge, scale), keys, settings, backend)
        statistics = Statistics(*statistics.unbind())
    else:
        before = None if ring.size == 1 else _by_autograd(k, v, slot.shard, ring)
        arguments = (q, k, v, ridge, slot.lengths, slot.cu_seqlens)
        options = {**settings._asdict(), "scale": scale, "initial_state": before, "backend": backend}
        o, _, statistics = local_linear_attention(*arguments, **options)
    return to_tokens(o, plan.queries, ulysses), statistics


@dataclass(frozen=True, eq=False)
class GatheredKeys:
    """The keys that the queries of a ring slot see, from all slots: of each piece its document's up to its end."""

    shard: Shard
    axis: Axis

    @property
    def lengths(self) -> list[int]:
        return [piece.length for piece in self.shard.pieces]

    @property
    def prefixes(self) -> list[int]:
        return [piece.offset for piece in self.shard.pieces]

    @cached_property
    def _places(self) -> tuple[torch.Tensor, ...]:
        """int64: where, in the ranks' tokens laid end to end, the keys of all pieces are that this rank's queries see.
        In as many parts as it takes for none to have a token twice: a document has a piece in every segment.
        """
        parts, documents = [[]], set()
        for piece in self.shard.pieces:
            if piece.document in documents:
                parts, documents = [*parts, []], set()
            documents.add(piece.document)
            parts[-1].append(torch.arange(piece.start - piece.offset, piece.start + piece.length))
        return tuple(self.shard.layout.place[torch.cat(part)] for part in parts)

    def heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """(query heads, key heads, keys and values [1, sum(prefixes + lengths), few, D]), a few heads at a time.

        q: [1, n, H, D]; k, v: [1, n, Hk, D], this rank's own.
        """
        share, count = q.shape[2] // k.shape[2], k.shape[2]
        of_one = self.axis.size * (k.nbytes + v.nbytes) // max(1, count)
        few = max(1, min(count, max(gathered.GATHERED_BYTES, k.nbytes + v.nbytes) // max(1, of_one)))
        groups = [slice(first, min(first + few, count)) for first in range(0, count, few)]
        index = torch.cat(self._places).to(k.device)
        following = AsyncGather(torch.cat([k[0, :, groups[0]], v[0, :, groups[0]]], dim=-1), self.axis)
        for number, group in enumerate(groups):
            both = following.wait().flatten(0, 1).index_select(0, index)
            following = None  # or it keeps what it brought
            if number + 1 < len(groups):
                after = groups[number + 1]
                following = AsyncGather(torch.cat([k[0, :, after], v[0, :, after]], dim=-1), self.axis)
            keys, values = (x[None] for x in both.split((k.shape[3], v.shape[3]), dim=-1))
            yield slice(group.start * share, group.stop * share), group, keys, values

    def home(self, dkeys: torch.Tensor, dvalues: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of what `heads` gave, to those of this rank's own [n, few, D], from all ranks, in fp32 or wider."""
        wide = torch.promote_types(dkeys.dtype, torch.float32)
        found = torch.cat([dkeys[0], dvalues[0]], dim=-1).to(wide)
        row = found.new_zeros(self.shard.layout.tokens, *found.shape[1:])
        for places, part in zip(self._places, found.split([len(places) for places in self._places]), strict=True):
            places = places.to(row.device)
            row[places] = row[places] + part  # no place twice: no atomics
        own = reduce_scatter(row.unflatten(0, (self.axis.size, -1)), self.axis)
        return own.split((dkeys.shape[3], dvalues.shape[3]), dim=-1)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ridge, scale, keys, settings, backend):
        forward, ctx.run, solver = two_passes(backend, q, settings)
        ctx.keys, ctx.constants = keys, (keys.lengths, keys.prefixes, *settings._replace(solver=solver))
        o = q.new_empty(*q.shape[:3], v.shape[3])
        x, lse = q.new_empty(q.shape, dtype=ridge.dtype), q.new_empty(*q.shape[:3], 1, dtype=ridge.dtype)
        mean, largest = ridge.new_zeros(()), ridge.new_zeros(3)
        for rows, _, own_keys, own_values in keys.heads(q, k, v):
            inputs = (q[:, :, rows], own_keys, own_values, ridge[:, rows], scale[rows])
            o[:, :, rows], x[:, :, rows], lse[:, :, rows], found = forward(*inputs, *ctx.constants)
            mean += found[0] * (rows.stop - rows.start) / q.shape[2]
            largest = torch.maximum(largest, found[1:])
        ctx.save_for_backward(q, k, v, ridge, scale, x, lse)
        statistics = torch.cat([mean[None], largest])
        ctx.mark_non_differentiable(statistics)
        return o, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        q, k, v, ridge, scale, x, lse = ctx.saved_tensors
        dq, dk, dv, dridge, dscale = (torch.empty_like(y) for y in (q, k, v, ridge, scale))
        for rows, group, own_keys, own_values in ctx.keys.heads(q, k, v):
            inputs = (do[:, :, rows], q[:, :, rows], own_keys, own_values, ridge[:, rows], scale[rows])
            found = ctx.run(*inputs, x[:, :, rows], lse[:, :, rows], *ctx.constants)
            dq[:, :, rows], dkeys, dvalues, dridge[:, rows], dscale[rows] = found
            dk[0, :, group], dv[0, :, group] = ctx.keys.home(dkeys, dvalues)
        return dq, dk, dv, dridge, dscale, None, None, None


def _by_autograd(k: torch.Tensor, v: torch.Tensor, shard: Shard, ring: Axis) -> tuple:
    """The earlier keys and values of every piece, all heads at once and kept: for the reference."""
    both = gather(torch.cat([k[0], v[0]], dim=-1), ring).flatten(0, 1)
    keys, values = both.index_select(0, shard.layout.place.to(k.device)).split(k.shape[3], dim=-1)
    # A piece without earlier keys takes an empty part: every rank's backward pass comes by the reduce-scatter.
    earlier = [slice(piece.start - piece.offset, piece.start) for piece in shard.pieces]
    return tuple((keys[rows], values[rows]) for rows in earlier)
