"""The neural memory of Titans as a layer: projections, convolutions, gates, the memory itself, its output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from farspan.kernels.titans import titans_memory
from farspan.kernels.titans.state import Gates, Memory, MemoryState
from farspan.kernels.titans.step import close_block, memory_read, titans_step
from farspan.layers.short_convolution import ShortConvolution
from farspan.layers.titans_gates import MemoryGates
from farspan.layers.titans_options import TitansOptions


class MemoryInputs(NamedTuple):
    """What the memory is written with and asked: q, k (unit norm), v: [1, T, H, D]; gates: [1, T, H] each."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: Gates

    def rows(self, rows: slice) -> MemoryInputs:
        """The same of some of the tokens."""
        return MemoryInputs(*(x[:, rows] for x in self[:3]), Gates(*(gate[:, rows] for gate in self.gates)))


class Start(NamedTuple):
    """What every document begins with, batch 1: the memory after the persistent rows, and what is left of them.

    weights, momentum: L of [1, H, d_in, d_out]. tail: [1, reach, 3 C], the rows before the first token, as the
    convolutions read them. rows: [1, P, width], what attention sees of the persistent rows, None where there are none.
    """

    weights: tuple[torch.Tensor, ...]
    momentum: tuple[torch.Tensor, ...]
    tail: torch.Tensor
    rows: torch.Tensor | None


class NeuralMemory(nn.Module):
    """q, k, v = silu(convolution(linear(x))), q and k of unit norm; y = memory(q, k, v); output(norm(y) * silu(gate)).

    All its vectors, the memory's initial weights included, are flat parameters: the optimizer updates what has one
    dimension without weight decay, and weights that are a state have no use for it.
    """

    def __init__(self, options: TitansOptions) -> None:
        super().__init__()
        self.options = options
        channels = options.heads * options.head_dim
        self.query, self.key, self.value = (nn.Linear(options.width, channels, bias=options.bias) for _ in range(3))
        self.convolution = ShortConvolution(3 * channels, options.conv)
        self.gates = MemoryGates(options)
        shapes = zip(options.sizes, options.sizes[1:], strict=False)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(options.heads * a * b)) for a, b in shapes)
        self.norm_gain = self.norm_bias = None
        if options.norm == "ln_res":
            self.norm_gain, self.norm_bias = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.gate = nn.Linear(options.width, channels, bias=False)
        self.head_norm = nn.RMSNorm(options.head_dim, eps=options.eps)
        self.output = nn.Linear(channels, options.width, bias=options.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Pre-activations of order one for keys of unit norm: a smaller start is amplified by the norm at the end.

        1.68 makes up for what the activation before a layer takes from its scale.
        """
        self.convolution.reset_parameters()
        self.gates.reset_parameters()
        for layer, (weight, fan_in) in enumerate(zip(self.weights, self.options.sizes, strict=False)):
            nn.init.normal_(weight, std=0.02 if len(self.weights) == 1 else 1.0 if layer == 0 else 1.68 * fan_in**-0.5)
        if self.norm_gain is not None:
            nn.init.ones_(self.norm_gain)
            nn.init.zeros_(self.norm_bias)

    def memory(self, dtype: torch.dtype) -> Memory:
        """The initial memory, in the wider of fp32 and dtype."""
        options, wide = self.options, torch.promote_types(dtype, torch.float32)
        shapes = zip(self.weights, options.sizes, options.sizes[1:], strict=False)
        weights = tuple(weight.to(wide).unflatten(0, (options.heads, a, b)) for weight, a, b in shapes)
        if self.norm_gain is None:
            return Memory(weights)
        norm = (p.to(wide).unflatten(0, (options.heads, -1)) for p in (self.norm_gain, self.norm_bias))
        return Memory(weights, tuple(norm))

    def project(self, asked: torch.Tensor, written: torch.Tensor | None = None) -> torch.Tensor:
        """Queries of `asked`, keys and values of `written` (the same by default): [1, T, width] -> [1, T, 3 C]."""
        written = asked if written is None else written
        return torch.cat([self.query(asked), self.key(written), self.value(written)], dim=-1)

    def inputs(
        self, projected: torch.Tensor, written: torch.Tensor, tails: torch.Tensor, lengths: tuple[int, ...]
    ) -> tuple[MemoryInputs, torch.Tensor]:
        """From what `project` returned, the gates of `written` [1, T, width], and tails [documents, reach, 3 C] of what
        came before. Returns the memory's inputs and the tails after these tokens.
        """
        mixed, tails = self.convolution(projected, tails, lengths)
        q, k, v = (part.unflatten(-1, (self.options.heads, -1)) for part in F.silu(mixed).chunk(3, dim=-1))
        return MemoryInputs(unit(q), unit(k), v, self.gates(written)), tails

    def start(self, persistent: torch.Tensor | None, dtype: torch.dtype) -> Start:
        """The memory before the first token: it has read the persistent rows [P, width], if there are any.

        The grid of refreshes begins anew after them, so that it does not depend on their number.
        """
        options, memory = self.options, self.memory(dtype)
        channels = 3 * options.heads * options.head_dim
        tail = memory.weights[0].new_zeros(1, self.convolution.reach, channels, dtype=dtype)
        if persistent is None:
            weights = tuple(weight[None] for weight in memory.weights)
            return Start(weights, tuple(map(torch.zeros_like, weights)), tail, None)
        rows, lengths = persistent[None].to(dtype), (len(persistent),)
        inputs, tail = self.inputs(self.project(rows), rows, tail, lengths)
        y, state = self.run(inputs, memory, lengths, return_state=True)
        state = close_block(state, memory, options.decay_to)
        seen = self.merge(y, self.opened(rows)) if options.variant == "mal" else rows
        return Start(state.weights, state.momentum, tail, seen)

    def run(self, inputs: MemoryInputs, memory: Memory, lengths: tuple[int, ...], **others):
        """`titans_memory` with this layer's options, and others."""
        return titans_memory(*inputs, memory, lengths, backend=self.options.backend, **{**self._rule, **others})

    def step(
        self, inputs: MemoryInputs, memory: Memory, state: MemoryState, positions: torch.Tensor
    ) -> tuple[torch.Tensor, MemoryState]:
        """One token of every row, at `positions` [B]: inputs and result are packed rows [1, B, ...]."""
        q, k, v = (x.transpose(0, 1) for x in inputs[:3])
        gates = Gates(*(gate.transpose(0, 1) for gate in inputs.gates))
        y, state = titans_step(q, k, v, gates, memory, state, positions, **self._rule)
        return y.transpose(0, 1), state

    @property
    def _rule(self) -> dict:
        options = self.options
        names = ("refresh", "read", "decay_to", "activation")
        return {name: getattr(options, name) for name in names}

    def ask(self, q: torch.Tensor, weights: tuple[torch.Tensor, ...], memory: Memory) -> torch.Tensor:
        """The memory with `weights`, L of [B, H, d_in, d_out], read by q [B, T, H, D] and not written."""
        return memory_read(q, weights, memory, self.options.activation)

    def opened(self, x: torch.Tensor) -> torch.Tensor:
        """The output gate [..., H, D] for x [..., width]."""
        return F.silu(self.gate(x)).unflatten(-1, (self.options.heads, -1))

    def merge(self, y: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
        """y: [..., H, D], what was read; opened: its gate. Returns [..., width]."""
        return self.output((self.head_norm(y) * opened).flatten(-2))

    def flops(self) -> int:
        """FLOPs per token of projections and memory by its definition, multiply-add as 2: the key's pass forward and
        back and the gradient, the query's pass.
        """
        options = self.options
        linears = (self.query, self.key, self.value, self.gate, self.output, self.gates.logits)
        first = options.sizes[0] * options.sizes[1]
        memory = options.heads * (8 * options.memory_weights - 2 * first)
        return sum(2 * linear.weight.numel() for linear in linears) + memory

    def start_flops(self) -> int:
        """FLOPs of `start` with the persistent rows: those of so many tokens, whose output only MAL asks for, and the
        write of an open block into the weights.
        """
        options = self.options
        merged = 2 * (self.gate.weight.numel() + self.output.weight.numel())
        token = self.flops() - (0 if options.variant == "mal" else merged)
        closing = 4 * options.heads * options.memory_weights * (options.refresh - 1)
        return options.persistent * token + (closing if options.persistent else 0)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x over its length, by the last dimension; in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)
