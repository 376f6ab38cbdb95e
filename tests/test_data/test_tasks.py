"""Synthetic tasks: what each row asks, worked out again from its tokens alone, and that rows depend on nothing else."""

import itertools

import numpy as np
import pytest

from farspan.lm.data.spec import TaskSpec
from farspan.lm.data.task_loader import TaskLoader, task_batches
from farspan.lm.data.tasks import chance, check_task, examples

NAMES = ("recall", "copy", "selective", "permutations", "swaps", "regression", "needle")
LENGTH = 61


def spec(name, **options):
    return TaskSpec(name=name, **{"vocab_size": 128, "items": 5, **options})


def answers(name, tokens, vocabulary):
    """{place: answer} of one row, by the rule of the task and nothing else."""
    tokens = tokens.tolist()
    if name == "recall":
        pairs = dict(zip(tokens[0:10:2], tokens[1:10:2], strict=True))
        return {place: pairs[token] for place, token in enumerate(tokens) if place >= 10 and token in pairs}
    if name == "copy":
        mark = tokens.index(1)
        return {mark + i: token for i, token in enumerate(tokens[:mark])}
    if name == "selective":
        data = [token for token in tokens if token > 1]
        return {len(tokens) - len(data) + i: token for i, token in enumerate(data)}
    if name == "permutations":
        group, state, found = list(itertools.permutations(range(5))), tuple(range(5)), {}
        for place, token in enumerate(tokens):
            state = tuple(group[token][i] for i in state)
            found[place] = group.index(state)
        return found
    if name == "swaps":  # where each object stands, by object
        pairs = [(first, second) for first in range(5) for second in range(5) if first != second]
        place_of, found = {thing: place for place, thing in enumerate(tokens[:5])}, {}
        for place, token in enumerate(tokens[5:], start=5):
            first, second = pairs[token - 5]
            at = {standing: thing for thing, standing in place_of.items()}
            place_of[at[first]], place_of[at[second]] = second, first
            found[place] = at[second]
        return found
    if name == "regression":
        (x0, y0), (x1, y1), prime = tokens[0:2], tokens[2:4], 127
        a = (y1 - y0) * pow(x1 - x0, -1, prime) % prime
        return {place: (a * (tokens[place] - x0) + y0) % prime for place in range(4, len(tokens), 2)}
    places = [place for place, token in enumerate(tokens[:-2]) if token == 0]
    values = {tokens[place + 1]: tokens[place + 2] for place in places}
    assert len(values) == 5 and tokens[-2] == 0
    return {len(tokens) - 1: values[tokens[-1]]}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", [False, True])
def test_labels_are_what_the_tokens_say(name, noise):
    task = spec(name, noise=noise)
    made = examples(task, LENGTH, (3, 0), 10, 20)
    assert made.tokens.shape == made.labels.shape == (20, LENGTH)
    assert made.tokens.min() >= 0 and max(made.tokens.max(), made.labels.max()) < task.vocab_size
    for tokens, labels in zip(made.tokens, made.labels, strict=True):
        asked = {int(place): int(labels[place]) for place in np.flatnonzero(labels != -100)}
        assert asked == answers(name, tokens, task.vocab_size)
        assert len(asked) == int((made.labels[0] != -100).sum())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_function_of_its_number(name):
    task = spec(name)
    many, one = examples(task, LENGTH, (0, 0), 0, 12), examples(task, LENGTH, (0, 0), 7, 1)
    assert (many.tokens[7] == one.tokens[0]).all() and (many.labels[7] == one.labels[0]).all()
    np.random.seed(1)
    assert (examples(task, LENGTH, (0, 0), 0, 12).tokens == many.tokens).all()
    assert len({row.tobytes() for row in many.tokens}) == 12
    assert (examples(task, LENGTH, (1, 0), 0, 12).tokens != many.tokens).any()


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_same_on_any_ranks_and_held_out_rows_are_others(name):
    task = spec(name)
    loader = TaskLoader(task, LENGTH, rows=4, seed=2)
    (whole,) = loader.batch(3)
    parts = [loader.batch(3, rank, 2, 2) for rank in range(2)]
    tokens = np.concatenate([batch.input_ids.numpy() for rank in parts for batch in rank], axis=1)
    assert (whole.input_ids.numpy() == tokens).all() and whole.cu_seqlens.tolist() == [0, 61, 122, 183, 244]
    assert loader.valid_tokens(3) == whole.valid_tokens == sum(b.valid_tokens for rank in parts for b in rank)
    assert loader.identifier(3) == whole.identifier != loader.identifier(4)
    held_out = task_batches(task, LENGTH, 4, seed=2, count=6)
    assert [len(batch.cu_seqlens) - 1 for batch in held_out] == [4, 2]
    trained = {row.tobytes() for step in range(9) for row in loader.batch(step)[0].input_ids.view(4, -1).numpy()}
    assert not trained & {row.tobytes() for batch in held_out for row in batch.input_ids.view(-1, LENGTH).numpy()}


def test_chance():
    expected = {"recall": 64, "copy": 126, "selective": 126, "permutations": 120, "swaps": 5, "regression": 127}
    expected["needle"] = 32
    assert {name: 1 / chance(spec(name)) for name in NAMES} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "length", "message"),
    [
        ("recall", {"items": 30}, 61, "needs rows of 90 tokens or more, not 61; raise batch.sequence_length"),
        ("needle", {"items": 30}, 61, "needs rows of 121 tokens or more"),
        ("permutations", {"vocab_size": 100}, 61, "needs a vocabulary of 120, data.task.vocab_size is 100; raise it"),
        ("swaps", {"vocab_size": 24}, 61, "needs a vocabulary of 25, data.task.vocab_size is 24; raise it"),
        ("swaps", {}, 5, "needs rows of 6 tokens"),
        ("regression", {}, 4, "needs rows of 5 tokens"),
    ],
)
def test_what_does_not_fit_is_one_line(name, options, length, message):
    with pytest.raises(ValueError, match=message):
        check_task(spec(name, **options), length)
