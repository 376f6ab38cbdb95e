"""Local linear attention in Triton kernels, solved by conjugate gradients: the algorithms are in fused_forward.py,
fused_backward.py and fused_solve.py.

Saved for the backward pass, as by the chunked form: the inputs, x and lse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from farspan.kernels.launch import architecture, packed
from farspan.kernels.local_linear.fused_backward import (
    keys_backward_kernel,
    queries_backward_kernel,
    solve_backward_kernel,
)
from farspan.kernels.local_linear.fused_forward import output_kernel, solve_kernel
from farspan.kernels.local_linear.fused_plan import PROGRAMS, Plan, make_plan
from farspan.kernels.local_linear.fused_tiles import LARGEST, Launch, compilations
from farspan.kernels.local_linear.reference import absolute_factor

__all__ = ["backward_pass", "compilations", "forward_pass", "local_linear_fused", "refusal"]

DTYPES = (torch.float32, torch.bfloat16)


def local_linear_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as `kernels.local_linear.chunked.local_linear_chunked`; CUDA tensors (any under
    TRITON_INTERPRET=1). ValueError where `refusal` says so.
    """
    reason = refusal(q, v, solver)
    if reason is not None:
        raise ValueError(f"local_linear: backend='fused' {reason}; use backend='chunked'")
    constants = (list(lengths), list(prefixes), kernel, ridge_mode, window, solver, tolerance, iterations)
    o, _, _, statistics = forward_pass(q, k, v, ridge, scale, *constants)
    return o, statistics


def refusal(q: torch.Tensor, v: torch.Tensor, solver: str) -> str | None:
    """Why these kernels do not take a call, the other half of a sentence; None where they do."""
    if solver == "gram":
        return "solves by conjugate gradients, not solver='gram'"
    if q.dtype not in DTYPES or v.dtype != q.dtype:
        names = " and ".join(sorted({str(x.dtype).removeprefix("torch.") for x in (q, v)}))
        return f"takes float32 or bfloat16, not {names}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        return f"takes head dims up to {LARGEST}, not {q.shape[-1]} (values {v.shape[-1]})"
    return None


@torch.library.custom_op("farspan::local_linear_fused_forward", mutates_args=())
def forward_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, Dv], x [1, T, H, D] and lse [1, T, H, 1] in fp32, and the statistics [4]."""
    call = _Call.of(q, k, v, ridge, scale, lengths, prefixes, kernel, ridge_mode, window)
    plan, launch = call.plan, call.launch
    o, x = q.new_empty(*q.shape[:3], v.shape[3]), ridge.new_empty(q.shape)
    lse, found = ridge.new_empty(*q.shape[:3], 1), ridge.new_empty(5, *q.shape[1:3])
    table = plan.query_table(launch.tiles[0].M)
    programs = min(table.shape[1] * q.shape[2], PROGRAMS)
    space = ridge.new_empty(programs, launch.tiles[0].M, launch.workspace)
    solve_kernel[(programs,)](
        call.q, call.k, call.ridge, call.scale, call.half, x, lse, found, space, table,
        table.shape[1], *call.sizes, tolerance, iterations, call.ridge_stride, *call.strides[:2], **launch.solve,
    )  # fmt: skip
    table = plan.query_table(launch.tiles[2].M)
    output_kernel[(table.shape[1] * q.shape[2],)](
        call.q, call.k, call.v, call.scale, call.half, x, found, o, table,
        table.shape[1], *call.sizes, *call.strides, **launch.output,
    )  # fmt: skip
    return o, x, lse, torch.cat([found[0].mean()[None], found[:3].flatten(1).amax(1)])


@forward_pass.register_fake
def _(q, k, v, ridge, scale, lengths, prefixes, kernel, ridge_mode, window, solver, tolerance, iterations):
    x, lse = ridge.new_empty(q.shape), ridge.new_empty(*q.shape[:3], 1)
    return q.new_empty(*q.shape[:3], v.shape[3]), x, lse, ridge.new_empty(4)


@torch.library.custom_op("farspan::local_linear_fused_backward", mutates_args=())
def backward_pass(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    lse: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, ridge and scale."""
    call = _Call.of(q, k, v, ridge, scale, lengths, prefixes, kernel, ridge_mode, window)
    plan, launch = call.plan, call.launch
    heads, key_heads = q.shape[2], k.shape[2]
    do, x, lse = packed(do), x.contiguous(), lse.contiguous()

    pairs, scalars = q.new_empty(4 if launch.split else 2, *q.shape[1:]), ridge.new_empty(5, *q.shape[1:3])
    table = plan.query_table(launch.tiles[1].M)
    programs = min(table.shape[1] * heads, PROGRAMS)
    space = ridge.new_empty(programs, launch.tiles[1].M, launch.workspace)
    solve_backward_kernel[(programs,)](
        call.q, call.k, call.v, do, call.ridge, call.scale, call.half, x, lse, pairs, scalars, space, table,
        table.shape[1], *call.sizes, tolerance, iterations, call.ridge_stride, *call.strides, do.stride(1),
        **launch.solve_backward,
    )  # fmt: skip
    dq = q.new_empty(q.shape)
    table = plan.query_table(launch.tiles[3].M)
    queries_backward_kernel[(table.shape[1] * heads,)](
        call.q, call.k, call.v, do, call.scale, call.half, lse, pairs, scalars, dq, table,
        table.shape[1], *call.sizes, *call.strides, do.stride(1), **launch.queries_backward,
    )  # fmt: skip

    table = plan.key_table(launch.tiles[4].N)
    groups = heads // key_heads
    share = plan.share(table.shape[1] * key_heads, groups)
    splits = triton.cdiv(groups, share)
    dk, dv = (y.new_empty(splits, *y.shape[1:], dtype=y.dtype if splits == 1 else torch.float32) for y in (k, v))
    for constants in launch.keys_backward:
        keys_backward_kernel[(table.shape[1] * key_heads * splits,)](
            call.q, call.k, call.v, do, call.scale, call.half, lse, pairs, scalars, dk, dv, table,
            table.shape[1], *call.sizes, share, *call.strides, do.stride(1), **constants,
        )  # fmt: skip
    dk, dv = (y if splits == 1 else y.sum(0, keepdim=True).to(k.dtype) for y in (dk, dv))
    return dq, dk, dv, call.dridge(scalars[3], x, lse, pairs), scalars[4].sum(0)


@backward_pass.register_fake
def _(
    do, q, k, v, ridge, scale, x, lse, lengths, prefixes, kernel, ridge_mode, window, solver, tolerance, iterations,
):  # fmt: skip
    return tuple(y.new_empty(y.shape) for y in (q, k, v, ridge, scale))


def _save(ctx, inputs, output):
    *tensors, ctx.constants = *inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, do, *_):
    return *backward_pass(do, *ctx.saved_tensors, *ctx.constants), *(None,) * len(ctx.constants)


forward_pass.register_autograd(_backward, setup_context=_save)


@dataclass
class _Call:
    """Inputs of one call, packed per token, with the plan and the launch constants that forward and backward share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ridge: torch.Tensor
    scale: torch.Tensor
    half: torch.Tensor
    plan: Plan
    launch: Launch

    @classmethod
    def of(cls, q, k, v, ridge, scale, lengths, prefixes, kernel, ridge_mode, window) -> _Call:
        plan = make_plan(tuple(lengths), tuple(prefixes), window, q.device)
        kinds = {
            "windowed": window is not None,
            "diagonal": ridge.shape[2] > 1,
            "absolute": ridge_mode == "absolute",
            "rbf": kernel == "rbf",
        }
        shape = (q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        launch = Launch(*shape, q.element_size(), architecture(q.device), **kinds)
        half = k[0].float().square().sum(-1).T.contiguous() / 2 if kernel == "rbf" else scale  # which is not read
        return cls(*(packed(x) for x in (q, k, v)), ridge.contiguous(), scale.contiguous(), half, plan, launch)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, keys, and the window (0 for none)."""
        return self.q.shape[1], self.k.shape[1], self.plan.window or 0

    @property
    def strides(self) -> tuple[int, ...]:
        return self.q.stride(1), self.k.stride(1), self.v.stride(1)

    @property
    def ridge_stride(self) -> int:
        """From token to token, 0 where all have one ridge."""
        return self.ridge.shape[1] if self.ridge.shape[0] > 1 else 0

    def dridge(self, of_rows: torch.Tensor, x: torch.Tensor, lse: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """The gradient of the ridge from that of every query [T, H], or, by channel, from x and y themselves."""
        if not self.launch.diagonal:
            return of_rows[..., None] if self.ridge.shape[0] > 1 else of_rows.sum(0)[None, :, None]
        product = x[0] * pairs[1::2].float().sum(0)
        if self.launch.absolute:
            product *= absolute_factor(lse)[0]
        return product.sum(0, keepdim=True)
