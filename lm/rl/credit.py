"""Per-token credit: from what attention shows of a response to the weight gamma of each of its tokens.

    local     preplan tokens, where a locally focused head's reach changes most
    anchor    tokens that later tokens keep attending to through globally focused heads
    coupled   anchors, with part of a dominated anchor's bonus moved to the preplan before
    uniform, random, entropy   controls: none, random tokens, the tokens of highest entropy

Source: "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization",
arXiv 2510.13554 and its ICML 2026 version. Everything is ranked within one response, counted (never by a quantile,
which takes too many where scores are equal), and no score is normalised. gamma scales the advantage: for gamma > 0 that
is the same as weighting the clipped loss of the token, and no clipping changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.lm.rl.spec import CreditSpec

_LOWEST, _HIGHEST = float("-inf"), float("inf")


@dataclass(frozen=True)
class Weights:
    """gamma: fp32 [B, T], 1 outside the response. Sets of tokens, bool [B, T], empty where the strategy has none:
    local (preplan), anchors, dominated (a part of the anchors), intros (where their bonus went).
    """

    gamma: torch.Tensor
    local: torch.Tensor
    anchors: torch.Tensor
    dominated: torch.Tensor
    intros: torch.Tensor


@torch.no_grad()
def weights(
    credit: CreditSpec,
    mask: torch.Tensor,
    *,
    waad: torch.Tensor | None = None,
    fai: torch.Tensor | None = None,
    fai_count: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    seeds: list[int] | None = None,
) -> Weights:
    """The weights of a batch of responses under `credit.strategy`.

    mask: bool [B, T], the tokens that carry loss. waad: fp32 [B, T], windowed average attention distance. fai: fp32
    [B, T], future attention influence; fai_count: int [B, T], rows that it is a mean over, 0 where it is undefined.
    entropy: fp32 [B, T], of the distribution that produced each token (strategy `entropy`). seeds: one number per
    response (strategy `random`). Values outside the mask are never looked at. A response of less than two tokens gets
    1.
    """
    mask = mask.bool()
    none = torch.zeros_like(mask)
    local = anchors = dominated = intros = none
    bonus = credit.gamma_amp - 1.0
    gamma = torch.ones(mask.shape, dtype=torch.float32, device=mask.device)
    if credit.strategy == "random":
        gamma = gamma + bonus * _random(mask, credit.top_fraction, seeds)
    elif credit.strategy == "entropy":
        gamma = gamma + bonus * top(entropy, credit.top_fraction, mask, credit.bottom)
    elif credit.strategy == "local":
        score, defined = delta(_rows(waad, mask, credit.row_shift), mask, credit.delta_mode)
        local = top(score, credit.top_fraction, defined, credit.bottom)
        gamma = gamma + bonus * local
    elif credit.strategy in ("anchor", "coupled"):
        eligible = mask & (fai_count >= credit.fai_min_count)
        anchors = top(fai, credit.top_fraction, eligible, credit.bottom)
        if credit.strategy == "anchor":
            gamma = gamma + bonus * anchors
        else:
            dominated, shares = _couple(_rows(waad, mask, credit.row_shift), anchors, mask, credit)
            intros = shares > 0
            # The terms add: a free anchor may be an intro as well.
            gamma = gamma + bonus * (anchors & ~dominated) + (1 - credit.alpha) * bonus * dominated
            gamma = gamma + credit.alpha * bonus * (intros if credit.intro_count == "set" else shares)
    long_enough = mask.sum(-1, keepdim=True) >= 2
    gamma = torch.where(mask & long_enough, gamma, 1.0)
    if credit.renorm == "mean1":
        mean = (gamma * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        gamma = torch.where(mask & long_enough, gamma / mean, 1.0)
    return Weights(gamma, *(chosen & long_enough for chosen in (local, anchors, dominated, intros)))


def scaled(advantages: torch.Tensor, gamma: torch.Tensor, sign: str = "both") -> torch.Tensor:
    """[B, T]: each response's advantage [B] times its tokens' gamma [B, T], where its sign allows.

    sign: "both" (the camera-ready version), "nonneg" (the first version's text) or "neg".
    """
    per_token = advantages[:, None]
    allowed = {"both": torch.ones_like(per_token, dtype=torch.bool), "nonneg": per_token >= 0, "neg": per_token < 0}
    return per_token * torch.where(allowed[sign], gamma, 1.0)


def top(score: torch.Tensor, fraction: float, eligible: torch.Tensor, bottom: bool = False) -> torch.Tensor:
    """bool [B, T]: in each row floor(fraction * eligible + 1/2) of the eligible tokens, those of largest score.

    Of equal scores the earlier comes first. bottom: of smallest score instead.
    """
    ordered = torch.where(eligible, -score if bottom else score, _LOWEST)
    order = ordered.sort(dim=-1, descending=True, stable=True).indices
    wanted = torch.floor(fraction * eligible.sum(-1, keepdim=True).double() + 0.5)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(eligible).scatter(-1, order, places < wanted) & eligible


def delta(waad: torch.Tensor, mask: torch.Tensor, mode: str = "abs") -> tuple[torch.Tensor, torch.Tensor]:
    """Change of WAAD to the next token, fp32 [B, T], and where it is defined, bool [B, T]: token and next both count.

    mode: "abs", or "drop" for falls alone. The last token of a response has none.
    """
    step = waad - waad.roll(-1, dims=-1)
    step = step.abs() if mode == "abs" else step.clamp(min=0)
    defined = mask & mask.roll(-1, dims=-1)
    defined = torch.cat([defined[:, :-1], torch.zeros_like(defined[:, :1])], dim=-1)
    return torch.where(defined, step, 0.0), defined


def threshold(value: float | str, score: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[B, 1]: a number as it is, or the "median" or "quantile:x" of each row's scores; of two middle ones the lower."""
    if not isinstance(value, str):
        return torch.full_like(score[:, :1], float(value))
    share = 0.5 if value == "median" else float(value.removeprefix("quantile:"))
    ordered = torch.where(where, score, _HIGHEST).sort(dim=-1).values
    place = torch.floor(share * (where.sum(-1, keepdim=True) - 1).clamp(min=0).double()).long()
    return ordered.gather(-1, place)


def peaks(score: torch.Tensor, mask: torch.Tensor, fraction: float = 0.25) -> torch.Tensor:
    """bool [B, T]: local maxima among the highest `fraction` of each row; for pictures and studies, not for credit."""
    inside = torch.where(mask, score, _LOWEST)
    edge = torch.full_like(inside[:, :1], _LOWEST)
    before, after = torch.cat([edge, inside[:, :-1]], -1), torch.cat([inside[:, 1:], edge], -1)
    return top(score, fraction, mask) & (inside >= before) & (inside >= after)


def _couple(
    waad: torch.Tensor, anchors: torch.Tensor, mask: torch.Tensor, credit: CreditSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dominated anchors, bool [B, T], and how many of them have their intro at each token, int [B, T]."""
    step, defined = delta(waad, mask, credit.delta_mode)
    near = waad <= threshold(credit.tau_waad, waad, mask)
    enough = threshold(credit.tau_delta, step, defined)
    best, distance = torch.full_like(step, _LOWEST), torch.zeros(step.shape, dtype=torch.long, device=step.device)
    known = torch.where(defined, step, _LOWEST)
    for back in range(min(credit.k, step.shape[1] - 1), 0, -1):  # the earliest first: it wins where two are equal
        moved = torch.cat([torch.full_like(known[:, :back], _LOWEST), known[:, :-back]], dim=-1)
        better = moved > best
        best, distance = torch.where(better, moved, best), torch.where(better, back, distance)
    dominated = anchors & near & (best >= enough) & (distance > 0)
    places = torch.arange(step.shape[1], device=step.device) - distance
    shares = torch.zeros(step.shape, dtype=torch.long, device=step.device)
    return dominated, shares.scatter_add(-1, places.clamp(min=0), dominated.long())


def _rows(waad: torch.Tensor, mask: torch.Tensor, shift: int) -> torch.Tensor:
    """The row that stands for a token: its own, or (shift -1) that which produced it; the first token keeps its own."""
    if shift == 0:
        return waad
    before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=-1)
    return torch.where(mask & before, waad.roll(1, dims=-1), waad)


def _random(mask: torch.Tensor, fraction: float, seeds: list[int]) -> torch.Tensor:
    """As many tokens of each response as `top` takes, drawn by a generator of its own."""
    score = torch.empty(mask.shape)
    for row, seed in enumerate(seeds):
        score[row] = torch.rand(mask.shape[1], generator=torch.Generator().manual_seed(seed))
    return top(score.to(mask.device), fraction, mask)
