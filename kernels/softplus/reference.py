"""Softplus attention by its definition: the whole score matrix, one document at a time."""

from __future__ import annotations

import torch

from farspan.kernels.softmax.reference import visible
from farspan.kernels.softplus.config import DEAD, Config
from farspan.kernels.softplus.maps import apply_map


def softplus_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    config: Config,
) -> torch.Tensor:
    """o_i = sum_j P_ij v_j, shapes as `kernels.softplus.softplus_attention`, q and k already normalised and the keys of
    the prefixes already in k and v. Computed in fp32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    outputs = []
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    for queries, keys, values, length, prefix in zip(
        q[0].split(lengths), k[0].split(totals), v[0].split(totals), lengths, prefixes, strict=True
    ):
        keys = keys.repeat_interleave(groups, dim=1).to(wide)
        values = values.repeat_interleave(groups, dim=1).to(wide)
        counts = config.visible(torch.arange(prefix, prefix + length, device=q.device))
        c = config.row_scale(counts, q.shape[-1], wide)
        z = c[:, None] * torch.einsum("ihd,jhd->hij", queries.to(wide), keys)
        weights = row_weights(z, visible(length, prefix, config.window, q.device), counts, config)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(outputs)[None].to(q.dtype)


def row_weights(z: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor, config: Config) -> torch.Tensor:
    """P of scores z [H, m, n]; seen: bool [m, n]; counts: int64 [m], the keys that each row sees.

    The re-weighting in the form without the first division, scaled by the row's largest excess so that nothing
    overflows: P does not depend on that scale, and no gradient goes through it.
    """
    shift = z.detach().masked_fill(~seen, float("-inf")).amax(-1, keepdim=True) if config.phi == "exp" else None
    f = torch.where(seen, apply_map(z, config.phi, shift), 0.0)
    n = counts[:, None].to(z.dtype)
    if not config.l1:
        return f / n
    total = f.abs().sum(-1, keepdim=True) + config.eps
    if not config.power:
        return f / total.masked_fill(total == 0, float("inf"))
    mean, largest = total / n, f.detach().amax(-1, keepdim=True).clamp(min=0)
    theta = torch.where(counts[:, None] > config.free_rows, mean, 0.0)
    excess = (largest - theta).detach()
    dead = excess <= DEAD * largest
    theta, excess = torch.where(dead, 0.0, theta), torch.where(dead, largest, excess)
    excess = excess.masked_fill(excess == 0, float("inf"))  # no map of the row is above 0
    u = ((f - theta) / excess).relu()
    b = torch.where(dead, u, u.pow(config.power))
    damping = config.eps * torch.where(dead, 1 / excess, (mean / excess).pow(config.power)) if config.eps else 0.0
    sums = b.sum(-1, keepdim=True) + damping
    weights = b / sums.masked_fill(sums == 0, float("inf"))
    return torch.where(dead, 0.0, weights) if config.dead_row == "zero" else weights
