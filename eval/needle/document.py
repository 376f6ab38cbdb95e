"""What the documents of all tasks share: the seed, the room for the answer, filling, and the schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from farspan.eval.needle.haystack import (
    FULL,
    Encoded,
    Haystack,
    LengthTooSmall,
    Overfull,
    Prompt,
    boundaries,
    encode,
    largest_fitting,
)
from farspan.eval.needle.tasks import CHOICES, VERSION, TaskSpec

KIND_NAMES = {"word": "word", "number": "number", "uuid": "code"}
_NEEDLE = re.compile(rf"The secret (?:{'|'.join(KIND_NAMES.values())}) of (\S+) is (\S+)\.")
_SPARE_TOKENS = 8  # for the space before an answer and what a model writes around it
_ROUND_TOKENS = 16


def needle(kind: str, key: str, value: str) -> str:
    """The sentence that says the value of a key. kind: of the value, as in `KIND_NAMES`."""
    return f"The secret {KIND_NAMES[kind]} of {key} is {value}."


def needle_pairs(text: str) -> list[tuple[str, str]]:
    """(key, value) of every needle in a text."""
    return _NEEDLE.findall(text)


def uid(spec: TaskSpec, length: int, depth: float | None, index: int) -> str:
    """The seed of one document as text: nothing but these decides what is drawn."""
    depth_text = "none" if depth is None else f"{depth:g}"
    return f"needle/v{VERSION}|{spec.seed}|{spec.seed_name}|{length}|{depth_text}|{index}"


def generator(key: str, stream: str = "") -> np.random.Generator:
    """The random numbers of a document, by its `uid`. `stream` names further, independent ones."""
    digest = blake2b(f"{key}|{stream}".encode() if stream else key.encode(), digest_size=8).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def answer_tokens(tokenizer, spec: TaskSpec, outputs: Sequence[str]) -> int:
    """Tokens kept free for the answer: the longest reference times their number (or all as one list, where that is
    longer), 8 more, rounded up to 16; `spec.gen_tokens` overrides it."""
    if spec.gen_tokens is not None:
        return spec.gen_tokens
    expected = outputs[:1] if spec.metric == "part" else outputs
    sizes = tokenizer([*(f" {o}" for o in outputs), " " + ", ".join(expected)], add_special_tokens=False)["input_ids"]
    needed = max(max(map(len, sizes[:-1])) * len(expected), len(sizes[-1])) + _SPARE_TOKENS
    return -(-needed // _ROUND_TOKENS) * _ROUND_TOKENS


@dataclass(frozen=True)
class Filled:
    """A prompt of the largest size that fits, its tokens, and the number of its units."""

    prompt: Prompt
    encoded: Encoded
    units: int


def fill(
    spec: TaskSpec, tokenizer, length: int, budget: int, build: Callable[[int], Prompt], guess: int, most=None
) -> Filled:
    """`largest_fitting` for a task. Raises LengthTooSmall where the prompt without units does not fit."""
    try:
        units, prompt, encoded = largest_fitting(build, tokenizer, budget, guess, most)
    except Overfull as overfull:
        raise LengthTooSmall(spec.name, length, overfull.tokens + length - budget) from None
    return Filled(prompt, encoded, units)


def fill_haystack(
    spec: TaskSpec,
    tokenizer,
    length: int,
    budget: int,
    hay: Haystack,
    parts: tuple[str, str, str],
    needles: Sequence[str],
    fractions: Sequence[float],
    first: int,
    finite: bool = False,
) -> Filled:
    """Fill `budget` tokens with units of `hay` and needles at fractions (ascending, in [0, 1]) of its tokens.

    parts: head, tail and lead-in of the prompt. first: the needle asked for first, which gets the exact place. finite:
    the haystack ends (a file). Raises LengthTooSmall, and ValueError where a finite haystack is too short.
    """
    head, tail, lead = parts

    def prompt(n: int, short: int, cumulative: np.ndarray) -> Prompt:
        at = boundaries(cumulative, fractions, first)
        context, spans = hay.with_needles(n, short, needles, at)
        return Prompt(head, context, tail, lead, tuple((len(head) + a, len(head) + b) for a, b in spans), first)

    free = budget - len(encode(tokenizer, prompt(0, 0, np.zeros(1, np.int64)).text).ids)
    if free < 0:
        raise LengthTooSmall(spec.name, length, length - free)
    counts = hay.cumulative(tokenizer, free)

    def build(n: int, short: int = 0) -> Prompt:
        return prompt(n, short, counts[: n + 1])

    guess = int(np.searchsorted(counts, free, side="right")) - 1
    most = len(counts) - 1  # more than fit, or all that there are
    filled = fill(spec, tokenizer, length, budget, build, guess, most)
    for short in range(1, len(hay.short) + 1):
        if len(filled.encoded.ids) >= FULL * budget:
            break
        fuller = build(filled.units, short)
        encoded = encode(tokenizer, fuller.text)
        if len(encoded.ids) > budget:
            break
        filled = Filled(fuller, encoded, filled.units)
    if finite and filled.units == most and len(filled.encoded.ids) < FULL * budget:
        raise ValueError(
            f"{spec.name}: the text of {spec.file} gives {len(filled.encoded.ids):,} of {budget:,} tokens; "
            f"use a longer one, or a length of at most {len(filled.encoded.ids) + length - budget:,}"
        )
    return filled


def spread(depth: float, others: int, rng: np.random.Generator) -> tuple[list[float], list[int], int]:
    """Where needles go: the first at `depth` percent, the others one in each of as many equal parts of the haystack.

    Returns the fractions, ascending; which needle (0 is the first) is at each of them, in random order; and the place
    of needle 0 among them.
    """
    fractions = [depth / 100, *((i + rng.random()) / others for i in range(others))]
    which = [0, *(int(i) + 1 for i in rng.permutation(others))]
    order = sorted(range(others + 1), key=fractions.__getitem__)
    return [fractions[i] for i in order], [which[i] for i in order], order.index(0)


def finish(
    spec: TaskSpec, key: str, length: int, depth: float | None, budget: int, outputs: Sequence[str], filled: Filled
) -> dict[str, Any]:
    """The document, as `generate.document` describes it. Raises LengthTooSmall where mc lacks wrong choices."""
    prompt, encoded = filled.prompt, filled.encoded
    document = {
        "uid": key,
        "task": spec.name,
        "protocol": spec.protocol,
        "input": prompt.input,
        "gen_prefix": prompt.lead,
        "outputs": list(outputs),
        "metric": spec.metric,
        "max_length": length,
        "gen_tokens": length - budget,
        "prompt_tokens": len(encoded.ids),
        "depth": depth,
        "depth_actual": prompt.depth(encoded),
        "needle_tokens": prompt.needle_tokens(encoded),
        "fill": len(encoded.ids) / budget,
        "version": VERSION,
    }
    if spec.protocol == "mc":
        wrong = [value for _, value in needle_pairs(prompt.context) if value not in outputs]
        if len(wrong) < CHOICES - 1:
            # a needle haystack of fewer than three units: what is there already grows by as many needles at most
            longest = max(1, len(encoded.ids) // (len(wrong) + 1))
            raise LengthTooSmall(spec.name, length, length + (CHOICES - 1 - len(wrong)) * longest)
        document |= choices(outputs[0], wrong, generator(key, "choices"))
    return document


def choices(right: Any, wrong: Sequence[Any], rng: np.random.Generator) -> dict[str, Any]:
    """`choices` (the right one and three of the wrong ones, shuffled) and `gold`, the index of the right one."""
    drawn = [wrong[i] for i in rng.choice(len(wrong), CHOICES - 1, replace=False)]
    gold = int(rng.integers(CHOICES))
    return {"choices": [*drawn[:gold], right, *drawn[gold:]], "gold": gold}
