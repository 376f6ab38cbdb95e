"""The feed-forward part of a block."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) when gated (SwiGLU with silu), else down(act(up(x)))."""

    def __init__(self, width: int, hidden: int, activation: str = "silu", gated: bool = True) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, hidden, bias=False) if gated else None
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., width]."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def flops(self) -> int:
        """FLOPs per token, multiply-add as 2."""
        return sum(2 * p.numel() for p in self.parameters())
