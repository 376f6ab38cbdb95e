"""One decoding step of RAT on preallocated states."""

from __future__ import annotations

import torch

from farspan.kernels.blocks import attention_block, hidden_mask
from farspan.kernels.operator import choose_backend
from farspan.kernels.rat import OPERATOR, RatState
from farspan.kernels.rat.chunked import turn

Rope = tuple[torch.Tensor, torch.Tensor] | None


def rat_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    z: torch.Tensor,
    positions: torch.Tensor,
    chunk: int,
    state: RatState,
    rope: Rope = None,
    *,
    scale: float | None = None,
    reach: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, RatState]:
    """The next token of every row, each at its own position.

    q, k: [B, 1, G, D]; v, gate, z: [B, 1, H, D]; gate_bias: [H, D]; rope: cos and sin, fp32 [chunks, D / 2], or None.
    positions: int64 [B], tokens before this one, on the device: nothing here waits for it, so that the step can be
    captured in a CUDA graph.
    state: key and value, fp32 [B, H, D], of the chunk that each row is in (ignored where a chunk begins); keys (turned)
    and values, head-major [B, H, capacity, D], of which row b reads the first positions[b] // chunk slots and fills the
    next one with the last token of a chunk; the slots after it may hold any finite numbers. The caller sees to it that
    capacity and rope reach that far.
    reach: slots that any row may read, where the host knows of fewer than the capacity.
    Returns y [B, 1, H, D] and the state after it: the same tensors, changed in place, unless gradients are recorded:
    then new ones, through which they flow.
    """
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, gate, gate_bias, z, *state))
    if choose_backend(OPERATOR, backend, v) == "fused" and not recorded:
        from farspan.kernels.rat.fused_step import rat_step_fused

        return rat_step_fused(q, k, v, gate, gate_bias, z, positions, chunk, state, rope, scale), state

    dtype = state.key.dtype
    share = v.shape[2] // q.shape[2]
    query, new_key = (x[:, 0].to(dtype).repeat(1, share, 1) for x in (q, k))  # head h reads group h mod G
    closed = torch.sigmoid(-(gate[:, 0].to(dtype) + gate_bias.to(dtype)))
    goes_on = (positions % chunk > 0)[:, None, None]
    key = torch.where(goes_on, state.key, 0.0).lerp(new_key, closed)
    value = torch.where(goes_on, state.value, 0.0).lerp(v[:, 0].to(dtype), closed)

    index, angles = positions // chunk, rope or (None, None)
    own = scale * (query * key).sum(-1)
    attend = _attend_recorded if recorded else _attend
    read = (state.keys[:, :, :reach], state.values[:, :, :reach])
    o = attend(turn(query, *angles, index), own, value, *read, index, scale)

    slots = index.clamp(max=state.keys.shape[2] - 1)[:, None]
    place = (torch.arange(len(q), device=q.device)[:, None], torch.arange(v.shape[2], device=q.device), slots)
    finished = (positions % chunk == chunk - 1)[:, None, None]
    caches = state.keys, state.values
    summaries = (turn(key, *angles, index), value)
    new = [torch.where(finished, s.to(c.dtype), c[place]) for c, s in zip(caches, summaries, strict=True)]
    y = (torch.sigmoid(z[:, 0].to(dtype)) * o).to(v.dtype)[:, None]
    if recorded:
        return y, RatState(key, value, *(c.index_put(place, n) for c, n in zip(caches, new, strict=True)))
    state.key.copy_(key)
    state.value.copy_(value)
    for cache, summary in zip(caches, new, strict=True):
        cache.index_put_(place, summary)
    return y, state


def _attend(query, own, value, keys, values, counts, scale) -> torch.Tensor:
    """o [B, H, D] of query [B, H, D] over the first `counts` of keys, values [B, H, slots, D] and the token itself,
    which has score own [B, H] and value [B, H, D].
    """
    mask = hidden_mask(torch.arange(keys.shape[2], device=keys.device) >= counts[:, None], keys.dtype)[:, None, None]
    block = query.to(keys.dtype)[:, :, None], keys, values
    o, lse = (x[:, :, 0].to(query.dtype) for x in attention_block(*block, scale, mask))
    weight = torch.sigmoid(own - lse)[..., None]
    nothing = (counts == 0)[:, None, None]  # o and lse of no keys at all are not numbers
    return torch.where(nothing, value, torch.lerp(o, value, weight))


def _attend_recorded(query, own, value, keys, values, counts, scale) -> torch.Tensor:
    """The same where gradients are recorded, which the block's log-sum-exp does not carry."""
    scores = scale * torch.einsum("bhd,bhsd->bhs", query, keys.to(query.dtype))
    hidden = (torch.arange(keys.shape[2], device=keys.device) >= counts[:, None])[:, None]
    p = torch.cat([scores.masked_fill(hidden, float("-inf")), own[..., None]], dim=-1).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", p[..., :-1], values.to(query.dtype)) + p[..., -1:] * value
