"""How Titans joins its attention and its memory: one gates the other."""

from __future__ import annotations

import torch
from torch import nn

from farspan.layers.titans_options import TitansOptions


class Join(nn.Module):
    """y (x) m of arXiv 2501.00663, which leaves the form open. With N the RMSNorm with a gain per channel:

    norm_sigmoid   N(y) * sigmoid(N(m) + bias)
    hadamard       y * m, as printed: next to nothing where the memory's output is small
    norm_both      sigmoid(N(y)) * sigmoid(N(m))
    hymba          N(y) + N(m)
    """

    def __init__(self, options: TitansOptions) -> None:
        super().__init__()
        self.form = options.gate
        normed = options.gate != "hadamard"
        self.attention_norm, self.memory_norm = (
            nn.RMSNorm(options.width, eps=options.eps) if normed else None for _ in range(2)
        )
        self.bias = nn.Parameter(torch.zeros(options.width)) if options.gate == "norm_sigmoid" else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """An open half: sigmoid(0)."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, y: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """y of the attention, m of the memory: [1, T, width]."""
        if self.form == "hadamard":
            return y * m
        y, m = self.attention_norm(y), self.memory_norm(m)
        if self.form == "norm_sigmoid":
            return y * torch.sigmoid(m + self.bias)
        return y + m if self.form == "hymba" else torch.sigmoid(y) * torch.sigmoid(m)
