"""RAT: a gated linear recurrence inside chunks, softmax attention across them (arXiv 2507.04416)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.rat.chunked import rat_chunked
from farspan.kernels.rat.exchange import Exchange
from farspan.kernels.rat.reference import rat_reference

__all__ = ["Exchange", "RatState", "rat"]

OPERATOR = declare(
    Operator(
        "rat",
        per_head=("v", "gate", "z", "initial_state", "exchange"),
        per_group=("q", "k"),
        per_head_parameters=("gate_bias",),
        replicated=("rope", "lengths", "offsets", "chunk"),
    )
)


class RatState(NamedTuple):
    """What later tokens need of the earlier ones, for a row of documents.

    key, value: [documents, H, D], fp32: the running states of the chunks that are not finished.
    keys, values: [chunks, H, D]: the summaries (keys rotated) of finished chunks, all documents one after the other;
    a document that has seen n tokens has n // chunk of them.
    """

    key: torch.Tensor
    value: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@own_precision
def rat(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    z: torch.Tensor,
    lengths: tuple[int, ...],
    chunk: int,
    *,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    offsets: tuple[int, ...] | None = None,
    initial_state: RatState | None = None,
    exchange: Exchange | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, RatState]:
    """Each token attends to one summary per finished chunk of its document, and to the running state of its own.

    Inside a chunk, per channel, with g = sigmoid(gate + gate_bias):
        k~_t = g_t k~_{t-1} + (1 - g_t) k_t        v~ likewise; both start from nothing at every chunk
    and with c the chunk of token t, one softmax over the keys k~ at the ends of chunks 0 .. c-1 and k~_t itself:
        y_t = sigmoid(z_t) * (sum_j p_j v~_end(j) + p_self v~_t)

    q, k: [1, T, G, D], shared by heads (head h uses group h mod G); v, gate, z: [1, T, H, D]; gate_bias: [H, D]. Any
    float dtype; gates, running states and softmax statistics in fp32 or wider.
    lengths: tokens of each document; offsets: tokens of it before these (zeros when None), which `initial_state` holds.
    chunk: tokens per chunk, L >= 1, counted from each document's start; no length needs to be a multiple of it.
    exchange: brings the summaries of earlier chunks from where they are, once these tokens' own are finished: then no
    document may begin inside a chunk, and initial_state is left out.
    rope: cos and sin, fp32 [chunks, D / 2], by which queries and summaries turn at their chunk's index; None for none.
    Returns y [1, T, H, D], and the state after these tokens with only the new summaries in it (append them to the
    earlier ones). Differentiable in every float argument and the initial state.
    Raises ValueError where shapes disagree or rope is too short. Source: arXiv 2507.04416, equations 1 to 6.
    """
    offsets = (0,) * len(lengths) if offsets is None else offsets
    _check(q, k, v, gate, gate_bias, z, lengths, offsets, chunk, rope, initial_state, exchange)
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        empty, nothing = v.new_zeros(len(lengths), *v.shape[2:], dtype=wide), v.new_zeros(0, *v.shape[2:])
        initial_state = RatState(empty, empty, nothing, nothing)
    choice = choose_backend(OPERATOR, backend, v)
    if choice == "fused":
        from farspan.kernels.rat.fused import rat_fused as run
    else:
        run = {"reference": rat_reference, "chunked": rat_chunked}[choice]
    running, before = initial_state[:2], initial_state[2:]
    arguments = (q, k, v, gate, gate_bias, z, rope, running, before, lengths, offsets, chunk, scale)
    y, summaries, final = run(*arguments, exchange)
    return y, RatState(*final, *summaries)


def _check(q, k, v, gate, gate_bias, z, lengths, offsets, chunk, rope, state, exchange) -> None:
    heads, head_dim = v.shape[2:]
    if q.ndim != 4 or q.shape[0] != 1 or k.shape != q.shape or q.shape[1] != v.shape[1] or q.shape[3] != head_dim:
        raise ValueError(f"shapes disagree: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if heads % q.shape[2]:
        raise ValueError(f"{heads} heads cannot share {q.shape[2]} groups of queries; use a divisor of the heads")
    if gate.shape != v.shape or z.shape != v.shape or gate_bias.shape != v.shape[2:]:
        shapes = [list(x.shape) for x in (gate, gate_bias, z)]
        raise ValueError(f"gate, gate_bias and z are {shapes}, v is {list(v.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if sum(lengths) != v.shape[1] or min(lengths, default=0) < 1 or len(offsets) != len(lengths):
        raise ValueError(f"document lengths {lengths[:8]} sum to {sum(lengths)}, the row has {v.shape[1]} tokens")
    chunks = max(-(-(offset + length) // chunk) for offset, length in zip(offsets, lengths, strict=True))
    if rope is not None and (len(rope[0]) < chunks or 2 * rope[0].shape[1] != head_dim):
        raise ValueError(f"rope tables {list(rope[0].shape)} must be [{chunks} or more chunks, {head_dim} / 2]")
    known = sum(offset // chunk for offset in offsets)
    if exchange is not None:
        if state is not None or any(offset % chunk for offset in offsets):
            raise ValueError(f"with an exchange, offsets {offsets[:8]} are multiples of chunk={chunk} without a state")
    elif state is None and any(offsets):
        raise ValueError(f"offsets {offsets[:8]} need an initial state")
    if state is not None and (len(state.key) != len(lengths) or len(state.keys) != known):
        raise ValueError(
            f"the initial state has {len(state.key)} documents and {len(state.keys)} summaries, "
            f"offsets {offsets[:8]} in chunks of {chunk} need {len(lengths)} and {known}"
        )
