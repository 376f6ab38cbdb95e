"""Causal softmax attention over packed documents (Vaswani et al. 2017), on torch's own kernels."""

from __future__ import annotations

import torch

from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.packing import PrefixState, check_packed, with_prefixes
from farspan.kernels.softmax.chunked import attention_chunked, attention_with_lse
from farspan.kernels.softmax.reference import attention_reference
from farspan.kernels.softmax.step import attention_step, write_slots

__all__ = ["attention_step", "attention_with_lse", "softmax_attention", "write_slots"]

OPERATOR = declare(
    Operator(
        "softmax",
        per_head=("q", "k", "v", "initial_state"),
        replicated=("lengths", "cu_seqlens"),
        fused="torch.nn.attention.varlen (flash attention)",
    )
)


@own_precision
def softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: PrefixState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, PrefixState | None]:
    """Each token attends to itself and to every earlier token of its document.

    q: [1, T, H, D]; k, v: [1, T, Hk, D] with H a multiple of Hk (head h reads key head h // (H / Hk)); any float dtype,
    softmax statistics in fp32 or wider.
    lengths: tokens of each document, on the host. cu_seqlens: int32 [documents + 1], the same as offsets, on device.
    scale: of the scores, D ** -0.5 when None.
    initial_state: for each document the keys and values that came before, `([n, Hk, D], [n, Hk, D])`, n >= 0.
    Returns o [1, T, H, D], and with `return_state` the final state in the form of the initial one (it grows by the
    length of the document), else None. Differentiable in q, k, v and the initial state.
    Raises ValueError where shapes disagree. Source: "Attention is all you need", equation 1.
    """
    check_packed(q, k, v, lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v, prefixes = with_prefixes(k, v, lengths, initial_state)
    final_state = None
    if return_state:
        totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        final_state = tuple(zip(k[0].split(totals), v[0].split(totals), strict=True))
    backend = choose_backend(OPERATOR, backend, q)
    if backend == "reference":
        return attention_reference(q, k, v, lengths, prefixes, scale), final_state
    if backend == "fused":
        from farspan.kernels.softmax.fused import attention_varlen, takes

        if takes(q):
            return attention_varlen(q, k, v, lengths, prefixes, cu_seqlens, scale), final_state
    return attention_chunked(q, k, v, lengths, prefixes, scale), final_state
