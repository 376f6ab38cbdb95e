"""Tasks: generated questions and their demonstrations, records and what is wrong with them."""

import json

import pytest

from farspan.lm.rl.rewards import REWARDS
from farspan.lm.rl.spec import TaskSpec
from farspan.lm.rl.tasks import HELD_OUT, TRAIN, examples

ARITHMETIC = TaskSpec(name="arithmetic", numbers=4, largest=20)
COUNTDOWN = TaskSpec(name="countdown", numbers=4, largest=100, operations="+-*/")


@pytest.mark.parametrize("task", [ARITHMETIC, COUNTDOWN, ARITHMETIC.model_copy(update={"operations": "+-*/"})])
def test_demonstrations_earn_the_reward(task):
    for example in examples(task, TRAIN, 0, 50):
        assert REWARDS[task.name](example.demonstration, example.reference) == 1


def test_a_demonstration_carries_out_one_operation_at_a_time():
    (example,) = examples(TaskSpec(name="arithmetic", numbers=4), TRAIN, 0, 1)
    assert (example.prompt, example.demonstration) == ("4*2*9+7=", "8*9+7=72+7=79#### 79")


def test_slips_leave_questions_alone_and_make_some_answers_wrong():
    right, wrong = (examples(ARITHMETIC, TRAIN, 0, 300, slips) for slips in (0.0, 0.25))
    assert [one.prompt for one in right] == [one.prompt for one in wrong]
    share = sum(REWARDS["arithmetic"](one.demonstration, one.reference) for one in wrong) / 300
    assert 0.3 < share < 0.55  # 0.75 ** 3 = 0.42


@pytest.mark.parametrize("task", [ARITHMETIC, COUNTDOWN])
def test_held_out_questions_are_never_trained_on(task):
    trained, held_out = ({one.prompt for one in examples(task, split, 0, 200)} for split in (TRAIN, HELD_OUT))
    assert not trained & held_out
    assert not held_out & {one.prompt for one in examples(task, TRAIN, 1, 200)}


def test_a_question_depends_on_its_number_alone():
    assert examples(ARITHMETIC, TRAIN, 0, 20)[:5] == examples(ARITHMETIC, TRAIN, 0, 5)
    assert examples(ARITHMETIC, TRAIN, 0, 5) != examples(ARITHMETIC, TRAIN, 1, 5)


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(10)))
    return path


def test_records(records):
    task = TaskSpec(name="gsm8k", jsonl=str(records), held_out=3, template="Q: {question} A:")
    assert [one.prompt for one in examples(task, TRAIN, 0, 2)] == ["Q: 0 + 1? A:", "Q: 1 + 1? A:"]
    assert len(examples(task, TRAIN, 0, 100)) == 7 and len(examples(task, HELD_OUT, 0, 100)) == 3
    chat = task.model_copy(update={"chat": True, "system": "Reason."})
    assert examples(chat, TRAIN, 0, 1)[0].prompt == [
        {"role": "system", "content": "Reason."},
        {"role": "user", "content": "Q: 0 + 1? A:"},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "problem"}, "has no column 'problem'; set task.question to one of: question, answer"),
        ({"answer": "solution"}, "has no column 'solution'; set task.answer to one of: question, answer"),
        ({"held_out": 10}, "has 10 records, of which task.held_out=10 are kept"),
        ({"jsonl": "nothing.jsonl"}, "no file matches task.jsonl='nothing.jsonl'"),
    ],
)
def test_records_that_do_not_fit(records, options, message):
    task = TaskSpec(**{"name": "gsm8k", "jsonl": str(records), "held_out": 3, **options})
    with pytest.raises((ValueError, OSError), match=message):
        examples(task, TRAIN, 0, 5)


def test_a_line_that_is_not_json(records):
    records.write_text('{"question": "a", "answer": "1"}\n[1]\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object: '\\[1\\]'"):
        examples(TaskSpec(name="gsm8k", jsonl=str(records), held_out=1), TRAIN, 0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gsm8k"}, "needs exactly one of task.jsonl and task.hub; found neither"),
        ({"name": "arithmetic", "jsonl": "x"}, "task.jsonl has no meaning for arithmetic"),
        ({"name": "arithmetic", "template": "x"}, 'does not contain "{question}"'),
        ({"name": "arithmetic", "system": "x"}, "set task.chat=true"),
    ],
)
def test_specs_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec(**options)
