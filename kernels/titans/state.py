"""The tensors of the Titans memory: gates, initial memory, and what one document needs to go on."""

from __future__ import annotations

from typing import NamedTuple

import torch

LOG_FLOOR = -20.0  # of a gate's logarithm: sums of it stay finite, and e^-20 of a memory is nothing in fp32
EPS = 1e-6  # in the square root of the memory's output norm


class Gates(NamedTuple):
    """Per token and head, [1, T, H], fp32 or wider: log(1 - alpha), log eta, and theta of the update rule."""

    log_decay: torch.Tensor
    log_momentum: torch.Tensor
    rate: torch.Tensor


class Memory(NamedTuple):
    """The memory that a document begins with, learned per head.

    weights: one tensor [H, d_in, d_out] per layer, 1 to 4 of them, from head_dim to head_dim channels.
    norm: (gain, bias), each [H, head_dim]: the memory is x + LN(MLP(x)); None: it is MLP(x).
    """

    weights: tuple[torch.Tensor, ...]
    norm: tuple[torch.Tensor, torch.Tensor] | None = None


class MemoryState(NamedTuple):
    """What documents need to go on, fp32 (float64 for float64).

    weights, momentum: per layer [documents, H, d_in, d_out], at the last position that is a multiple of `refresh`.
    The r = position mod refresh tokens after it, whose writes are not in the weights yet:
    keys: per layer [documents, H, refresh - 1, d_in], the inputs X of the layer on the keys.
    deltas: per layer [documents, H, refresh - 1, d_out], the gradients of the inner loss at the layer's outputs.
    g, n: [documents, H, refresh - 1], weight of each write in the memory and in the momentum now; rows from r on are 0.
    A, f, H: [documents, H], shares of weights and of momentum in the memory now, and of momentum in the momentum.
    The memory now is M = A weights + f momentum - keys' diag(g) deltas, its momentum H momentum - keys' diag(n) deltas;
    A = H = 1 and f = 0 at a multiple of refresh.
    """

    weights: tuple[torch.Tensor, ...]
    momentum: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    deltas: tuple[torch.Tensor, ...]
    g: torch.Tensor
    n: torch.Tensor
    A: torch.Tensor
    f: torch.Tensor
    H: torch.Tensor


def fresh_state(memory: Memory, documents: int, refresh: int, dtype: torch.dtype = torch.float32) -> MemoryState:
    """The state of documents that have seen nothing."""
    shape = (documents, memory.weights[0].shape[0])
    weights = tuple(w.to(dtype).expand(documents, *w.shape) for w in memory.weights)
    rows = weights[0].new_zeros(*shape, refresh - 1)
    one = rows.new_ones(shape)
    return MemoryState(
        weights,
        tuple(torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights),
        tuple(w.new_zeros(*rows.shape, w.shape[-2]) for w in weights),
        tuple(w.new_zeros(*rows.shape, w.shape[-1]) for w in weights),
        rows, rows.clone(), one, torch.zeros_like(one), one.clone(),
    )  # fmt: skip
