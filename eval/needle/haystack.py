"""Haystacks: units of filler text, needles placed among them at a depth in tokens, prompts filled to the token.

Everything is measured with the tokenizer of the model, on the text that the model will read. Tokens are not additive
where texts are joined, so a sum of counts only guesses how many units fit; the prompt itself is tokenised to decide.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np

from farspan.eval.needle import words

_SENTENCE = re.compile(r".+?(?:[.!?]+[\"')\]]*\s+|\n\s*\n|\Z)", re.DOTALL)
_BLOCK = 64
_SHORT = 4  # sentences at most that top up a prompt
FULL = 0.97  # share of the budget below which a prompt is topped up with short sentences


class LengthTooSmall(ValueError):
    """A task whose question and needles alone do not fit a length; `needed` is the shortest that they fit."""

    def __init__(self, task: str, length: int, needed: int) -> None:
        super().__init__(f"{task} does not fit into length={length} tokens; use at least {needed}")
        self.task, self.length, self.needed = task, length, needed


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text, special tokens included. ids: their ids; ends: int64 [T], the character after each."""

    ids: list[int]
    ends: np.ndarray

    def before(self, character: int) -> int:
        """Tokens that end at this character or before it."""
        return int(np.searchsorted(self.ends, character, side="right"))


def encode(tokenizer, text: str) -> Encoded:
    """A prompt as a model gets it: with the special tokens that the tokenizer adds, without one that ends a text.

    tokenizer: a fast tokenizer of transformers (it has to say which characters a token covers)
    """
    both = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    ids, ends = both["input_ids"], np.asarray([end for _, end in both["offset_mapping"]], np.int64)
    if ids and ids[-1] == tokenizer.eos_token_id and ends[-1] == 0:  # a special token covers no character
        ids, ends = ids[:-1], ends[:-1]
    return Encoded(ids, ends)


@dataclass(frozen=True)
class Prompt:
    """A prompt and where its parts are, in characters of `text`.

    head, context, tail, lead: the parts; `text` is all of them. needles: the inserted sentences (start, end) in the
    order of the text. first: which of them is the first that is asked for; None without needles.
    """

    head: str
    context: str
    tail: str
    lead: str
    needles: tuple[tuple[int, int], ...] = ()
    first: int | None = None

    @property
    def input(self) -> str:
        return self.head + self.context + self.tail

    @property
    def text(self) -> str:
        return self.input + self.lead

    def needle_tokens(self, encoded: Encoded) -> list[int]:
        """The token at which each needle begins."""
        return [encoded.before(start) for start, _ in self.needles]

    def depth(self, encoded: Encoded) -> float | None:
        """Percent of the haystack's tokens, needles not counted, that are before the first asked needle."""
        if self.first is None:
            return None
        at = encoded.before
        sizes = [at(end) - at(start) for start, end in self.needles]
        begin, end = at(len(self.head)), at(len(self.head) + len(self.context))
        above = at(self.needles[self.first][0]) - begin - sum(sizes[: self.first])
        total = end - begin - sum(sizes)
        return 100 * above / total if total > 0 else 0.0


class Haystack:
    """Units of filler text, drawn when they are asked for: the first n are the same whatever was asked before.

    units: their texts in order, each with the white space that follows it; they may end
    joint: what separates a needle from the units
    short: sentences that fill what is left where another unit is too long
    """

    def __init__(self, units: Iterator[str], joint: str, short: Sequence[str] = ()) -> None:
        self._source, self._units = units, []
        self.joint, self.short = joint, [sentence + joint for sentence in short]

    def first(self, n: int) -> list[str]:
        """The first n units, or all where there are fewer."""
        self._units.extend(islice(self._source, max(0, n - len(self._units))))
        return self._units[:n]

    def cumulative(self, tokenizer, tokens: int) -> np.ndarray:
        """Tokens before each boundary between units, int64 [n + 1], for more units than `tokens` tokens hold.

        Fewer only where there are no more. Two tokenisations, unless the first block of units is unlike the others.
        """
        n = _BLOCK
        while True:
            units = self.first(n)
            encoded = encode(tokenizer, "".join(units))
            ends = np.cumsum([0, *map(len, units)])
            counts = np.searchsorted(encoded.ends, ends, side="right") - encoded.before(0)
            # Joints with the rest of the prompt may save a token each: the surplus is more than they can.
            if len(units) < n or counts[-1] > 1.03 * tokens + _BLOCK:
                return counts
            n = max(n + _BLOCK, int((1.05 * tokens + 2 * _BLOCK) * n / max(1, counts[-1])))

    def with_needles(self, n: int, short: int, needles: Sequence[str], at: Sequence[int]) -> tuple[str, list]:
        """The first n units and the first `short` short sentences, with needle i before unit at[i] (ascending).

        Returns the text, without white space at its end, and (start, end) of every needle in it.
        """
        units = [*self.first(n), *self.short[:short]]
        at = [len(units) if i == n else i for i in at]  # the last boundary is the end, after the short sentences
        text, spans, begin = [], [], 0
        size = 0

        def add(part: str) -> None:
            nonlocal size
            text.append(part)
            size += len(part)

        for needle, boundary in zip(needles, at, strict=True):
            before = "".join(units[begin:boundary])
            if before and not before.endswith((self.joint, "\n")):
                before = before.rstrip(" ") + self.joint
            add(before)
            start = size
            add(needle + self.joint)
            spans.append((start, size))
            begin = boundary
        add("".join(units[begin:]))
        whole = "".join(text).rstrip()
        return whole, [(start, min(end, len(whole))) for start, end in spans]


def haystack(kind: str, rng: np.random.Generator, forbidden: Sequence[str], needles: Iterator[str] | None) -> Haystack:
    """Units of a kind: "noise", "prose" or "needle" (drawn from `needles`, sentences without end).

    rng: for the units only. forbidden: asked keys and values; a unit that contains one is left out.
    A unit of noise is one sentence of its line, so that prompts and depths are exact to a few tokens.
    """
    if kind == "noise":
        line = [sentence + ("\n" if i == len(words.NOISE) - 1 else " ") for i, sentence in enumerate(words.NOISE)]
        return Haystack(cycle(line), "\n")
    allowed = functools.partial(filter, lambda unit: not contains_any(unit, forbidden))
    if kind == "prose":
        short = words.short_prose(rng, _SHORT)
        return Haystack((sentence + " " for sentence in allowed(words.prose(rng))), " ", short)
    assert kind == "needle" and needles is not None, kind
    return Haystack((needle + "\n" for needle in allowed(needles)), "\n")


def file_haystack(path: str | Path, rng: np.random.Generator, forbidden: Sequence[str]) -> Haystack:
    """Sentences of a local text from a random one on, going on at its beginning after its end, each once.

    Raises ValueError for a text that cannot be read or contains one of `forbidden` (asked keys and values).
    """
    sentences, lowered = _sentences(Path(path))
    if found := next((text for text in forbidden if text.lower() in lowered), None):
        raise ValueError(
            f"the haystack {path} contains {found!r}, which is asked for; use another text or another seed"
        )
    start = int(rng.integers(len(sentences)))
    return Haystack(chain(sentences[start:], sentences[:start]), " ")


@functools.lru_cache(maxsize=2)
def _sentences(path: Path) -> tuple[list[str], str]:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the haystack {path} cannot be read as UTF-8 text: {error}") from error
    if not text:
        raise ValueError(f"the haystack {path} is empty; use a text with sentences")
    return _SENTENCE.findall(text + "\n"), text.lower()


def contains_any(text: str, forbidden: Sequence[str]) -> bool:
    """Whether one of the strings occurs in the text, in upper or lower case."""
    lowered = text.lower()
    return any(other.lower() in lowered for other in forbidden)


def boundaries(cumulative: np.ndarray, fractions: Sequence[float], anchor: int) -> list[int]:
    """The boundary between units that is nearest to each fraction of their tokens, no two alike if there are enough.

    cumulative: int [n + 1], tokens before each boundary. fractions: ascending, in [0, 1]. Number `anchor` of them gets
    its nearest boundary; the others keep their order around it.
    """
    last = len(cumulative) - 1
    target = np.asarray(fractions) * cumulative[-1]
    right = np.clip(np.searchsorted(cumulative, target), 1, max(last, 1)) if last else np.zeros(len(target), int)
    left = np.maximum(right - 1, 0)
    nearer_left = target - cumulative[left] <= cumulative[np.minimum(right, last)] - target
    at = [int(i) for i in np.where(nearer_left, left, right)]
    for i in range(anchor + 1, len(at)):
        at[i] = min(max(at[i], at[i - 1] + 1), last)
    for i in range(anchor - 1, -1, -1):
        at[i] = max(min(at[i], at[i + 1] - 1), 0)
    return at


def largest_fitting(
    build: Callable[[int], Prompt], tokenizer, budget: int, guess: int, most: int | None = None
) -> tuple[int, Prompt, Encoded]:
    """The largest number of units whose prompt has at most `budget` tokens, the prompt, and its tokens.

    build: number of units -> prompt. guess: where to begin; a good one needs three tokenisations. most: units that
    exist (None: as many as wanted).
    Secant steps inside a shrinking bracket: ends also where tokens do not grow evenly. Raises `Overfull`, which the
    caller turns into `LengthTooSmall`, where the prompt without units does not fit.
    """
    low, high = 0, None if most is None else most + 1
    best = build(0)
    tokens = encode(tokenizer, best.text)
    if len(tokens.ids) > budget:
        raise Overfull(len(tokens.ids))
    n = guess
    while high is None or high - low > 1:
        n = max(n, low + 1) if high is None else min(max(n, low + 1), high - 1)
        prompt = build(n)
        encoded = encode(tokenizer, prompt.text)
        cost = max(0.5, (len(encoded.ids) - len(tokens.ids)) / (n - low))
        if len(encoded.ids) <= budget:
            low, best, tokens = n, prompt, encoded
        else:
            high = n
        n = low + int((budget - len(tokens.ids)) / cost)
    return low, best, tokens


class Overfull(Exception):
    """The tokens of a prompt without any haystack, which are more than the budget."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens
