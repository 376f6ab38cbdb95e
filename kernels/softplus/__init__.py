"""Softplus attention with l1 normalisation and re-weighting (LSSA and LSSAR, arXiv 2501.13428)."""

from __future__ import annotations

from typing import Any

import torch

from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.packing import PrefixState, check_packed, with_prefixes
from farspan.kernels.softplus.chunked import softplus_chunked
from farspan.kernels.softplus.config import Config
from farspan.kernels.softplus.normalise import normalise
from farspan.kernels.softplus.reference import softplus_reference
from farspan.kernels.softplus.step import softplus_step

__all__ = ["Config", "attend", "normalise", "softplus_attention", "softplus_step"]

OPERATOR = declare(
    Operator(
        "softplus",
        per_head=("q", "k", "v", "initial_state"),
        replicated=("lengths", "cu_seqlens", "options"),
    )
)


@own_precision
def softplus_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    cu_seqlens: torch.Tensor,
    *,
    initial_state: PrefixState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, PrefixState | None]:
    """Each token attends to itself and to the tokens of its document before it, by clipped powers of softplus scores.

    With N the keys that row i sees, and q^, k^ unit vectors:
        z_ij = ln d * ln N * q^_i k^_j          f_ij = ln(1 + exp(z_ij))
        power 0 (LSSA):   P_ij = f_ij / sum_k f_ik
        power p (LSSAR):  P_ij = r_ij^p / sum_k r_ik^p,  r_ij = max(f_ij - mean_k f_ik, 0); no mean where N <= 3
        o_i = sum_j P_ij v_j

    q: [1, T, H, D]; k, v: [1, T, Hk, D] with H a multiple of Hk (head h reads key head h // (H / Hk)), rotated but not
    normalised: that happens here, in fp32 or wider, as do all statistics. Any float dtype.
    lengths: tokens of each document, on the host. cu_seqlens: int32 [documents + 1], the same as offsets, on device.
    initial_state: for each document the keys, already normalised, and the values that came before it,
    `([n, Hk, D], [n, Hk, D])`, n >= 0; N counts them. With a window all but the last `window - 1` are ignored.
    options: fields of `Config`: power, window, and what is there for ablations.
    Returns o [1, T, H, D], and with `return_state` the final state in the form of the initial one (with a window the
    last `window - 1` keys), else None. Differentiable in q, k, v and the initial state.
    Raises ValueError where shapes or options disagree. Source: arXiv 2501.13428, LSSA and LSSAR; the paper's first
    division of LSSAR cancels and is left out.
    """
    config = Config(**options)
    check_packed(q, k, v, lengths)
    config.check_head_dim(q.shape[-1])
    if config.qk_norm:
        q, k = normalise(q), normalise(k)
    o = attend(q, k, v, lengths, config, initial_state, backend)
    if not return_state:
        return o, None
    k, v, prefixes = with_prefixes(k, v, lengths, initial_state)
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    pairs = zip(k[0].split(totals), v[0].split(totals), strict=True)
    return o, tuple(_seen_later(pair, config.window) for pair in pairs)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    config: Config,
    initial_state: PrefixState | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`softplus_attention` of queries and keys that are normalised already (where the options say so)."""
    if config.unfused and backend == "fused":
        raise ValueError(
            f"softplus: backend='fused' has no kernels for other values of {', '.join(config.unfused)}; "
            "use backend='auto' or 'chunked'"
        )
    choice = choose_backend(OPERATOR, backend, q)
    if initial_state is not None:
        initial_state = tuple(_seen_later(pair, config.window) for pair in initial_state)
    k, v, prefixes = with_prefixes(k, v, lengths, initial_state)
    if choice == "reference":
        return softplus_reference(q, k, v, lengths, prefixes, config)
    if choice == "chunked" or config.unfused:
        return softplus_chunked(q, k, v, lengths, prefixes, config)
    from farspan.kernels.softplus.fused import softplus_fused

    return softplus_fused(q, k, v, lengths, prefixes, config)


def _seen_later(pair: tuple[torch.Tensor, torch.Tensor], window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a document that the tokens after it can see."""
    keys, values = pair
    first = 0 if window is None else max(0, keys.shape[0] - window + 1)
    return keys[first:], values[first:]
