"""One decoding step of attention inside groups, on caches of fixed size per group."""

from __future__ import annotations

import torch


def interval_step(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention of one query per group, the mean over the groups that have any key to see.

    q: [B, H, D], rotated; keys, values: [B, H, groups, slots, D]; seen: bool [B, H, groups, slots].
    Returns [B, H, D], 0 where no group has a key; differentiable. Slots that are not seen may hold any finite numbers.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    z = torch.matmul(keys, q[:, :, None, :, None])[..., 0].to(wide) * q.shape[-1] ** -0.5
    p = z.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen
    o = torch.matmul(p.to(values.dtype)[..., None, :], values)[..., 0, :]
    groups = seen.any(-1).sum(-1).clamp(min=1)
    return o.sum(2) / groups[..., None].to(o.dtype)
