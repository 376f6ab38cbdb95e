"""Titans: a memory whose state is the weights of a small network, trained on keys and values as they are read."""

from __future__ import annotations

import torch

from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.packing import check_packed
from farspan.kernels.titans.chunked import titans_chunked
from farspan.kernels.titans.reference import titans_reference
from farspan.kernels.titans.state import EPS, LOG_FLOOR, Gates, Memory, MemoryState, fresh_state

__all__ = ["EPS", "LOG_FLOOR", "Gates", "Memory", "MemoryState", "fresh_state", "titans_memory"]

OPERATOR = declare(
    Operator(
        "titans",
        per_head=("q", "k", "v", "gates", "initial_state"),
        per_head_parameters=("memory",),
        replicated=("lengths", "refresh", "read", "decay_to", "activation", "offsets"),
    )
)


@own_precision
def titans_memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Gates,
    memory: Memory,
    lengths: tuple[int, ...],
    refresh: int,
    *,
    read: str = "post",
    decay_to: str = "zero",
    activation: str = "silu",
    offsets: tuple[int, ...] | None = None,
    initial_state: MemoryState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """Each token takes one gradient step on the memory of its document and head, and reads it with its query.

    With M the weights, S their momentum, and l(M; k, v) = |M(k) - v|^2 / 2:
        S_t = eta_t S_{t-1} - theta_t grad l(M_r; k_t, v_t)        r = the last multiple of refresh that is <= t
        M_t = (1 - alpha_t) M_{t-1} + S_t                          y_t = M_t(q_t)
    The network is X^l = activation(X^{l-1} W^l), without activation after the last layer, raw = X^L; M(x) = raw, or
    x + LN(raw) where memory.norm is given. refresh=1 takes every gradient at the memory just before the token.

    q, k, v: [1, T, H, D], any float dtype (k and q of unit norm keep the inner loop stable); gates: [1, T, H] each,
    logarithms below -20 count as -20; memory: per head, shared by all documents. Computed in fp32 or wider.
    lengths: tokens of each document; offsets: tokens of it before these (zeros when None), which `initial_state` holds.
    initial_state: of each document; or of one, that all go on from at a multiple of refresh.
    refresh: tokens between two refreshes of the point where gradients are taken, counted from each document's start.
    read: "post" as above, or "pre": y_t = M_{t-1}(q_t). decay_to: "zero", or "init": the decay draws the weights to
    memory.weights. activation: "silu" or "gelu" (the exact one, by erf).
    Returns y [1, T, H, D] in v's dtype, and with return_state the state after these tokens, else None.
    Differentiable in every tensor, through the inner gradients and the initial state.
    Raises ValueError where shapes or options do not fit. Source: arXiv 2501.00663, equations 8 to 15.
    """
    offsets = (0,) * len(lengths) if offsets is None else offsets
    _check(q, k, v, gates, memory, lengths, refresh, read, decay_to, activation, offsets, initial_state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    gates = Gates(
        gates.log_decay.to(dtype).clamp(min=LOG_FLOOR),
        gates.log_momentum.to(dtype).clamp(min=LOG_FLOOR),
        gates.rate.to(dtype),
    )
    choice = choose_backend(OPERATOR, backend, v)
    run = {"reference": titans_reference, "chunked": titans_chunked}.get(choice)
    if choice == "fused":
        from farspan.kernels.titans.fused import titans_fused, uncovered

        beyond = backend == "auto" and uncovered(v, memory, refresh, decay_to) is not None
        run = titans_chunked if beyond else titans_fused
    tensors = (q, k, v, gates, memory, initial_state)
    return run(*tensors, tuple(lengths), tuple(offsets), refresh, read, decay_to, activation, return_state)


def _check(q, k, v, gates, memory, lengths, refresh, read, decay_to, activation, offsets, state) -> None:
    check_packed(q, k, v, lengths)
    for name, value, known in (
        ("read", read, ("post", "pre")),
        ("decay_to", decay_to, ("zero", "init")),
        ("activation", activation, ("silu", "gelu")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
    if refresh < 1:
        raise ValueError(f"refresh={refresh} must be at least 1")
    heads, head_dim = v.shape[2:]
    if q.shape != v.shape or any(gate.shape != v.shape[:3] for gate in gates):
        shapes = [list(x.shape) for x in (q, *gates)]
        raise ValueError(f"q and the gates are {shapes}, v is {list(v.shape)}: expected {list(v.shape[:3])} gates")
    widths = [w.shape[1] for w in memory.weights] + [head_dim]
    expected = [(heads, *widths[i : i + 2]) for i in range(len(memory.weights))]
    shapes = [tuple(w.shape) for w in memory.weights]
    if not 1 <= len(shapes) <= 4 or shapes != expected or widths[0] != head_dim:
        raise ValueError(
            f"memory weights {shapes} are not 1 to 4 layers [{heads} heads, d_in, d_out] from {head_dim} to "
            f"{head_dim} channels"
        )
    if memory.norm is not None and any(x.shape != (heads, head_dim) for x in memory.norm):
        raise ValueError(f"norm {[list(x.shape) for x in memory.norm]} must be gain and bias of [{heads}, {head_dim}]")
    if len(offsets) != len(lengths) or min(offsets) < 0:
        raise ValueError(f"offsets {offsets[:8]} must count the earlier tokens of each of {len(lengths)} documents")
    if state is None:
        if any(offsets):
            raise ValueError(f"offsets {offsets[:8]} need an initial state")
        return
    shared = len(state.A) == 1 and not any(offset % refresh for offset in offsets)
    rows = (1 if shared else len(lengths), heads, refresh - 1)
    expected = [(*rows[:2], *w.shape[1:]) for w in memory.weights] * 2
    expected += [(*rows, w.shape[1]) for w in memory.weights] + [(*rows, w.shape[2]) for w in memory.weights]
    expected += [rows] * 2 + [rows[:2]] * 3
    given = [tuple(x.shape) for part in state for x in (part if isinstance(part, tuple) else (part,))]
    if given != expected:
        raise ValueError(
            f"the initial state has shapes {given}; {len(lengths)} documents at {offsets[:8]} with refresh={refresh} "
            f"need {expected}"
        )
