"""One response under the lens: WAAD, FAI and credit of each of its tokens, and how the first two go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from farspan.lm.rl.credit import Weights, weights
from farspan.lm.rl.spec import CreditSpec
from farspan.lm.rl.statistics import Statistics, attention_statistics

PEAK_SHARE = 0.25  # of the tokens: a peak is a local maximum among the highest so many


@dataclass(frozen=True)
class Inspection:
    """A response of n tokens.

    prompt: its text. tokens: text of each token of the response. waad: n numbers, 0 to `window` tokens. fai: n numbers,
    0 to 1, None at the end, where no later token is in the horizon. gamma: n weights. preplan, anchor, dominated,
    introduces: whether the strategy chose the token, whether an anchor's bonus was shared, and with whom.
    waad_peaks, fai_peaks: local maxima among the highest quarter. pool: (layer, head) of the heads that were ranked;
    distances: their mean backward distance in tokens, local_heads and global_heads: indices into it.
    """

    prompt: str
    tokens: list[str]
    waad: list[float]
    fai: list[float | None]
    gamma: list[float]
    preplan: list[bool]
    anchor: list[bool]
    dominated: list[bool]
    introduces: list[bool]
    waad_peaks: list[bool]
    fai_peaks: list[bool]
    pool: list[tuple[int, int]]
    distances: list[float]
    local_heads: list[int]
    global_heads: list[int]
    credit: CreditSpec

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.pool})

    def distance_of(self, heads: list[int]) -> float:
        """Mean backward distance of a group of heads, in tokens."""
        return sum(self.distances[head] for head in heads) / len(heads)

    def rhythm(self) -> tuple[float, float] | None:
        """The share of FAI peaks at a WAAD peak or right after one, and what it would be by chance; None without."""
        after = [here or before for here, before in zip(self.waad_peaks, [False, *self.waad_peaks], strict=False)]
        at = [one for one, peak in zip(after, self.fai_peaks, strict=True) if peak]
        defined = [one for one, value in zip(after, self.fai, strict=True) if value is not None]
        return (sum(at) / len(at), sum(defined) / len(defined)) if at else None


def inspect(
    model: Any, tokenizer: Any, prompt_ids: list[int], response_ids: list[int], credit: CreditSpec
) -> Inspection:
    """Look at the response of a policy to a prompt; ids without padding.

    Raises ValueError for a model without attention statistics, and for a response of less than two tokens.
    """
    if len(response_ids) < 2:
        raise ValueError(f"the response has {len(response_ids)} tokens; there is no rhythm in less than 2")
    ids = torch.tensor([[*prompt_ids, *response_ids]], device=next(model.parameters()).device)
    response = torch.zeros_like(ids)
    response[:, len(prompt_ids) :] = 1
    statistics = attention_statistics(
        *(model, ids, torch.ones_like(ids), response),
        layers=credit.layers,
        window=credit.waad_window,
        horizon=credit.fai_horizon,
        head_fraction=credit.head_fraction,
    )
    values = {name: getattr(statistics, name) for name in ("waad", "fai", "fai_count")}
    made = weights(credit, response, **values, **_controls(model, ids, len(prompt_ids), credit))
    return _inspection(tokenizer, prompt_ids, response_ids, statistics, made, credit)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token, spaces and all: what it adds to the text of those before it."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append(text[len(before) :] if text.startswith(before) else "\N{REPLACEMENT CHARACTER}")
        before = text
    return found


def peaks(values: list[float | None], share: float = PEAK_SHARE) -> list[bool]:
    """Local maxima among the highest `share` of the values that are defined; of equal neighbours the first."""
    defined = sorted((value for value in values if value is not None), reverse=True)
    if not defined:
        return [False] * len(values)
    least = defined[max(0, int(share * len(defined) + 0.5) - 1)]

    def of(index: int) -> float:
        value = values[index] if 0 <= index < len(values) else None
        return float("-inf") if value is None else value

    return [
        value is not None and value >= least and value > 0 and of(i - 1) < value >= of(i + 1)
        for i, value in enumerate(values)
    ]


@torch.no_grad()
def _controls(model: Any, ids: torch.Tensor, prompt: int, credit: CreditSpec) -> dict[str, Any]:
    """What the controls among the strategies take beside attention."""
    if credit.strategy == "random":
        return {"seeds": [0]}
    if credit.strategy != "entropy":
        return {}
    logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].float()
    entropy = torch.zeros(ids.shape, device=ids.device)
    entropy[0, prompt:] = torch.distributions.Categorical(logits=logits).entropy()
    return {"entropy": entropy}


def _inspection(tokenizer, prompt_ids, response_ids, statistics: Statistics, made: Weights, credit) -> Inspection:
    first = len(prompt_ids)

    def own(x: torch.Tensor) -> list:
        return x[0, first:].tolist()

    waad, counts = own(statistics.waad), own(statistics.fai_count)
    fai = [value if count else None for value, count in zip(own(statistics.fai), counts, strict=True)]
    return Inspection(
        prompt=tokenizer.decode(prompt_ids, skip_special_tokens=False),
        tokens=pieces(tokenizer, response_ids),
        waad=waad,
        fai=fai,
        gamma=own(made.gamma),
        preplan=own(made.local),
        anchor=own(made.anchors),
        dominated=own(made.dominated),
        introduces=own(made.intros),
        waad_peaks=peaks(waad),
        fai_peaks=peaks(fai),
        pool=statistics.pool,
        distances=statistics.head_distance[0].tolist(),
        local_heads=statistics.local_heads[0].tolist(),
        global_heads=statistics.global_heads[0].tolist(),
        credit=credit,
    )
