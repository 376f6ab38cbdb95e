"""Rotary position embedding (Su et al. 2021), half-split convention: channel i turns with channel i + d/2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from farspan.layers.sequence import Sequence


@dataclass(frozen=True)
class Rope:
    """How fast each channel pair turns.

    theta: base of the default frequencies, theta ** (-2i / head_dim).
    frequencies: radians per position of the first channel pairs, in place of the default ones (scaled or partial
    variants); pairs beyond them do not turn.
    scale: factor on cos and sin (the attention temperature of YaRN and LongRoPE).
    """

    theta: float = 10_000.0
    frequencies: tuple[float, ...] | None = None
    scale: float = 1.0

    def pairs(self, head_dim: int) -> tuple[float, ...]:
        """Radians per position for each turning pair of a head of `head_dim` channels."""
        if self.frequencies is None:
            if head_dim % 2:
                raise ValueError(
                    f"head_dim={head_dim} must be even for rotary positions; use rope: none or another width"
                )
            return tuple(self.theta ** (-i / head_dim) for i in range(0, head_dim, 2))
        if 2 * len(self.frequencies) > head_dim:
            raise ValueError(
                f"rope has {len(self.frequencies)} frequencies, a head of {head_dim} channels takes half that"
            )
        return self.frequencies


def rope_tables(sequence: Sequence, rope: Rope, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [tokens, 1, pairs], for every token's position; fp32, or float64 for float64 inputs.

    Angles are formed in float64: at a position of a million an fp32 angle is off by 0.06 radians.
    """
    wide = torch.promote_types(dtype, torch.float32)

    def build() -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = _frequencies(rope, head_dim, sequence.positions.device)
        angles = sequence.positions[:, None, None].double() * frequencies
        return (angles.cos() * rope.scale).to(wide), (angles.sin() * rope.scale).to(wide)

    return sequence.table((rope, head_dim, wide), build)


@lru_cache(maxsize=64)
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> torch.Tensor:
    """float64 [pairs]; kept, since a copy from the host has no place in a captured CUDA graph."""
    return torch.tensor(rope.pairs(head_dim), dtype=torch.float64, device=device)


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [..., tokens, heads, head_dim] turned by the tables of `rope_tables`, in fp32; returned in x's dtype."""
    return _Rotation.apply(x, *tables)


class _Rotation(torch.autograd.Function):
    """Turns; its gradient is turned back, in half the passes that autograd would make of the same arithmetic."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    scales = [cos, cos] + ([cos.new_ones(*cos.shape[:-1], rest)] if rest else [])
    turned = x * torch.cat(scales, dim=-1)
    turned[..., :pairs].addcmul_(x[..., pairs : 2 * pairs], sin, value=-1)
    turned[..., pairs : 2 * pairs].addcmul_(x[..., :pairs], sin)
    return turned.to(x.dtype)
