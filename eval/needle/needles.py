"""Documents of the needle tasks (values of keys) and of variable tracing (names that are bound to one another)."""

from __future__ import annotations

from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from farspan.eval.needle.document import (
    KIND_NAMES,
    answer_tokens,
    fill_haystack,
    finish,
    generator,
    needle,
    spread,
    uid,
)
from farspan.eval.needle.haystack import file_haystack, haystack
from farspan.eval.needle.tasks import TaskSpec
from farspan.eval.needle.words import coded, distinct, listed

_NAMES = 5  # variables of the chain
_LATE = 80.0  # percent; a chain that begins later has no room after it, so that it is spread over the whole context


def needle_document(spec: TaskSpec, tokenizer, length: int, depth: float, index: int) -> dict[str, Any]:
    """Sentences that give values to keys in a haystack; the question asks for the values of some keys.

    Several keys are asked for in the order of the text, so that their values are expected in that order too.
    """
    key = uid(spec, length, depth, index)
    rng = generator(key)
    keys = distinct(spec.key, rng)
    values = keys if spec.key == spec.value else distinct(spec.value, rng)  # one stream: no key equals a value
    pairs = []
    for number in range(spec.n_keys):
        name = next(keys)
        pairs += [(name, next(values)) for _ in range(spec.n_values if number < spec.n_asked else 1)]
    asked = spec.n_asked * spec.n_values
    fractions, which, first = spread(depth, len(pairs) - 1, rng)

    in_order = [pairs[i] for i in which if i < asked]
    names, outputs = list(dict.fromkeys(name for name, _ in in_order)), [value for _, value in in_order]
    forbidden = [*names, *outputs]
    if spec.haystack == "file":
        hay = file_haystack(spec.file, generator(key, "units"), forbidden)
    else:
        # After everything else was drawn, keys and values go on: no distractor repeats a needle.
        others = (needle(spec.value, next(keys), next(values)) for _ in iter(int, 1))
        hay = haystack(spec.haystack, generator(key, "units"), forbidden, others)
    kind, many = KIND_NAMES[spec.value], len(outputs) > 1
    parts = (
        f"Read the text below and remember every secret {kind} in it. A question follows at the end.\n",
        f"\nQuestion: which secret {kind}{'s belong' if many else ' belongs'} to {listed(names)}?\n",
        f"Answer: the secret {kind}{'s' if many else ''} of {listed(names)} {'are' if many else 'is'}",
    )
    budget = length - answer_tokens(tokenizer, spec, outputs)
    sentences = [needle(spec.value, *pairs[i]) for i in which]
    filled = fill_haystack(
        spec, tokenizer, length, budget, hay, parts, sentences, fractions, first, finite=spec.haystack == "file"
    )
    return finish(spec, key, length, depth, budget, outputs, filled)


def tracing_document(spec: TaskSpec, tokenizer, length: int, depth: float, index: int) -> dict[str, Any]:
    """Statements that bind a name to a number, and names to names; the question asks for all names of the number.

    A solved example with shorter names comes first. The statements keep their order: the first at `depth`, the others
    after it; beyond 80 percent all are spread over the whole haystack.
    """
    key = uid(spec, length, depth, index)
    rng = generator(key)
    solved, number = (str(n) for n in rng.choice(90_000, 2, replace=False) + 10_000)
    example, names = coded(rng, 3, 3, ascii_uppercase), coded(rng, _NAMES, 5, ascii_uppercase)
    if depth <= _LATE:
        begin = depth / 100
        fractions = [begin, *sorted(begin + (1 - begin) * rng.random(_NAMES - 1))]
    else:
        fractions = sorted(rng.random(_NAMES))

    question, lead = "Question: which names stand for {}?", "Answer: the names that stand for {} are"
    parts = (
        "Some sentences of a text bind names to numbers. For example: "
        f"{' '.join(_chain(example, solved))} {question.format(solved)} {lead.format(solved)} {listed(example)}.\n"
        "Read the text below and remember every name in it. A question follows at the end.\n",
        f"\n{question.format(number)}\n",
        lead.format(number),
    )
    hay = haystack(spec.haystack, generator(key, "units"), [*names, number], None)
    budget = length - answer_tokens(tokenizer, spec, names)
    filled = fill_haystack(spec, tokenizer, length, budget, hay, parts, _chain(names, number), fractions, first=0)
    return finish(spec, key, length, depth, budget, names, filled)


def _chain(names: list[str], number: str) -> list[str]:
    copies = [f"Let {name} be the same as {before}." for before, name in pairwise(names)]
    return [f"Let {names[0]} be {number}.", *copies]
