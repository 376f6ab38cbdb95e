"""How far back heads look, and which tokens later ones come back to, without an attention map (arXiv 2510.13554)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from farspan.kernels.attention_statistics.bands import band_statistics, future_rows
from farspan.kernels.attention_statistics.chunked import SoftmaxMap
from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments
from farspan.kernels.attention_statistics.reference import map_of, softmax_map, statistics_of_map
from farspan.kernels.operator import Operator, choose_backend, declare, own_precision

__all__ = ["EffectiveMap", "HeadStatistics", "Moments", "attention_statistics", "effective_statistics"]

OPERATOR = declare(
    Operator(
        "attention_statistics",
        per_head=("q", "k", "lse"),
        replicated=("rows", "pieces", "documents", "window", "softcap", "waad_window", "horizon"),
    )
)


class HeadStatistics(NamedTuple):
    """By head, [T, H], fp32 (float64 for float64 inputs); without gradients.

    distance: mean backward distance of the rows, 0 outside of them. waad: windowed average attention distance, 0
    outside the rows. fai: future attention influence of the rows, 0 where count is. count: int64 [T], |T(s)|, 0 outside
    the rows. lse: of the scores of every token, None where weights are not a softmax.
    """

    distance: torch.Tensor
    waad: torch.Tensor
    fai: torch.Tensor
    count: torch.Tensor
    lse: torch.Tensor | None = None


@torch.no_grad()
@own_precision
def attention_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    pieces: tuple[int, ...],
    *,
    documents: tuple[int, ...] | None = None,
    window: int | None = None,
    scale: torch.Tensor | float | None = None,
    softcap: float | None = None,
    lse: torch.Tensor | None = None,
    waad_window: int = 10,
    horizon: tuple[int, int] = (10, 100),
    backend: str = "auto",
) -> HeadStatistics:
    """Statistics of causal softmax attention, a[t, s] = softmax_s(scale q_t k_s), by head and in linear memory.

        distance_t = sum_s a[t, s] (t - s)            WAAD_t = sum_s a[t, s] min(t - s, W)         for rows t
        FAI_s = mean of a[t, s] over T(s)             T(s) = rows t of the document, s + lo <= t <= s + hi

    q: [1, T, H, D]; k: [1, T, Hk, D] with H a multiple of Hk (head h reads key head h // (H / Hk)), as they meet in the
    scores: rotated and normed; any float dtype, scores and sums in fp32 or wider.
    rows: bool [T], the tokens of responses; keys before them count, rows of prompts do not.
    pieces: tokens of the runs that attention does not leave. documents: what pieces make up, for T(s); pieces if None.
    window: keys that a token sees, itself included. scale: a number or [H]; D ** -0.5 when None. softcap: scores become
    softcap tanh(score / softcap). lse: [T, H], of the scores, where the layer has it: saves the chunked form a third.
    waad_window: W, at least 1. horizon: lo and hi, 0 <= lo <= hi.
    Raises ValueError where shapes or numbers disagree. Source: arXiv 2510.13554, sections 3.1 and 3.2.
    """
    documents = pieces if documents is None else documents
    _check(q, k, rows, pieces, documents, window, lse, waad_window, horizon)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_backend(OPERATOR, backend, q)
    if choice == "fused":
        from farspan.kernels.attention_statistics.fused import statistics_fused

        distance, waad, sums, lse = statistics_fused(q, k, rows, pieces, window, scale, softcap, waad_window, horizon)
        count = future_rows(rows, documents, horizon)
        return HeadStatistics(distance, waad, _mean(sums, count), count, lse)
    if choice == "reference":
        a, lse = softmax_map(q, k, pieces, window, scale, softcap)
        return HeadStatistics(*statistics_of_map(a, rows, documents, waad_window, horizon), lse)
    effective = SoftmaxMap(q, k, pieces, documents, window, scale, softcap, lse)
    return _chunked(effective, rows, waad_window, horizon)._replace(lse=effective.lse)


@torch.no_grad()
@own_precision
def effective_statistics(
    effective: EffectiveMap,
    rows: torch.Tensor,
    *,
    waad_window: int = 10,
    horizon: tuple[int, int] = (10, 100),
    backend: str = "auto",
) -> HeadStatistics:
    """The same of any map that fulfils the contract of `EffectiveMap`, its rows divided by their mass.

    backend: "reference" writes the map out; anything else takes blocks, on any device.
    """
    check_numbers(waad_window, horizon)
    if backend == "reference":
        return HeadStatistics(*statistics_of_map(map_of(effective), rows, effective.documents, waad_window, horizon))
    return _chunked(effective, rows, waad_window, horizon)


def _chunked(effective: EffectiveMap, rows: torch.Tensor, waad_window: int, horizon: tuple[int, int]) -> HeadStatistics:
    moments = effective.moments()
    waad, sums = band_statistics(effective, rows, moments.mass, waad_window, horizon)
    count = future_rows(rows, effective.documents, horizon)
    return HeadStatistics(moments.distance * rows[:, None], waad, _mean(sums, count), count)


def _mean(sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """FAI of the sums over T(s); columns that are no rows have a count of 0."""
    return torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], 0.0)


def check_numbers(waad_window: int, horizon: tuple[int, int]) -> None:
    """Raise ValueError for a W or a horizon that means nothing."""
    if waad_window < 1:
        raise ValueError(f"waad_window={waad_window} must be at least 1 token")
    if len(horizon) != 2 or not 0 <= horizon[0] <= horizon[1]:
        raise ValueError(f"horizon={tuple(horizon)} must be two numbers of tokens, 0 <= first <= last")


def _check(q, k, rows, pieces, documents, window, lse, waad_window, horizon) -> None:
    check_numbers(waad_window, horizon)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}"
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != 1 or k.shape[:2] != q.shape[:2]:
        raise ValueError(f"expected packed [1, time, heads, head_dim] tensors, got {shapes}")
    if k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"shapes disagree: {shapes}")
    if rows.dtype != torch.bool or rows.shape != q.shape[1:2]:
        raise ValueError(f"rows are {rows.dtype} {list(rows.shape)}; give bool [{q.shape[1]}], true for responses")
    if lse is not None and lse.shape != q.shape[1:3]:
        raise ValueError(f"lse is {list(lse.shape)}; give [time, heads], {list(q.shape[1:3])}")
    for name, lengths in (("pieces", pieces), ("documents", documents)):
        if sum(lengths) != q.shape[1] or min(lengths, default=0) < 1:
            raise ValueError(f"{name} of {lengths[:8]} tokens sum to {sum(lengths)}, the row has {q.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1: a token sees itself")
