"""Causal sliding-window attention over packed documents: torch's flash attention on CUDA, own blocks elsewhere."""

from __future__ import annotations

import torch

from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.packing import PrefixState, check_packed, with_prefixes
from farspan.kernels.softmax.reference import attention_reference
from farspan.kernels.window.chunked import window_chunked

__all__ = ["window_attention"]

OPERATOR = declare(
    Operator(
        "window",
        per_head=("q", "k", "v", "initial_state"),
        replicated=("lengths", "cu_seqlens", "window"),
        fused="torch.nn.attention.varlen (flash attention)",
    )
)


@own_precision
def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    cu_seqlens: torch.Tensor,
    window: int,
    *,
    scale: float | None = None,
    initial_state: PrefixState | None = None,
    return_state: bool = False,
    block: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, PrefixState | None]:
    """Each token attends to the last `window` tokens of its document, itself included.

    q: [1, T, H, D]; k, v: [1, T, Hk, D] with H a multiple of Hk; any float dtype, softmax statistics in fp32 or wider.
    lengths, cu_seqlens: tokens of each document on the host, and int32 [documents + 1] offsets on the device.
    window: keys that a token sees, at least 1. scale: D ** -0.5 when None.
    initial_state: per document the keys and values just before it, `([n, Hk, D], [n, Hk, D])`; all but the last
    `window - 1` are ignored.
    block: queries per block of the chunked backend; changes the speed, not the result.
    Returns o [1, T, H, D], and with `return_state` the last `window - 1` (or fewer) keys and values of every document,
    else None. Differentiable in q, k, v and the initial state. Raises ValueError where shapes disagree.
    """
    check_packed(q, k, v, lengths)
    if window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is not None:
        initial_state = tuple(_last(document, window - 1) for document in initial_state)
    k, v, prefixes = with_prefixes(k, v, lengths, initial_state)
    final_state = None
    if return_state:
        totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        pairs = zip(k[0].split(totals), v[0].split(totals), strict=True)
        final_state = tuple(_last(pair, window - 1) for pair in pairs)
    backend = choose_backend(OPERATOR, backend, q)
    if backend == "reference":
        return attention_reference(q, k, v, lengths, prefixes, scale, window), final_state
    if backend == "fused":
        from farspan.kernels.softmax.fused import attention_varlen, takes

        if takes(q):
            return attention_varlen(q, k, v, lengths, prefixes, cu_seqlens, scale, window), final_state
    return window_chunked(q, k, v, lengths, prefixes, window, scale, block), final_state


def _last(pair: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = pair
    first = max(0, keys.shape[0] - count)
    return keys[first:], values[first:]
