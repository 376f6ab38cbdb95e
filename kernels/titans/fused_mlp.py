"""The memory of two layers in Triton kernels: launches, and the operator with its backward.

Saved for the backward pass: the inputs and the states before each span but the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from farspan.kernels.launch import packed
from farspan.kernels.titans.fused_coefficients import coefficients_kernel, gates_backward_kernel
from farspan.kernels.titans.fused_linear import mixing_backward
from farspan.kernels.titans.fused_mlp_backward import mlp_answer_backward_kernel, mlp_scan_backward_kernel
from farspan.kernels.titans.fused_mlp_forward import mlp_answer_kernel, mlp_scan_kernel
from farspan.kernels.titans.fused_plan import Group, Span, ending_gradient, make_plan, return_gradient
from farspan.kernels.titans.fused_tiles import Launch

Tensors = list[torch.Tensor]


def titans_mlp(q, k, v, gates, state, initial, norm, starts, lengths, refresh, read, activation, keep_final):
    """Arguments and results as `kernels.titans.mlp.titans_mlp`, for two layers that decay to zero; no float64."""
    assert len(state) == 2 and not initial
    constants = (list(starts), list(lengths), refresh, read, activation, keep_final)
    y, *rest = _mlp_forward(q, k, v, *gates, *state, list(norm), *constants)
    return y, rest[:2] if keep_final else []


def plan_of(state: Tensors, starts: list[int], lengths: list[int], refresh: int) -> tuple[Group, ...]:
    size = sum(x[0].numel() for x in state)
    return make_plan(tuple(starts), tuple(lengths), refresh, refresh, size, state[0].device)


@torch.library.custom_op("farspan::titans_fused_mlp_forward", mutates_args=())
def _mlp_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_momentum: torch.Tensor,
    rate: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    norm: list[torch.Tensor],
    starts: list[int],
    lengths: list[int],
    refresh: int,
    read: int | None,
    activation: str,
    keep_final: bool,
) -> list[torch.Tensor]:
    """first, second: [W; S] of the two layers. Returns y; with keep_final both layers' final states; both layers'
    states before every span but the groups' first [kept, H, 2, d_in, d_out], padded.
    """
    state = [first, second]
    call = _Call.of(q, k, v, log_decay, log_momentum, rate, norm, first.shape[-1], refresh, read, activation)
    y = torch.zeros_like(v, memory_format=torch.contiguous_format)
    final = [x.expand(len(lengths), *x.shape[1:]).clone() for x in state] if keep_final else []
    kept = [[call.pad(x.new_empty(0, *x.shape[1:]))] for x in state]
    for group in plan_of(state, starts, lengths, refresh):
        carried = [call.pad(group.start(x)) for x in state]
        for span in group.spans:
            if span is not group.spans[0]:
                for boundaries, x in zip(kept, carried, strict=True):
                    boundaries.append(x[: span.documents].clone())
            tiles = _Tiles(call, span)
            tiles.scan(carried)
            tiles.answer(y)
        for out, x in zip(final, carried, strict=False):
            out.index_copy_(0, group.index, call.cut(x, out))
    return [y, *final, *(torch.cat(boundaries) for boundaries in kept)]


@_mlp_forward.register_fake
def _(
    q, k, v, log_decay, log_momentum, rate, first, second, norm, starts, lengths, refresh, read, activation, keep_final
):  # fmt: skip
    state = [first, second]
    kept = sum(group.boundaries for group in plan_of(state, starts, lengths, refresh))
    final = [x.new_empty(len(lengths), *x.shape[1:]) for x in state] if keep_final else []
    call = _Call.of(q, k, v, log_decay, log_momentum, rate, norm, first.shape[-1], refresh, read, activation)
    return [v.new_empty(v.shape), *final, *(call.pad(x.new_empty(kept, *x.shape[1:])) for x in state)]


@torch.library.custom_op("farspan::titans_fused_mlp_backward", mutates_args=())
def _mlp_backward(
    dy: torch.Tensor | None,
    dfirst: torch.Tensor | None,
    dsecond: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_momentum: torch.Tensor,
    rate: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    norm: list[torch.Tensor],
    kept: list[torch.Tensor],
    starts: list[int],
    lengths: list[int],
    refresh: int,
    read: int | None,
    activation: str,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, the gates, both layers' states, and norm."""
    state, dfinal = [first, second], [dfirst, dsecond]
    call = _Call.of(q, k, v, log_decay, log_momentum, rate, norm, first.shape[-1], refresh, read, activation)
    inputs = (q, k, v, log_decay, log_momentum, rate)
    dinputs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    dnorm = rate.new_zeros(2, *v.shape[2:])
    dy = torch.zeros_like(v) if dy is None else packed(dy.to(v.dtype))
    dstate = [ending_gradient(d, x, lengths) for d, x in zip(dfinal, state, strict=True)]
    plan = plan_of(state, starts, lengths, refresh)
    last = sum(group.boundaries for group in plan)
    for group in reversed(plan):
        carried = [call.pad(_carried(group, d, x)) for d, x in zip(dfinal, state, strict=True)]
        for span in reversed(group.spans):
            if span is group.spans[0]:
                start = [call.pad(group.start(x)) for x in state]
            else:
                start = [x[last - span.documents : last].clone() for x in kept]
                last -= span.documents
            tiles = _Tiles(call, span)
            tiles.scan(start)
            tiles.backward(dy, carried, dnorm, *dinputs)
        for own, out in zip(carried, dstate, strict=True):
            return_gradient(group, call.cut(own, out), out)
    return [*dinputs, *dstate, *(d.to(x.dtype, copy=True) for d, x in zip(dnorm, norm, strict=False))]


def _carried(group: Group, dfinal: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    if dfinal is None:
        return state.new_zeros(len(group.documents), *state.shape[1:])
    return dfinal.index_select(0, group.index)


@_mlp_backward.register_fake
def _(dy, dfirst, dsecond, q, k, v, log_decay, log_momentum, rate, first, second, norm, *constants):
    return [x.new_empty(x.shape) for x in (q, k, v, log_decay, log_momentum, rate, first, second, *norm)]


def _save(ctx, inputs, output):
    *tensors, norm, ctx.starts, ctx.lengths, ctx.refresh, ctx.read, ctx.activation, ctx.keep = inputs
    ctx.save_for_backward(*tensors, *norm, *output[-2:])
    ctx.mark_non_differentiable(*output[-2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradients):
    *tensors, kept_first, kept_second = ctx.saved_tensors
    tensors, norm = tensors[:8], tensors[8:]
    dfinal = gradients[1:3] if ctx.keep else (None, None)
    constants = (ctx.starts, ctx.lengths, ctx.refresh, ctx.read, ctx.activation)
    found = _mlp_backward(gradients[0], *dfinal, *tensors, norm, [kept_first, kept_second], *constants)
    return *found[:8], found[8:], None, None, None, None, None, None


_mlp_forward.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True)
class _Call:
    """Inputs packed per token, and the launch constants that forward and backward share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    norm: torch.Tensor
    launch: Launch

    @classmethod
    def of(cls, q, k, v, log_decay, log_momentum, rate, norm, hidden, refresh, read, activation) -> _Call:
        launch = Launch.mlp(v, refresh, read, hidden, bool(norm), activation)
        gates = tuple(x.contiguous() for x in (log_decay, log_momentum, rate))
        affine = torch.stack([x.to(rate.dtype) for x in norm]) if norm else rate
        return cls(*(packed(x) for x in (q, k, v)), gates, affine, launch)

    def pad(self, state: torch.Tensor) -> torch.Tensor:
        """[n, H, 2 d_in, d_out] -> [n, H, 2, d_in, d_out], zeros up to whole blocks of channels and hidden units."""
        state = state.unflatten(2, (2, -1))
        widths = {self.launch.dim: self.launch.padded, self.launch.hidden: self.launch.padded_hidden}
        d_in, d_out = state.shape[-2:]
        return pad(state, (0, widths[d_out] - d_out, 0, widths[d_in] - d_in))

    def cut(self, state: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """What was padded, with the widths of `like` [.., 2 d_in, d_out]."""
        return state[..., : like.shape[-2] // 2, : like.shape[-1]].flatten(2, 3)


class _Tiles:
    """The tiles of one span: buffers [tiles, H, ...] that its kernels pass to each other."""

    def __init__(self, call: _Call, span: Span) -> None:
        self.call, self.span, launch = call, span, call.launch
        self.rows = (span.tiles, launch.heads)
        new, gate, C = call.v.new_empty, call.gates[0], launch.slots
        self.shares, self.ends = gate.new_empty(*self.rows, 6, C), gate.new_empty(*self.rows, 3)
        D, hidden = launch.padded, launch.padded_hidden
        self.states = [new(*self.rows, 2, D, hidden), new(*self.rows, 2, hidden, D)]
        self.hidden_deltas, self.deltas = new(*self.rows, C, hidden), new(*self.rows, C, D)
        self.mixed = gate.new_empty(*self.rows, C, C)
        coefficients_kernel[(span.tiles * launch.heads,)](
            *call.gates, span.table, self.shares, self.ends, self.mixed, self.mixed, span.tiles, launch.refresh,
            **launch.constants(coefficients_kernel),
        )  # fmt: skip

    @property
    def written(self) -> Tensors:
        return [*self.states, self.hidden_deltas, self.deltas]

    def scan(self, carried: Tensors) -> None:
        """From the state of the span's start, which is changed in place to that of its end."""
        call, span, launch = self.call, self.span, self.call.launch
        mlp_scan_kernel[(span.documents * launch.heads,)](
            call.k, call.v, call.norm, span.table, span.sequences, self.shares, self.ends, *carried, *self.written,
            span.tiles, span.documents, call.k.stride(1), call.v.stride(1), **launch.constants(mlp_scan_kernel),
        )  # fmt: skip

    def answer(self, y: torch.Tensor) -> None:
        call, span, launch = self.call, self.span, self.call.launch
        mlp_answer_kernel[(span.tiles * launch.heads,)](
            call.q, call.k, call.norm, span.table, self.shares, self.mixed, *self.written, y,
            span.tiles, call.q.stride(1), call.k.stride(1), **launch.constants(mlp_answer_kernel),
        )  # fmt: skip

    def backward(self, dy, dcarried: Tensors, dnorm, dq, dk, dv, dlog_decay, dlog_momentum, drate) -> None:
        """Writes the gradients of the span's tokens and adds to dnorm [2, H, D]; dcarried is taken from the span's end
        to its start, in place.
        """
        call, span, launch = self.call, self.span, self.call.launch
        gate, C, programs = call.gates[0], launch.slots, span.tiles * launch.heads
        strides = (call.q.stride(1), call.k.stride(1))
        asked, dhidden, dinputs, dhidden_deltas = (torch.empty_like(self.hidden_deltas) for _ in range(4))
        dout = torch.empty_like(self.deltas)
        dkeys, ddeltas = (gate.new_empty(self.deltas.shape) for _ in range(2))
        vectors, scalars = gate.new_empty(1, *self.rows, 6, C), gate.new_empty(1, *self.rows, 3)
        dmixed = torch.empty_like(self.mixed)
        dnorms = gate.new_empty(*self.rows, 2, launch.padded) if launch.norm else gate.new_empty(0)
        mlp_answer_backward_kernel[(programs,)](
            dy, call.q, call.k, call.norm, span.table, self.shares, self.mixed, *self.written,
            dq, dkeys, asked, dhidden, dout, dinputs, dhidden_deltas, ddeltas, vectors, dmixed, dnorms,
            span.tiles, *strides, dy.stride(1), **launch.constants(mlp_answer_backward_kernel),
        )  # fmt: skip
        mlp_scan_backward_kernel[(span.documents * launch.heads,)](
            call.q, call.k, call.v, call.norm, span.table, span.sequences, self.shares, self.ends, *self.written,
            asked, dhidden, dout, dinputs, dhidden_deltas, ddeltas, dkeys, *dcarried, dk, dv, vectors, scalars, dnorms,
            span.tiles, span.documents, *strides, call.v.stride(1), **launch.constants(mlp_scan_backward_kernel),
        )  # fmt: skip
        partial = mixing_backward(call.gates, span, launch, dmixed)
        gates_backward_kernel[(programs,)](
            *call.gates, span.table, vectors, scalars, partial, dlog_decay, dlog_momentum, drate,
            span.tiles, 1, launch.refresh, **launch.constants(gates_backward_kernel),
        )  # fmt: skip
        if launch.norm:
            dnorm += dnorms.sum(0).transpose(0, 1)[..., : launch.dim]
