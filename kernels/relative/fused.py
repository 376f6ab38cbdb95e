"""Relative attention in Triton kernels: the algorithm is in fused_forward.py and fused_backward.py.

Saved for the backward pass: the inputs, o, and lse. Of a table, what the blocks of rows found for each distance is fp32
and as long as the longest document, whatever the table has; larger distances are folded into its last row here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.kernels.launch import architecture, packed, sum_first
from farspan.kernels.relative.blocks import fold
from farspan.kernels.relative.fused_backward import (
    distances_backward_kernel,
    keys_backward_kernel,
    queries_backward_kernel,
)
from farspan.kernels.relative.fused_forward import forward_kernel
from farspan.kernels.relative.fused_plan import key_table, query_table
from farspan.kernels.relative.fused_tiles import Launch, compilations
from farspan.kernels.relative.gradients import differentiate
from farspan.kernels.relative.spans import Span, unflat
from farspan.kernels.workspace import LOG2E

__all__ = ["compilations", "fused_backward", "fused_forward"]

# Programs that a GPU should get at least from the distances' kernel.
PROGRAMS = 512


@torch.library.custom_op("farspan::relative_fused_forward", mutates_args=())
def fused_forward(
    a: torch.Tensor,
    p: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    beta: torch.Tensor | None,
    spans: list[int],
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.relative.chunked.relative_forward`, on CUDA tensors (any under TRITON_INTERPRET=1): fp32, bf16 or
    fp16, up to 128 channels.
    """
    call = _Call.of(a, p, k, v, table, beta, spans, window)
    tile = call.launch.tiles[0]
    programs = query_table(call.spans, window, tile.M, a.device)
    o = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    lse = a.new_empty(a.shape[2], a.shape[1], dtype=torch.float32)
    forward_kernel[(programs.shape[1] * a.shape[2],)](
        *call.inputs, o, lse, programs, *call.sizes(programs), scale * LOG2E, *call.strides,
        **call.launch.constants(tile),
    )  # fmt: skip
    return o, lse


@fused_forward.register_fake
def _(a, p, k, v, table, beta, spans, window, scale):
    return a.new_empty(a.shape), a.new_empty(a.shape[2], a.shape[1], dtype=torch.float32)


@torch.library.custom_op("farspan::relative_fused_backward", mutates_args=())
def fused_backward(
    do: torch.Tensor,
    a: torch.Tensor,
    p: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    beta: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    spans: list[int],
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.relative.chunked.relative_backward`."""
    call, do = _Call.of(a, p, k, v, table, beta, spans, window), packed(do)
    da, dp, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a, p, k, v))
    delta = (do[0].float() * o[0]).sum(-1).t().contiguous()
    factors, strides = (scale * LOG2E, scale), (*call.strides, do.stride(1))
    heads, tiles = a.shape[2], call.launch.tiles
    programs = query_table(call.spans, window, tiles[1].M, a.device)
    for content in (True,) if beta is None else (True, False):
        queries_backward_kernel[(programs.shape[1] * heads,)](
            *call.inputs, do, lse, delta, da, dp, programs, *call.sizes(programs), *factors, *strides,
            **call.launch.constants(tiles[1]), CONTENT=content,
        )  # fmt: skip
    programs = key_table(call.spans, window, tiles[2].N, a.device)
    keys_backward_kernel[(programs.shape[1] * k.shape[2],)](
        *call.inputs, do, lse, delta, dk, dv, programs, *call.sizes(programs), *factors, *strides,
        **call.launch.constants(tiles[2]),
    )  # fmt: skip
    if beta is None:
        return da, dp, dk, dv, a.new_empty(0), a.new_empty(0)
    programs = query_table(call.spans, window, tiles[3].M, a.device)
    blocks = -(-call.farthest // tiles[3].N)
    splits = max(1, min(programs.shape[1], PROGRAMS // (blocks * heads)))
    shape = splits, heads, blocks * tiles[3].N
    dr = a.new_empty(*shape, p.shape[3], dtype=torch.float32)
    dbeta = a.new_empty(shape, dtype=torch.float32)
    distances_backward_kernel[(blocks * splits * heads,)](
        *call.inputs, do, lse, delta, dr, dbeta, programs, *call.sizes(programs), *factors, splits, shape[2], *strides,
        **call.launch.constants(tiles[3]),
    )  # fmt: skip
    learned = (fold(sum_first(x), like.shape[1]).to(like.dtype) for x, like in ((dr, table), (dbeta, beta)))
    return da, dp, dk, dv, *learned


@fused_backward.register_fake
def _(do, a, p, k, v, table, beta, *rest):
    learned = (a.new_empty(0), a.new_empty(0)) if beta is None else (x.new_empty(x.shape) for x in (table, beta))
    return *(x.new_empty(x.shape) for x in (a, p, k, v)), *learned


differentiate(fused_forward, fused_backward)


@dataclass(frozen=True)
class _Call:
    """Inputs of one call, packed per token, and what forward and backward launch with."""

    inputs: tuple[torch.Tensor, ...]
    spans: tuple[Span, ...]
    window: int | None
    launch: Launch

    @classmethod
    def of(cls, a, p, k, v, table, beta, spans, window) -> _Call:
        (heads, dim), rank = a.shape[2:], p.shape[3]
        if max(dim, rank) > 128 or a.dtype == torch.float64:
            raise ValueError(
                f"backend='fused' takes up to 128 channels of heads and positions in fp32, bf16 or fp16, not {dim} and "
                f"{rank} in {a.dtype}; use backend='chunked'"
            )
        arch = architecture(a.device)
        launch = Launch(heads, k.shape[2], dim, rank, a.itemsize, arch, beta is None, window is not None)
        table = table.to(a.dtype).contiguous()
        beta = table if beta is None else beta.float().contiguous()  # sinusoids have none, and nothing reads it
        return cls((*(packed(x) for x in (a, p, k, v)), table, beta), unflat(spans), window, launch)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(x.stride(1) for x in self.inputs[:4])

    @property
    def farthest(self) -> int:
        """Distances that occur, counted from 0."""
        most = max(span.base + span.length for span in self.spans)
        return most if self.window is None else min(most, self.window)

    def sizes(self, programs: torch.Tensor) -> tuple[int, ...]:
        a, table = self.inputs[0], self.inputs[4]
        return programs.shape[1], a.shape[1], table.shape[-2], self.window or 0
