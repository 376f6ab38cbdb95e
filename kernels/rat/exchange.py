"""Summaries that other ranks hold: what a caller hands in to bring them, between the two halves of the operator.

The summaries of a chunk depend on its own tokens alone. So a shard of a row finishes its own summaries first, exchanges
them, and only then attends; backward in the opposite order. Nothing is computed twice.
"""

from __future__ import annotations

from typing import Protocol

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class Exchange(Protocol):
    """Brings the summaries of earlier chunks, and takes their gradients home. Called by all ranks alike."""

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """Summaries [finished, H, D] that these tokens finish, document by document, to those of the earlier chunks of
        every document, [sum of offset // chunk, H, D], document by document.
        """

    def backward(self, dkeys: torch.Tensor, dvalues: torch.Tensor) -> Pair:
        """Gradients of what `forward` returned to those of what it was given, from all ranks."""


def run_exchanged(forward_pass, backward_pass, exchange: Exchange, constants: tuple, *inputs: torch.Tensor | None):
    """y, keys, values, key, value of a backend's `forward_pass`, with the gradients of its `backward_pass`.

    inputs: q, k, v, gate, gate_bias, z, cos, sin, running key and value; constants: lengths, offsets, chunk, scale.
    """
    return _Exchanged.apply(forward_pass, backward_pass, exchange, constants, *inputs)


def exchanged_by_autograd(exchange: Exchange, keys: torch.Tensor, values: torch.Tensor) -> Pair:
    """`exchange.forward` as one differentiable step, for the reference."""
    return _Brought.apply(exchange, keys, values)


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward_pass, backward_pass, exchange, constants, *inputs):
        v = inputs[2]
        nothing = (v.new_empty(0, *v.shape[2:]),) * 2
        results, saved = forward_pass(*inputs, *nothing, *constants, exchange)
        ctx.save_for_backward(*inputs, *saved)
        ctx.backward_pass, ctx.exchange, ctx.constants = backward_pass, exchange, constants
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        found = ctx.backward_pass(*gradients, *ctx.saved_tensors, *ctx.constants, ctx.exchange)
        return None, None, None, None, *found[:6], None, None, *found[6:8]


class _Brought(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, keys, values):
        ctx.exchange = exchange
        return exchange.forward(keys, values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dkeys, dvalues):
        return None, *ctx.exchange.backward(dkeys, dvalues)
