"""One decoding step of core-context-aware attention on preallocated caches."""

from __future__ import annotations

import torch

from farspan.kernels.blocks import attention_block, hidden_mask


def core_step(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    core_keys: torch.Tensor,
    core_values: torch.Tensor,
    positions: torch.Tensor,
    group: int,
    window: int,
    core_bias: float = 0.0,
    share: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The query of every row, each at its own position, on the cores and near tokens that it sees.

    q: [B, 1, H, D]. keys, values: rings, head-major [B, Hk, ring, D], that hold the last `ring >= window + group - 1`
    tokens, this one among them, at slot position % ring. core_keys, core_values: [B, Hc, slots, D], Hc = H or Hk, core
    j in slot j; slots beyond those that a row sees may hold any finite numbers, and there must be as many as it sees.
    positions: int64 [B], of the queries, on the device: nothing here waits for it, so that the step can be captured in
    a CUDA graph.
    share: the weight of the cores where each part has a softmax of its own, [B, 1, H, 1], read where cores are seen;
    None for one softmax over both.
    scale: D ** -0.5 when None.
    Returns [B, 1, H, D]. Differentiable in every float tensor where gradients are recorded.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ring, device = keys.shape[2], q.device
    cores = ((positions + 1 - window) // group).clamp(min=0)  # torch's // rounds down
    slot_position = positions[:, None] - (positions[:, None] - torch.arange(ring, device=device)) % ring
    sees_tokens = slot_position >= (group * cores)[:, None]
    sees_cores = torch.arange(core_keys.shape[2], device=device) < cores[:, None]
    tensors = (q, keys, values, core_keys, core_values, *(() if share is None else (share,)))
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    attend = _attend_recorded if recorded else _attend
    o, lse = attend(q, keys, values, sees_tokens, scale)
    if core_keys.shape[2] == 0:
        return o
    core_o, core_lse = attend(q, core_keys, core_values, sees_cores, scale)
    weight = torch.sigmoid(core_lse + core_bias - lse)[..., None] if share is None else share
    merged = torch.lerp(o, core_o, weight.to(o.dtype))
    return torch.where((cores > 0)[:, None, None, None], merged, o)  # of no cores at all, o and lse are not numbers


def _attend(q, keys, values, sees, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, 1, H, D] and lse [B, 1, H] of queries [B, 1, H, D] over the slots of [B, K, n, D] that `sees`, [B, n],
    marks.
    """
    mask = hidden_mask(~sees, keys.dtype)[:, None, None]
    o, lse = attention_block(q.to(keys.dtype).transpose(1, 2), keys, values, scale, mask)
    return o.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def _attend_recorded(q, keys, values, sees, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where gradients are recorded, which the block's log-sum-exp does not carry. A query that sees nothing
    gets finite numbers, so that what is chosen instead has a finite gradient.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q[:, 0].to(wide).unflatten(1, (keys.shape[1], -1))
    scores = scale * torch.einsum("bkrd,bknd->bkrn", grouped, keys.to(wide))
    scores = scores.masked_fill(~sees[:, None, None], -1e30)
    lse = scores.logsumexp(-1)
    o = torch.einsum("bkrn,bknd->bkrd", (scores - lse[..., None]).exp(), values.to(wide))
    return o.flatten(1, 2)[:, None].to(q.dtype), lse.flatten(1, 2)[:, None]
