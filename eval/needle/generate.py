"""One document of a needle task, or all of a cell.

A document depends on nothing but (task, length, depth, index), the suite's seed, the tokenizer and, where the task has
one, its file: not on other tasks, on the order, or on any global random generator, and it changes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from farspan.eval.needle.counting import coded_words_document, common_words_document
from farspan.eval.needle.needles import needle_document, tracing_document
from farspan.eval.needle.passages import question_document
from farspan.eval.needle.tasks import TaskSpec
from farspan.eval.needle.tokens import token_document

_BUILDERS = {
    "needle": needle_document,
    "vt": tracing_document,
    "cwe": common_words_document,
    "fwe": coded_words_document,
    "qa": question_document,
}


def document(spec: TaskSpec, tokenizer, length: int, depth: float | None, index: int) -> dict[str, Any]:
    """Sample number `index` of the cell (length, depth) of a task.

    tokenizer: a fast tokenizer of transformers; unused (None) for the family tok
    length: tokens of the prompt and the answer together
    depth: percent of the haystack's tokens before the first asked needle; None where the task has no depth

    uid: the seed as text. task, protocol, metric, version: of the task. input, gen_prefix: the prompt and the lead-in
        of the answer; what the model reads is `input + gen_prefix`, and an answer begins with a space
    outputs: references, in the order of the document. choices, gold: for mc only
    max_length: `length`. gen_tokens: of it for the answer. prompt_tokens: of input and gen_prefix, special tokens
        included. fill: prompt_tokens / (max_length - gen_tokens)
    depth_actual: as `depth`, measured. needle_tokens: the token at which each inserted needle begins

    Raises LengthTooSmall (a ValueError) where the length cannot hold the task, ValueError for a missing or unfit file.
    """
    if spec.needs_file:
        what = "JSON lines of questions" if spec.family == "qa" else "a text"
        raise ValueError(f"{spec.name} needs {what}: give the path as the task's file")
    if spec.family == "tok":
        return token_document(spec, length, depth, index)
    return _BUILDERS[spec.family](spec, tokenizer, length, depth, index)


def documents(spec: TaskSpec, tokenizer, length: int, depth: float | None) -> Iterator[dict[str, Any]]:
    """The `spec.samples` documents of a cell, as `document`."""
    for index in range(spec.samples):
        yield document(spec, tokenizer, length, depth, index)
