"""The scalar coefficients of a block, and their gradients back to the gates.

With a = 1 - alpha, for the tokens t = 1 .. C of a block that begins with memory M_0 and momentum S_0:
    A_t = a_1 .. a_t        H_t = eta_1 .. eta_t        Da[t, i] = a_{i+1} .. a_t        De[i, j] = eta_{j+1} .. eta_i
    G = Da De               f = Da H                    (lower triangular)
    M_t = A_t M_0 + f_t S_0 - sum_j G[t, j] theta_j grad_j        S_t = H_t S_0 - sum_j De[t, j] theta_j grad_j
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class End(NamedTuple):
    """What takes a state to the end of the block: gamma, nu [n, C, 1] of the writes; A, f, H [n, 1, 1]."""

    gamma: torch.Tensor
    nu: torch.Tensor
    A: torch.Tensor
    f: torch.Tensor
    H: torch.Tensor

    def rows(self, rows: slice) -> End:
        return End(*(x[rows] for x in self))


class Coefficients:
    """Of n blocks (each of one head) with C tokens.

    log_decay, log_momentum, rate: [n, C], fp32 or wider; ends: int64 [n] in 1 .. C, where the block's last refresh is
    and `end` is taken; None for C.
    """

    def __init__(
        self, log_decay: torch.Tensor, log_momentum: torch.Tensor, rate: torch.Tensor, ends: torch.Tensor | None = None
    ) -> None:
        self.rate, self.ends = rate, ends
        size, dtype = rate.shape[-1], rate.dtype
        # Sums in float64: neighbours of a long block are differences of large numbers.
        decay, momentum = (x.double().cumsum(-1) for x in (log_decay, log_momentum))
        above = torch.full((size, size), float("-inf"), dtype=dtype, device=rate.device).triu_(1)
        self.A, self.H = decay.exp().to(dtype), momentum.exp().to(dtype)
        self.Da, self.De = _products(decay, above), _products(momentum, above)
        self.G = torch.bmm(self.Da, self.De)
        self.f = torch.bmm(self.Da, self.H[..., None])[..., 0]

    def at(self, every: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, f [n, C, 1] and G [n, C, C] as token t meets them: after its own write (every=None), or at the last
        multiple of `every` before it.
        """
        A, f, G = self.A[..., None], self.f[..., None], self.G
        if every is None:
            return A, f, G
        return tuple(_held(x, every, first) for x, first in ((A, 1.0), (f, 0.0), (G, 0.0)))

    def end(self) -> End:
        A, f, H, G, De = (self._last(x) for x in (self.A, self.f, self.H, self.G, self.De))
        gamma, nu = (self.rate * x for x in (G, De))
        return End(gamma[..., None], nu[..., None], A[:, None, None], f[:, None, None], H[:, None, None])

    def _last(self, x: torch.Tensor) -> torch.Tensor:
        """Row `ends - 1` of x [n, C, ...]."""
        if self.ends is None:
            return x[:, -1]
        return x[torch.arange(len(x), device=x.device), self.ends - 1]


class CoefficientGradients:
    """Collects the gradients of one `Coefficients`; `gates` gives those of log_decay, log_momentum and rate, [n, C]."""

    def __init__(self, coefficients: Coefficients) -> None:
        self.of = coefficients
        self.A, self.f, self.H, self.rate = (torch.zeros_like(coefficients.A) for _ in range(4))
        self.G, self.De = torch.zeros_like(coefficients.G), torch.zeros_like(coefficients.De)

    def add(self, every: int | None, A: torch.Tensor, f: torch.Tensor, G: torch.Tensor) -> None:
        """Gradients of what `at(every)` gave: A, f [n, C], G [n, C, C] (what is above the diagonal is left out)."""
        for total, own in ((self.A, A), (self.f, f), (self.G, G)):
            if every is None:
                total += own
            else:
                size = own.shape[1]
                own = own.unflatten(1, (-1, every)).sum(2) if every > 1 else own
                total[:, every - 1 : size - 1 : every] += own[:, 1:]

    def add_end(self, gamma: torch.Tensor, nu: torch.Tensor, state: torch.Tensor) -> None:
        """gamma, nu: [n, C]; state: [n, 3], of A, f and H at the end."""
        own = self.of
        index = torch.full((len(gamma),), gamma.shape[1], device=gamma.device) if own.ends is None else own.ends
        place = (torch.arange(len(gamma), device=gamma.device), index - 1)
        self.rate += gamma * own.G[place] + nu * own.De[place]
        self.G[place] += gamma * own.rate
        self.De[place] += nu * own.rate
        for total, part in zip((self.A, self.f, self.H), state.unbind(1), strict=True):
            total[place] += part

    def gates(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = self.of
        dG = self.G.tril_()
        # of products from i to t: what is above the diagonal is zero in Da and De themselves
        dDa = torch.bmm(dG, own.De.mT).addcmul_(self.f[..., None], own.H[:, None]).mul_(own.Da)
        dDe = torch.baddbmm(self.De, own.Da.mT, dG).mul_(own.De)
        dH = self.H + torch.bmm(self.f[:, None], own.Da)[:, 0]
        return _to_logs(self.A * own.A, dDa), _to_logs(dH * own.H, dDe), self.rate


def _to_logs(ends: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Gradients of the logarithms of C factors, [n, C], from those of the logarithms of their products: of the first t
    factors, ends [n, C]; of the factors i + 1 .. t, products [n, C, C].

    Summed in float64, as the logarithms are: terms cancel, and what rounding leaves of them stays in all gates before.
    """
    products = products.double()
    shares = products.sum(2).sub_(products.sum(1)).add_(ends)
    return shares.flip(-1).cumsum(-1).flip(-1).to(ends.dtype)


def _products(sums: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """exp(sums[t] - sums[i]) for i <= t, [n, C, C] in the dtype of `above` (-inf above the diagonal)."""
    high = sums.to(above.dtype)
    low = (sums - high).to(above.dtype)
    difference = high[..., :, None] - high[..., None, :]
    if above.dtype != sums.dtype:
        difference.add_(low[..., :, None]).sub_(low[..., None, :])
    return difference.add_(above).exp_()


def _held(x: torch.Tensor, every: int, first: float) -> torch.Tensor:
    """Rows of x [n, C, ...] as of the last multiple of `every` before each token; `first` before all."""
    kept = x[:, every - 1 : x.shape[1] - 1 : every]
    kept = torch.cat([x.new_full((len(x), 1, *x.shape[2:]), first), kept], 1)
    return kept if every == 1 else kept.repeat_interleave(every, 1)
