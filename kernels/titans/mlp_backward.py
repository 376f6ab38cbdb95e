"""Backward pass of the memory of any depth, a segment at a time from the last to the first.

The queries first, all blocks at once: they need nothing of later blocks. They leave a part of the gradients of X and D
of the keys. Then the keys, from block to block: with dW, dS of the block's end,
    dD^l -= diag(gamma) X^{l-1} dW^l + diag(nu) X^{l-1} dS^l
    dX^{l-1} -= diag(gamma) D^l dW^l' + diag(nu) D^l dS^l'
    dW^l <- A_C dW^l + X~' diag(A) dZ~        dS^l <- f_C dW^l + H_C dS^l + X~' diag(f) dZ~
and from dX and dD through the inner gradient (`network`) to keys, values, norm and the weights once more.
"""

import torch

from farspan.kernels.titans.coefficients import CoefficientGradients
from farspan.kernels.titans.linear_backward import (
    ending_gradient,
    group_gradient,
    return_gradient,
    split_backward,
    write_backward,
)
from farspan.kernels.titans.mlp import Answer, Blocks, mlp_groups, weights_of
from farspan.kernels.titans.network import inner_gradient_backward, normalise_backward

Tensors = list[torch.Tensor]


@torch.library.custom_op("farspan::titans_mlp_backward", mutates_args=())
def mlp_backward(
    dy: torch.Tensor | None,
    dfinal: list[torch.Tensor],
    given: list[int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_momentum: torch.Tensor,
    rate: torch.Tensor,
    state: list[torch.Tensor],
    initial: list[torch.Tensor],
    norm: list[torch.Tensor],
    kept: list[torch.Tensor],
    starts: list[int],
    lengths: list[int],
    refresh: int,
    read: int | None,
    activation: str,
    keep_final: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, the gates, the state, initial and norm; dfinal: of the layers in `given`."""
    inputs = (q, k, v, log_decay, log_momentum, rate)
    dinputs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    dinitial, dnorm = ([torch.zeros_like(x) for x in side] for side in (initial, norm))
    dy = torch.zeros_like(v) if dy is None else dy
    by_layer = [dfinal[given.index(l)] if l in given else None for l in range(len(state))]
    dstate = [ending_gradient(d, x, lengths) for d, x in zip(by_layer, state, strict=True)]
    groups = mlp_groups(v, state, starts, lengths, refresh, keep_final)
    last = sum(group.kept for group in groups)
    for group in reversed(groups):
        carried = [group_gradient(group, d, x) for d, x in zip(by_layer, state, strict=True)]
        room = [group.room(x) for x in state]
        for segment in reversed(group.segments):
            if segment is group.segments[0]:
                start = [group.start(x) for x in state]
            else:
                active = segment.steps[0].active
                start = [x[last - active : last].clone() for x in kept]
                last -= active
            blocks = Blocks(segment, *inputs, initial, norm, read, activation)
            gradients = _Backward(blocks, start, room, carried, dinitial, dnorm).run(segment.gather(dy, rate.dtype))
            for gradient, out in zip(gradients, dinputs, strict=True):
                segment.scatter(gradient, out)
        for own, out in zip(carried, dstate, strict=True):
            return_gradient(group, own, out)
    return [*dinputs, *dstate, *dinitial, *dnorm]


@mlp_backward.register_fake
def _(dy, dfinal, given, q, k, v, log_decay, log_momentum, rate, state, initial, norm, *constants):
    return [x.new_empty(x.shape) for x in (q, k, v, log_decay, log_momentum, rate, *state, *initial, *norm)]


class _Backward:
    """One segment. carried: per layer the gradient of [W; S], taken from the segment's end to its start in place;
    dinitial and dnorm are added to.
    """

    def __init__(
        self, blocks: Blocks, start: Tensors, room: Tensors, carried: Tensors, dinitial: Tensors, dnorm: Tensors
    ) -> None:
        self.blocks, self.carried, self.dinitial, self.dnorm = blocks, carried, dinitial, dnorm
        self.states, self.found, self.writes = blocks.scan(start, room)
        self.collected = CoefficientGradients(blocks.coefficients)

    def run(self, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of q, k, v [n, C, D] and of the gates [n, C]."""
        answer = self.blocks.answer(self.states, self.found)
        dq, dz, dinputs, ddeltas = self._queries(dy, answer)
        dk, dv = self._keys(answer, dz, dinputs, ddeltas)
        return dq, dk, dv, *self.collected.gates()

    def _queries(self, dy: torch.Tensor, answer: Answer):
        """dq; per layer the gradients of Z~, and the queries' part of those of X and D of the keys."""
        blocks = self.blocks
        dz = dy
        if blocks.norm is not None:
            dz = normalise_backward(dy * blocks.norm[0], *answer.normed)
            self._add_norm((dy * answer.normed[0]), dy)
        found = []
        dG = torch.zeros_like(blocks.G)
        dA, df = (torch.zeros_like(blocks.coefficients.A) for _ in range(2))
        for l in range(len(self.states) - 1, -1, -1):
            layer = answer.layers[l]
            dmixed = torch.bmm(dz, layer.deltas.mT).neg_()
            dscores = dmixed * blocks.mixing
            dG.addcmul_(dmixed, layer.scores)
            dx, own_A, own_f = split_backward(torch.bmm(dz, self.states[l].mT), layer.x, blocks.A, blocks.f)
            dA += own_A
            df += own_f
            if blocks.initial:
                through = blocks.by_head(dz, blocks.initial[l].mT)
                dA -= (through * layer.x).sum(-1)
                dx.addcmul_(through, 1 - blocks.A)
                shared = blocks.fold((1 - blocks.A) * layer.x)
                self.dinitial[l].baddbmm_(shared.mT, blocks.fold(dz))
            dx.baddbmm_(dscores, layer.inputs)
            found.append((dz, torch.bmm(dscores.mT, layer.x), torch.bmm(layer.mixed.mT, dz).neg_()))
            dz = dx * answer.layers[l - 1].slope if l else dx
        self.collected.rate += (dG * blocks.G).sum(1)
        self.collected.add(blocks.read, dA, df, dG.mul_(blocks.rates))
        return dz if blocks.norm is None else dz + dy, *([*side][::-1] for side in zip(*found, strict=True))

    def _keys(self, answer: Answer, dz: Tensors, dinputs: Tensors, ddeltas: Tensors):
        """dk and dv, taking `carried` from block to block."""
        blocks, segment = self.blocks, self.blocks.segment
        dk, dv = torch.empty_like(blocks.k), torch.empty_like(blocks.v)
        dgamma, dnu = (torch.zeros_like(blocks.coefficients.A) for _ in range(2))
        dend = dgamma.new_zeros(len(dgamma), 3)
        dnorm = [torch.empty_like(blocks.k) for _ in blocks.norm or ()]
        for step, written, writes in reversed(list(zip(segment.steps, self.found, self.writes, strict=True))):
            if step.writing:
                rows = segment.heads_of(step, step.writing)
                for l in range(len(self.carried)):
                    own_gamma, own_nu, own_end = self._write(l, step, rows, written, writes[l], dinputs[l], ddeltas[l])
                    dgamma[rows] += own_gamma
                    dnu[rows] += own_nu
                    dend[rows] += own_end
            rows = segment.heads_of(step)
            before = [x[: step.active].flatten(0, 1) for x in self.carried]
            for own, layer, d in zip(before, answer.layers, dz, strict=True):
                own.baddbmm_(layer.asked[rows].mT, d[rows])
            dk[rows], dv[rows], *own_norm = inner_gradient_backward(
                written,
                [x[rows] for x in dinputs],
                [x[rows] for x in ddeltas],
                weights_of(self.states, rows),
                [x[:, : x.shape[1] // 2] for x in before],
                blocks.norm and tuple(x[rows] for x in blocks.norm),
                blocks.activation,
            )
            for out, own in zip(dnorm, own_norm, strict=True):
                out[rows] = own
        self._add_norm(*dnorm)
        self.collected.add_end(dgamma, dnu, dend)
        return dk, dv

    def _write(self, l, step, rows, written, writes, dinputs, ddeltas):
        """Layer l's writes of one step: gradients of gamma, nu [n, C] and of A, f, H [n, 3]."""
        after = self.carried[l][: step.writing].flatten(0, 1)
        end, inputs, deltas = self.blocks.end.rows(rows), written.inputs[l][: len(after)], written.deltas[l]
        ddeltas[rows].baddbmm_(writes, after, alpha=-1)
        own, dgamma, dnu = split_backward(torch.bmm(deltas[: len(after)], after.mT).neg_(), inputs, end.gamma, end.nu)
        dinputs[rows] += own
        if self.blocks.initial:
            weights = after[:, : after.shape[1] // 2].unflatten(0, (step.writing, -1))
            kept = 1 - end.A.unflatten(0, (step.writing, -1))
            towards = (weights * self.blocks.initial[l]).sum((-1, -2)).flatten()
            self.dinitial[l] += (weights * kept).sum(0)
        dend = write_backward(step, self.carried[l], self.states[l][rows], end)
        if self.blocks.initial:
            dend[:, 0] -= towards
        return dgamma, dnu, dend

    def _add_norm(self, *gradients: torch.Tensor) -> None:
        """Gradients [n, C, D] of gain and bias, summed over rows and tokens."""
        for out, own in zip(self.dnorm, gradients, strict=True):
            out += own.unflatten(0, (-1, self.blocks.segment.heads)).sum((0, 2)).to(out.dtype)
