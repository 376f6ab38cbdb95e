"""The linear memory tile by tile: the inner errors of a tile solve one triangular system, at any refresh.

Of one tile of C tokens that begins with M = W, S, with the coefficients of `coefficients` and, for token t, those at
the last refresh before it marked by r (E holds the errors k_t M_r - v_t; rates are columns of G):
    (I + G^r o K K') E = diag(A^r) K W + diag(f^r) K S - V
    Y  = diag(A) Q W + diag(f) Q S - (G o Q K') E
    W <- A_C W + f_C S - K' diag(gamma) E        S <- H_C S - K' diag(nu) E
The inverse is taken for all tiles of a segment at once; from tile to tile only two products are left, with the state
[W; S] in one piece. With a refresh per tile there is nothing to solve.

The forward pass keeps the state before every segment; the backward pass computes a segment again from there.
"""

import torch

from farspan.kernels.titans.coefficients import Coefficients, End
from farspan.kernels.titans.lockstep import Group, Segment, make_groups

TILE = 64


def titans_linear(q, k, v, gates, state, starts, lengths, refresh, read, keep_final):
    """Documents that begin at a refresh.

    q, k, v: [1, T, H, D]; gates: [1, T, H] in fp32 or wider; state: [W; S], [documents or 1, H, 2 D, D] as the gates.
    starts, lengths: of each document in the row, or 0 tokens of it. read: None for M_t, 1 for M_{t-1}.
    Returns y [1, T, H, D], zero where no document is, and [W; S] after the last whole refresh of every document,
    [documents, H, 2 D, D], or [0] without keep_final.
    """
    constants = (list(starts), list(lengths), refresh, read, keep_final)
    y, final, _ = _linear_forward(q, k, v, *gates, state, *constants)
    return y, final


class Tiles:
    """What the tiles of one segment are before any state is known; n = rows * H of them."""

    def __init__(self, segment: Segment, q, k, v, log_decay, log_momentum, rate, refresh: int, read: int | None):
        dtype = rate.dtype
        self.segment, self.read = segment, read
        self.q, self.k, self.v = (segment.gather(x, dtype) for x in (q, k, v))
        ends = None if segment.ends is None else segment.ends.repeat_interleave(segment.heads)
        gates = (segment.gather(x, dtype) for x in (log_decay, log_momentum, rate))
        self.coefficients = Coefficients(*gates, ends)
        self.every = refresh if refresh < self.k.shape[1] else None  # None: one refresh, the tile's start
        self.end = self.coefficients.end()
        self.written = both(self.k, self.end.gamma, self.end.nu)
        self.A, self.f, self.G = self.coefficients.at(read)
        self.asked = both(self.q, self.A, self.f)
        self.qk = torch.bmm(self.q, self.k.mT)
        self.P = (self.G * self.rate).mul_(self.qk)
        if self.every is None:
            self.T, self.U, self.Tv = None, torch.cat([self.k, torch.zeros_like(self.k)], -1), self.v
        else:
            self.A_r, self.f_r, self.G_r = self.coefficients.at(self.every)
            self.kk = torch.bmm(self.k, self.k.mT)
            L = (self.G_r * self.rate).mul_(self.kk)
            one = torch.eye(L.shape[-1], dtype=dtype, device=L.device).expand_as(L)
            self.T = torch.linalg.solve_triangular(L, one, upper=False, unitriangular=True)
            self.U = torch.bmm(self.T, both(self.k, self.A_r, self.f_r))
            self.Tv = torch.bmm(self.T, self.v)

    @property
    def rate(self) -> torch.Tensor:
        return self.coefficients.rate[:, None]

    def scan(self, state: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the state [documents, H, 2 D, D] of the segment's start, which is changed in place to that of its end.

        Returns the states at the tiles' starts [n, 2 D, D], in `room`, and the errors E [n, C, D].
        """
        segment, states, errors = self.segment, room[: len(self.k)], torch.empty_like(self.v)
        segment.begin(state, states)
        for index, step in enumerate(segment.steps):
            rows = segment.heads_of(step)
            torch.baddbmm(self.Tv[rows], self.U[rows], states[rows], beta=-1, out=errors[rows])
            if step.writing:
                rows, new = segment.heads_of(step, step.writing), segment.target(index, state, states)
                write(new, states[rows], self.end.rows(rows), self.written[rows], errors[rows])
            segment.settle(index, state, states)
        return states, errors


def both(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[first * x, second * x] side by side, [n, C, 2 D], for first, second [n, C, 1]."""
    return (x[..., None, :] * torch.cat([first, second], -1)[..., None]).flatten(-2)


def write(new: torch.Tensor, before: torch.Tensor, end: End, written: torch.Tensor, errors: torch.Tensor) -> None:
    """The state after a block, into `new`. before: [W; S], [n, 2 d, d']; written: [gamma X, nu X], [n, C, 2 d]; errors:
    [n, C, d'].
    """
    size = before.shape[1] // 2
    weights, momentum = before[:, :size], before[:, size:]
    torch.mul(weights, end.A, out=new[:, :size]).addcmul_(momentum, end.f)
    torch.mul(momentum, end.H, out=new[:, size:])
    new.baddbmm_(written.mT, errors, alpha=-1)


def linear_groups(v, state, starts, lengths, refresh, keep_final) -> tuple[Group, ...]:
    heads, tile = v.shape[2], refresh * max(1, TILE // refresh)
    size = heads * state.shape[-1] * state.shape[-2]
    return make_groups(tuple(starts), tuple(lengths), tile, refresh, heads, size, keep_final, v.device)


@torch.library.custom_op("farspan::titans_linear_forward", mutates_args=())
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
    """Returns y, the final states, and the states before every segment but the groups' first [kept, H, 2 D, D]."""
    inputs = (q, k, v, log_decay, log_momentum, rate)
    y = torch.zeros_like(v, memory_format=torch.contiguous_format)
    final = state.expand(len(lengths), *state.shape[1:]).clone() if keep_final else state.new_empty(0)
    groups = linear_groups(v, state, starts, lengths, refresh, keep_final)
    kept, first = state.new_empty(sum(group.kept for group in groups), *state.shape[1:]), 0
    for group in groups:
        carried, room = group.start(state), group.room(state)
        for segment in group.segments:
            if segment is not group.segments[0]:
                active = segment.steps[0].active
                kept[first : first + active] = carried[:active]
                first += active
            tiles = Tiles(segment, *inputs, refresh, read)
            states, errors = tiles.scan(carried, room)
            segment.scatter(torch.bmm(tiles.asked, states).baddbmm_(tiles.P, errors, alpha=-1), y)
        if keep_final:
            final.index_copy_(0, group.index, carried)
    return y, final, kept


@_linear_forward.register_fake
def _(q, k, v, log_decay, log_momentum, rate, state, starts, lengths, refresh, read, keep_final):
    groups = linear_groups(v, state, starts, lengths, refresh, keep_final)
    final = state.new_empty(len(lengths), *state.shape[1:]) if keep_final else state.new_empty(0)
    return v.new_empty(v.shape), final, state.new_empty(sum(group.kept for group in groups), *state.shape[1:])


def _save(ctx, inputs, output):
    *tensors, ctx.starts, ctx.lengths, ctx.refresh, ctx.read, ctx.keep_final = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    from farspan.kernels.titans.linear_backward import linear_backward

    *tensors, kept = ctx.saved_tensors
    constants = (ctx.starts, ctx.lengths, ctx.refresh, ctx.read, ctx.keep_final)
    return *linear_backward(dy, dfinal, *tensors, kept, *constants), None, None, None, None, None


_linear_forward.register_autograd(_backward, setup_context=_save)
