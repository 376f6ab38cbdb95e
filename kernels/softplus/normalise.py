"""Unit vectors: what makes the scores of softplus attention cosines."""

from __future__ import annotations

import math

import torch

TINY = 1e-12


def normalise(x: torch.Tensor) -> torch.Tensor:
    """x / ||x|| over the last dimension, in fp32 or wider, returned in x's dtype; differentiable.

    A vector shorter than 1e-12 becomes 0 and gets no gradient: its direction means nothing (and 1 / ||x|| would make
    the gradients of padding huge).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norm.masked_fill(norm < TINY, math.inf)).to(x.dtype)
