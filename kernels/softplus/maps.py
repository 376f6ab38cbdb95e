"""The positive maps of softplus attention, and their slopes."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu

# Above it softplus(z) is z to more than float64 precision, below it exp(z) is finite in fp32.
LINEAR = 80.0


def apply_map(z: torch.Tensor, phi: str, shift: torch.Tensor | None = None) -> torch.Tensor:
    """phi(z), elementwise; phi one of `config.MAPS`. shift: for exp alone, taken from z."""
    if phi == "softplus":
        return torch.nn.functional.softplus(z, 1.0, LINEAR)  # log1p(exp(z)): no cancellation at any z
    if phi == "exp":
        return (z - shift).clamp(max=0).exp()  # hidden scores may lie above the largest visible one
    if phi == "sigmoid":
        return z.sigmoid()
    if phi == "gelu":
        return gelu(z)
    return z.relu() if phi == "relu" else z.relu().square()


def map_slope(z: torch.Tensor, phi: str, f: torch.Tensor) -> torch.Tensor:
    """phi'(z), where f is phi(z)."""
    if phi == "softplus":
        return z.sigmoid()
    if phi == "exp":
        return f
    if phi == "sigmoid":
        return f * (1 - f)
    if phi == "gelu":
        return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return (z > 0).to(z.dtype) if phi == "relu" else 2 * z.relu()
