"""The first tokens of documents that go on inside a block, and what is left open at the end, in operations of autograd.

A document that goes on after r tokens of a block reads W, S of the block's start for its inner gradients, but its
memory has moved on from there: to M = A W + f S - X' diag(g) D and H S - X' diag(n) D, of the state's rows. From these
its tokens up to the next refresh go as any block does; only the point of the gradients is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

import torch

from farspan.kernels.titans.lockstep import Segment, Step
from farspan.kernels.titans.mlp import Blocks
from farspan.kernels.titans.network import inner_gradient
from farspan.kernels.titans.state import MemoryState

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Call:
    """What all passes over one call's tokens take; initial: per layer weights that the decay draws to, or nothing."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    initial: Tensors
    norm: Tensors
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    refresh: int
    read: int | None
    activation: str

    @property
    def starts(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))[:-1]

    def blocks(self, tokens: list[range]) -> Blocks:
        """One block with these tokens of each document."""
        ends = [max(len(t), 1) for t in tokens]
        step = Step(0, len(tokens), len(tokens))
        segment = Segment((step,), tokens, max(map(len, tokens)), ends, self.v.shape[2], self.v.device)
        return Blocks(segment, self.q, self.k, self.v, *self.gates, self.initial, self.norm, self.read, self.activation)


def finish_open(call: Call, state: MemoryState) -> tuple[torch.Tensor, torch.Tensor, Tensors, list[int]]:
    """The tokens up to the next refresh of the documents that stand inside a block.

    Returns where their outputs [m, D] lie in a row of tokens and heads, int64 [m], the outputs, per layer [W; S]
    [documents, H, 2 d_in, d_out] as of each document's last refresh, and the number of tokens done of each document.
    """
    phases = [offset % call.refresh for offset in call.offsets]
    done = [min(n, call.refresh - p) if p else 0 for n, p in zip(call.lengths, phases, strict=True)]
    documents = [d for d, count in enumerate(done) if count]
    starts, heads, device = call.starts, call.v.shape[2], call.v.device
    blocks = call.blocks([range(starts[d], starts[d] + done[d]) for d in documents])
    index = torch.tensor(documents, device=device)
    W, S, X, D = ([x[index].flatten(0, 1) for x in side] for side in state[:4])
    g, n, A, f, H = (x[index].flatten(0, 1)[..., None] for x in state[4:])
    now = [
        torch.cat(_written(call, l, w, s, Writes(x, d, g, n, A[..., None], f[..., None], H[..., None])), 1)
        for l, (w, s, x, d) in enumerate(zip(W, S, X, D, strict=True))
    ]
    keys = inner_gradient(blocks.k, blocks.v, W, blocks.norm, call.activation)
    y = blocks.answer(now, [keys]).y.flatten(0, 1)

    complete = torch.tensor([phases[d] + done[d] == call.refresh for d in documents], device=device)
    states = []
    for l, (w, x, d) in enumerate(zip(W, keys.inputs, keys.deltas, strict=True)):
        size = w.shape[1]
        after = torch.cat(_written(call, l, now[l][:, :size], now[l][:, size:], Writes(x, d, *blocks.end)), 1)
        before = torch.cat([state.weights[l], state.momentum[l]], -2)
        after = torch.where(complete[:, None, None, None], after.unflatten(0, (len(documents), heads)), before[index])
        states.append(before.index_copy(0, index, after))
    longest, rows = blocks.k.shape[1], product(enumerate(documents), range(heads))
    kept = [(i * heads + h) * longest + t for (i, d), h in rows for t in range(done[d])]
    kept = torch.tensor(kept, device=device)
    return blocks.segment.places[kept], y[kept], states, done


class Writes(NamedTuple):
    """X [n, m, d_in] and D [n, m, d_out] of m tokens; weights g, n [n, m, 1] of them, and shares A, f, H [n, 1, 1]."""

    x: torch.Tensor
    d: torch.Tensor
    g: torch.Tensor
    n: torch.Tensor
    A: torch.Tensor
    f: torch.Tensor
    H: torch.Tensor


def _written(
    call: Call, l: int, weights: torch.Tensor, momentum: torch.Tensor, by: Writes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer l's weights and momentum [n, d_in, d_out] after some writes."""
    new = by.A * weights + by.f * momentum - torch.bmm((by.x * by.g).mT, by.d)
    if call.initial:
        new = new + ((1 - by.A).unflatten(0, (-1, call.v.shape[2])) * call.initial[l]).flatten(0, 1)
    return new, by.H * momentum - torch.bmm((by.x * by.n).mT, by.d)


def state_after(call: Call, state: MemoryState | None, states: Tensors) -> MemoryState:
    """The state after the call's tokens. state: the one before; states: per layer [W; S] at the last refreshes."""
    sizes = [x.shape[-2] // 2 for x in states]
    weights = tuple(x[..., :size, :] for x, size in zip(states, sizes, strict=True))
    momentum = tuple(x[..., size:, :] for x, size in zip(states, sizes, strict=True))
    spans = list(zip(call.offsets, call.lengths, strict=True))
    # rows that the open block has from earlier calls, and those that this one adds
    earlier = [o % call.refresh if o // call.refresh == (o + n) // call.refresh else 0 for o, n in spans]
    added = [(o + n) % call.refresh - e for (o, n), e in zip(spans, earlier, strict=True)]
    ends = [start + n for start, n in zip(call.starts, call.lengths, strict=True)]
    old = _rows_before(call, state, weights, earlier)
    if not any(added):
        return MemoryState(weights, momentum, *old)

    blocks = call.blocks([range(end - count, end) for end, count in zip(ends, added, strict=True)])
    keys = inner_gradient(blocks.k, blocks.v, [w.flatten(0, 1) for w in weights], blocks.norm, call.activation)
    heads = call.v.shape[2]
    shape = (len(spans), heads)
    moved = torch.tensor([count > 0 for count in added], device=call.v.device)[:, None]
    end = [x.unflatten(0, shape) for x in blocks.end]
    gamma, nu = (x[..., 0] for x in end[:2])
    A, f, H = (torch.where(moved, x[..., 0, 0], one) for x, one in zip(end[2:], (1.0, 0.0, 1.0), strict=True))
    slots = torch.arange(call.refresh - 1, device=call.v.device)
    place = slots - torch.tensor(earlier, device=call.v.device)[:, None]  # of each slot's token among the added ones
    own = (place >= 0) & (place < torch.tensor(added, device=call.v.device)[:, None])
    place, own = place.clamp(0, gamma.shape[-1] - 1)[:, None], own[:, None]

    def joined(new: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """new [documents, H, tokens, ...] in its slots of before [documents, H, refresh - 1, ...]."""
        rest = [1] * (new.ndim - 3)
        index = place.view(*place.shape, *rest).expand(*before.shape[:3], *new.shape[3:])
        return torch.where(own.view(*own.shape, *rest), new.gather(2, index), before)

    kept_keys, kept_deltas, g, n, kept_A, kept_f, kept_H = old
    return MemoryState(
        weights,
        momentum,
        tuple(joined(x.unflatten(0, shape), b) for x, b in zip(keys.inputs, kept_keys, strict=True)),
        tuple(joined(x.unflatten(0, shape), b) for x, b in zip(keys.deltas, kept_deltas, strict=True)),
        joined(gamma, A[..., None] * g + f[..., None] * n),
        joined(nu, H[..., None] * n),
        A * kept_A,
        A * kept_f + f * kept_H,
        H * kept_H,
    )


def _rows_before(call: Call, state: MemoryState | None, weights: tuple[torch.Tensor, ...], earlier: list[int]):
    """keys, deltas, g, n, A, f, H of the open blocks before the call: nothing where a refresh came since."""
    dtype, device = weights[0].dtype, weights[0].device
    if state is None or not any(earlier):
        shape = (len(call.lengths), call.v.shape[2])
        rows = (*shape, call.refresh - 1)
        keys = tuple(w.new_zeros(*rows, w.shape[-2]) for w in weights)
        deltas = tuple(w.new_zeros(*rows, w.shape[-1]) for w in weights)
        zeros, one = torch.zeros(rows, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device)
        return keys, deltas, zeros, zeros.clone(), one, torch.zeros_like(one), one.clone()
    count = torch.tensor(earlier, device=device)[:, None]
    going, filled = count > 0, (torch.arange(call.refresh - 1, device=device) < count)[:, None]
    sides = (tuple(torch.where(filled[..., None], x, 0.0) for x in side) for side in (state.keys, state.deltas))
    rows = (torch.where(filled, x, 0.0) for x in (state.g, state.n))
    scalars = zip((state.A, state.f, state.H), (1.0, 0.0, 1.0), strict=True)
    return (*sides, *rows, *(torch.where(going, x, fresh) for x, fresh in scalars))
