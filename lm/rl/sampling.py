"""Sampling whose noise belongs to the response: the same tokens on any number of ranks, in any batch, after a resume.

Token t of response i is argmax(logits / temperature + Gumbel noise), which is a draw from the softmax, and the noise is
a hash of (seed of the response, t, token). No generator is drawn from, so nothing has to be put back either.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

# SplitMix64 (Steele, Lea and Flood 2014): the golden ratio's increment and the two multipliers of its finalizer.
_STEP, _FIRST, _SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def response_seed(*numbers: int | str) -> int:
    """A seed of a response, from what names it: the run's seed, the step, the number of the response."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), signed=True)


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    *,
    tokens: int,
    temperature: float,
    seeds: list[int],
    ends: list[int],
    padding: int,
    rows: int | None = None,
) -> list[list[int]]:
    """Responses to tokenized prompts, each up to and with its first end-of-text token, or of `tokens` tokens.

    temperature: 0 takes the likeliest token. seeds: one per prompt, see `response_seed`. ends: tokens that end a
    response. rows: prompts at once. The model is left in the mode that it was in.
    """
    found: list[list[int]] = []
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(prompts), rows or len(prompts) or 1):
            part = slice(first, first + (rows or len(prompts)))
            found += _batch(model, prompts[part], seeds[part], tokens, temperature, ends, padding)
    finally:
        model.train(was_training)
    return found


def _batch(model, prompts, seeds, tokens, temperature, ends, padding) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, pad_token_id=padding, eos_token_id=ends, disable_compile=True
    )
    noise = [Noise(seeds, width, temperature)] if temperature > 0 else []
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList(noise)
    )
    return [_until_end(row, set(ends)) for row in output[:, width:].tolist()]


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: last + 1]


class Noise(LogitsProcessor):
    """logits / temperature + Gumbel noise, fp32; for rows whose seeds are given, behind prompts of `width` columns."""

    def __init__(self, seeds: list[int], width: int, temperature: float) -> None:
        self._seeds, self._width, self._temperature = torch.tensor(seeds, dtype=torch.int64), width, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [rows, vocabulary]."""
        place = torch.tensor(input_ids.shape[1] - self._width, device=scores.device)
        rows = _mixed(self._seeds.to(scores.device) + place * _STEP)
        words = _mixed(rows[:, None] + torch.arange(1, scores.shape[1] + 1, device=scores.device) * _STEP)
        uniform = ((words >> 40 & 0xFFFFFF).float() + 0.5) / 2**24
        return scores.float() / self._temperature - torch.log(-torch.log(uniform))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64, whose products wrap; shifts are made logical by a mask."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * _FIRST
    x = (x ^ (x >> 27 & 2**37 - 1)) * _SECOND
    return x ^ (x >> 31 & 2**33 - 1)
