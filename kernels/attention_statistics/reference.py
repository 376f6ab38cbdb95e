"""The statistics by their definitions, from whole attention maps, one document at a time."""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import DEAD_MASS, EffectiveMap


def softmax_map(
    q: torch.Tensor,
    k: torch.Tensor,
    pieces: tuple[int, ...],
    window: int | None,
    scale: torch.Tensor | float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """a [H, T, T] and lse [T, H] of a whole packed row; q [1, T, H, D], k [1, T, Hk, D], in fp32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k[0].repeat_interleave(q.shape[2] // k.shape[2], dim=1).to(wide)
    scores = torch.einsum("ihd,jhd->hij", q[0].to(wide), keys)
    scores = scores * (scale.to(wide)[:, None, None] if isinstance(scale, torch.Tensor) else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    piece = torch.arange(len(pieces)).repeat_interleave(torch.tensor(pieces)).to(q.device)
    back = _back(q.shape[1], q.device)
    hidden = (back < 0) | (piece[:, None] != piece)
    if window is not None:
        hidden |= back >= window
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1).t()


def statistics_of_map(
    a: torch.Tensor, rows: torch.Tensor, documents: tuple[int, ...], waad_window: int, horizon: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """distance [T, H], WAAD [T, H], FAI [T, H] and |T(s)| [T] of maps a [H, T, T] of a packed row.

    distance_t = sum_s a (t - s)        WAAD_t = sum_s a min(t - s, W)        for t in R, else 0
    FAI_s = mean of a[t, s] over T(s) = {t in R: s + lo <= t <= s + hi, in the document of s}, for s in R, else 0
    Rows are divided by their mass; one below 1e-6 counts as 0.
    """
    mass = a.sum(-1, keepdim=True)
    a = torch.where(mass < DEAD_MASS, 0.0, a / mass)
    back = _back(a.shape[1], a.device)
    inside = rows.to(a.dtype)
    distance = inside * (a * back).sum(-1)
    waad = inside * (a * back.clamp(max=waad_window)).sum(-1)
    document = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).to(a.device)
    ahead = (back >= horizon[0]) & (back <= horizon[1]) & (document[:, None] == document)
    ahead &= rows[:, None] & rows
    count = ahead.sum(0)
    fai = (a * ahead).sum(1) / count.clamp(min=1)
    return distance.t(), waad.t(), fai.t(), count


def map_of(effective: EffectiveMap) -> torch.Tensor:
    """The whole of an effective map, [H, T, T]; its moments are computed before, as blocks may need them."""
    effective.moments()
    whole = slice(0, effective.tokens)
    return effective.block(whole, whole)


def _back(tokens: int, device: torch.device) -> torch.Tensor:
    """int64 [T, T]: t - s."""
    at = torch.arange(tokens, device=device)
    return at[:, None] - at
