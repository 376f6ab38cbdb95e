"""The Titans memory in PyTorch, block by block: any depth, any device, hand-written backward.

The documents' whole blocks go through one of two operators: the linear memory without a norm (`linear`), in tiles that
do not depend on the refresh, and all others (`mlp`), one refresh at a time. What stands inside a block where the call
begins or ends is less than `refresh` tokens of each document; `open_block` takes it with autograd.
"""

from __future__ import annotations

import torch

from farspan.kernels.titans.linear import titans_linear
from farspan.kernels.titans.mlp import titans_mlp
from farspan.kernels.titans.open_block import Call, finish_open, state_after
from farspan.kernels.titans.state import Gates, Memory, MemoryState


def titans_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState | None,
    lengths: tuple[int, ...],
    offsets: tuple[int, ...],
    refresh: int,
    read: str,
    decay_to: str,
    activation: str,
    return_state: bool,
) -> tuple[torch.Tensor, MemoryState | None]:
    """Arguments as `kernels.titans.titans_memory`; saves the inputs and a state every few blocks."""
    arguments = (q, k, v, gates, memory, state, lengths, offsets, refresh, read, decay_to, activation, return_state)
    return run_blocks(titans_linear, titans_mlp, *arguments)


def run_blocks(
    linear, mlp, q, k, v, gates, memory, state, lengths, offsets, refresh, read, decay_to, activation, return_state
):  # fmt: skip
    """`titans_chunked` with operators `linear` and `mlp` for the whole blocks, called as `titans_linear` and
    `titans_mlp` are.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    initial = [w.to(dtype) for w in memory.weights]
    norm = [x.to(dtype) for x in memory.norm or ()]
    target = initial if decay_to == "init" else []
    when = 1 if read == "pre" else None
    call = Call(q, k, v, tuple(gates), target, norm, lengths, offsets, refresh, when, activation)

    done, first = [0] * len(lengths), None
    if state is None:
        states = [torch.cat([w, torch.zeros_like(w)], 1)[None] for w in initial]
    else:
        state = MemoryState(*(tuple(x.to(dtype) for x in p) if isinstance(p, tuple) else p.to(dtype) for p in state))
        if any(offset % refresh for offset in offsets):
            *first, states, done = finish_open(call, state)
        else:
            states = [torch.cat(pair, -2) for pair in zip(state.weights, state.momentum, strict=True)]
    left = [length - count for length, count in zip(lengths, done, strict=True)]
    starts = [start + count for start, count in zip(call.starts, done, strict=True)]
    if not any(left):
        y = torch.zeros_like(v)
    elif len(initial) == 1 and not norm:
        y, states = _linear(linear, call, states[0], starts, left, return_state)
    else:
        options = (starts, left, refresh, when, activation, return_state)
        y, states = mlp(q, k, v, gates, states, target, norm, *options)
    if first is not None:
        places, own = first
        y = y.flatten(0, 2).index_copy(0, places, own.to(y.dtype)).view(v.shape)
    return y.to(v.dtype), state_after(call, state, states) if return_state else None


def _linear(linear, call: Call, state: torch.Tensor, starts: list[int], lengths: list[int], return_state: bool):
    """The linear memory; one that decays to its initial weights is one that decays to zero from there on, of what
    those leave of the values.
    """
    options = (starts, lengths, call.refresh, call.read, return_state)
    if not call.initial:
        y, final = linear(call.q, call.k, call.v, call.gates, state, *options)
        return y, [final]
    weights = call.initial[0]
    shift = torch.cat([weights, torch.zeros_like(weights)], -2)
    y, final = linear(call.q, call.k, call.v - _times(call.k, weights), call.gates, state - shift, *options)
    return y + _times(call.q, weights), [final + shift if return_state else final]


def _times(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [1, T, H, D] times weights [H, D, D] of each head."""
    return torch.einsum("bthi,hio->btho", x.to(weights.dtype), weights)
