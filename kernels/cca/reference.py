"""Core-context-aware attention by its definition: every score of every document, with autograd's gradients."""

from __future__ import annotations

import torch

from farspan.kernels.cca.pieces import Piece


def pool_reference(
    q_end: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_keys: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    core_heads: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as `kernels.cca.pool_groups`; computed in fp32 (float64 for float64 inputs)."""
    accumulate = torch.promote_types(k.dtype, torch.float32)
    share = q_end.shape[2] // k.shape[2]
    evaluator = q_end[0].to(accumulate)
    if core_heads == "kv":
        evaluator, share = evaluator.unflatten(1, (-1, share)).mean(2), 1

    rows = starts[:, None] + torch.arange(group, device=starts.device)
    keys, values, pooled = (
        x[0, rows].repeat_interleave(share, dim=2).to(accumulate)
        for x in (k, v, k if pooled_keys is None else pooled_keys)
    )
    weights = (scale * torch.einsum("mhd,mrhd->mhr", evaluator, keys)).softmax(dim=-1)
    core_k, core_v = (torch.einsum("mhr,mrhd->mhd", weights, x) for x in (pooled, values))
    return core_k[None].to(k.dtype), core_v[None].to(v.dtype)


def core_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    pieces: tuple[Piece, ...],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> torch.Tensor:
    """Arguments and result as `kernels.cca.core_attention`; computed in fp32 (float64 for float64 inputs)."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    outputs, heads = [], q.shape[2]
    for piece, queries in zip(pieces, q[0].split([piece.length for piece in pieces]), strict=True):
        own = slice(piece.key, piece.key + piece.prefix + piece.length)
        cores = slice(piece.core, piece.core + max(0, piece.offset + piece.length - window) // group)
        keys, values = (
            torch.cat([x.repeat_interleave(heads // x.shape[1], dim=1) for x in (far[0, cores], near[0, own])])
            for far, near in ((core_k, k), (core_v, v))
        )
        scores = scale * torch.einsum("ihd,jhd->hij", queries.to(accumulate), keys.to(accumulate))
        sees_cores, sees_tokens = visible(piece, group, window, q.device)
        bias = core_bias * torch.cat([sees_cores, torch.zeros_like(sees_tokens)], dim=1).to(accumulate)
        seen = torch.cat([sees_cores & (parts != "raw"), sees_tokens & (parts != "cores")], dim=1)
        scores = (scores + bias).masked_fill(~seen, float("-inf"))
        nothing = ~seen.any(dim=1, keepdim=True)
        weights = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values.to(accumulate)))
    return torch.cat(outputs)[None].to(q.dtype)


def visible(piece: Piece, group: int, window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [length, cores] and [length, prefix + length]: which of its cores and keys every query of a piece sees."""
    query = torch.arange(piece.offset, piece.offset + piece.length, device=device)[:, None]
    cores = (query + 1 - window).div(group, rounding_mode="floor").clamp(min=0)
    core = torch.arange(max(0, piece.offset + piece.length - window) // group, device=device)
    token = torch.arange(piece.offset - piece.prefix, piece.offset + piece.length, device=device)
    return core < cores, (token <= query) & (token >= group * cores)
