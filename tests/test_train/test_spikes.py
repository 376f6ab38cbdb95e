"""What the guard lets through; the statistics by numpy."""

import numpy as np
import pytest
import torch

from farspan.lm.recipe import SpikeSpec
from farspan.lm.train.spikes import SpikeGuard


def judge(guard, loss, norm=1.0):
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)).isfinite())


def test_mean_and_six_deviations_of_the_last_values():
    guard = SpikeGuard(SpikeSpec(window=16, history=16), torch.device("cpu"))
    draw = np.random.default_rng(0)
    values = draw.normal(5.0, 0.5, 40).astype(np.float32)
    assert all(judge(guard, value) for value in values)
    limit = float(values[-16:].mean() + 6 * values[-16:].std())
    assert not judge(guard, limit + 0.01)
    assert judge(guard, limit - 0.01)


def test_skipped_values_do_not_join_the_statistics():
    guard = SpikeGuard(SpikeSpec(window=8, history=4), torch.device("cpu"))
    for _ in range(4):
        assert judge(guard, 3.0)
    for _ in range(20):
        assert not judge(guard, 9.0)
    assert not judge(guard, 3.0, norm=50.0)
    assert judge(guard, 3.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_bad_from_the_first_step(bad):
    guard = SpikeGuard(SpikeSpec(), torch.device("cpu"))
    assert not judge(guard, bad)
    assert not judge(guard, 1.0, norm=bad)
    assert judge(guard, 1.0)


def test_state_survives():
    one = SpikeGuard(SpikeSpec(window=8, history=4), torch.device("cpu"))
    other = SpikeGuard(SpikeSpec(window=8, history=4), torch.device("cpu"))
    for value in (3.0, 3.1, 2.9, 3.0, 3.2):
        judge(one, value)
    other.load_state_dict(one.state_dict())
    for value in (3.3, 9.0, 3.0):
        assert judge(one, value) == judge(other, value)
