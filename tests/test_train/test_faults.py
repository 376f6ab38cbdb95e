"""Faults happen where they are planned, and nowhere else."""

import importlib
import json
import math
import os
import signal
import time

import pytest

from farspan.lm.train import faults


@pytest.fixture(autouse=True)
def no_faults():
    yield
    faults.install(None)


def test_nothing_planned_does_nothing():
    faults.reach("step", 1)
    assert faults.poison(1, 2.0) == 2.0


def test_only_the_planned_point_step_and_rank(monkeypatch):
    faults.install([{"point": "data", "step": 3, "do": "full", "rank": 1}])
    faults.reach("data", 3)
    monkeypatch.setenv("RANK", "1")
    faults.reach("data", 2)
    faults.reach("step", 3)
    with pytest.raises(OSError, match="No space left"):
        faults.reach("data", 3)


def test_poison():
    faults.install(
        [{"point": "loss", "step": 2, "do": "nan"}, {"point": "loss", "step": 3, "do": "spike", "factor": 10}]
    )
    assert faults.poison(1, 2.0) == 2.0
    assert math.isnan(faults.poison(2, 2.0))
    assert faults.poison(3, 2.0) == 20.0


def test_hang_lasts_as_long_as_asked():
    faults.install([{"point": "step", "step": 1, "do": "hang", "seconds": 0.05}])
    start = time.monotonic()
    faults.reach("step", 1)
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize("do, status", [("kill", -signal.SIGKILL), ("terminate", -signal.SIGTERM), ("exit", 1)])
def test_ways_to_die(do, status):
    faults.install([{"point": "step", "step": 2, "do": do}])
    child = os.fork()
    if child == 0:
        faults.reach("step", 1)
        faults.reach("step", 2)
        os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_the_environment_is_read_at_import(monkeypatch):
    monkeypatch.setenv("FARSPAN_FAULTS", json.dumps([{"point": "loss", "step": 1, "do": "spike", "factor": 3}]))
    importlib.reload(faults)
    assert faults.poison(1, 2.0) == 6.0


@pytest.mark.parametrize(
    "fault",
    [
        {"point": "nowhere", "step": 1, "do": "kill"},
        {"point": "step", "step": 1, "do": "nan"},
        {"point": "step", "do": "kill"},
        {"point": "step", "step": 1, "do": "kill", "ranks": 1},
    ],
)
def test_ill_plans_are_refused(fault):
    with pytest.raises(ValueError, match="fault"):
        faults.install([fault])


def test_unknown_point_in_the_program_is_refused():
    faults.install([{"point": "step", "step": 1, "do": "kill"}])
    with pytest.raises(ValueError, match="'forward' is not a fault point"):
        faults.reach("forward", 5)


def test_corrupt(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    faults.corrupt(path, "flip")
    assert path.stat().st_size == 100 and sum(map(int.bit_count, path.read_bytes())) == 1
    faults.corrupt(path)
    assert path.stat().st_size == 50
    with pytest.raises(ValueError, match="'melt'"):
        faults.corrupt(path, "melt")
