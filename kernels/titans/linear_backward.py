"""Backward pass of the linear memory, a segment at a time from the last to the first.

With dY, and dW, dS of the tile's end:
    dE = -(G o Q K')' dY - diag(gamma) K dW - diag(nu) K dS        dR = (I + L)^-T dE
    dW <- A_C dW + Q' diag(A) dY + K' diag(A^r) dR        dS <- f_C dW + H_C dS + Q' diag(f) dY + K' diag(f^r) dR
from tile to tile; all else (dQ, dK, dV and the coefficients) for all tiles of the segment at once.
"""

import torch

from farspan.kernels.titans.coefficients import CoefficientGradients, End
from farspan.kernels.titans.linear import Tiles, linear_groups
from farspan.kernels.titans.lockstep import Group, Step


@torch.library.custom_op("farspan::titans_linear_backward", mutates_args=())
def linear_backward(
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
    keep_final: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, the gates and the state."""
    inputs = (q, k, v, log_decay, log_momentum, rate)
    dinputs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    dy = torch.zeros_like(v) if dy is None else dy
    dstate = ending_gradient(dfinal, state, lengths)
    groups = linear_groups(v, state, starts, lengths, refresh, keep_final)
    last = sum(group.kept for group in groups)
    for group in reversed(groups):
        carried, room = group_gradient(group, dfinal, state), group.room(state)
        for segment in reversed(group.segments):
            if segment is group.segments[0]:
                start = group.start(state)
            else:
                active = segment.steps[0].active
                start, last = kept[last - active : last].clone(), last - active
            tiles = Tiles(segment, *inputs, refresh, read)
            gradients = _segment_backward(tiles, segment.gather(dy, rate.dtype), start, room, carried)
            for gradient, out in zip(gradients, dinputs, strict=True):
                segment.scatter(gradient, out)
        return_gradient(group, carried, dstate)
    return *dinputs, dstate


@linear_backward.register_fake
def _(dy, dfinal, q, k, v, log_decay, log_momentum, rate, state, kept, *constants):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_decay, log_momentum, rate, state))


def _segment_backward(tiles: Tiles, dy: torch.Tensor, start: torch.Tensor, room: torch.Tensor, carried: torch.Tensor):
    """Gradients of the segment's q, k, v [n, C, D] and gates [n, C]; carried is taken to the segment's start."""
    states, errors = tiles.scan(start, room)
    q, k, rate = tiles.q, tiles.k, tiles.rate
    dE = torch.bmm(tiles.P.mT, dy).neg_()
    dwritten = torch.zeros_like(tiles.written)
    dend = rate.new_zeros(len(q), 3)
    for step in reversed(tiles.segment.steps):
        rows = tiles.segment.heads_of(step, step.writing)
        if step.writing:
            after = carried[: step.writing].flatten(0, 1)
            dE[rows].baddbmm_(tiles.written[rows], after, alpha=-1)
            torch.bmm(errors[rows], after.mT, out=dwritten[rows])
            dend[rows] = write_backward(step, carried, states[rows], tiles.end.rows(rows))
        rows = tiles.segment.heads_of(step)
        before = carried[: step.active].flatten(0, 1)
        before.baddbmm_(tiles.asked[rows].mT, dy[rows]).baddbmm_(tiles.U[rows].mT, dE[rows])
    dwritten.neg_()

    collected = CoefficientGradients(tiles.coefficients)
    dq, dA, df = split_backward(torch.bmm(dy, states.mT), q, tiles.A, tiles.f)
    dk, dgamma, dnu = split_backward(dwritten, k, tiles.end.gamma, tiles.end.nu)
    collected.add_end(dgamma, dnu, dend)
    dP = torch.bmm(dy, errors.mT).neg_()
    dqk = (tiles.G * rate).mul_(dP)
    dq.baddbmm_(dqk, k)
    dk.baddbmm_(dqk.mT, q)
    dP.mul_(tiles.qk)
    collected.rate += (dP * tiles.G).sum(1)
    collected.add(tiles.read, dA, df, dP.mul_(rate))
    if tiles.every is None:
        dR, width = dE, k.shape[-1]
        dk.baddbmm_(dR, states[:, :width].mT)
    else:
        dR = torch.bmm(tiles.T.mT, dE)
        more, dA, df = split_backward(torch.bmm(dR, states.mT), k, tiles.A_r, tiles.f_r)
        dL = torch.bmm(dR, errors.mT).neg_()
        dkk = (tiles.G_r * rate).mul_(dL)
        dk.add_(more).baddbmm_(dkk, k).baddbmm_(dkk.mT, k)
        dL.mul_(tiles.kk)
        collected.rate += (dL * tiles.G_r).sum(1)
        collected.add(tiles.every, dA, df, dL.mul_(rate))
    return dq, dk, dR.neg(), *collected.gates()


def split_backward(d: torch.Tensor, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor):
    """Backward of `both`: d [n, C, 2 D] -> the gradients of x [n, C, D] and of first and second [n, C]."""
    d_first, d_second = d.chunk(2, dim=-1)
    return (d_first * first).addcmul_(d_second, second), (d_first * x).sum(-1), (d_second * x).sum(-1)


def write_backward(step: Step, carried: torch.Tensor, states: torch.Tensor, end: End) -> torch.Tensor:
    """Take the gradient of [W; S] from after a write to before it, in place, all but what passes by the errors.

    Returns the gradients of A, f and H at the end, [n, 3].
    """
    after = carried[: step.writing].flatten(0, 1)
    size = after.shape[1] // 2
    products = torch.bmm(after.view(len(after), 2, -1), states.reshape(len(after), 2, -1).mT)
    weights, momentum = after[:, :size], after[:, size:]
    momentum.mul_(end.H).addcmul_(weights, end.f)
    weights.mul_(end.A)
    return torch.stack([products[:, 0, 0], products[:, 0, 1], products[:, 1, 1]], 1)


def ending_gradient(dfinal: torch.Tensor | None, state: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The gradient of the initial state from documents that have no tokens, [documents or 1, H, ...]."""
    dstate = torch.zeros_like(state, memory_format=torch.contiguous_format)
    idle = [d for d, length in enumerate(lengths) if not length]
    if dfinal is not None and idle:
        own = dfinal[idle]
        if len(state) == 1:
            dstate += own.sum(0, keepdim=True)
        else:
            dstate[idle] = own
    return dstate


def group_gradient(group: Group, dfinal: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    """The gradient of the final states of the group's documents, contiguous."""
    if dfinal is None:
        return state.new_zeros(len(group.documents), *state.shape[1:])
    return dfinal.index_select(0, group.index)


def return_gradient(group: Group, carried: torch.Tensor, dstate: torch.Tensor) -> None:
    """Add the gradient of the documents' initial states to dstate [documents or 1, H, ...]."""
    if len(dstate) == 1:
        dstate += carried.sum(0, keepdim=True)
    else:
        dstate.index_copy_(0, group.index, carried)
