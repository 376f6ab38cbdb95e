"""What may have a number and what may not."""

import pytest
import torch

from farspan.eval.gate import judge


def tensors(value, error=0.0):
    return {"output": value + error, "gradient of x": value.clone()}


@pytest.fixture
def exact():
    return tensors(torch.linspace(-1, 1, 11, dtype=torch.float64))


def rounded(exact, **errors):
    return {name: (value + errors.get(name, 0.0)).float() for name, value in exact.items()}


@pytest.mark.parametrize(("error", "passes"), [(1.9e-3, True), (2.1e-3, False), (float("nan"), False)])
def test_twice_the_error_of_the_eager_path_is_allowed(exact, error, passes):
    check = judge(rounded(exact, output=error), rounded(exact, output=1e-3), exact)
    assert check.passed == passes and check.tensor == "output"
    assert check.eager_error == pytest.approx(1e-3, rel=1e-3)


def test_the_worst_tensor_decides(exact):
    fast = rounded(exact, output=1e-6) | {"gradient of x": exact["gradient of x"].float() * 1.001}
    check = judge(fast, rounded(exact, output=1e-6), exact)
    assert not check.passed and check.tensor == "gradient of x"
    assert check.error == pytest.approx(1e-3, rel=1e-3)


def test_errors_are_relative_to_the_largest_value(exact):
    large = {name: 1e6 * value for name, value in exact.items()}
    assert judge(rounded(large, output=1.0), rounded(large), large).error == pytest.approx(1e-6, rel=0.1)


def test_rounding_the_result_is_no_fault(exact):
    """An eager path that is exact by luck does not condemn one that rounds its result."""
    exact = {"output": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    eager = {"output": exact["output"].float()}
    half_unit = torch.finfo(torch.float32).eps / 2
    assert judge({"output": (exact["output"] - half_unit).float()}, eager, exact).passed
    assert not judge({"output": (exact["output"] - 3 * half_unit).float()}, eager, exact).passed
