"""Conjugate gradients on a tile of queries, without their matrices; and which solver a call takes.

Every row of a tile has its own symmetric positive definite system A x = b of size head_dim,

    A r = sum_j p_j t_j k_j - (sum_j p_j t_j) mean + ridge * r        t_j = (k_j - mean) r, one number per key

and all of them are advanced together: two matrix products per iteration. Scores are centred, not vectors, and the
curvature r'Ar = sum_j p_j t_j^2 + sum ridge r^2 is a sum of non-negative terms, positive in any precision.
"""

from typing import NamedTuple

import torch

SOLVERS = ("auto", "gram", "cg")


class Tile(NamedTuple):
    """What the systems of some queries are made of; n is a batch of documents and key heads.

    p: [n, M, S] weights of the keys, rows sum to 1. keys: [n, S, D], less one vector for all of them, which changes no
    result and keeps their products small. mean: [n, M, D], the weighted means of these keys. ridge: [n, M, 1 or D].
    """

    p: torch.Tensor
    keys: torch.Tensor
    mean: torch.Tensor
    ridge: torch.Tensor

    def centred(self, r: torch.Tensor) -> torch.Tensor:
        """t [n, M, S]: the product of every centred key with its row of r [n, M, D]."""
        return torch.baddbmm(-(r * self.mean).sum(-1, keepdim=True), r, self.keys.transpose(1, 2))

    def times(self, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A r [n, M, D], and the curvature r'Ar [n, M, 1]."""
        t = self.centred(r)
        weighted = self.p * t
        product = torch.baddbmm(self.ridge * r, weighted, self.keys) - weighted.sum(-1, keepdim=True) * self.mean
        curvature = weighted.mul_(t).sum(-1, keepdim=True) + (self.ridge * r * r).sum(-1, keepdim=True)
        return product, curvature


class Solved(NamedTuple):
    """x: [n, M, D]; iterations and relative residual of every row: [n, M, 1]."""

    x: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor


def choose_solver(solver: str, head_dim: int, iterations: int, dtype: torch.dtype) -> str:
    """`gram` or `cg`: what costs less, from what the host knows.

    On a CPU the Gram form takes as long as half of head_dim iterations, as many as head_dim at 128. `auto` takes it
    where the cap `iterations`, high where the ridge is small, allows more, and in float64, which is asked for where
    results have to be exact.
    """
    if solver != "auto":
        return solver
    direct = iterations > head_dim * max(head_dim, 64) // 128 or dtype == torch.float64
    return "gram" if direct else "cg"


def conjugate_gradients(tile: Tile, b: torch.Tensor, tolerance: float, iterations: int) -> Solved:
    """Solve A x = b [n, M, D] from x = 0: at most `iterations` for each row, until |b - A x| <= tolerance |b|.

    A row that has converged is frozen: what the others still need changes no bit of it. Rows that are not numbers stop
    at once. The systems are solved for b / |b|, so that no square overflows where b itself is finite.
    """
    norm = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    residual = b / torch.where(norm > 0, norm, 1.0)
    x, direction = torch.zeros_like(b), residual
    square = residual.square().sum(-1, keepdim=True)
    target = tolerance**2 * square
    used, active = torch.zeros_like(square), square > target
    for _ in range(iterations):
        if not bool(active.any()):
            break
        product, curvature = tile.times(direction)
        active = active & (curvature > 0)
        step = torch.where(active, square / curvature, 0.0)
        x = x + step * direction
        residual = residual - step * product
        following = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(active, following / square, 0.0) * direction
        square = torch.where(active, following, square)
        used += active
        active = active & (square > target)
    return Solved(x * norm, used, square.sqrt())
