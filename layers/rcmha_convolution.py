"""The convolutions of RCMHA over queries, keys and values, in one: Primer's multi-D-conv heads (arXiv 2109.08668)."""

from __future__ import annotations

import torch
from torch import nn

from farspan.layers.short_convolution import ShortConvolution

INITIALS = ("primer", "identity", "uniform")


class HeadConvolution(ShortConvolution):
    """y_t = sum over i < width of tap i * x_(t - i), per channel, without bias or activation; `weight` has the last tap
    first, as a library's cross-correlation.

    A bias would say nothing new: of the keys it cancels in the softmax, of the queries it is part of u and of the
    distances' biases, of the values it is one of the output.
    """

    def __init__(self, sides: tuple[int, ...], head_dim: int, width: int, shared: bool, initial: str) -> None:
        """sides: heads of the queries, of the keys, of the values, which lie side by side in x. shared: whether all
        heads of a side have one kernel.
        """
        self.sides, self.head_dim, self.shared, self.initial = sides, head_dim, shared, initial
        super().__init__((len(sides) if shared else sum(sides)) * head_dim, width)
        self.channels = sum(sides) * head_dim

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.initial == "uniform":
            return super().reset_parameters()
        rest, own = (0.5 / self.width, 0.5) if self.initial == "primer" else (0.0, 1.0)
        nn.init.constant_(self.weight, rest)
        self.weight.view(self.width, -1)[-1] = own

    def taps(self) -> torch.Tensor:
        """[width, channels]."""
        if not self.shared:
            return super().taps()
        kernels = self.weight.view(self.width, len(self.sides), self.head_dim).unbind(1)
        repeated = (kernel.repeat(1, heads) for kernel, heads in zip(kernels, self.sides, strict=True))
        return torch.cat(list(repeated), dim=1)
