"""One decoding step of the Titans memory at the cadence it was trained with, and reads of it that write nothing.

A block of `refresh` tokens takes its inner gradients at the weights W, S where it began. Until it is full its tokens
are kept as rows: what each layer of the memory was given (`keys`) and its error (`deltas`), with two coefficients. With
a = 1 - forgetting, e = momentum, t = rate of the new token:

    n <- e n, append t        g <- a g, append 0, g <- g + n        H <- e H        f <- a f + H        A <- a A
    read     z = A (x W) + f (x S) - sum_j g_j (x . keys_j) deltas_j            layer by layer
    full     W <- A W + f S - keys' diag(g) deltas        S <- H S - keys' diag(n) deltas

A read costs two products with the weights and one per kept row; the weights are written once per block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from farspan.kernels.titans.network import activate, inner_gradient
from farspan.kernels.titans.state import EPS, LOG_FLOOR, Gates, Memory, MemoryState


def titans_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState,
    positions: torch.Tensor,
    refresh: int,
    *,
    read: str = "post",
    decay_to: str = "zero",
    activation: str = "silu",
) -> tuple[torch.Tensor, MemoryState]:
    """The next token of every row, each at its own position: what `titans_memory` computes for it.

    q, k, v: [B, 1, H, D]; gates: three of [B, 1, H]. positions: int64 [B], tokens before this one since the grid of
    refreshes began, on the device: nothing here waits for it on CUDA, so that the step can be captured in a graph.
    state: as `titans_memory` returns it, for B documents; what it holds of an open block is ignored where one begins.
    Returns y [B, 1, H, D] and a new state; the old one is untouched. Differentiable in everything. Weights, momentum
    and all sums in the dtype of the state (fp32 or wider).
    """
    dtype = state.weights[0].dtype
    query, key, value = (x.transpose(1, 2).to(dtype) for x in (q, k, v))  # [B, H, 1, D]
    a, e = (log[:, 0].to(dtype).clamp(min=LOG_FLOOR).exp() for log in (gates.log_decay, gates.log_momentum))
    rate = gates.rate[:, 0].to(dtype)
    phase = positions % refresh
    state = _begun(state, phase == 0)
    H = e * state.H
    f = a * state.f + H
    A = a * state.A
    n = e[..., None] * state.n
    g = a[..., None] * state.g + n
    keys, deltas = _errors(key, value, memory, state.weights, activation)
    if read == "pre":
        rows = [(K, D * state.g[..., None]) for K, D in zip(state.keys, state.deltas, strict=True)]
        y = _read(query, memory, state, state.A, state.f, rows, decay_to, activation)
    else:
        own = zip(state.keys, state.deltas, keys, deltas, strict=True)
        rows = [
            (torch.cat([K, x], dim=2), torch.cat([D * g[..., None], d * rate[..., None, None]], dim=2))
            for K, D, x, d in own
        ]
        y = _read(query, memory, state, A, f, rows, decay_to, activation)
    after = state._replace(g=g, n=n, A=A, f=f, H=H)
    return y.to(v.dtype).transpose(1, 2), _written(after, memory, keys, deltas, rate, phase, refresh, decay_to)


def memory_read(
    q: torch.Tensor, weights: Sequence[torch.Tensor], memory: Memory, activation: str = "silu"
) -> torch.Tensor:
    """The memory with these weights asked, and not changed. q: [B, T, H, D]; weights: L of [B, H, d_in, d_out].

    Returns [B, T, H, D] in the dtype of q.
    """
    x = query = q.transpose(1, 2).to(weights[0].dtype)
    for weight in weights[:-1]:
        x = activate(x @ weight, activation)[0]
    return _finish(query, x @ weights[-1], memory).to(q.dtype).transpose(1, 2)


def close_block(state: MemoryState, memory: Memory, decay_to: str = "zero") -> MemoryState:
    """The state with its open block written into the weights, as if a refresh came now; nothing is left open."""
    weights, momentum = _closed(state, state.keys, state.deltas, state.g, state.n, memory, decay_to)
    empty = (torch.zeros_like(x) for x in (state.g, state.n))
    rows = (tuple(map(torch.zeros_like, side)) for side in (state.keys, state.deltas))
    one = torch.ones_like(state.A)
    return MemoryState(weights, momentum, *rows, *empty, one, torch.zeros_like(one), torch.ones_like(one))


def _errors(key, value, memory, weights, activation) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of one token, what each layer is given and its error: L of [B, H, 1, d_in], and L of [B, H, 1, d_out]."""
    rows, heads = key.shape[:2]
    norm = memory.norm
    if norm is not None:
        norm = tuple(p.to(key.dtype).repeat(rows, 1)[:, None] for p in norm)
    flat = [x.flatten(0, 1) for x in (key, value, *weights)]
    written = inner_gradient(*flat[:2], flat[2:], norm, activation)
    return tuple([x.unflatten(0, (rows, heads)) for x in side] for side in (written.inputs, written.deltas))


def _begun(state: MemoryState, begins: torch.Tensor) -> MemoryState:
    """The state with nothing open in the rows where a block begins, whatever was left there."""
    flag = begins[:, None]
    g, n = (torch.where(flag[..., None], 0.0, x) for x in (state.g, state.n))
    A, H = (torch.where(flag, 1.0, x) for x in (state.A, state.H))
    return state._replace(g=g, n=n, A=A, f=torch.where(flag, 0.0, state.f), H=H)


def _read(query, memory, state, A, f, rows, decay_to, activation) -> torch.Tensor:
    """rows: per layer the kept inputs, and errors times coefficient."""
    A, f = A[..., None, None], f[..., None, None]
    x, last = query, len(rows) - 1
    for layer, (keys, errors) in enumerate(rows):
        weight, momentum = state.weights[layer], state.momentum[layer]
        z = A * (x @ weight) + f * (x @ momentum) - (x @ keys.mT) @ errors
        if decay_to == "init":
            z = z + (1 - A) * (x @ memory.weights[layer].to(x.dtype))
        x = z if layer == last else activate(z, activation)[0]
    return _finish(query, x, memory)


def _written(state, memory, keys, deltas, rate, phase, refresh, decay_to) -> MemoryState:
    """The state after the token with these inputs and errors, whose coefficients are both `rate`."""
    closing = phase == refresh - 1
    weights, momentum = state.weights, state.momentum
    if not closing.is_cpu or bool(closing.any()):  # on CUDA the host does not know
        own = rate[..., None]
        sides = (
            tuple(torch.cat(pair, dim=2) for pair in zip(side, new, strict=True))
            for side, new in ((state.keys, keys), (state.deltas, deltas))
        )
        new = _closed(state, *sides, *(torch.cat([x, own], dim=2) for x in (state.g, state.n)), memory, decay_to)
        flag = closing[:, None, None, None]
        if refresh == 1:
            weights, momentum = new
        else:
            weights, momentum = (
                tuple(torch.where(flag, x, y) for x, y in zip(*pair, strict=True))
                for pair in zip(new, (weights, momentum), strict=True)
            )
    slots = torch.arange(refresh - 1, device=phase.device)
    here, keep = slots == phase[:, None], ~closing[:, None]

    def placed(rows: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        shape = (len(phase), 1, refresh - 1, *[1] * (rows.ndim - 3))
        return torch.where(here.view(shape), new, torch.where(keep.view(-1, *[1] * (rows.ndim - 1)), rows, 0.0))

    buffers = (
        tuple(placed(rows, new) for rows, new in zip(side, added, strict=True))
        for side, added in ((state.keys, keys), (state.deltas, deltas))
    )
    g, n = (placed(x, rate[..., None]) for x in (state.g, state.n))
    A, H = (torch.where(keep, x, 1.0) for x in (state.A, state.H))
    return MemoryState(weights, momentum, *buffers, g, n, A, torch.where(keep, state.f, 0.0), H)


def _closed(state, keys, deltas, g, n, memory, decay_to) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    A, f, H = (x[..., None, None] for x in (state.A, state.f, state.H))
    weights, momentum = [], []
    for layer, (W, S, K, D) in enumerate(zip(state.weights, state.momentum, keys, deltas, strict=True)):
        new = A * W + f * S - K.mT @ (D * g[..., None])
        if decay_to == "init":
            new = new + (1 - A) * memory.weights[layer].to(W.dtype)
        weights.append(new)
        momentum.append(H * S - K.mT @ (D * n[..., None]))
    return tuple(weights), tuple(momentum)


def _finish(query: torch.Tensor, raw: torch.Tensor, memory: Memory) -> torch.Tensor:
    """raw, or query + LayerNorm(raw) with the memory's own gain and bias per head."""
    if memory.norm is None:
        return raw
    gain, bias = (p.to(raw.dtype)[:, None] for p in memory.norm)
    return query + gain * F.layer_norm(raw, raw.shape[-1:], eps=EPS) + bias
