"""Core-context-aware attention in Triton kernels: the algorithms are in fused_forward.py, fused_backward.py and
fused_pool.py.

Saved for the backward passes: the inputs, o and lse. The weights of pooling are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from farspan.kernels.cca.fused_backward import columns_backward_kernel, queries_backward_kernel
from farspan.kernels.cca.fused_forward import attend_kernel
from farspan.kernels.cca.fused_plan import Plan, make_plan
from farspan.kernels.cca.fused_pool import pool_kernel, pool_queries_backward_kernel, pool_rows_backward_kernel
from farspan.kernels.cca.fused_tiles import ELEMENTS, Launch, compilations
from farspan.kernels.cca.pieces import Piece
from farspan.kernels.launch import architecture, packed, sum_first

__all__ = ["compilations", "core_attention_fused", "pool_fused"]


def pool_fused(
    q_end: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_keys: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    core_heads: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as `kernels.cca.pool_groups`; CUDA tensors (any under TRITON_INTERPRET=1).

    fp32, bf16 or fp16, all alike; head dims up to 256, else ValueError.
    """
    _check(k, q_end, v, k if pooled_keys is None else pooled_keys)
    evaluator = q_end
    if core_heads == "kv":
        evaluator = q_end.float().unflatten(2, (k.shape[2], -1)).mean(3)
    return _pool_forward(evaluator, k, v, pooled_keys, starts, group, scale)


def core_attention_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    pieces: tuple[Piece, ...],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> torch.Tensor:
    """Arguments and result as `kernels.cca.core_attention`; CUDA tensors (any under TRITON_INTERPRET=1).

    fp32, bf16 or fp16, all alike; head dims up to 256, else ValueError.
    """
    _check(q, k, v, core_k, core_v)
    numbers = [number for piece in pieces for number in piece]
    return _attention_forward(q, k, v, core_k, core_v, numbers, group, window, core_bias, scale, parts)[0]


def _check(first: torch.Tensor, *others: torch.Tensor) -> None:
    dtypes = {first.dtype, *(x.dtype for x in others)}
    if first.shape[-1] > 256 or len(dtypes) > 1 or first.dtype == torch.float64:
        names = ", ".join(sorted(str(x).removeprefix("torch.") for x in dtypes))
        raise ValueError(
            f"backend='fused' takes head dims up to 256 in one of fp32, bf16 and fp16, not {first.shape[-1]} in "
            f"{names}; use backend='chunked'"
        )


@torch.library.custom_op("farspan::cca_pool_fused_forward", mutates_args=())
def _pool_forward(
    evaluator: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_keys: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """core_k, core_v [1, M, Hc, D] for evaluators [1, M, Hc, D]."""
    inputs, strides = _pool_inputs(evaluator, k, v, pooled_keys)
    core_k, core_v = (x.new_empty(evaluator.shape) for x in (k, v))
    groups, launch = len(starts), _pool_launch(evaluator, k)
    constants = launch.pool(group, ELEMENTS, pooled_keys is not None)
    if groups:
        pool_kernel[(triton.cdiv(groups, constants["N"]) * launch.core_heads,)](
            *inputs, starts, core_k, core_v, groups, group, scale, *strides, **constants
        )
    return core_k, core_v


@_pool_forward.register_fake
def _(evaluator, k, v, pooled_keys, starts, group, scale):
    return tuple(x.new_empty(evaluator.shape) for x in (k, v))


@torch.library.custom_op("farspan::cca_pool_fused_backward", mutates_args=())
def _pool_backward(
    dcore_k: torch.Tensor,
    dcore_v: torch.Tensor,
    evaluator: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_keys: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the evaluators, k, v and pooled_keys (empty where there are none)."""
    inputs, strides = _pool_inputs(evaluator, k, v, pooled_keys)
    dcore_k, dcore_v = packed(dcore_k), packed(dcore_v)
    strides = (*strides, dcore_k.stride(1), dcore_v.stride(1))
    pooled = pooled_keys is not None
    dq, dk, dv = evaluator.new_empty(evaluator.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dx = k.new_zeros(k.shape if pooled else 0)
    groups, launch = len(starts), _pool_launch(evaluator, k)
    lse, delta = (k.new_empty(groups, launch.core_heads, dtype=torch.float32) for _ in range(2))
    constants = launch.pool(group, ELEMENTS, pooled)
    tiles = triton.cdiv(groups, constants["N"])
    if groups:
        pool_queries_backward_kernel[(tiles * launch.core_heads,)](
            *inputs, starts, dcore_k, dcore_v, dq, lse, delta, groups, group, scale, *strides, **constants
        )
        pool_rows_backward_kernel[(tiles * triton.cdiv(group, constants["R"]) * launch.key_heads,)](
            *inputs, starts, dcore_k, dcore_v, lse, delta, dk, dv, dx, groups, group, scale, *strides, **constants
        )
    return dq, dk, dv, dx


@_pool_backward.register_fake
def _(dcore_k, dcore_v, evaluator, k, v, pooled_keys, starts, group, scale):
    dx = k.new_empty(0 if pooled_keys is None else k.shape)
    return evaluator.new_empty(evaluator.shape), k.new_empty(k.shape), v.new_empty(v.shape), dx


def _pool_inputs(evaluator, k, v, pooled_keys) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """What the pooling kernels read, and its strides; k in place of keys to pool, which are then not read."""
    inputs = tuple(packed(x) for x in (evaluator, k, v, k if pooled_keys is None else pooled_keys))
    return inputs, tuple(x.stride(1) for x in inputs)


def _pool_launch(evaluator: torch.Tensor, k: torch.Tensor) -> Launch:
    heads = evaluator.shape[2]
    return Launch(heads, k.shape[2], heads, k.shape[3], k.element_size(), architecture(k.device))


def _save_pool(ctx, inputs, output):
    *tensors, ctx.group, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _pool_gradients(ctx, dcore_k, dcore_v):
    dq, dk, dv, dx = _pool_backward(dcore_k, dcore_v, *ctx.saved_tensors, ctx.group, ctx.scale)
    return dq, dk, dv, None if ctx.saved_tensors[3] is None else dx, None, None, None


_pool_forward.register_autograd(_pool_gradients, setup_context=_save_pool)


@torch.library.custom_op("farspan::cca_attention_fused_forward", mutates_args=())
def _attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    pieces: list[int],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [1, T, H, D], and lse, fp32 [H, T], infinite where a query sees nothing."""
    call = _Call.of(q, k, v, core_k, core_v, pieces, group, window, core_bias, scale, parts)
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[2], q.shape[1], dtype=torch.float32)
    tile = call.launch.tiles[0]
    table = call.plan.query_table(tile.M)
    attend_kernel[(table.shape[1] * q.shape[2],)](
        *call.inputs, o, lse, table, table.shape[1], *call.numbers, *call.strides, **call.launch.queries(tile)
    )
    return o, lse


@_attention_forward.register_fake
def _(q, k, v, core_k, core_v, pieces, group, window, core_bias, scale, parts):
    return q.new_empty(q.shape), q.new_empty(q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("farspan::cca_attention_fused_backward", mutates_args=())
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    pieces: list[int],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, core_k and core_v."""
    call = _Call.of(q, k, v, core_k, core_v, pieces, group, window, core_bias, scale, parts)
    do, dq, delta = do.contiguous(), q.new_empty(q.shape), torch.empty_like(lse)
    tile = call.launch.tiles[1]
    table = call.plan.query_table(tile.M)
    queries_backward_kernel[(table.shape[1] * q.shape[2],)](
        *call.inputs, o, do, lse, delta, dq, table, table.shape[1], *call.numbers, *call.strides,
        **call.launch.queries(tile),
    )  # fmt: skip
    rows = do, lse, delta
    return dq, *call.columns_backward(*rows, cores=False), *call.columns_backward(*rows, cores=True)


@_attention_backward.register_fake
def _(do, q, k, v, core_k, core_v, o, lse, pieces, group, window, core_bias, scale, parts):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, core_k, core_v))


def _save_attention(ctx, inputs, output):
    *tensors, pieces, group, window, core_bias, scale, parts = inputs
    ctx.constants = (pieces, group, window, core_bias, scale, parts)
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for lse


def _attention_gradients(ctx, do, _):
    return *_attention_backward(do, *ctx.saved_tensors, *ctx.constants), *(None,) * 6


_attention_forward.register_autograd(_attention_gradients, setup_context=_save_attention)


@dataclass
class _Call:
    """Inputs of one call of core attention, packed per token, with what forward and backward share."""

    inputs: tuple[torch.Tensor, ...]
    plan: Plan
    launch: Launch
    core_bias: float
    scale: float
    parts: str

    @classmethod
    def of(cls, q, k, v, core_k, core_v, pieces, group, window, core_bias, scale, parts) -> _Call:
        plan = make_plan(tuple(pieces), group, window, q.device)
        heads = (x.shape[2] for x in (q, k, core_k))
        launch = Launch(*heads, q.shape[3], q.element_size(), architecture(q.device))
        return cls(tuple(packed(x) for x in (q, k, v, core_k, core_v)), plan, launch, core_bias, scale, parts)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(x.stride(1) for x in self.inputs)

    @property
    def numbers(self) -> tuple[int | float, ...]:
        """Tokens, group, window, whether keys and cores are seen, scale, bias."""
        seen = self.parts != "cores", self.parts != "raw"
        tokens = self.inputs[0].shape[1]
        return tokens, self.plan.group, self.plan.window, *(int(x) for x in seen), self.scale, self.core_bias

    def columns_backward(self, do, lse, delta, cores: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of k and v, or of core_k and core_v."""
        q, k, v = self.inputs[0].contiguous(), *(self.inputs[3:] if cores else self.inputs[1:3])
        rows, heads, tile = k.shape[1], k.shape[2], self.launch.tiles[2]
        if not rows or self.parts == ("raw" if cores else "cores"):
            return k.new_zeros(k.shape), v.new_zeros(v.shape)
        columns = self.plan.columns(cores, rows, heads, tile.N, tile.M)
        dtype = k.dtype if columns.splits == 1 else torch.float32
        dk, dv = (x.new_empty(columns.splits, *x.shape[1:], dtype=dtype) for x in (k, v))
        tokens, group, window, _, _, scale, bias = self.numbers
        entries, pairs = columns.blocks.shape[1], columns.segments.shape[1]
        columns_backward_kernel[(entries * heads,)](
            q, k, v, do, lse, delta, dk, dv, columns.blocks, columns.segments, entries, pairs, rows, tokens,
            group, window, scale, bias if cores else 0.0, k.stride(1), v.stride(1), **self.launch.columns(tile, cores),
        )  # fmt: skip
        return tuple(sum_first(x)[None].to(k.dtype) for x in (dk, dv))
