"""What every operator shares: how its backend is chosen, and what it declares about its arguments.

An operator is a pure function of tensors in a folder of its own. It declares, once, which of its tensor arguments carry
a head dimension, which are the same on every rank, and which are parameters with one slice per head: head-wise sharding
(Ulysses) reads this to re-shard any operator without knowing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P, T = ParamSpec("P"), TypeVar("T")
BACKENDS = ("auto", "reference", "chunked", "fused")


@dataclass(frozen=True)
class Operator:
    """Name and argument declaration of one operator.

    per_head: tensors laid out `[batch, time, heads, head_dim]` (query heads or key-value heads).
    per_group: tensors laid out `[batch, time, groups, head_dim]` whose head h is group h mod groups.
    replicated: tensors and host values that every rank needs whole.
    per_head_parameters: parameters whose first dimension is the head.
    fused: what the fused backend is: "triton", or the CUDA kernel of torch that it calls.
    """

    name: str
    per_head: tuple[str, ...]
    per_group: tuple[str, ...] = ()
    replicated: tuple[str, ...] = ()
    per_head_parameters: tuple[str, ...] = ()
    fused: str = "triton"


OPERATORS: dict[str, Operator] = {}


def declare(operator: Operator) -> Operator:
    """Enter an operator into the table; called once at the top of its package."""
    assert operator.name not in OPERATORS, f"operator {operator.name} is declared twice"
    OPERATORS[operator.name] = operator
    return operator


def choose_backend(operator: Operator, requested: str, x: torch.Tensor) -> str:
    """`reference`, `chunked` or `fused`, for an operator called on tensors like `x`.

    `auto` is `fused` for half-precision and fp32 tensors on CUDA and `chunked` everywhere else (float64 keeps its
    precision only there). Raises ValueError for an unknown name, or for `fused` where it cannot run.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is not one of {', '.join(BACKENDS)}")
    if requested == "auto":
        return "fused" if x.is_cuda and x.dtype != torch.float64 else "chunked"
    if requested == "fused" and not (x.is_cuda or (operator.fused == "triton" and _interpreted())):
        instead = " (or TRITON_INTERPRET=1)" if operator.fused == "triton" else f": it is {operator.fused}"
        raise ValueError(f"{operator.name}: backend='fused' needs CUDA tensors{instead}; use backend='auto'")
    return requested


def own_precision(function: Callable[P, T]) -> Callable[P, T]:
    """The operator outside of torch.autocast: it takes tensors as they come, and chooses the dtype of sums itself."""

    @wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        tensors = (x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor))
        with torch.autocast(next(tensors).device.type, enabled=False):
            return function(*arguments, **options)

    return run


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def backend_report(device: torch.device) -> str:
    """One line for a program's start: which backend `auto` takes on `device`, and why."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"using fused kernels: {torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {torch.version.cuda}"
        )
    return f"using chunked PyTorch kernels: no CUDA device ({torch.get_num_threads()} CPU threads)"
