"""One prediction -> numbers. Comparison is by containment, upper and lower case alike, as RULER does it.

A score is a share between 0 and 1. RULER's stock tables print it times 100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from farspan.eval.needle.document import needle_pairs

_CONTROL = re.compile(r"[\x00-\x1f]")
_REPEATED_TOKENS, _LONGEST_PATTERN = 8, 4
# The number that a cell averages, by protocol; the others are reported beside it.
MAIN_METRIC = {"gen": "recall", "tf": "tf_exact", "mc": "acc"}


def cleaned(prediction: str) -> str:
    """A prediction without white space around it, control characters (0x00 to 0x1f) turned into newlines."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def contained(prediction: str, references: Sequence[str]) -> list[bool]:
    """Whether each reference occurs in the prediction."""
    text = cleaned(prediction).lower()
    return [reference.lower() in text for reference in references]


def contained_exactly(prediction: str, references: Sequence[str]) -> list[bool]:
    """As `contained`, but not inside a longer word or number: no letter or digit right before or after."""
    text = cleaned(prediction).lower()
    return [bool(re.search(rf"(?<![^\W_]){re.escape(r.lower())}(?![^\W_])", text)) for r in references]


def combined(found: Sequence[bool], metric: str) -> float:
    """metric "all": the share of references found; "part": 1 where any is."""
    return float(any(found)) if metric == "part" else float(np.mean(found))


def looped(tokens: Sequence[int]) -> bool:
    """Whether the last 8 tokens repeat a pattern of at most 4."""
    last = list(tokens)[-_REPEATED_TOKENS:]
    if len(last) < _REPEATED_TOKENS:
        return False
    return any(last[period:] == last[:-period] for period in range(1, _LONGEST_PATTERN + 1))


def score_generation(document: Mapping[str, Any], prediction: str, tokens: Sequence[int] = ()) -> dict[str, float]:
    """Scores of a generated answer to a document of `generate.document`.

    prediction: text; tokens: its ids, for `looped`

    recall, exact: by the document's metric. wrong_value: 1 where it contains the value of another needle of the
    context. empty: 1 where nothing but white space was generated. looped: 1 as the function of this name.
    """
    references, metric = document["outputs"], document["metric"]
    text = cleaned(prediction).lower()
    right = {reference.lower() for reference in references}
    # What a haystack says about itself, not a list kept beside it: at 128K tokens it has thousands of needles.
    others = {value.lower() for _, value in needle_pairs(document["input"])} - right
    return {
        "recall": combined(contained(prediction, references), metric),
        "exact": combined(contained_exactly(prediction, references), metric),
        "wrong_value": float(any(value in text for value in others)),
        "empty": float(not text),
        "looped": float(looped(tokens)),
    }


def score_token(document: Mapping[str, Any], prediction: int) -> dict[str, float]:
    """As `score_generation`, of the one id that a model gives for a document of `tokens.token_document`."""
    right = float(prediction == document["answer"])
    values = {document["ids"][begin + 2] for begin in document["needle_tokens"]}
    wrong = float(not right and prediction in values)
    return {"recall": right, "exact": right, "wrong_value": wrong, "empty": 0.0, "looped": 0.0}


def score_forced(log_probs: Sequence[float], is_argmax: Sequence[bool]) -> dict[str, float]:
    """Scores of teacher forcing, per token of the answer: its log-probability (nats), whether it was the likeliest.

    tf_exact: 1 where every token was. nll: mean negative log-probability of a token.
    """
    assert len(log_probs) == len(is_argmax) > 0, "an answer has at least one token"
    return {"tf_exact": float(all(is_argmax)), "nll": -float(np.mean(log_probs))}


def score_choice(document: Mapping[str, Any], log_probs: Sequence[float]) -> dict[str, float]:
    """acc: 1 where the right choice is the likeliest. log_probs: of each of the choices, sums over tokens."""
    assert len(log_probs) == len(document["choices"]), (len(log_probs), len(document["choices"]))
    return {"acc": float(int(np.argmax(log_probs)) == document["gold"])}


def target(document: Mapping[str, Any]) -> str:
    """What teacher forcing feeds after the lead-in: a space, then all references (metric part: the first one)."""
    outputs = document["outputs"][:1] if document["metric"] == "part" else document["outputs"]
    return " " + ", ".join(outputs)
