"""What is learned about distances: a table, or the sinusoids of Transformer-XL seen through a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Table:
    """r: [H, L, D], a vector for every distance 0 .. L - 1. beta: [H, L], a number. Larger distances use the last."""

    r: torch.Tensor
    beta: torch.Tensor

    def check(self, heads: int, head_dim: int) -> None:
        if self.r.ndim != 3 or self.r.shape[::2] != (heads, head_dim) or self.beta.shape != self.r.shape[:2]:
            raise ValueError(
                f"the table is r {list(self.r.shape)} with beta {list(self.beta.shape)}; {heads} heads of {head_dim} "
                f"channels take [{heads}, distances, {head_dim}] and [{heads}, distances]"
            )
        if not self.r.shape[1]:
            raise ValueError("the table has no distance; use one row at least")


@dataclass(frozen=True)
class Sinusoid:
    """r_delta = phi(delta) projection, beta_delta = nu r_delta: projection [H, R, D], nu [H, D].

    phi(delta) = [sin(w delta), cos(w delta)], R / 2 frequencies w_f = 10000^(-2f / R): halves, not interleaved.
    """

    projection: torch.Tensor
    nu: torch.Tensor

    def check(self, heads: int, head_dim: int) -> None:
        shape = tuple(self.projection.shape)
        if len(shape) != 3 or shape[::2] != (heads, head_dim) or self.nu.shape != (heads, head_dim):
            raise ValueError(
                f"the sinusoid has a projection {list(shape)} and nu {list(self.nu.shape)}; {heads} heads of "
                f"{head_dim} channels take [{heads}, R, {head_dim}] and [{heads}, {head_dim}]"
            )
        if shape[1] % 2 or not shape[1]:
            raise ValueError(f"{shape[1]} sinusoids are no pairs of sine and cosine; use an even number")

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """q: [..., H, D]. Returns (q + nu) projection' [..., H, R], whose product with phi(delta) is the score's part
        of position: content is compared with keys, this with distances.
        """
        return torch.einsum("...hd,hrd->...hr", q + self.nu.to(q.dtype), self.projection.to(q.dtype))

    def table(self, distances: int) -> Table:
        """The table that says the same, of that many distances; fp32, float64 where the projection is."""
        wide = torch.promote_types(self.projection.dtype, torch.float32)
        phi = features(torch.arange(distances, device=self.nu.device), self.projection.shape[1], wide)
        r = torch.einsum("lr,hrd->hld", phi, self.projection.to(wide))
        return Table(r, (r * self.nu.to(wide)[:, None]).sum(-1))


def features(positions: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """phi of int64 positions [...]: [..., channels], formed in float64 and rounded once.

    A phase in fp32 is off by 3e-4 radians at position 8000, by 4e-2 at a million.
    """
    angles = positions[..., None].double() * _frequencies(channels, positions.device)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def turned(p: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """p: [1, T, H, R], `Sinusoid.queries`; positions: int64 [T]. Returns what has the products with phi of a
    key's position that p has with phi of its distance: sin w(i - j) = sin wi cos wj - cos wi sin wj, and so on.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    sin, cos = features(positions, p.shape[-1], wide)[:, None].chunk(2, dim=-1)
    a, b = p.to(wide).chunk(2, dim=-1)
    return torch.cat([b * sin - a * cos, a * sin + b * cos], dim=-1).to(p.dtype)


@lru_cache(maxsize=16)
def _frequencies(channels: int, device: torch.device) -> torch.Tensor:
    """float64 [channels / 2]; kept, since a copy from the host has no place in a captured CUDA graph."""
    pairs = [math.exp(-math.log(10_000.0) * 2 * f / channels) for f in range(channels // 2)]
    return torch.tensor(pairs, dtype=torch.float64, device=device)
