"""The projections around attention-like cores, shared by every mixer with queries, keys and values."""

from __future__ import annotations

import torch
from torch import nn

from farspan.layers.mixer import GroupedOptions
from farspan.layers.rotary import Rope, rope_tables, rotate
from farspan.layers.sequence import Sequence


class Projections(nn.Module):
    """x -> q, k, v by head, optionally normed and rotated; and the heads back to x."""

    def __init__(self, options: GroupedOptions, rope: Rope | None, qk_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        self.rope = rope
        if rope is not None:
            rope.pairs(options.head_dim)  # refuses an odd head_dim now, not in the first step
        queries, keys = options.heads * options.head_dim, options.kv_heads * options.head_dim
        self.query = nn.Linear(options.width, queries, bias=options.bias)
        self.key = nn.Linear(options.width, keys, bias=options.bias)
        self.value = nn.Linear(options.width, keys, bias=options.bias)
        self.output = nn.Linear(queries, options.width, bias=options.bias)
        self.query_norm = nn.RMSNorm(options.head_dim, eps=options.eps) if qk_norm else None
        self.key_norm = nn.RMSNorm(options.head_dim, eps=options.eps) if qk_norm else None

    def forward(self, x: torch.Tensor, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: [1, T, width]. Returns q [1, T, H, D] and k, v [1, T, Hk, D]."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.query, self.key, self.value))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope is not None:
            tables = rope_tables(sequence, self.rope, self.head_dim, x.dtype)
            q, k = rotate(q, tables), rotate(k, tables)
        return q, k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        """o: [1, T, H, D]. Returns [1, T, width]."""
        return self.output(o.flatten(2))

    def flops(self) -> int:
        """FLOPs per token, multiply-add as 2."""
        return sum(2 * linear.weight.numel() for linear in (self.query, self.key, self.value, self.output))
