"""Softplus attention in Triton kernels: the algorithm is in fused_forward.py and fused_backward.py.

Saved for the backward pass: q, k, v, o, and two fp32 numbers per row and head (one without the re-weighting).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from farspan.kernels.launch import architecture, packed
from farspan.kernels.softplus.config import Config
from farspan.kernels.softplus.fused_backward import keys_backward_kernel, queries_backward_kernel
from farspan.kernels.softplus.fused_forward import attend_kernel
from farspan.kernels.softplus.fused_plan import key_table, query_table
from farspan.kernels.softplus.fused_tiles import Launch, compilations

__all__ = ["compilations", "softplus_fused"]


def softplus_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    config: Config,
) -> torch.Tensor:
    """Arguments and result as `kernels.softplus.reference.softplus_reference`; CUDA tensors (any under
    TRITON_INTERPRET=1).

    fp32, bf16 or fp16, head dims up to 256; else, and for options that have no kernels, ValueError.
    """
    if config.unfused:
        raise ValueError(f"backend='fused' has no kernels for other values of {', '.join(config.unfused)}")
    if q.shape[-1] > 256 or q.dtype == torch.float64:
        raise ValueError(
            f"backend='fused' takes head dims up to 256 in fp32, bf16 or fp16, not {q.shape[-1]} in {q.dtype}; "
            "use backend='chunked'"
        )
    options = (config.power, config.window, config.free_rows, config.scale_multiplier, config.dead_row)
    return _fused_forward(q, k, v, list(lengths), list(prefixes), *options)[0]


@torch.library.custom_op("farspan::softplus_fused_forward", mutates_args=())
def _fused_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    power: float,
    window: int | None,
    free_rows: int,
    scale_multiplier: float,
    dead_row: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, D] and fp32 [2, H, T] (LSSA [1, H, T]), what the weights of every row are found from."""
    call = _Call.of(q, k, v, lengths, prefixes, power, window, free_rows, scale_multiplier, dead_row)
    tile = call.launch.tiles[0]
    table = query_table(*call.documents, tile.M, q.device)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = q.new_empty(call.row_numbers, q.shape[2], q.shape[1], dtype=torch.float32)
    attend_kernel[(table.shape[1] * q.shape[2],)](
        call.q, call.k, call.v, o, rows, table, table.shape[1], q.shape[1], *call.strides, call.scale,
        call.launch.power, call.free_rows, call.window, **call.launch.constants(tile), ZERO=call.launch.dead_zero,
    )  # fmt: skip
    return o, rows


@_fused_forward.register_fake
def _(q, k, v, lengths, prefixes, power, window, free_rows, scale_multiplier, dead_row):
    rows = _row_numbers(power, q.dtype)
    return q.new_empty(q.shape), q.new_empty(rows, q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("farspan::softplus_fused_backward", mutates_args=())
def _fused_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    rows: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    power: float,
    window: int | None,
    free_rows: int,
    scale_multiplier: float,
    dead_row: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = _Call.of(q, k, v, lengths, prefixes, power, window, free_rows, scale_multiplier, dead_row)
    do = packed(do)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    held = torch.empty_like(rows)
    strides = *call.strides, do.stride(1)
    options = call.scale, call.launch.power

    _, tile, key_tile = call.launch.tiles
    table = query_table(*call.documents, tile.M, q.device)
    queries_backward_kernel[(table.shape[1] * q.shape[2],)](
        call.q, call.k, call.v, o, do, rows, dq, held, table, table.shape[1], q.shape[1], *strides, *options,
        call.free_rows, call.window, **call.launch.constants(tile),
    )  # fmt: skip
    table = key_table(*call.documents, key_tile.N, q.device)
    keys_backward_kernel[(table.shape[1] * k.shape[2],)](
        call.q, call.k, call.v, do, rows, held, dk, dv, table, table.shape[1], q.shape[1], *strides, *options,
        call.window, **call.launch.constants(key_tile),
    )  # fmt: skip
    return dq, dk, dv


@_fused_backward.register_fake
def _(do, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    gradients = _fused_backward(do, *ctx.saved_tensors, *ctx.constants)
    return *gradients, *(None for _ in ctx.constants)


_fused_forward.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Call:
    """Inputs of one call, packed per token, and what forward and backward launch with."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    documents: tuple[tuple[int, ...], tuple[int, ...], int | None]
    launch: Launch
    free_rows: int
    scale: float

    @classmethod
    def of(cls, q, k, v, lengths, prefixes, power, window, free_rows, scale_multiplier, dead_row) -> _Call:
        heads, dim = q.shape[2:]
        if _needs_range(power, q.dtype):
            power, free_rows = 1.0, 2**31 - 1
        arch, windowed = architecture(q.device), window is not None
        launch = Launch(heads, k.shape[2], dim, q.itemsize, arch, power, windowed, dead_row == "zero")
        documents = tuple(lengths), tuple(prefixes), window
        return cls(packed(q), packed(k), packed(v), documents, launch, free_rows, scale_multiplier * math.log(dim))

    @property
    def window(self) -> int:
        return self.documents[2] or 0

    @property
    def row_numbers(self) -> int:
        return 2 if self.launch.power else 1

    @cached_property
    def strides(self) -> tuple[int, int, int]:
        return self.q.stride(1), self.k.stride(1), self.v.stride(1)


def _needs_range(power: float, dtype: torch.dtype) -> bool:
    """Whether the maps of LSSA, from e^-60 to 60, do not fit the dtype: it is then computed as power 1 without a
    threshold, which is the same and divides by the row's largest map first.
    """
    return power == 0 and dtype == torch.float16


def _row_numbers(power: float, dtype: torch.dtype) -> int:
    return 2 if power or _needs_range(power, dtype) else 1
