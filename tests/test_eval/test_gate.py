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


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 3), (torch.bfloat16, 2)])
@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (1.1, False), (float("nan"), False)])
def test_some_times_the_error_of_the_eager_path_is_allowed(dtype, times, share, passes):
    exact = tensors(torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64))
    eager, fast = ({n: v.to(dtype) for n, v in exact.items()} for _ in range(2))
    eager["output"][1], fast["output"][1] = 2**-6, share * times * 2**-6
    check = judge(fast, eager, exact)
    assert check.passed == passes and check.tensor == "output"
    assert check.eager_error == 2**-6


def test_the_worst_tensor_decides(exact):
    fast = rounded(exact, output=1e-6) | {"gradient of x": exact["gradient of x"].float() * 1.001}
    check = judge(fast, rounded(exact, output=1e-6), exact)
    assert not check.passed and check.tensor == "gradient of x"
    assert check.error == pytest.approx(1e-3, rel=1e-3)


def test_errors_are_relative_to_the_largest_value(exact):
    large = {name: 1e6 * value for name, value in exact.items()}
    assert judge(rounded(large, output=1.0), rounded(large), large).error == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_fault(dtype):
    """An eager path that is exact by luck does not condemn one that rounds its result or sums in another order."""
    exact = {"output": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    eager = {"output": exact["output"].to(dtype)}
    allowed = {torch.float32: 16, torch.bfloat16: 0.5}[dtype] * torch.finfo(dtype).eps
    for share, passes in ((1, True), (3, False)):
        assert judge({"output": (exact["output"] - share * allowed).to(dtype)}, eager, exact).passed == passes
