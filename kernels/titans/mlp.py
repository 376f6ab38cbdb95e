"""The memory of any depth, block by block: one refresh per block.

Of one block of C tokens that begins with W^l, S^l, X and D of its keys by `network`, rates as columns of G:
    keys     W^l <- A_C W^l + f_C S^l - X^{l-1}' diag(gamma) D^l        S^l <- H_C S^l - X^{l-1}' diag(nu) D^l
    queries  Z~^l = diag(A) X~^{l-1} W^l + diag(f) X~^{l-1} S^l - (G o X~^{l-1} X^{l-1}') D^l        X~^0 = Q
The keys go from block to block; the queries of a segment are answered at once, as no token's weights are ever built.
With decay to the initial weights W_0, A_C W^l becomes W_0^l + A_C (W^l - W_0^l), and likewise for the queries.

The forward pass keeps the state before every segment; the backward pass computes a segment again from there.
"""

from typing import NamedTuple

import torch

from farspan.kernels.titans.coefficients import Coefficients
from farspan.kernels.titans.linear import both, write
from farspan.kernels.titans.lockstep import Group, Segment, make_groups
from farspan.kernels.titans.network import Written, activate, inner_gradient, normalise

Tensors = list[torch.Tensor]


def titans_mlp(q, k, v, gates, state, initial, norm, starts, lengths, refresh, read, activation, keep_final):
    """Documents that begin at a refresh.

    q, k, v: [1, T, H, D]; gates: [1, T, H] in fp32 or wider, the dtype of all that follows; state: per layer [W; S],
    [documents or 1, H, 2 d_in, d_out]; initial: per layer [H, d_in, d_out] for decay to it, or nothing; norm: gain and
    bias [H, D], or nothing. starts, lengths: of each document in the row, or 0 tokens of it. read: None for M_t, 1 for
    M_{t-1}. Returns y [1, T, H, D], zero where no document is, and per layer [W; S] after the last whole refresh of
    every document, [documents, H, 2 d_in, d_out], or nothing without keep_final.
    """
    constants = (list(starts), list(lengths), refresh, read, activation, keep_final)
    y, *rest = _mlp_forward(q, k, v, *gates, list(state), list(initial), list(norm), *constants)
    return y, rest[: len(state)] if keep_final else []


class Blocks:
    """The blocks of one segment; n = rows * H of them."""

    def __init__(self, segment: Segment, q, k, v, log_decay, log_momentum, rate, initial, norm, read, activation):
        dtype = rate.dtype
        self.segment, self.read, self.activation = segment, read, activation
        self.q, self.k, self.v = (segment.gather(x, dtype) for x in (q, k, v))
        ends = None if segment.ends is None else segment.ends.repeat_interleave(segment.heads)
        self.coefficients = Coefficients(*(segment.gather(x, dtype) for x in (log_decay, log_momentum, rate)), ends)
        self.end = self.coefficients.end()
        self.A, self.f, self.G = self.coefficients.at(read)
        self.rates = self.coefficients.rate[:, None]
        self.mixing = self.G * self.rates
        self.initial = initial
        self.norm = tuple(x.to(dtype).repeat(segment.rows, 1)[:, None] for x in norm) or None

    def scan(self, state: Tensors, room: Tensors) -> tuple[Tensors, list[Written], list[Tensors]]:
        """From the state of the segment's start, which is changed in place to that of its end.

        Returns per layer the states at the blocks' starts [n, 2 d_in, d_out], in `room`; per step what the keys gave,
        and per layer both(X, gamma, nu).
        """
        segment, states = self.segment, [x[: len(self.k)] for x in room]
        found, writes = [], []
        for own, all_states in zip(state, states, strict=True):
            segment.begin(own, all_states)
        for index, step in enumerate(segment.steps):
            rows = segment.heads_of(step)
            norm = self.norm and tuple(x[rows] for x in self.norm)
            keys = inner_gradient(self.k[rows], self.v[rows], weights_of(states, rows), norm, self.activation)
            rows = segment.heads_of(step, step.writing)
            end, count = self.end.rows(rows), step.writing * segment.heads
            writes.append([both(x[:count], end.gamma, end.nu) for x in keys.inputs] if count else [])
            for l, (own, all_states) in enumerate(zip(state, states, strict=True)):
                if count:
                    new = segment.target(index, own, all_states)
                    write(new, all_states[rows], end, writes[-1][l], keys.deltas[l][:count])
                    self._draw(l, new, end.A)
                segment.settle(index, own, all_states)
            found.append(keys)
        return states, found, writes

    def _draw(self, l: int, new: torch.Tensor, A: torch.Tensor) -> None:
        """Add what the decay of the weights to share A has drawn in of the initial ones."""
        if self.initial:
            weights = new[:, : new.shape[1] // 2].unflatten(0, (-1, self.segment.heads))
            weights += (1 - A).unflatten(0, (-1, self.segment.heads)) * self.initial[l]

    def answer(self, states: Tensors, found: list[Written]) -> "Answer":
        """The queries, layer by layer, through memories that no token's weights are built for."""
        layers, x = [], self.q
        for l, state in enumerate(states):
            inputs, deltas = (
                torch.cat(side) for side in zip(*((w.inputs[l], w.deltas[l]) for w in found), strict=True)
            )
            scores = torch.bmm(x, inputs.mT)
            asked = both(x, self.A, self.f)
            mixed = scores * self.mixing
            z = torch.bmm(asked, state).baddbmm_(mixed, deltas, alpha=-1)
            if self.initial:
                z += self.by_head((1 - self.A) * x, self.initial[l])
            after, slope = activate(z, self.activation) if l + 1 < len(states) else (z, None)
            layers.append(Asked(x, asked, scores, mixed, inputs, deltas, slope))
            x = after
        if self.norm is None:
            return Answer(layers, x, None)
        gain, bias = self.norm
        normed = normalise(x)
        return Answer(layers, (self.q + bias).addcmul_(normed[0], gain), normed)

    def by_head(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [n, C, d] times weights [H, d, d'] of each head."""
        return self.back(torch.bmm(self.fold(x), weights))

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """[n, C, d] -> [H, rows * C, d]."""
        return x.unflatten(0, (-1, self.segment.heads)).transpose(0, 1).flatten(1, 2)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """`fold`, undone."""
        return x.unflatten(1, (self.segment.rows, -1)).transpose(0, 1).flatten(0, 1)


class Asked(NamedTuple):
    """One layer on the queries: its input X~, [A X~, f X~], X~ X', G o X~ X', X and D of the keys, the slope after."""

    x: torch.Tensor
    asked: torch.Tensor
    scores: torch.Tensor
    mixed: torch.Tensor
    inputs: torch.Tensor
    deltas: torch.Tensor
    slope: torch.Tensor | None


class Answer(NamedTuple):
    """y [n, C, D]; normed: x_hat and r where there is a norm."""

    layers: list[Asked]
    y: torch.Tensor
    normed: tuple[torch.Tensor, torch.Tensor] | None


def weights_of(states: Tensors, rows: slice) -> Tensors:
    return [x[rows, : x.shape[1] // 2] for x in states]


def mlp_groups(v, state, starts, lengths, refresh, keep_final) -> tuple[Group, ...]:
    heads = v.shape[2]
    size = heads * sum(x.shape[-1] * x.shape[-2] for x in state)
    return make_groups(tuple(starts), tuple(lengths), refresh, refresh, heads, size, keep_final, v.device)


@torch.library.custom_op("farspan::titans_mlp_forward", mutates_args=())
def _mlp_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_momentum: torch.Tensor,
    rate: torch.Tensor,
    state: list[torch.Tensor],
    initial: list[torch.Tensor],
    norm: list[torch.Tensor],
    starts: list[int],
    lengths: list[int],
    refresh: int,
    read: int | None,
    activation: str,
    keep_final: bool,
) -> list[torch.Tensor]:
    """Returns y; per layer, with keep_final, the final states; per layer the states before every segment but the
    groups' first [kept, H, 2 d_in, d_out].
    """
    inputs = (q, k, v, log_decay, log_momentum, rate)
    y = torch.zeros_like(v, memory_format=torch.contiguous_format)
    final = [x.expand(len(lengths), *x.shape[1:]).clone() for x in state] if keep_final else []
    groups = mlp_groups(v, state, starts, lengths, refresh, keep_final)
    kept, first = [x.new_empty(sum(group.kept for group in groups), *x.shape[1:]) for x in state], 0
    for group in groups:
        carried, room = [group.start(x) for x in state], [group.room(x) for x in state]
        for segment in group.segments:
            if segment is not group.segments[0]:
                active = segment.steps[0].active
                for out, x in zip(kept, carried, strict=True):
                    out[first : first + active] = x[:active]
                first += active
            blocks = Blocks(segment, *inputs, initial, norm, read, activation)
            states, found, _ = blocks.scan(carried, room)
            segment.scatter(blocks.answer(states, found).y, y)
        for l, out in enumerate(final):
            out.index_copy_(0, group.index, carried[l])
    return [y, *final, *kept]


@_mlp_forward.register_fake
def _(
    q, k, v, log_decay, log_momentum, rate, state, initial, norm, starts, lengths, refresh, read, activation, keep_final
):  # fmt: skip
    groups = mlp_groups(v, state, starts, lengths, refresh, keep_final)
    kept = sum(group.kept for group in groups)
    final = [x.new_empty(len(lengths), *x.shape[1:]) for x in state] if keep_final else []
    return [v.new_empty(v.shape), *final, *(x.new_empty(kept, *x.shape[1:]) for x in state)]


def _save(ctx, inputs, output):
    *tensors, state, initial, norm, ctx.starts, ctx.lengths, ctx.refresh, ctx.read, ctx.activation, ctx.keep = inputs
    ctx.sizes = (len(state), len(initial), len(norm))
    kept = output[-len(state) :]
    ctx.save_for_backward(*tensors, *state, *initial, *norm, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradients):
    from farspan.kernels.titans.mlp_backward import mlp_backward

    layers, initial, norm = ctx.sizes
    saved = ctx.saved_tensors  # once: activation checkpointing lets them be unpacked only once
    tensors, rest = saved[:6], list(saved[6:])
    lists = [[rest.pop(0) for _ in range(count)] for count in (layers, initial, norm, layers)]
    final = gradients[1 : 1 + layers] if ctx.keep else []
    given = [i for i, x in enumerate(final) if x is not None]
    constants = (ctx.starts, ctx.lengths, ctx.refresh, ctx.read, ctx.activation, ctx.keep)
    found = mlp_backward(gradients[0], [final[i] for i in given], given, *tensors, *lists, *constants)
    state, initial, norm = (found[6:][first : first + n] for first, n in _spans(ctx.sizes))
    return *found[:6], state, initial, norm, None, None, None, None, None, None


def _spans(sizes):
    first = 0
    for size in sizes:
        yield first, size
        first += size


_mlp_forward.register_autograd(_backward, setup_context=_save)
