"""The two groups of heads: those that look back least, and those that look back most."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadGroups:
    """local_heads, global_heads: [n_group], or [batch, n_group], int64 indices into the pool of heads."""

    local_heads: torch.Tensor
    global_heads: torch.Tensor

    def of(self, batch: int, pool: int, device: torch.device) -> HeadGroups:
        """One pair for each row of a batch. Raises ValueError where a head is not in the pool."""
        for heads in (self.local_heads, self.global_heads):
            if heads.ndim not in (1, 2) or (heads.ndim == 2 and len(heads) != batch):
                raise ValueError(f"groups of heads are [n_group] or [{batch}, n_group], not {list(heads.shape)}")
            if not heads.numel() or int(heads.min()) < 0 or int(heads.max()) >= pool:
                raise ValueError(f"heads {heads.flatten()[:8].tolist()} ... are not all in a pool of {pool}")
        pair = (heads.to(device).expand(batch, -1) for heads in (self.local_heads, self.global_heads))
        return HeadGroups(*pair)


def head_groups(distance: torch.Tensor, fraction: float) -> HeadGroups:
    """The lowest and the highest `fraction` of the pool, at least one head each, by mean backward distance.

    distance: [pool] or [batch, pool]. Ties: the earlier head is the more local one. Raises ValueError for a pool of one
    head, which cannot be both.
    """
    pool = distance.shape[-1]
    if pool < 2:
        raise ValueError("one head cannot be split into a local and a global group; use more layers or heads")
    size = max(1, math.floor(fraction * pool + 0.5))
    order = distance.argsort(dim=-1, stable=True)
    size = min(size, pool // 2)
    return HeadGroups(order[..., :size], order[..., -size:])
