"""What is logged of the credit of a rollout."""

from __future__ import annotations

from typing import Any

import torch

from farspan.lm.rl.credit import Weights
from farspan.lm.rl.statistics import Statistics

_QUANTILES = (0.1, 0.5, 0.9)


def credit_metrics(
    made: Weights,
    mask: torch.Tensor,
    given: dict[str, Any],
    statistics: Statistics | None,
    last_heads: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
) -> dict[str, float]:
    """Averages over the responses of a batch, NaN where there is nothing to average.

    gamma: mean over tokens; amplified: share of tokens with gamma > 1; tokens_*: chosen per response; dominated: share
    of the anchors; moved: share of the bonus that went to intros. waad and fai: mean and quantiles over the tokens
    where they are defined. distance_*: mean backward distance of the two groups of heads. heads_kept: overlap (Jaccard)
    of both groups with those of the rollout before.
    """
    mask = mask.bool()
    tokens, responses = mask.sum(), len(mask)
    bonus = (made.gamma - 1)[mask]
    metrics = {
        "gamma": made.gamma[mask].sum() / tokens,
        "amplified": (bonus > 0).sum() / tokens,
    }
    if statistics is None:
        return _plain(metrics)
    anchors, dominated = made.anchors.sum(), made.dominated.sum()
    metrics |= {
        "tokens_local": made.local.sum() / responses,
        "tokens_anchor": anchors / responses,
        "tokens_dominated": dominated / responses,
        "tokens_intro": made.intros.sum() / responses,
        "dominated": dominated / anchors,
        "moved": 1 - ((made.gamma - 1) * (made.anchors & ~made.intros)).sum() / bonus.sum() if anchors else anchors / 0,
        "distance_local": statistics.head_distance.gather(1, statistics.local_heads).mean(),
        "distance_global": statistics.head_distance.gather(1, statistics.global_heads).mean(),
    }
    for name, where in (("waad", mask), ("fai", mask & (given["fai_count"] > 0))):
        values = given[name][where].float()
        metrics[name] = values.mean()
        for share in _QUANTILES:
            metrics[f"{name}_{share:.0%}"] = values.quantile(share) if len(values) else values.mean()
    if last_heads is not None:
        kept = [_overlap(a, b) for a, b in zip(last_heads.tolist(), heads.tolist(), strict=True)]
        metrics["heads_kept"] = sum(kept) / len(kept)
    return _plain(metrics)


def _overlap(before: list[int], now: list[int]) -> float:
    return len(set(before) & set(now)) / len(set(before) | set(now))


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
