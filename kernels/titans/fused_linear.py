"""The linear memory in Triton kernels: launches, and the operator with its backward.

Saved for the backward pass: the inputs and the states before each span but the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.kernels.launch import packed
from farspan.kernels.titans import fused_tiles
from farspan.kernels.titans.fused_coefficients import (
    coefficients_kernel,
    decay_backward_kernel,
    gates_backward_kernel,
    momentum_backward_kernel,
)
from farspan.kernels.titans.fused_linear_backward import (
    channels_backward_kernel,
    local_kernel,
    scan_backward_kernel,
    scores_backward_kernel,
    solve_backward_kernel,
)
from farspan.kernels.titans.fused_linear_forward import answer_kernel, scan_kernel, solve_kernel
from farspan.kernels.titans.fused_plan import Group, Span, ending_gradient, make_plan, return_gradient
from farspan.kernels.titans.fused_tiles import Launch


def titans_linear(q, k, v, gates, state, starts, lengths, refresh, read, keep_final):
    """Arguments and results as `kernels.titans.linear.titans_linear`; operands are of q's dtype, but no float64."""
    constants = (list(starts), list(lengths), refresh, read, keep_final)
    y, final, _ = _linear_forward(q, k, v.to(q.dtype), *gates, state, *constants)
    return y, final


def plan_of(state: torch.Tensor, starts: list[int], lengths: list[int], refresh: int) -> tuple[Group, ...]:
    return make_plan(
        tuple(starts), tuple(lengths), fused_tiles.SLOTS // refresh * refresh, refresh, state[0].numel(), state.device
    )


@torch.library.custom_op("farspan::titans_fused_linear_forward", mutates_args=())
def _linear_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_momentum: torch.Tensor,
    rate: torch.Tensor,
    state: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    refresh: int,
    read: int | None,
    keep_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, the final states (or [0]), and those before every span but the groups' first [kept, H, 2 D, D]."""
    call = _Call.of(q, k, v, log_decay, log_momentum, rate, refresh, read)
    y = torch.zeros_like(v, memory_format=torch.contiguous_format)
    final = state.expand(len(lengths), *state.shape[1:]).clone() if keep_final else state.new_empty(0)
    kept = []
    for group in plan_of(state, starts, lengths, refresh):
        carried = group.start(state)
        for span in group.spans:
            if span is not group.spans[0]:
                kept.append(carried[: span.documents].clone())
            tiles = _Tiles(call, span)
            tiles.scan(carried)
            tiles.answer(y)
        if keep_final:
            final.index_copy_(0, group.index, carried)
    return y, final, torch.cat(kept) if kept else state.new_empty(0)


@_linear_forward.register_fake
def _(q, k, v, log_decay, log_momentum, rate, state, starts, lengths, refresh, read, keep_final):
    kept = sum(group.boundaries for group in plan_of(state, starts, lengths, refresh))
    final = state.new_empty(len(lengths), *state.shape[1:]) if keep_final else state.new_empty(0)
    return v.new_empty(v.shape), final, state.new_empty(kept, *state.shape[1:]) if kept else state.new_empty(0)


@torch.library.custom_op("farspan::titans_fused_linear_backward", mutates_args=())
def _linear_backward(
    dy: torch.Tensor | None,
    dfinal: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_momentum: torch.Tensor,
    rate: torch.Tensor,
    state: torch.Tensor,
    kept: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    refresh: int,
    read: int | None,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """Gradients of q, k, v, the gates and the state."""
    call = _Call.of(q, k, v, log_decay, log_momentum, rate, refresh, read)
    inputs = (q, k, v, log_decay, log_momentum, rate)
    dinputs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    dy = torch.zeros_like(v) if dy is None else packed(dy.to(v.dtype))
    dstate = ending_gradient(dfinal, state, lengths)
    plan = plan_of(state, starts, lengths, refresh)
    last = sum(group.boundaries for group in plan)
    for group in reversed(plan):
        shape = (len(group.documents), *state.shape[1:])
        carried = state.new_zeros(shape) if dfinal is None else dfinal.index_select(0, group.index)
        for span in reversed(group.spans):
            if span is group.spans[0]:
                start = group.start(state)
            else:
                start, last = kept[last - span.documents : last].clone(), last - span.documents
            tiles = _Tiles(call, span)
            tiles.scan(start)
            tiles.backward(dy, carried, *dinputs)
        return_gradient(group, carried, dstate)
    return *dinputs, dstate


@_linear_backward.register_fake
def _(dy, dfinal, q, k, v, log_decay, log_momentum, rate, state, kept, *constants):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, log_momentum, rate, state))


def _save(ctx, inputs, output):
    *tensors, ctx.starts, ctx.lengths, ctx.refresh, ctx.read, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    constants = (ctx.starts, ctx.lengths, ctx.refresh, ctx.read)
    dfinal = dfinal if dfinal is not None and dfinal.numel() else None
    return *_linear_backward(dy, dfinal, *ctx.saved_tensors, *constants), None, None, None, None, None


_linear_forward.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Call:
    """Inputs packed per token, and the launch constants that forward and backward share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    launch: Launch

    @classmethod
    def of(cls, q, k, v, log_decay, log_momentum, rate, refresh: int, read: int | None) -> _Call:
        launch = Launch.linear(v, refresh, read)
        gates = tuple(x.contiguous() for x in (log_decay, log_momentum, rate))
        return cls(*(packed(x) for x in (q, k, v)), gates, launch)


class _Tiles:
    """The tiles of one span: buffers [tiles, H, ...] that its kernels pass to each other."""

    def __init__(self, call: _Call, span: Span) -> None:
        self.call, self.span, launch = call, span, call.launch
        v, gate = call.v, call.gates[0]
        rows, C, D = (span.tiles, launch.heads), launch.slots, launch.padded
        self.shares, self.ends = gate.new_empty(*rows, 6, C), gate.new_empty(*rows, 3)
        self.inverses = v.new_empty(*rows, C, C) if launch.solves else v.new_empty(0)
        solved = (v.new_empty(*rows, C, D) if launch.solves else v.new_empty(0) for _ in range(3))
        self.keys, self.momentum_keys, self.values = solved
        self.states, self.errors = v.new_empty(*rows, 2, D, D), v.new_empty(*rows, C, D)
        self.mixed = gate.new_empty(*rows, C, C)
        self.refreshed = torch.empty_like(self.mixed) if launch.solves else gate.new_empty(0)
        programs = span.tiles * launch.heads
        coefficients_kernel[(programs,)](
            *call.gates, span.table, self.shares, self.ends, self.mixed, self.refreshed, span.tiles, launch.refresh,
            **launch.constants(coefficients_kernel),
        )  # fmt: skip
        if launch.solves:
            solve_kernel[(programs,)](
                call.k, call.v, span.table, self.shares, self.refreshed,
                self.inverses, self.keys, self.momentum_keys, self.values,
                span.tiles, call.k.stride(1), call.v.stride(1), **launch.constants(solve_kernel),
            )  # fmt: skip

    def scan(self, carried: torch.Tensor) -> None:
        """From the state of the span's start, which is changed in place to that of its end."""
        call, span, launch = self.call, self.span, self.call.launch
        scan_kernel[(span.documents * launch.heads * launch.parts(scan_kernel),)](
            call.k, call.v, self.keys, self.momentum_keys, self.values, span.table, span.sequences,
            self.shares, self.ends, carried, self.states, self.errors,
            span.tiles, span.documents, call.k.stride(1), call.v.stride(1), **launch.constants(scan_kernel),
        )  # fmt: skip

    def answer(self, y: torch.Tensor) -> None:
        call, span, launch = self.call, self.span, self.call.launch
        answer_kernel[(span.tiles * launch.heads * launch.parts(answer_kernel),)](
            call.q, call.k, span.table, self.shares, self.mixed, self.states, self.errors, y,
            span.tiles, call.q.stride(1), call.k.stride(1), **launch.constants(answer_kernel),
        )  # fmt: skip

    def backward(self, dy, dcarried, dq, dk, dv, dlog_decay, dlog_momentum, drate) -> None:
        """Writes the gradients of the span's tokens; dcarried is taken from the span's end to its start, in place."""
        call, span, launch = self.call, self.span, self.call.launch
        rows, C, D = (span.tiles, launch.heads), launch.slots, launch.padded
        strides = (call.q.stride(1), call.k.stride(1), dy.stride(1))
        programs = span.tiles * launch.heads
        new, gate = call.v.new_empty, call.gates[0]
        derrors = gate.new_empty(*rows, C, D)
        local_kernel[(programs,)](
            dy, call.q, call.k, span.table, self.mixed, derrors, span.tiles, *strides, **launch.constants(local_kernel)
        )
        dstates = torch.empty_like(self.states)
        scan_backward_kernel[(span.documents * launch.heads * launch.parts(scan_backward_kernel),)](
            dy, call.q, call.k, self.keys, self.momentum_keys, span.table, span.sequences, self.shares, self.ends,
            dcarried, dstates, derrors, span.tiles, span.documents, *strides, **launch.constants(scan_backward_kernel),
        )  # fmt: skip
        dqk, dkk = new(*rows, C, C), torch.empty_like(self.inverses)
        dmixed, drefreshed = torch.empty_like(self.mixed), torch.empty_like(self.refreshed)
        scores_backward_kernel[(programs,)](
            dy, call.q, call.k, span.table, self.mixed, self.errors, derrors, dv, dqk, dmixed,
            span.tiles, *strides, **launch.constants(scores_backward_kernel),
        )  # fmt: skip
        if launch.solves:
            solve_backward_kernel[(programs,)](
                call.k, span.table, self.refreshed, self.inverses, self.errors, derrors, dv, dkk, drefreshed,
                span.tiles, call.k.stride(1), **launch.constants(solve_backward_kernel),
            )  # fmt: skip
        parts = launch.parts(channels_backward_kernel)
        vectors, scalars = gate.new_empty(parts, *rows, 6, C), gate.new_empty(parts, *rows, 3)
        channels_backward_kernel[(programs * parts,)](
            dy, call.q, call.k, span.table, self.shares, self.states, dstates, self.errors, dv, dqk, dkk, dq, dk,
            vectors, scalars, span.tiles, *strides, **launch.constants(channels_backward_kernel),
        )  # fmt: skip
        partial = mixing_backward(call.gates, span, launch, dmixed, drefreshed)
        gates_backward_kernel[(programs,)](
            *call.gates, span.table, vectors, scalars, partial, dlog_decay, dlog_momentum, drate,
            span.tiles, parts, launch.refresh, **launch.constants(gates_backward_kernel),
        )  # fmt: skip


def mixing_backward(gates, span: Span, launch: Launch, *gradients: torch.Tensor) -> torch.Tensor:
    """`partial` of `gates_backward_kernel` from the gradients of `mixed` and, where there is one, of `refreshed`."""
    rows = (span.tiles, launch.heads)
    partial = gradients[0].new_empty(*rows, 3, launch.slots)
    for kernel in (decay_backward_kernel, momentum_backward_kernel):
        for refreshed, gradient in enumerate(gradients[: 1 + launch.solves]):
            kernel[(rows[0] * rows[1],)](
                *gates, span.table, gradient, partial, span.tiles, launch.refresh,
                **launch.constants(kernel), REFRESHED=bool(refreshed),
            )  # fmt: skip
    return partial
