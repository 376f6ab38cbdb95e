"""The Titans memory by its definition: token after token, the inner gradient by autograd."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from farspan.kernels.titans.state import EPS, Gates, Memory, MemoryState, fresh_state

Tensors = list[torch.Tensor]


def titans_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState | None,
    lengths: tuple[int, ...],
    offsets: tuple[int, ...],
    refresh: int,
    read: str,
    decay_to: str,
    activation: str,
    return_state: bool,
) -> tuple[torch.Tensor, MemoryState | None]:
    """Arguments as `kernels.titans.titans_memory`; computed in fp32, or float64 for float64 inputs."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    memory = Memory(
        tuple(w.to(dtype) for w in memory.weights),
        None if memory.norm is None else tuple(x.to(dtype) for x in memory.norm),
    )
    if state is None:
        state = fresh_state(memory, len(lengths), refresh, dtype)
    outputs, finals, start = [], [], 0
    for document, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        run = _Document(memory, state, document, offset, refresh, decay_to == "init", activation)
        # unbound once: the backward pass of q[t] writes a whole zero tensor for every token
        row = [x[0, start : start + length].to(dtype).unbind() for x in (q, k, v, *gates)]
        for query, key, value, log_decay, log_momentum, rate in zip(*row, strict=True):
            before = run.M
            run.write(key, value, log_decay.exp(), log_momentum.exp(), rate)
            outputs.append(run.forward(query, run.M if read == "post" else before)[0])
        finals.append(run.state())
        start += length
    y = torch.stack(outputs)[None].to(v.dtype)
    return y, _stack(finals) if return_state else None


class _Document:
    """The memory M [H, d_in, d_out] per layer of one document, and its momentum S, at a position."""

    def __init__(self, memory, state, document, position, refresh, to_init, activation):
        document %= len(state.A)
        own = [[x[document] for x in part] if isinstance(part, tuple) else part[document] for part in state]
        weights, momentum, keys, deltas, g, n, A, f, H = own
        self.memory, self.position, self.refresh, self.to_init = memory, position, refresh, to_init
        self.activation = {"silu": F.silu, "gelu": F.gelu}[activation]
        filled = position % refresh
        self.boundary, self.boundary_S = weights, momentum
        self.keys = [list(x[:, :filled].unbind(1)) for x in keys]
        self.deltas = [list(x[:, :filled].unbind(1)) for x in deltas]
        self.g, self.n = (list(x[:, :filled].unbind(1)) for x in (g, n))
        self.A, self.f, self.H = A, f, H
        self.M, self.S = weights, momentum
        if filled:
            self.M = [self._now(l, A, f, self.g) for l in range(len(weights))]
            self.S = [self._now(l, None, H, self.n) for l in range(len(weights))]

    def _now(self, l: int, A, f, coefficients) -> torch.Tensor:
        """Share A of the boundary weights (of none: None) and f of their momentum, less the writes since."""
        result = f[:, None, None] * self.boundary_S[l]
        if A is not None:
            target = self.memory.weights[l] if self.to_init else 0
            result = result + target + A[:, None, None] * (self.boundary[l] - target)
        for c, x, delta in zip(coefficients, self.keys[l], self.deltas[l], strict=True):
            result = result - torch.einsum("h,hi,ho->hio", c, x, delta)
        return result

    def forward(self, x: torch.Tensor, weights: Tensors) -> tuple[torch.Tensor, Tensors, Tensors]:
        """M(x) for x [H, D], the inputs of its layers, and their outputs before the activation."""
        inputs, outputs = [x], []
        for w in weights:
            outputs.append(torch.einsum("hi,hio->ho", inputs[-1], w))
            inputs.append(self.activation(outputs[-1]))
        raw = outputs[-1]
        if self.memory.norm is not None:
            gain, bias = self.memory.norm
            raw = x + gain * F.layer_norm(raw, raw.shape[-1:], eps=EPS) + bias
        return raw, inputs[:-1], outputs

    def write(self, key, value, decay, momentum, rate) -> None:
        if self.position % self.refresh == 0:
            self.boundary, self.boundary_S = self.M, self.S
            self.keys, self.deltas = [[] for _ in self.M], [[] for _ in self.M]
            self.g, self.n, self.A, self.f, self.H = [], [], *(c.expand_as(rate) for c in rate.new_tensor([1, 0, 1]))
        record = torch.is_grad_enabled()
        with torch.enable_grad():
            point = [w.clone() for w in self.boundary]  # fresh nodes: the partial derivative in the memory alone
            point = [w if w.requires_grad else w.requires_grad_() for w in point]
            predicted, inputs, outputs = self.forward(key, point)
            loss = 0.5 * (predicted - value).square().sum()
            found = torch.autograd.grad(loss, [*point, *outputs], create_graph=record)
        gradients, deltas = found[: len(point)], found[len(point) :]
        decay, momentum, rate = (x[:, None, None] for x in (decay, momentum, rate))
        targets = self.memory.weights if self.to_init else [0] * len(point)
        self.S = [momentum * s - rate * g for s, g in zip(self.S, gradients, strict=True)]
        self.M = [t + decay * (m - t) + s for t, m, s in zip(targets, self.M, self.S, strict=True)]
        self.position += 1
        self._remember(inputs, deltas, decay[:, 0, 0], momentum[:, 0, 0], rate[:, 0, 0])

    def _remember(self, inputs, deltas, decay, momentum, rate) -> None:
        """What decoding keeps of an unfinished block: the write in factors, and every write's share by now."""
        for kept, new in zip((*self.keys, *self.deltas), (*inputs, *deltas), strict=True):
            kept.append(new if torch.is_grad_enabled() else new.detach())
        self.n = [momentum * n for n in self.n] + [rate]
        self.g = [decay * g + n for g, n in zip([*self.g, 0 * rate], self.n, strict=True)]
        self.H = momentum * self.H
        self.f, self.A = decay * self.f + self.H, decay * self.A

    def state(self) -> MemoryState:
        keys, deltas, g, n = self.keys, self.deltas, self.g, self.n
        weights, momentum, (A, f, H) = self.boundary, self.boundary_S, (self.A, self.f, self.H)
        if self.position % self.refresh == 0:  # nothing is open
            keys, deltas, g, n = [[] for _ in keys], [[] for _ in deltas], [], []
            weights, momentum, (A, f, H) = self.M, self.S, (torch.ones_like(A), torch.zeros_like(A), torch.ones_like(A))
        sizes = [m.shape[1:] for m in self.M]
        return MemoryState(
            tuple(weights),
            tuple(momentum),
            tuple(self._padded(rows, size[0]) for rows, size in zip(keys, sizes, strict=True)),
            tuple(self._padded(rows, size[1]) for rows, size in zip(deltas, sizes, strict=True)),
            self._padded(g),
            self._padded(n),
            A,
            f,
            H,
        )

    def _padded(self, rows: Tensors, *size: int) -> torch.Tensor:
        """[H, refresh - 1, ...] of rows [H, ...], zeros after them."""
        empty = self.A.new_zeros(len(self.A), self.refresh - 1 - len(rows), *size)
        return torch.cat([torch.stack(rows, 1), empty], 1) if rows else empty


def _stack(states: list[MemoryState]) -> MemoryState:
    return MemoryState(
        *(
            tuple(torch.stack(x) for x in zip(*part, strict=True)) if isinstance(part[0], tuple) else torch.stack(part)
            for part in zip(*states, strict=True)
        )
    )
