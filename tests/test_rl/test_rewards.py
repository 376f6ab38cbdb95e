"""Tables of (text, reference, value); rewards never raise."""

import json

import pytest

from farspan.lm.rl.rewards import REWARDS, boxed, choice, countdown, evaluate, final_answer, last_boxed


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("so 40 + 2 = 42 #### 42", "#### 42", 1),
        ("#### 41", "#### 42", 0),
        ("#### 1,234", "1234", 1),
        ("#### $1,234.50", "1234.5", 1),
        ("#### 72 clips", "... #### 72", 1),
        ("#### 72.", "72", 1),
        ("#### \u22125", "-5", 1),
        ("#### 3/6", "0.5", 1),
        ("#### 1/0", "1", 0),
        ("#### 7\nand then 8", "7", 1),
        ("first #### 1 then #### 2", "2", 1),
        (r"\boxed{42}", "42", 1),
        (r"\boxed{1} or \boxed{42} #### 7", "42", 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{50\%}", "50", 1),
        ("the answer is 42", "42", 0),
        ("", "42", 0),
        ("####", "42", 0),
        ("#### " + "9" * 100_000, "42", 0),
        ("42", "no number here", None),
    ],
)
def test_final_answer(text, reference, value):
    assert final_answer(text, reference) == value


def test_last_number_where_it_is_allowed():
    assert final_answer("it costs $1,050 in all.", "1050", last_number=True) == 1
    assert final_answer("10 then 11", "10", last_number=True) == 0
    assert final_answer("none", "10", last_number=True) == 0


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac12", 1),
        (r"\boxed{\dfrac{1}{2}}", "0.5", 1),
        (r"\boxed{\text{even}}", "even", 1),
        (r"\boxed{ x^2 + 1 }", "x^2+1", 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{3} and \boxed{4}", "3", 0),
        (r"\boxed{\sqrt{2}} and \boxed{\frac{1", r"\boxed{\sqrt{2}}", 1),  # the last is cut off
        (r"\boxed{}", "1", 0),
        ("", "1", 0),
        (r"\boxed{1}", " ", None),
    ],
)
def test_boxed(text, reference, value):
    assert boxed(text, reference) == value


def test_boxed_by_the_symbolic_checker():
    assert boxed(r"\boxed{1 + x}", "x + 1") == 1
    assert boxed(r"\boxed{2 + x}", "x + 1") == 0
    assert boxed(r"\boxed{\frac{{{}", "x + 1") == 0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<answer>(7 - 3) * 25</answer>", 1),
        ("<answer>25*(7-3)</answer> no, <answer>7+3+25</answer>", 0.1),
        ("<answer>7+3</answer><answer>25*(7-3)</answer>", 1),
        ("<answer>25*(7-3)", 0),
        ("25*(7-3)", 0),
        ("", 0),
        ("<answer></answer>", 0.1),
        ("<answer>100</answer>", 0.1),
        ("<answer>25*(7-3)*1</answer>", 0.1),  # a number that is not given
        ("<answer>25*(7-3)+3-3</answer>", 0.1),  # used twice
        ("<answer>25*4</answer>", 0.1),
        ("<answer>25*(7-3)/0</answer>", 0.1),
        ("<answer>25*(7-3) = 100</answer>", 0.1),
        ("<answer>25**(7-3)</answer>", 0.1),
        ("<answer>__import__('os')</answer>", 0.1),
        ("<answer>" + "(" * 100_000 + "</answer>", 0.1),
    ],
)
def test_countdown(answer, value):
    assert countdown(answer, json.dumps({"numbers": [3, 7, 25], "target": 100})) == value


@pytest.mark.parametrize(
    "reference", ["", "[]", "{}", '{"numbers": [1], "target": "x"}', '{"numbers": 3, "target": 1}']
)
def test_countdown_without_a_question(reference):
    assert countdown("<answer>1</answer>", reference) is None


@pytest.mark.parametrize(
    ("expression", "value"), [("1+2*3", 7), ("(1+2)*3", 9), ("-3+5", 2), ("6/4*2", 3), ("2 .5", None), ("1 +", None)]
)
def test_evaluate(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        (r"\boxed{B}", "B", 1),
        (r"\boxed{\text{(B) 12}}", "B", 1),
        ("The answer is (C).", "C", 1),
        ("the answer is A, no, the answer is B", "B", 1),
        (r"the answer is A \boxed{B}", "B", 1),
        ("B", "B", 0),
        ("the answer is unknown", "B", 0),
        (r"\boxed{b}", "B", 0),
        (r"\boxed{B}", "two", None),
    ],
)
def test_choice(text, reference, value):
    assert choice(text, reference) == value


@pytest.mark.parametrize("name", REWARDS)
def test_no_text_makes_a_reward_raise(name):
    texts = [
        "",
        "\x00",
        "{" * 5000,
        "\\boxed{" * 3000,
        "<answer>" * 3000,
        "#### " * 3000,
        "1/0",
        "\\boxed{\\frac{1}{0}}",
    ]
    for text in texts:
        for reference in ("", "1", "{", '{"numbers": [1], "target": 1}'):
            assert REWARDS[name](text, reference) in (None, 0.0, 0.1, 1.0)


def test_last_boxed():
    assert last_boxed(r"a \boxed{x_{1} + \frac{1}{2}} b") == r"x_{1} + \frac{1}{2}"
    assert last_boxed(r"\boxed{a} \boxed{b") == "a" and last_boxed("none") is None
