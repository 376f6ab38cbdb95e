"""One decoding step of local linear attention on a preallocated key-value cache.

Every statistic of a query's fit can be merged, so keys are read in parts, twice:

    first   of each part, with weights w = exp(score - m): sum w, the mean of keys, S = sum w c c'; merged by
            w = w1 + w2, shift = kbar2 - kbar1, kbar += shift w2 / w, S = S1 + S2 + (w1 w2 / w) shift shift'
    solve   (S / w + ridge I) x = kbar - q, by Cholesky
    second  o = sum p (1 - (k - kbar) x) v

No part of it is carried from step to step: the weights are those of this query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farspan.kernels.local_linear.reference import absolute_factor

NUMBERS = 2**24  # of the centred keys of all rows and heads in a part, which are held besides the cache
LEAST_SLOTS = 64
CAPTURED_ITERATIONS = 16  # of the solver that queries fall back to, in a CUDA graph, where they run for all of them


def local_linear_step(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: torch.Tensor,
    ridge: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    kernel: str = "dot",
    ridge_mode: str = "relative",
    parts: int | None = None,
) -> torch.Tensor:
    """Local linear attention of one query per row over the first `counts[row]` slots of its cache, solved directly.

    q: [B, 1, H, D]; keys: [B, Hk, capacity, D]; values: [B, Hk, capacity, Dv], the query's own key among them; counts:
    int64 [B], at least 1, on the device. The order of the slots does not matter, so a ring buffer serves as well.
    ridge: [H], [B, 1, H] by token, or [H, D] by channel; scale, kernel, ridge_mode: as in `local_linear_attention`.
    parts: that the slots are read in; as many as NUMBERS asks for when None.
    Returns [B, 1, H, Dv]. Differentiable in every float argument.
    """
    batch, _, heads, channels = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    groups, slots = (keys.shape[1], heads // keys.shape[1]), keys.shape[2]
    ridge = ridge.to(wide)
    ridge = ridge[:, 0, :, None] if ridge.ndim == 3 else ridge[..., None] if ridge.ndim == 1 else ridge
    ridge = ridge.expand(batch, heads, -1).unflatten(1, groups)
    if not isinstance(scale, torch.Tensor):
        scale = q.new_full((heads,), channels**-0.5 if scale is None else scale, dtype=wide)
    scale = scale.to(wide).unflatten(0, groups)[..., None]  # [Hk, g, 1]
    query = q[:, 0].to(wide).unflatten(1, groups)  # [B, Hk, g, D]
    # Less one vector that every query sees, which changes nothing but the size of what is subtracted below.
    origin = keys[:, :, :1].to(wide)
    size = max(LEAST_SLOTS, NUMBERS // (batch * heads * channels)) if parts is None else -(-slots // parts)
    bounds = [(first, min(first + size, slots)) for first in range(0, slots, size)]

    fit, scores = None, []
    for first, last in bounds:
        key = keys[:, :, first:last].to(wide)
        score = torch.einsum("bkgd,bknd->bkgn", query, key)
        if kernel == "rbf":
            score = score - key.square().sum(-1)[:, :, None] / 2
        live = torch.arange(first, last, device=q.device) < counts[:, None]
        scores.append((scale * score).masked_fill(~live[:, None, None], float("-inf")))
        part = _Fit.of(scores[-1], key - origin)
        fit = part if fit is None else fit.merged(part)

    lse = fit.top + fit.weight.log()
    if ridge_mode == "absolute":
        ridge = ridge * absolute_factor(lse)[..., None]
    delta = fit.mean - (query - origin)
    x = _solve(fit.scatter / fit.weight[..., None, None], ridge.expand_as(delta), delta)

    own, o = (x * fit.mean).sum(-1, keepdim=True), 0
    for (first, last), score in zip(bounds, scores, strict=True):
        key, value = keys[:, :, first:last].to(wide) - origin, values[:, :, first:last].to(wide)
        u = 1 + own - torch.einsum("bkgd,bknd->bkgn", x, key)
        o = o + torch.einsum("bkgn,bknd->bkgd", (score - lse[..., None]).exp() * u, value)
    return o.flatten(1, 2)[:, None].to(q.dtype)


class _Fit(NamedTuple):
    """Statistics of some keys. top, weight: [B, Hk, g]; mean: [B, Hk, g, D]; scatter: [B, Hk, g, D, D].

    top: -inf where there is no key, with everything else 0.
    """

    top: torch.Tensor
    weight: torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor, keys: torch.Tensor) -> _Fit:
        """scores: [B, Hk, g, n], -inf for slots that are not in use; keys: [B, Hk, n, D]."""
        top = scores.detach().amax(-1)
        w = (scores - torch.where(top.isfinite(), top, 0.0)[..., None]).exp()
        weight = w.sum(-1)
        mean = torch.einsum("bkgn,bknd->bkgd", w, keys) / torch.where(weight > 0, weight, 1.0)[..., None]
        c = keys[:, :, None] - mean[..., None, :]
        return cls(top, weight, mean, (w[..., None] * c).mT @ c)

    def merged(self, other: _Fit) -> _Fit:
        """Of the keys of both; there are some in self."""
        top = torch.maximum(self.top, other.top)
        own, its = (fit.weight * (fit.top - top).exp() for fit in (self, other))
        scatters = (fit.scatter * (fit.top - top).exp()[..., None, None] for fit in (self, other))
        weight = own + its
        shift = other.mean - self.mean
        between = (own * its / weight)[..., None, None] * shift[..., :, None] * shift[..., None, :]
        return _Fit(top, weight, self.mean + shift * (its / weight)[..., None], sum(scatters) + between)


def _solve(matrix: torch.Tensor, ridge: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x of (matrix + diag(ridge)) x = b; conjugate gradients where that is not positive definite in this precision."""
    factor, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge))
    x = torch.cholesky_solve(b[..., None], factor)[..., 0]
    lost = (info != 0)[..., None]
    if b.is_cuda and torch.cuda.is_current_stream_capturing():  # a captured step is the same every time
        return torch.where(lost, _descend(matrix, ridge, b, CAPTURED_ITERATIONS), x)
    if not bool(lost.any()):
        return x
    return torch.where(lost, _descend(matrix, ridge, b, b.shape[-1]), x)


def _descend(matrix: torch.Tensor, ridge: torch.Tensor, b: torch.Tensor, iterations: int) -> torch.Tensor:
    """Conjugate gradients on the matrix itself; no row is touched once it has converged."""
    norm = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    residual = b / torch.where(norm > 0, norm, 1.0)
    x, direction, square = torch.zeros_like(b), residual, residual.square().sum(-1, keepdim=True)
    enough = torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        product = (matrix @ direction[..., None])[..., 0] + ridge * direction
        curvature = (direction * product).sum(-1, keepdim=True)
        active = (square > enough) & (curvature > 0)
        step = torch.where(active, square / torch.where(active, curvature, 1.0), 0.0)
        x, residual = x + step * direction, residual - step * product
        following = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(active, following / torch.where(active, square, 1.0), 0.0) * direction
        square = torch.where(active, following, square)
    return x * norm
