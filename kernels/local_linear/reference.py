"""Local linear attention by its definition: every query's matrix, an explicit solve, gradients by autograd."""

from __future__ import annotations

import torch

from farspan.kernels.softmax.reference import visible


def local_linear_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as `kernels.local_linear.chunked.local_linear_chunked`; solver, tolerance and iterations
    change nothing here.

    With p the softmax over the visible keys of scale q k (less scale k k / 2 for rbf), kbar = sum_j p_j k_j,
    c_j = k_j - kbar and C = sum_j p_j c_j c_j':

        x = (C + ridge I)^-1 (kbar - q)        o = sum_j p_j (1 - c_j x) v_j
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    ridges = ridge.expand(q.shape[1], *ridge.shape[1:]).split(lengths)
    outputs, largest = [], ridge.new_zeros(2)
    for queries, keys, values, own, length, prefix in zip(
        q[0].split(lengths), k[0].split(totals), v[0].split(totals), ridges, lengths, prefixes, strict=True
    ):
        queries = queries.to(wide)
        keys, values = (x.to(wide).repeat_interleave(groups, dim=1) for x in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", queries, keys)
        if kernel == "rbf":
            scores = scores - keys.square().sum(-1).mT[:, None] / 2
        scores = scale[:, None, None] * scores
        scores = scores.masked_fill(~visible(length, prefix, window, q.device), float("-inf"))
        p, lse = scores.softmax(-1), scores.logsumexp(-1)
        mean = torch.einsum("hij,jhd->ihd", p, keys)
        c = keys.transpose(0, 1)[:, None] - mean.transpose(0, 1)[:, :, None]  # [H, i, j, D]
        matrix = torch.einsum("hijd,hije->hide", p[..., None] * c, c)
        if ridge_mode == "absolute":
            own = own * absolute_factor(lse.mT)[..., None]
        diagonal = own.expand_as(mean).transpose(0, 1)
        delta = (mean - queries).transpose(0, 1)
        x = torch.linalg.solve(matrix + torch.diag_embed(diagonal), delta)
        weights = p * (1 - torch.einsum("hijd,hid->hij", c, x))
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
        with torch.no_grad():
            rest = (matrix * x[..., None, :]).sum(-1) + diagonal * x - delta
            residual = rest.norm(dim=-1) / delta.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)
            largest = torch.maximum(largest, torch.stack([residual.max(), weights.abs().sum(-1).max()]))
    return torch.cat(outputs)[None].to(q.dtype), torch.cat([torch.zeros_like(largest), largest])


def absolute_factor(lse: torch.Tensor) -> torch.Tensor:
    """exp(-lse), kept inside what squares of it can be: of a ridge on raw weights, its share for normalised ones."""
    limit = torch.finfo(lse.dtype).max ** 0.5
    return (-lse).exp().clamp(1 / limit, limit)
