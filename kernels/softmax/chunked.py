"""Causal softmax attention on torch's SDPA, one call per document (one call in all where the lengths agree).

SDPA's kernels are the chunked algorithm: linear memory and a hand-written backward, on CPU and CUDA, in every float
dtype. What is done here is only to hand it documents, and keys that came before the queries.

On CPU SDPA's kernel is `attention_block`, which also tells the log-sum-exp: the same bits, for who wants that.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from farspan.kernels.blocks import attention_block

# Queries that follow a prefix need a mask; it is built for this many at a time, so that its memory stays linear.
MASKED_QUERIES = 512


def attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """Arguments and result as `kernels.softmax.softmax_attention`, with the keys of the prefixes already in k and v."""
    if len(set(zip(lengths, prefixes, strict=True))) == 1:
        documents = len(lengths)
        q, k, v = (x.reshape(documents, -1, *x.shape[2:]) for x in (q, k, v))
        return _attend(q, k, v, scale).flatten(0, 1)[None]
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    documents = zip(q.split(lengths, dim=1), k.split(totals, dim=1), v.split(totals, dim=1), strict=True)
    return torch.cat([_attend(*document, scale) for document in documents], dim=1)


def attention_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of whole documents on a CPU, with the log-sum-exp of the scores [T, H] (fp32 or wider, no gradients)."""
    if len(set(lengths)) == 1:
        parts = [tuple(x.reshape(len(lengths), -1, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))]
    else:
        parts = zip(*(x.transpose(1, 2).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    found = [attention_block(*part, scale, causal=part[0].shape[2] > 1) for part in parts]
    o, lse = (torch.cat([side.transpose(1, 2).flatten(0, 1) for side in sides]) for sides in zip(*found, strict=True))
    return o[None], lse


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q: [documents, T, H, D]; k, v: [documents, prefix + T, Hk, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    length, prefix = q.shape[2], k.shape[2] - q.shape[2]
    if prefix == 0 or length == 1:
        causal = length > 1
        o = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2)
    pieces = []
    for start in range(0, length, MASKED_QUERIES):
        end = min(start + MASKED_QUERIES, length)
        seen = prefix + end
        rows = torch.arange(prefix + start, seen, device=q.device)[:, None]
        mask = torch.arange(seen, device=q.device)[None, :] <= rows
        pieces.append(
            scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2)
