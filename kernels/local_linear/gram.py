"""The direct solver: the matrix of every query by one matrix product over pairs of channels, then Cholesky.

    C = P (K * K) - mean mean'     the lower triangle in stripes of channels, keys a block at a time

The keys come less one vector for all of them (`solve.Tile`), so that the subtraction loses little. One step of
refinement with the matrix-free product, which loses less still, takes the rest. A matrix that is not positive definite
in this precision is solved by conjugate gradients instead; nothing is added to its diagonal.
"""

import torch

from farspan.kernels.local_linear.solve import Solved, Tile, conjugate_gradients

STRIPE = 16  # channels: of 64, the stripes of a triangle hold 0.62 of the square
PRODUCTS = 2**20  # products of channels at once


def solve_gram(tile: Tile, b: torch.Tensor, tolerance: float, iterations: int) -> Solved:
    """Solve A x = b [n, M, D] to rounding; the residual is that before refinement.

    tolerance, iterations: of the conjugate gradients that rows fall back to; they get at least 2 D iterations, and no
    tolerance above 8 roundings.
    """
    matrix = covariance(tile)
    matrix.diagonal(dim1=-2, dim2=-1).add_(tile.ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    x = torch.cholesky_solve(b[..., None], factor)[..., 0]
    rest = b - tile.times(x)[0]
    refined = x + torch.cholesky_solve(rest[..., None], factor)[..., 0]
    lost = (info[..., None] != 0) | ~refined.isfinite().all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    residual = torch.linalg.vector_norm(rest, dim=-1, keepdim=True) / torch.where(norm > 0, norm, 1.0)
    used = torch.zeros_like(norm)
    if bool(lost.any()):
        tolerance = min(tolerance, 8 * torch.finfo(b.dtype).eps)
        instead = conjugate_gradients(tile, b, tolerance, max(iterations, 2 * b.shape[-1]))
        pairs = zip(instead, (refined, used, residual), strict=True)
        return Solved(*(torch.where(lost, other, own) for other, own in pairs))
    return Solved(refined, used, residual)


def covariance(tile: Tile) -> torch.Tensor:
    """[n, M, D, D], of which the lower triangle is sum_j p_j c_j c_j' with c_j = k_j - mean."""
    n, rows, channels = tile.mean.shape
    matrix = -tile.mean[..., :, None] * tile.mean[..., None, :]
    block = max(1, PRODUCTS // (n * channels * min(STRIPE, channels)))
    for first in range(0, tile.keys.shape[1], block):
        keys, p = tile.keys[:, first : first + block], tile.p[..., first : first + block]
        for low in range(0, channels, STRIPE):
            high = min(low + STRIPE, channels)
            products = keys[..., low:, None] * keys[..., None, low:high]
            matrix[..., low:, low:high] += torch.bmm(p, products.flatten(2)).view(n, rows, channels - low, -1)
    return matrix
