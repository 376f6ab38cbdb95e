"""One decoding step of softplus attention on a preallocated cache."""

from __future__ import annotations

import torch

from farspan.kernels.softplus.config import Config
from farspan.kernels.softplus.reference import row_weights


def softplus_step(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, config: Config
) -> torch.Tensor:
    """Attention of one query per row over the first `counts[row]` slots of its cache.

    q: [B, 1, H, D], normalised; keys (normalised) and values: [B, Hk, capacity, D], head-major, the query's own among
    them; counts: int64 [B], at least 1, on the device: the N of the row. Returns [B, 1, H, D]; differentiable.

    The keys are read once: f of every slot, fp32, stays in a scratch of H * capacity numbers a row between the sum that
    gives the threshold and the weights. Slots beyond the count may hold any finite numbers, and the order of the slots
    does not matter, so a ring buffer serves as well.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q[:, 0].unflatten(1, (keys.shape[1], -1))  # [B, Hk, shared, D]
    c = config.row_scale(counts, q.shape[-1], wide)
    z = _product(grouped, keys.transpose(2, 3), wide) * c[:, None, None, None]
    seen = torch.arange(keys.shape[2], device=q.device) < counts[:, None]
    z = z.permute(1, 2, 0, 3).flatten(0, 1)
    weights = row_weights(z, seen, counts, config)
    weights = weights.unflatten(0, (keys.shape[1], -1)).permute(2, 0, 1, 3).to(values.dtype)
    return torch.matmul(weights, values).reshape(q.shape)


def _product(q: torch.Tensor, k: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """q @ k, [B, Hk, shared, D] by [B, Hk, D, slots], not rounded to their own dtype: scores reach 40 and more."""
    if q.is_cuda and q.dtype != wide and not torch.is_grad_enabled():
        return torch.bmm(q.flatten(0, 1), k.flatten(0, 1), out_dtype=wide).unflatten(0, q.shape[:2])
    return torch.matmul(q.to(wide), k.to(wide))
