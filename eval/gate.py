"""The check that a benchmark row has to pass before it gets a number."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# By dtype: how many times the error of the eager path, and how many units in the last place of a tensor's largest
# value, are allowed. Narrow: the rule of flash-attention's tests, and the rounding of the result. In float32 both paths
# round every sum, in another order; which is off by more is chance, and at small sizes one may be exact.
ALLOWED = {torch.bfloat16: (2.0, 0.5), torch.float16: (2.0, 0.5), torch.float32: (3.0, 16.0)}
EXACT = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Check:
    """How far the worst tensor is off, as a share of its largest exact value, and how far the eager path is."""

    passed: bool
    tensor: str
    error: float
    eager_error: float


def judge(fast: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> Check:
    """Compare what a fast path computed with its definition, tensor by tensor.

    fast, eager: the same tensors by the fast path and by the definition in the same dtype. exact: by the definition in
    a wider one. The largest error of each may be what `ALLOWED` says. NaN fails.
    """
    worst = None
    for name, truth in exact.items():
        scale = max(float(truth.abs().max()), torch.finfo(truth.dtype).tiny)
        ours, theirs = (float((x[name].to(truth.dtype) - truth).abs().max()) / scale for x in (fast, eager))
        times, units = ALLOWED[fast[name].dtype]
        limit = max(times * theirs, units * torch.finfo(fast[name].dtype).eps)
        excess = ours / limit if ours == ours else float("inf")
        if worst is None or excess > worst[0]:
            worst = excess, Check(ours <= limit, name, ours, theirs)
    assert worst is not None, "nothing to compare"
    return worst[1]
