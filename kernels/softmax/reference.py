"""Causal softmax attention by its definition: the whole score matrix, one document at a time."""

from __future__ import annotations

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """o_i = sum_j softmax_j(scale q_i k_j) v_j over the visible j; shapes as `kernels.softmax.softmax_attention`.

    Computed in fp32 (float64 for float64 inputs). Query i of a document whose prefix is p sees the keys
    `max(0, p + i - window + 1) .. p + i` of its own document.
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    outputs = []
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    for queries, keys, values, length, prefix in zip(
        q[0].split(lengths), k[0].split(totals), v[0].split(totals), lengths, prefixes, strict=True
    ):
        keys = keys.repeat_interleave(groups, dim=1).to(accumulate)
        values = values.repeat_interleave(groups, dim=1).to(accumulate)
        scores = scale * torch.einsum("ihd,jhd->hij", queries.to(accumulate), keys)
        scores = scores.masked_fill(~visible(length, prefix, window, q.device), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), values))
    return torch.cat(outputs)[None].to(q.dtype)


def visible(length: int, prefix: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, prefix + length]: which keys (prefix first) each query sees, itself included."""
    query = torch.arange(prefix, prefix + length, device=device)[:, None]
    key = torch.arange(prefix + length, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
