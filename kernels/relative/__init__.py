"""Causal attention with relative positions in its scores (Transformer-XL; RCMHA, arXiv 2308.03429)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.packing import PrefixState, check_packed, with_prefixes
from farspan.kernels.relative.chunked import relative_backward, relative_forward
from farspan.kernels.relative.positions import Sinusoid, Table, features, turned
from farspan.kernels.relative.reference import relative_reference
from farspan.kernels.relative.spans import Span, document_spans, flat
from farspan.kernels.relative.step import relative_step

__all__ = [
    "Sinusoid",
    "Span",
    "Table",
    "features",
    "operands",
    "passes",
    "relative_attention",
    "relative_step",
]

OPERATOR = declare(
    Operator(
        "relative",
        per_head=("q", "k", "v", "initial_state"),
        replicated=("lengths", "cu_seqlens", "window"),
        per_head_parameters=("u", "positions"),
    )
)


@own_precision
def relative_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    positions: Table | Sinusoid,
    lengths: tuple[int, ...],
    cu_seqlens: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    initial_state: PrefixState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, PrefixState | None]:
    """Each token attends to itself and to the earlier tokens of its document, by content and by distance.

        s_ij = scale ((q_i + u) k_j + q_i r_(i-j) + beta_(i-j))      o_i = sum_j softmax_j(s_ij) v_j

    q: [1, T, H, D]; k, v: [1, T, Hk, D] with H a multiple of Hk (head h reads key head h // (H / Hk)); any float dtype,
    scores and softmax statistics in fp32 or wider.
    u: [H, D]. positions: `Table`, r and beta for every distance, of which larger ones use the last; or `Sinusoid`,
    which makes both of sines and cosines and takes any distance.
    lengths: tokens of each document, on the host. cu_seqlens: int32 [documents + 1], the same as offsets, on device.
    window: keys that a token sees, itself included; None for all. scale: of all terms, D ** -0.5 when None.
    initial_state: for each document the keys and values that came before, `([n, Hk, D], [n, Hk, D])`, n >= 0: all of
    them, or at least the last `window - 1`. Distances are what counts: a document may continue at any position.
    Returns o [1, T, H, D], and with `return_state` the final state in the form of the initial one, else None.
    Differentiable in q, k, v, u, the tensors of positions and the initial state; the table's gradients are sums in one
    order. Raises ValueError where shapes disagree.
    Source: Transformer-XL (arXiv 1901.02860), its two attention biases u and v (here nu); the table is that of the code
    released with RCMHA, by distance instead of by its negative.
    """
    check_packed(q, k, v, lengths)
    heads, head_dim = q.shape[2:]
    if u.shape != (heads, head_dim):
        raise ValueError(f"u is {list(u.shape)}; {heads} heads of {head_dim} channels take [{heads}, {head_dim}]")
    positions.check(heads, head_dim)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself")
    scale = head_dim**-0.5 if scale is None else scale
    if initial_state is not None and window is not None:
        initial_state = tuple(_last(pair, window - 1) for pair in initial_state)
    k, v, prefixes = with_prefixes(k, v, lengths, initial_state)
    final_state = None
    if return_state:
        totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        final_state = tuple(zip(k[0].split(totals), v[0].split(totals), strict=True))
        if window is not None:
            final_state = tuple(_last(pair, window - 1) for pair in final_state)
    if choose_backend(OPERATOR, backend, q) == "reference":
        return relative_reference(q, k, v, u, positions, lengths, prefixes, window, scale), final_state
    spans = document_spans(lengths, prefixes)
    at = torch.cat([torch.arange(prefix, prefix + n) for n, prefix in zip(lengths, prefixes, strict=True)])
    a, p, table, beta = operands(q, u, positions, at.to(q.device), max(span.keys for span in spans))
    forward, _ = passes(backend, q)
    return forward(a, p, k, v, table, beta, flat(spans), window, scale)[0], final_state


def passes(backend: str, q: torch.Tensor) -> tuple[Callable, Callable]:
    """(forward, backward) of `kernels.relative.chunked`, or those in Triton: for spans of queries and keys."""
    if choose_backend(OPERATOR, backend, q) == "fused":
        from farspan.kernels.relative.fused import fused_backward, fused_forward

        return fused_forward, fused_backward
    return relative_forward, relative_backward


def operands(
    q: torch.Tensor, u: torch.Tensor, positions: Table | Sinusoid, at: torch.Tensor, farthest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """a, p, table, beta of `kernels.relative.chunked` for q [1, T, H, D], whose tokens are at positions int64 [T] of
    their documents, none of which has more than `farthest` tokens.
    """
    a = q + u.to(q.dtype)
    if isinstance(positions, Table):
        return a, q, positions.r, positions.beta
    p = turned(positions.queries(q), at)
    return a, p, features(torch.arange(farthest, device=q.device), p.shape[-1], q.dtype), None


def _last(pair: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    first = max(0, pair[0].shape[0] - count)
    return pair[0][first:], pair[1][first:]
