"""Turns, medians and ratios, on a clock that the test sets."""

import pytest
import torch

from farspan.eval import timing
from farspan.eval.timing import alternate, median_ratio, stopwatch


class Clock:
    """Time that passes only where work says so."""

    def __init__(self):
        self.now = 0.0

    def takes(self, seconds):
        def work():
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_stopwatch_takes_the_time_of_the_work(clock):
    seconds = stopwatch(torch.device("cpu"))
    clock.now = 7.0
    assert [seconds(clock.takes(2.5)), seconds(clock.takes(0.25))] == [2.5, 0.25]


def test_sides_take_turns(clock):
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "abc"}
    times = alternate(sides, range(3), stopwatch(torch.device("cpu")))
    assert "".join(order) == "abc" + "cba" + "abc"
    assert times == {"a": [0.0] * 3, "b": [0.0] * 3, "c": [0.0] * 3}


def test_each_side_gets_its_own_times(clock):
    times = alternate({"slow": clock.takes(4.0), "fast": clock.takes(0.5)}, range(2), stopwatch(torch.device("cpu")))
    assert times == {"slow": [4.0, 4.0], "fast": [0.5, 0.5]}


def test_the_ratio_is_the_median_of_the_rounds():
    # a machine that is ten times slower in one round, for both, changes nothing
    assert median_ratio([8.0, 80.0, 9.0], [2.0, 20.0, 3.0]) == 4.0
    assert median_ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 1.0


@pytest.mark.gpu
def test_events_measure_the_device():
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    seconds = stopwatch(device)
    one, four = (min(seconds(lambda n=n: [x @ x for _ in range(n)]) for _ in range(3)) for n in (1, 4))
    assert 3 < four / one < 5
