"""Tasks: questions with what their answers are scored by. Generated ones come with demonstrations.

A question is held out if its hash says so, so that training never sees one, however many are drawn. Question i of a
task is a function of (task, seed, split, i) alone.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.lm.data.tasks import Draw
from farspan.lm.rl.spec import GENERATED, TaskSpec

TRAIN, HELD_OUT = "train", "validation"
_SHARE_HELD_OUT = 1 / 8
_DEFAULT_TEMPLATES = {
    "arithmetic": "{question}=",
    "countdown": (
        "Using the numbers {question}. You can use + - * / and each number exactly once. Think in <think> </think> and "
        "put the expression in <answer> </answer>.\n<think>"
    ),
    "gsm8k": "{question}\nReason step by step, and give the final number after ####.\n",
    "boxed": "{question}\nReason step by step, and put the final answer in \\boxed{}.\n",
    "choice": "{question}\nReason step by step, and put the letter of the answer in \\boxed{}.\n",
}


@dataclass(frozen=True)
class Example:
    """prompt: text, or messages where the task is a chat. reference: what a reward compares with. demonstration: an
    answer that earns it, of generated tasks.
    """

    prompt: str | list[dict[str, str]]
    reference: str
    demonstration: str | None = None


def examples(task: TaskSpec, split: str, seed: int, count: int, slips: float = 0.0) -> list[Example]:
    """The first `count` of a split, "train" or "validation"; of records all there are, where they are fewer.

    slips: probability that a demonstration of arithmetic carries out an operation wrongly, by 1 to 3. A policy that
    learns from such demonstrations knows how to be right, and has something to gain by doing so more often. Raises
    ValueError or OSError, one line, for records that cannot be used, and where too few are left for training.
    """
    if task.name in GENERATED:
        return [_generated(task, split, seed, index, slips) for index in range(count)]
    found = list(_records(task))
    if len(found) <= task.held_out:
        raise ValueError(
            f"{task.jsonl or task.hub} has {len(found)} records, of which task.held_out={task.held_out} are kept for "
            "validation; lower it"
        )
    chosen = found[: -task.held_out] if split == TRAIN else found[-task.held_out :]
    return [Example(_prompt(task, question), answer) for question, answer in chosen[:count]]


def _prompt(task: TaskSpec, question: str) -> str | list[dict[str, str]]:
    text = (task.template or _DEFAULT_TEMPLATES[task.name]).replace("{question}", question)
    if not task.chat:
        return text
    system = [{"role": "system", "content": task.system}] if task.system else []
    return [*system, {"role": "user", "content": text}]


def _generated(task: TaskSpec, split: str, seed: int, index: int, slips: float) -> Example:
    make = {"arithmetic": functools.partial(_arithmetic, slips=slips), "countdown": _countdown}[task.name]
    for attempt in range(10_000):
        draw = Draw((seed, [TRAIN, HELD_OUT].index(split), index, attempt))
        made = make(task, draw)
        if made is not None and _is_held_out(made[0]) == (split == HELD_OUT):
            question, reference, demonstration = made
            return Example(_prompt(task, question), reference, demonstration)
    raise ValueError(f"no {split} question of {task.name} was found in 10000 draws; raise task.numbers or task.largest")


def _is_held_out(question: str) -> bool:
    word = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(word) < _SHARE_HELD_OUT * 2**64


def _arithmetic(task: TaskSpec, draw: Draw, slips: float) -> tuple[str, str, str] | None:
    """An expression; the demonstration carries out one operation at a time: `3+4*5-2=` -> `3+20-2=23-2=21#### 21`."""
    terms = draw.integers(1, task.largest + 1, task.numbers).tolist()
    signs = [task.operations[i] for i in draw.integers(0, len(task.operations), task.numbers - 1)]
    errors = [0] * len(signs)
    right = _steps(terms, signs, errors)
    if right is None:
        return None
    if slips > 0:
        is_slip = draw.words(len(signs)) < int(slips * 2**64)
        errors = (is_slip * draw.integers(1, 4, len(signs)) * (2 * draw.integers(0, 2, len(signs)) - 1)).tolist()
    steps = _steps(terms, signs, errors) or right
    return _written(terms, signs), f"#### {right[-1]}", f"{'='.join(steps)}#### {steps[-1]}"


def _steps(terms: list[int], signs: list[str], errors: list[int]) -> list[str] | None:
    """The expression after each operation, to whose results `errors` are added; None where a quotient is not whole."""
    terms, signs, steps = list(terms), list(signs), []
    for error in errors:
        place = next((i for i, sign in enumerate(signs) if sign in "*/"), 0)
        left, sign, right = terms[place], signs.pop(place), terms.pop(place + 1)
        if sign == "/" and (right == 0 or left % right):
            return None  # whole numbers all the way
        terms[place] = error + {"+": left + right, "-": left - right, "*": left * right}.get(sign, left // (right or 1))
        steps.append(_written(terms, signs))
    return steps


def _written(terms: list[int], signs: list[str]) -> str:
    return "".join(f"{term}{sign}" for term, sign in zip(terms, [*signs, ""], strict=True))


def _countdown(task: TaskSpec, draw: Draw) -> tuple[str, str, str] | None:
    """Numbers and a target that an expression of them reaches: two of what is left are joined until one is."""
    numbers = draw.integers(1, task.largest + 1, task.numbers).tolist()
    parts = [(number, str(number)) for number in numbers]
    steps = []
    while len(parts) > 1:
        first, second = draw.distinct(0, len(parts), 2).tolist()
        (a, left), (b, right) = parts[first], parts[second]
        sign = task.operations[int(draw.integers(0, len(task.operations), 1)[0])]
        if sign == "/" and (b == 0 or a % b):
            return None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[sign]
        if not 0 < value <= max(1000, task.largest):
            return None
        steps.append(f"{a}{sign}{b}={value}")
        parts = [part for i, part in enumerate(parts) if i not in (first, second)] + [(value, f"({left}{sign}{right})")]
    target, expression = parts[0]
    listed = ", ".join(map(str, numbers))
    reference = json.dumps({"numbers": numbers, "target": target})
    answer = f"{', '.join(steps)}</think><answer>{expression[1:-1]}</answer>"
    return f"{listed} reach {target}", reference, answer


def _records(task: TaskSpec) -> Iterator[tuple[str, str]]:
    """(question, answer as text) of each record; a record where one is null is left out."""
    for where, record in _jsonl(task.jsonl) if task.jsonl is not None else _hub(task):
        for option, column in (("question", task.question), ("answer", task.answer)):
            if column not in record:
                raise ValueError(f"{where} has no column {column!r}; set task.{option} to one of: {', '.join(record)}")
        question, answer = record[task.question], record[task.answer]
        if question is not None and answer is not None:
            yield str(question), answer if isinstance(answer, str) else json.dumps(answer)


def _jsonl(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    files = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not files:
        raise FileNotFoundError(f"no file matches task.jsonl={pattern!r} (in {Path.cwd()})")
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise ValueError(f"{file}, line {number} is not a JSON object: {line[:60].strip()!r}")
                yield f"{file}, line {number}", record


def _hub(task: TaskSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors are raised as well
    try:
        loaded = datasets.load_dataset(task.hub, task.subset, split=task.split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read task.hub={task.hub}: {reason}") from error
    for number, record in enumerate(loaded):
        yield f"{task.hub}, record {number}", record
