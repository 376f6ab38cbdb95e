"""Documents of the counting tasks: the words that a list repeats most, the coded words that a text repeats most."""

from __future__ import annotations

from itertools import islice
from string import ascii_lowercase
from typing import Any

import numpy as np

from farspan.eval.needle.document import answer_tokens, fill, finish, generator, uid
from farspan.eval.needle.haystack import Prompt
from farspan.eval.needle.tasks import TaskSpec
from farspan.eval.needle.words import coded, distinct, listed

_FREQUENT = 10  # words asked for
_SHORT = 4096  # tokens; a shorter context repeats words less often
_TOKENS_PER_WORD = 8  # only where the search for the size begins
_EXPONENT = 2.0  # rank k of the coded words has a share of k^-2 / zeta(2)
_SHARE = 6 / np.pi**2
_FEWEST = 53  # coded words of a text: from here on rank 4 occurs more often than rank 5
_DOTS = "......"


def common_words_document(spec: TaskSpec, tokenizer, length: int, depth: None, index: int) -> dict[str, Any]:
    """A numbered list of shuffled words: 10 occur 30 times, the others 3 times (6 times and once below 4096 tokens).

    A unit is one of the other words, with all of its occurrences. A solved example of 3 times and once comes first.
    """
    key = uid(spec, length, depth, index)
    rng = generator(key)
    often, seldom = (30, 3) if length >= _SHORT else (6, 1)
    words = distinct("word", rng)
    example, example_others, frequent = (list(islice(words, _FREQUENT)) for _ in range(3))
    others: list[str] = []
    question = "Question: which ten words occur most often in the list?\n"
    lead = "Answer: the ten words that occur most often are"
    head = (
        "Some words of a numbered list occur more often than the others.\n"
        f"List: {_numbered(example * 3 + example_others, generator(key, 'example'))}\n"
        f"{question}{lead} {listed(example)}.\n\n"
        "Read the list below and remember the words that occur most often. A question follows at the end.\nList: "
    )

    def build(n: int) -> Prompt:
        others.extend(islice(words, max(0, n - len(others))))
        context = _numbered(frequent * often + others[:n] * seldom, generator(key, "order"))
        return Prompt(head, context, f"\n{question}", lead)

    budget = length - answer_tokens(tokenizer, spec, frequent)
    filled = fill(spec, tokenizer, length, budget, build, guess=budget // (2 * _TOKENS_PER_WORD * seldom))
    return finish(spec, key, length, depth, budget, frequent, filled)


def coded_words_document(spec: TaskSpec, tokenizer, length: int, depth: None, index: int) -> dict[str, Any]:
    """Shuffled words of six random letters whose numbers of occurrences fall with the square of their rank.

    The commonest is written as dots and does not count; ranks 2, 3 and 4 are asked for. A unit is one word of the text.
    """
    key = uid(spec, length, depth, index)
    rng = generator(key)
    budget = length - 16  # only for the size of the vocabulary: the room for the answer depends on the words
    vocabulary = [_DOTS, *coded(rng, max(8, budget // 50), 6, ascii_lowercase)]
    outputs = vocabulary[1:4]
    shares = _SHARE * np.arange(1.0, len(vocabulary) + 1) ** -_EXPONENT

    def build(n: int) -> Prompt:
        counts = np.floor((n + _FEWEST) * shares).astype(int)
        text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        generator(key, "order").shuffle(text)
        return Prompt(
            "Read the coded text below and count how often each coded word occurs. Dots are not words. "
            "A question follows at the end.\n",
            " ".join(text),
            "\nQuestion: which three coded words occur most often?\n",
            "Answer: the three coded words that occur most often are",
        )

    budget = length - answer_tokens(tokenizer, spec, outputs)
    filled = fill(spec, tokenizer, length, budget, build, guess=budget // _TOKENS_PER_WORD)
    return finish(spec, key, length, depth, budget, outputs, filled)


def _numbered(items: list[str], rng: np.random.Generator) -> str:
    return " ".join(f"{number}. {items[i]}" for number, i in enumerate(rng.permutation(len(items)), start=1))
