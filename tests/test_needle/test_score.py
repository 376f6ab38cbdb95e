"""Scores of hand-made predictions, and cells of hand-made scores."""

import math

import pytest

from farspan.eval.needle.cells import (
    Cell,
    by_length,
    cells,
    effective_length,
    read_csv,
    summary,
    wilson,
    write_csv,
)
from farspan.eval.needle.document import needle_pairs
from farspan.eval.needle.generate import document
from farspan.eval.needle.score import (
    cleaned,
    contained,
    contained_exactly,
    looped,
    score_choice,
    score_forced,
    score_generation,
    score_token,
    target,
)
from farspan.eval.needle.tasks import task

INPUT = "The secret number of red-door is 1234567. The secret number of red-gate is 7654321.\nQuestion: which?\n"


def made(outputs=("1234567",), metric="all", text=INPUT):
    return {"input": text, "outputs": list(outputs), "metric": metric}


@pytest.mark.parametrize(
    ("prediction", "reference", "recall", "exact"),
    [
        ("1234567", "1234567", 1, 1),
        (" is 1234567.\n", "1234567", 1, 1),
        ("12345678", "1234567", 1, 0),  # inside a longer number, as RULER counts it
        ("a1234567", "1234567", 1, 0),
        ("x_1234567_", "1234567", 1, 1),
        ("1234567 or 12345678", "1234567", 1, 1),
        ("1,234,567", "1234567", 0, 0),
        ("AMBER-Anvil", "amber-anvil", 1, 1),
        ("amber-anvils", "amber-anvil", 1, 0),
        ("amber\x01anvil", "amber\nanvil", 1, 1),  # control characters are newlines
        ("", "1234567", 0, 0),
        ("a+b(c", "+b(", 1, 0),
    ],
)
def test_containment(prediction, reference, recall, exact):
    scores = score_generation(made([reference]), prediction)
    assert (scores["recall"], scores["exact"]) == (recall, exact)


def test_cleaning():
    assert cleaned(" \x00 a\tb\x1f \n") == "a\nb"
    assert contained("ONE two", ["one", "three"]) == [True, False]
    assert contained_exactly("one twofold", ["one", "two"]) == [True, False]


def test_all_and_part():
    references = ["1111111", "2222222", "3333333", "4444444"]
    assert score_generation(made(references), "2222222 and more")["recall"] == 0.25
    assert score_generation(made(references, "part"), "2222222 and more")["recall"] == 1
    assert score_generation(made(references, "part"), "5555555")["recall"] == 0


def test_diagnostics():
    right = score_generation(made(), "1234567")
    assert right == {"recall": 1, "exact": 1, "wrong_value": 0, "empty": 0, "looped": 0}
    assert score_generation(made(), "7654321")["wrong_value"] == 1
    assert score_generation(made(), "1234567 or 7654321")["wrong_value"] == 1
    assert score_generation(made(), "9999999")["wrong_value"] == 0
    assert score_generation(made(), " \n\x00")["empty"] == 1
    assert score_generation(made(), "no no no", [5] * 8)["looped"] == 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1] * 8, True),
        ([9, 9, 1, 2, 3, 4, 1, 2, 3, 4], True),
        ([1, 2, 3, 1, 2, 3, 1, 2], True),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], False),
        ([1] * 7, False),
        ([1] * 8 + [2], False),
    ],
)
def test_loops(tokens, expected):
    assert looped(tokens) is expected


def test_forced_and_choice():
    assert score_forced([-1.0, -3.0], [True, True]) == {"tf_exact": 1, "nll": 2}
    assert score_forced([-1.0, -3.0], [True, False])["tf_exact"] == 0
    assert score_choice({"choices": "abcd", "gold": 2}, [-3, -2, -1, -4]) == {"acc": 1}
    assert score_choice({"choices": "abcd", "gold": 1}, [-3, -2, -1, -4]) == {"acc": 0}
    assert target(made(["1", "2"])) == " 1, 2"
    assert target(made(["1", "2"], "part")) == " 1"


@pytest.mark.parametrize("name", ["needle_s1", "needle_mk1", "needle_mk3", "needle_mv", "needle_mq", "needle_vt"])
def test_an_oracle_scores_one_and_a_distractor_nothing(name, tokenizers):
    doc = document(task(name), tokenizers["bpe"], 1024, 50.0, 0)
    right = score_generation(doc, target(doc))
    assert (right["recall"], right["exact"], right["wrong_value"]) == (1, 1, 0)
    wrong = [value for _, value in needle_pairs(doc["input"]) if value not in doc["outputs"]]
    if wrong:
        scores = score_generation(doc, f" {wrong[0]}")
        assert (scores["recall"], scores["wrong_value"]) == (0, 1)


def test_token_scores():
    doc = document(task("needle_tok", n_keys=4), None, 64, 50.0, 0)
    other = next(doc["ids"][i + 2] for i in doc["needle_tokens"] if doc["ids"][i + 2] != doc["answer"])
    found = [[score_token(doc, i)[name] for name in ("recall", "wrong_value")] for i in (doc["answer"], other, 0)]
    assert found == [[1, 0], [0, 1], [0, 0]]


def sample(recall, length=4096, depth=0.0, **other):
    fixed = {"task": "needle_s1", "protocol": "gen", "version": 1, "fill": 0.99, "prompt_tokens": length - 16}
    scores = {"recall": recall, "exact": recall, "wrong_value": 0.0, "empty": 0.0, "looped": 0.0}
    return fixed | {"max_length": length, "depth": depth} | scores | other


def test_a_cell():
    (cell,) = cells([sample(r, wrong_value=1 - r) for r in (1, 1, 1, 0, 0)])
    assert (cell.task, cell.protocol, cell.length, cell.depth, cell.n) == ("needle_s1", "gen", 4096, 0.0, 5)
    assert cell.mean == pytest.approx(0.6) and cell.wrong_value == pytest.approx(0.4)
    assert cell.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert (cell.low, cell.high) == pytest.approx((0.2307, 0.8824), abs=1e-4)  # published for 3 of 5
    assert (cell.fill, cell.prompt_tokens) == pytest.approx((0.99, 4080))
    assert math.isnan(cell.nll)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(1, 20)[1] == 1


def test_cells_keep_protocols_and_depths_apart():
    forced = {"protocol": "tf", "tf_exact": 1.0, "nll": 0.5}
    found = cells([sample(1), sample(0, depth=50.0), sample(0, 8192), sample(0) | forced, sample(0, depth=None)])
    assert len(found) == 5 and found[3].mean == 1 and found[3].nll == 0.5
    with pytest.raises(ValueError, match=r"samples of suite versions \[1, 2\] cannot be averaged"):
        cells([sample(1), sample(1, version=2)])


def grid(means, task="needle_s1"):
    return [
        Cell(task, "gen", length, depth, n=0 if mean is None else 4, mean=math.nan if mean is None else mean)
        for length, row in means.items()
        for depth, mean in zip((0.0, 100.0), row, strict=True)
    ]


def test_effective_length():
    assert effective_length(grid({1024: (1, 1), 2048: (0.8, 0.9), 4096: (0.5, 0.9), 8192: (1, 1)})) == 2048
    assert effective_length(grid({1024: (0, 1)})) is None
    assert effective_length(grid({512: (None, None), 1024: (1, 1)})) == 1024
    assert effective_length(grid({1024: (0.5, 0.5)}), threshold=0.5) == 1024
    assert by_length(grid({1024: (None, None), 2048: (None, 0.5)})) == {2048: 0.5}


def test_summary():
    group = grid({512: (None, 1.0), 1024: (1.0, 0.5)}) + grid({512: (None, None)}, "needle_mk1")
    result = summary(group)
    assert list(result) == ["needle_s1 gen", "needle_mk1 gen"]
    first = result["needle_s1 gen"]
    assert first["mean"] == pytest.approx(2.5 / 3) and first["mean_by_length"] == {512: 1.0, 1024: 0.75}
    assert first["worst"] == {"length": 1024, "depth": 100.0, "mean": 0.5, "n": 4}
    assert first["effective_length"] == 512 and first["not_available"] == [{"length": 512, "depth": 0.0}]
    nothing = result["needle_mk1 gen"]
    assert nothing["mean"] is nothing["worst"] is nothing["effective_length"] is None


def test_cells_come_back_from_csv(tmp_path):
    group = [
        *cells([sample(r, 4096, d, task=t) for t in ("a", "b") for d in (0.0, 12.5) for r in (1, 1 / 3, 0.1)]),
        Cell("needle_cwe", "tf", 1024, None, 3, 1 / 7, nll=0.25),
        Cell("needle_cwe", "tf", 512, None),
    ]
    write_csv(tmp_path / "new" / "cells.csv", group)
    assert repr(read_csv(tmp_path / "new" / "cells.csv")) == repr(group)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv is not a table of needle cells; use a cells.csv"):
        read_csv(other)
