"""Relative attention by its definition: every score, one document at a time."""

from __future__ import annotations

import torch

from farspan.kernels.relative.positions import Sinusoid, Table
from farspan.kernels.softmax.reference import visible


def relative_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    positions: Table | Sinusoid,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """o_i = sum_j softmax_j(s_ij) v_j, s_ij = scale ((q_i + u) k_j + q_i r_(i-j) + beta_(i-j)); shapes as
    `kernels.relative.relative_attention`, the keys of the prefixes already in k and v.

    Computed in fp32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    outputs = []
    for queries, keys, values, length, prefix in zip(
        q[0].split(lengths), k[0].split(totals), v[0].split(totals), lengths, prefixes, strict=True
    ):
        queries, keys, values = (x.to(wide) for x in (queries, keys, values))
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        table = positions if isinstance(positions, Table) else positions.table(prefix + length)
        r, beta = (x[:, : prefix + length].to(wide) for x in (table.r, table.beta))
        by_distance = torch.einsum("ihd,hld->hil", queries, r) + beta[:, None]
        distance = torch.arange(prefix, prefix + length, device=q.device)[:, None]
        distance = distance - torch.arange(prefix + length, device=q.device)
        index = distance.clamp(0, r.shape[1] - 1).expand(len(r), -1, -1)
        scores = torch.einsum("ihd,jhd->hij", queries + u.to(wide), keys) + by_distance.gather(2, index)
        scores = (scale * scores).masked_fill(~visible(length, prefix, window, q.device), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), values))
    return torch.cat(outputs)[None].to(q.dtype)
