"""States that run through the row: a scan where a segment's effect is affine, a relay where it is not.

A recurrence over a segment of tokens that is affine in its state leaves M S + E where S entered. Every rank runs its
segments from nothing, giving E and M; all exchange these and each works out what enters its own segments. Backward the
same from the right: with C the gradient of what leaves a segment, that of what enters it is M' C.

A state update that is not affine (a memory that learns as it reads) has no M: the state itself goes from segment to
segment, one rank after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from farspan.parallel.comm import all_gather, receive, send
from farspan.parallel.layout import Layout
from farspan.parallel.mesh import Axis

State = tuple[torch.Tensor, ...]


def affine_scan(
    gain: torch.Tensor, state: torch.Tensor, layout: Layout, axis: Axis, matrix: bool = False
) -> torch.Tensor:
    """The state that enters each of this rank's segments, in the order of its segments; nothing enters the first.

    state: [segments, *S], what each segment leaves when nothing enters it. gain: M of each segment: [segments, *S] or
    what broadcasts to it (decay), or with `matrix` [segments, ..., k, k] where S = [..., k, v], multiplied from the
    left. For a segment in which a document starts, gain is zero and state counts from that start: nothing of what
    enters leaves. Computed in fp32 or wider. Every rank must use the result: the backward pass communicates. Raises
    ValueError for half-precision inputs: products of many gains drift.
    """
    if state.dtype in (torch.float16, torch.bfloat16) or gain.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"a scan carries its state in fp32 or wider, not gain {gain.dtype} and state {state.dtype}")
    return _Scan.apply(gain, state, layout, axis, matrix)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gain, state, layout, axis, matrix):
        gains, states = (_gather_segments(x, layout, axis) for x in (gain, state))
        entering, current = {}, torch.zeros_like(state[0])
        for segment in _in_order(layout):
            entering[segment] = current
            current = (gains[segment] @ current if matrix else gains[segment] * current) + states[segment]
        entered = torch.stack([entering[axis.rank, index] for index in range(len(state))])
        ctx.save_for_backward(*gains.values(), entered)
        ctx.numbers, ctx.layout, ctx.axis, ctx.matrix, ctx.shape = list(gains), layout, axis, matrix, gain.shape
        return entered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        *gains, entered = ctx.saved_tensors
        gains = dict(zip(ctx.numbers, gains, strict=True))
        gradients = _gather_segments(gradient, ctx.layout, ctx.axis)
        leaving, current = {}, torch.zeros_like(gradient[0])
        for segment in reversed(_in_order(ctx.layout)):
            leaving[segment] = current
            back = gains[segment].mT @ current if ctx.matrix else gains[segment] * current
            current = back + gradients[segment]
        dstate = torch.stack([leaving[ctx.axis.rank, index] for index in range(len(gradient))])
        dgain = dstate @ entered.mT if ctx.matrix else (dstate * entered).sum_to_size(ctx.shape)
        return dgain, dstate, None, None, None


def relay(
    step: Callable[[int, State], tuple[torch.Tensor, State]],
    x: torch.Tensor,
    first: State,
    layout: Layout,
    axis: Axis,
) -> list[torch.Tensor]:
    """Runs `step` over all segments of the row in order, the state handed from rank to rank; exact and serial.

    step(i, state) -> (output, state after it) for this rank's i-th segment. x: what the outputs are made from, e.g. the
    layer's input: the backward pass sends a state's gradient on its way to x, also where only that of x is asked for.
    first: what enters the row's first segment; every state has its shapes and dtypes (ValueError otherwise, before
    anything is sent). Returns the outputs of this rank's segments; differentiable, also in what `step` closes over. All
    ranks must use all of their outputs.
    """
    order = _in_order(layout)
    outputs: list[torch.Tensor | None] = [None] * len(layout.segments[axis.rank])
    state = first
    for position, (owner, index) in enumerate(order):
        if owner != axis.rank:
            continue
        before = order[position - 1][0] if position else owner
        if before != owner:
            state = _Receive.apply(before, axis, x, *(entry.detach() for entry in first))
        output, state = step(index, state)
        _check_same(first, state)
        after = order[position + 1][0] if position + 1 < len(order) else owner
        if after != owner:
            output = _Send.apply(after, axis, output, *state)
        outputs[index] = output
    return outputs


class _Send(torch.autograd.Function):
    """Hands a state on; the output passes through, so that the backward pass comes by to fetch the state's gradient."""

    @staticmethod
    def forward(ctx, after, axis, output, *state):
        ctx.after, ctx.axis = after, axis
        ctx.like = [torch.empty_like(x, device="meta") for x in state]
        ctx.device = output.device
        for x in state:
            send(x, after, axis)
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        received = (receive(torch.empty_like(x, device=ctx.device), ctx.after, ctx.axis) for x in ctx.like)
        return None, None, gradient, *received


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before, axis, x, *like):
        ctx.before, ctx.axis = before, axis
        return tuple(receive(torch.empty_like(entry), before, axis) for entry in like)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        for gradient in gradients:
            send(gradient, ctx.before, ctx.axis)
        return None, None, None, *(None for _ in gradients)


def _in_order(layout: Layout) -> list[tuple[int, int]]:
    """(rank, number among the rank's) of all segments in the order of the row."""
    starts = {(r, i): s.start for r, segments in enumerate(layout.segments) for i, s in enumerate(segments)}
    return sorted(starts, key=starts.__getitem__)


def _gather_segments(x: torch.Tensor, layout: Layout, axis: Axis) -> dict[tuple[int, int], torch.Tensor]:
    """What every segment of every rank has; x is [own segments, ...]."""
    most = max(map(len, layout.segments))
    if len(x) < most:  # a rank may hold one segment more than another
        x = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    everyone = all_gather(x, axis)
    return {(r, i): everyone[r, i] for r, segments in enumerate(layout.segments) for i in range(len(segments))}


def _check_same(first: State, state: State) -> None:
    for expected, found in zip(first, state, strict=True):
        if expected.shape != found.shape or expected.dtype != found.dtype:
            raise ValueError(
                f"a relayed state must keep its shape and dtype: {list(expected.shape)} {expected.dtype} entered, "
                f"{list(found.shape)} {found.dtype} left"
            )
