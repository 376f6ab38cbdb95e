"""Documents of question answering: the passage with the answer among other passages of a local file."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from farspan.eval.needle.document import answer_tokens, fill_haystack, finish, generator, spread, uid
from farspan.eval.needle.haystack import Haystack, contains_any
from farspan.eval.needle.tasks import TaskSpec

_FIELDS = ("question", "answers", "gold", "others")


def question_document(spec: TaskSpec, tokenizer, length: int, depth: float, index: int) -> dict[str, Any]:
    """One question of `spec.file`, its gold passages (the first at `depth`), its others, then those of other questions.

    A passage that contains an answer is used only as gold. Raises ValueError for a file that is not as `read_questions`
    says, or has too few passages for the length.
    """
    key = uid(spec, length, depth, index)
    rng = generator(key)
    items = read_questions(str(spec.file))
    item = items[rng.integers(len(items))]
    fractions, which, first = spread(depth, len(item["gold"]) - 1, rng)
    hay = Haystack(_fillers(items, item, generator(key, "units")), "\n")
    parts = (
        "Read the passages below. A question about one of them follows at the end.\n",
        f"\nQuestion: {item['question']}\n",
        "Answer:",
    )
    budget = length - answer_tokens(tokenizer, spec, item["answers"])
    gold = [item["gold"][i] for i in which]
    filled = fill_haystack(spec, tokenizer, length, budget, hay, parts, gold, fractions, first, finite=True)
    return finish(spec, key, length, depth, budget, item["answers"], filled)


@functools.lru_cache(maxsize=2)
def read_questions(path: str) -> list[dict[str, Any]]:
    """Questions of a JSON-lines file, each with `question` (text), `answers`, `gold` and `others` (lists of text).

    Raises ValueError, naming the line, for anything else.
    """
    items = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the questions {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = {name: json.loads(line)[name] for name in _FIELDS}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: needs a JSON object with {', '.join(_FIELDS)} ({error})"
            ) from None
        for name in _FIELDS[1:]:
            texts = [item[name]] if isinstance(item[name], str) else item[name]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path}, line {number}: {name} must be a text or a list of texts")
            item[name] = [" ".join(text.split()) for text in texts]  # a passage is one line of the prompt
        if not item["answers"] or not item["gold"]:
            raise ValueError(f"{path}, line {number}: answers and gold need at least one text each")
        items.append(item)
    if not items:
        raise ValueError(f"the questions {path} are empty; use JSON lines with {', '.join(_FIELDS)}")
    return items


def _fillers(items: list[dict[str, Any]], item: dict[str, Any], rng: np.random.Generator) -> Iterator[str]:
    seen = set(item["gold"])
    own = [item["others"][i] for i in rng.permutation(len(item["others"]))]
    elsewhere = (p for i in rng.permutation(len(items)) for p in (*items[i]["gold"], *items[i]["others"]))
    for passage in (*own, *elsewhere):
        if passage not in seen and not contains_any(passage, item["answers"]):
            seen.add(passage)
            yield passage + "\n"
