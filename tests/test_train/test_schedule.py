"""Learning rate schedules at the points that define them."""

import itertools

import pytest

from farspan.lm.recipe import ScheduleSpec
from farspan.lm.train.schedule import cosine, factor, steps_in_budget, warmup_stable_decay


def test_cosine():
    spec = ScheduleSpec(name="cosine", warmup=10, final=0.1)
    values = [factor(spec, step, 110) for step in range(110)]
    assert values[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert values[9] == pytest.approx(1.0)
    assert values[59] == pytest.approx(0.55)  # half way down
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values[9:]))


def test_warmup_stable_decay():
    spec = ScheduleSpec(name="wsd", warmup=0.1, decay=0.2, final=0.0)
    values = [factor(spec, step, 100) for step in range(100)]
    assert values[4] == pytest.approx(0.5)
    assert values[9:80] == pytest.approx([1.0] * 71)
    assert values[89] == pytest.approx(0.5)
    assert values[99] == pytest.approx(0.0)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_runs_shorter_than_their_warmup(name, total):
    values = [factor(ScheduleSpec(name=name, warmup=5), step, total) for step in range(total)]
    assert all(0 < value <= 1 for value in values)


def test_without_warmup_the_first_step_is_nearly_full():
    assert cosine(0.01, 0.0, 0.0) > 0.99
    assert warmup_stable_decay(0.01, 0.0, 0.2, 0.0) == 1.0


def test_steps_in_budget():
    assert steps_in_budget(4.5, 0.25) == 1080
    assert steps_in_budget(0.001, 10) == 1
