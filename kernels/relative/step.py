"""One decoding step of relative attention on a preallocated key-value cache."""

from __future__ import annotations

import torch

from farspan.kernels.relative.positions import Sinusoid, Table, features


def relative_step(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    u: torch.Tensor,
    positions: Table | Sinusoid,
    distances: torch.Tensor,
    longest: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of one query per row over the slots of its cache.

    q: [B, 1, H, D]; keys, values: [B, Hk, slots, D], head-major, the query's own key among them. u, positions: as
    `kernels.relative.relative_attention`. distances: int64 [B, slots], of each slot's key from the query, below 0 where
    the slot is not seen. longest: no seen slot is further away, on the host. scale: D ** -0.5 when None.
    Returns [B, 1, H, D]; differentiable.

    The products with the table are formed once per row and head and by distance, for all rows of the batch together,
    and then read for every slot: the order of the slots does not matter, so a ring buffer serves as well.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    one = q[:, 0].to(wide)  # [B, H, D]
    if isinstance(positions, Table):
        r, beta = (x[:, : longest + 1].to(wide) for x in (positions.r, positions.beta))
        by_distance = torch.einsum("bhd,hld->bhl", one, r) + beta
    else:
        phi = features(torch.arange(longest + 1, device=q.device), positions.projection.shape[1], wide)
        by_distance = torch.einsum("bhr,lr->bhl", positions.queries(one), phi)
    seen = distances >= 0
    index = distances.clamp(0, by_distance.shape[-1] - 1)[:, None].expand(-1, one.shape[1], -1)
    content = (one + u.to(wide)).unflatten(1, (keys.shape[1], -1))  # [B, Hk, share, D]
    scores = torch.matmul(content, keys.to(wide).transpose(2, 3)).flatten(1, 2) + by_distance.gather(2, index)
    weights = (scores * scale).masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
    weights = weights.unflatten(1, (keys.shape[1], -1)).to(values.dtype)
    return torch.matmul(weights, values).reshape(q.shape)
