"""Local linear attention: per query a ridge regression on the softmax-weighted past (arXiv 2510.01450)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from farspan.kernels.local_linear import chunked
from farspan.kernels.local_linear.chunked import local_linear_chunked
from farspan.kernels.local_linear.reference import local_linear_reference
from farspan.kernels.local_linear.solve import SOLVERS, choose_solver
from farspan.kernels.local_linear.step import local_linear_step
from farspan.kernels.operator import Operator, choose_backend, declare, own_precision
from farspan.kernels.packing import PrefixState, with_prefixes

__all__ = ["Settings", "Statistics", "local_linear_attention", "local_linear_step", "prepared", "two_passes"]

KERNELS, RIDGE_MODES = ("dot", "rbf"), ("relative", "absolute")

OPERATOR = declare(
    Operator(
        "local_linear",
        per_head=("q", "k", "v", "initial_state"),
        per_head_parameters=("ridge", "scale"),
        replicated=("lengths", "cu_seqlens", "kernel", "ridge_mode", "window", "solver", "tolerance", "iterations"),
    )
)


class Settings(NamedTuple):
    """Options of `local_linear_attention`, as it explains them."""

    kernel: str = "dot"
    ridge_mode: str = "relative"
    window: int | None = None
    solver: str = "auto"
    tolerance: float = 1e-3
    iterations: int = 16

    def check(self) -> None:
        """Raise ValueError, naming the setting, unless the operator takes them all."""
        choices = (("kernel", KERNELS), ("ridge_mode", RIDGE_MODES), ("solver", SOLVERS))
        for name, valid in choices:
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not known to local_linear; valid: {', '.join(valid)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} must be above 0 and below 1: it is a relative residual")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1; without any it is softmax attention")


class Statistics(NamedTuple):
    """How the solver fared and how far outputs reach, detached scalars in fp32 (float64 for float64).

    iterations, iterations_max: of conjugate gradients per query, 0 where it was solved directly.
    residual_max: largest |A x - b| / |b|. reach_max: largest sum of |weights| of a query: 1 for softmax attention.
    """

    iterations: torch.Tensor
    iterations_max: torch.Tensor
    residual_max: torch.Tensor
    reach_max: torch.Tensor


@own_precision
def local_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    lengths: tuple[int, ...],
    cu_seqlens: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    kernel: str = "dot",
    ridge_mode: str = "relative",
    window: int | None = None,
    solver: str = "auto",
    tolerance: float = 1e-3,
    iterations: int = 16,
    initial_state: PrefixState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, PrefixState | None, Statistics]:
    """Each token fits a line b + W (k - q) to the keys and values that it sees, and takes b.

    The fit weighs key j by w_j = exp(scale q k_j) and W by the ridge; b is free. With p = w / sum w, kbar = sum p k:
        A = sum_j p_j (k_j - kbar)(k_j - kbar)' + ridge I      x = A^-1 (kbar - q)
        o = sum_j p_j (1 - (k_j - kbar) x) v_j
    x = 0 is softmax attention, and so is an infinite ridge. The weights sum to 1 for any x, also for an unfinished one.

    q: [1, T, H, D]; k: [1, T, Hk, D]; v: [1, T, Hk, Dv], H a multiple of Hk; any float dtype, solved in fp32 or wider.
    ridge: above 0, in fp32 or wider: [H], [1, T, H] by token, or [H, D] by channel. It has the scale of k squared.
    lengths, cu_seqlens: tokens of each document on the host, and int32 [documents + 1] offsets on the device.
    scale: D ** -0.5 when None; a tensor [H] is learned.
    kernel: "dot", or "rbf", w_j = exp(-scale |q - k_j|^2 / 2), the same where all keys have one norm (its factor of the
    query alone is left out, which only an absolute ridge would see).
    ridge_mode: "relative" to the sum of the weights, or "absolute": the ridge is then divided by sum w.
    window: keys that a token sees, itself included; None for all.
    solver: "gram" (direct), "cg" (conjugate gradients to `tolerance` of the residual, `iterations` at most), or "auto":
    what costs less (`solve.choose_solver`); float64 is solved directly. Forward and backward solve alike.
    initial_state: per document the keys and values before it, `([n, Hk, D], [n, Hk, Dv])`.
    Returns o [1, T, H, Dv]; with `return_state` the final state in the form of the initial one (with a window the last
    `window - 1`), else None; and statistics. Differentiable, once, in q, k, v, ridge, scale and the initial state.
    Raises ValueError where shapes disagree or a setting is out of range; a ridge on a CUDA device is not looked at.
    Source: arXiv 2510.01450, equations of the estimator, in centred form.
    """
    _check(q, k, v, ridge, scale, lengths)
    settings = Settings(kernel, ridge_mode, window, solver, tolerance, iterations)
    settings.check()
    if window is not None and initial_state is not None:
        initial_state = tuple(_last(document, window) for document in initial_state)
    if initial_state is not None and len(initial_state) == len(lengths):
        _check_state(k, v, initial_state)
    k, v, prefixes = with_prefixes(k, v, lengths, initial_state)
    final_state = None
    if return_state:
        totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        final_state = tuple(_last(pair, window) for pair in zip(k[0].split(totals), v[0].split(totals), strict=True))
    ridge, scale = prepared(q, ridge, scale)
    choice = _backend(backend, q, v, settings.solver)
    if choice == "fused":
        from farspan.kernels.local_linear.fused import local_linear_fused as run
    else:
        run = {"reference": local_linear_reference, "chunked": local_linear_chunked}[choice]
    o, statistics = run(q, k, v, ridge, scale, lengths, prefixes, *settings)
    return o, final_state, Statistics(*statistics.detach().unbind())


def prepared(
    q: torch.Tensor, ridge: torch.Tensor, scale: torch.Tensor | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """ridge [T or 1, H, D or 1] and scale [H] as the backends take them, in fp32 or wider; differentiable."""
    wide = torch.promote_types(q.dtype, torch.float32)
    ridge = ridge.to(wide)
    ridge = ridge[None, :, None] if ridge.ndim == 1 else ridge[0, ..., None] if ridge.ndim == 3 else ridge[None]
    if not isinstance(scale, torch.Tensor):
        scale = q.new_full((q.shape[2],), q.shape[3] ** -0.5 if scale is None else scale, dtype=wide)
    return ridge, scale.to(wide)


def two_passes(backend: str, q: torch.Tensor, settings: Settings) -> tuple[Callable, Callable, str]:
    """The forward and the backward pass of a backend as plain functions, for who moves keys itself, and the solver.

    forward(q, k, v, ridge, scale, lengths, prefixes, *settings) -> o, x, lse, statistics
    backward(do, q, k, v, ridge, scale, x, lse, lengths, prefixes, *settings) -> dq, dk, dv, dridge, dscale
    as in `chunked`; settings with the solver that is returned. There is none of the reference.
    """
    choice = _backend(backend, q, q, settings.solver)
    assert choice != "reference", "the reference is differentiated by autograd"
    if choice == "fused":
        from farspan.kernels.local_linear import fused

        return fused.forward_pass, fused.backward_pass, "cg"
    solver = choose_solver(settings.solver, q.shape[3], settings.iterations, q.dtype)
    return chunked.forward_pass, chunked.backward_pass, solver


def _backend(requested: str, q: torch.Tensor, v: torch.Tensor, solver: str) -> str:
    """As `choose_backend`, but `auto` is chunked for what the Triton kernels do not take; "fused" raises ValueError."""
    choice = choose_backend(OPERATOR, requested, q)
    if choice == "fused":
        from farspan.kernels.local_linear.fused import refusal

        if (reason := refusal(q, v, solver)) is not None:
            if requested != "auto":
                raise ValueError(f"local_linear: backend='fused' {reason}; use backend='auto' or 'chunked'")
            return "chunked"
    return choice


def _check(q, k, v, ridge, scale, lengths) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != 1:
        raise ValueError(f"expected packed [1, time, heads, head_dim] tensors, got {shapes}")
    agree = k.shape[:3] == v.shape[:3] and k.shape[1] == q.shape[1] and k.shape[3] == q.shape[3]
    if not agree or q.shape[2] % k.shape[2]:
        raise ValueError(f"shapes disagree: {shapes}")
    if sum(lengths) != q.shape[1] or min(lengths, default=0) < 1:
        raise ValueError(f"document lengths {lengths[:8]} sum to {sum(lengths)}, the row has {q.shape[1]} tokens")
    heads, head_dim = q.shape[2:]
    valid = ([heads], [1, q.shape[1], heads], [heads, head_dim])
    if list(ridge.shape) not in valid:
        raise ValueError(f"ridge {list(ridge.shape)} must be [heads], [1, time, heads] or [heads, head_dim]: {valid}")
    if isinstance(scale, torch.Tensor) and list(scale.shape) != [heads]:
        raise ValueError(f"scale {list(scale.shape)} must be a number, or one for each of {heads} heads")
    if not ridge.is_cuda and not torch.compiler.is_compiling():  # on CUDA the host would wait for it
        for bound in map(float, ridge.detach().aminmax()):
            if not 0 < bound < math.inf:
                raise ValueError(f"ridge={bound:.3g} must be above 0 and finite: early tokens see few keys")


def _check_state(k: torch.Tensor, v: torch.Tensor, state: PrefixState) -> None:
    for keys, values in state:
        if keys.shape[1:] != k.shape[2:] or values.shape[1:] != v.shape[2:] or len(keys) != len(values):
            raise ValueError(
                f"the initial state has keys {list(keys.shape)} and values {list(values.shape)}; "
                f"they must be [n, {k.shape[2]}, {k.shape[3]}] and [n, {v.shape[2]}, {v.shape[3]}]"
            )


def _last(pair: tuple[torch.Tensor, torch.Tensor], window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """All that a later token can see: everything, or the last `window - 1`."""
    first = 0 if window is None else max(0, pair[0].shape[0] - window + 1)
    return pair[0][first:], pair[1][first:]
