"""The map of softplus attention: the weights that the operator gives its values, re-weighting included.

One forward pass of the operator on values of two columns, position and 1, gives the rows' moments, and the numbers that
it saves for its backward pass make any weight of a row.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, first_tokens, moments_of
from farspan.kernels.softplus.chunked import _softplus_forward
from farspan.kernels.softplus.config import Config
from farspan.kernels.softplus.maps import apply_map
from farspan.kernels.softplus.tiles import Workspace, _divisor, _inverse, _Row


@dataclass(frozen=True)
class _Counts:
    """What the formulas of rows ask a block for: int64 [rows, 1], the keys that each row sees."""

    counts: torch.Tensor


class SoftplusMap(EffectiveMap):
    """q: [1, T, H, D]; k: [1, T, Hk, D], normalised where the configuration says so. Raises ValueError for gelu, whose
    weights can be negative.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, documents: tuple[int, ...], config: Config) -> None:
        if config.phi == "gelu":
            raise ValueError("softplus with phi=gelu has negative weights, and no attention statistics")
        wide = torch.promote_types(q.dtype, torch.float32)
        self.documents, self.heads, self.device, self.config = documents, q.shape[2], q.device, config
        self.q, self.k = q.to(wide), k.to(wide)
        self.at, self.begins = torch.arange(q.shape[1], device=q.device), first_tokens(documents, q.device)
        self.statistics: torch.Tensor | None = None

    def moments(self) -> Moments:
        position = (self.at - self.begins).to(self.q.dtype)
        values = torch.zeros_like(self.k)
        values[0, :, :, 0], values[0, :, :, 1] = position[:, None], 1.0
        none = [0] * len(self.documents)
        o, self.statistics = _softplus_forward(
            *(self.q, self.k, values, list(self.documents), none), *astuple(self.config)
        )
        mass = o[0, :, :, 1]
        return moments_of((position[:, None] * mass - o[0, :, :, 0]).clamp(min=0), mass)

    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        key_heads, config = self.k.shape[2], self.config
        counts = config.visible(self.at[rows] - self.begins[rows])
        queries = self.q[0, rows] * config.row_scale(counts, self.q.shape[-1], self.q.dtype)[:, None, None]
        queries = queries.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        z = torch.bmm(queries, self.k[0, keys].permute(1, 2, 0)).view(self.heads, -1, keys.stop - keys.start)
        total, largest, sums = (x.t()[..., None] for x in self.statistics[:, rows])
        f = apply_map(z, config.phi, largest if config.phi == "exp" else None)
        own, other = self.at[rows, None], self.at[keys]
        f = f.masked_fill((other > own) | (other <= own - counts[:, None]), 0.0)
        sizes = _Counts(counts[:, None])
        if not config.power:
            return f * _inverse(_divisor(total, sizes, config))
        row = _Row(total, torch.ones_like(largest) if config.phi == "exp" else largest, sizes, config)
        weights, _ = row.weights(f, Workspace(f))
        return torch.zeros_like(z) if weights is None else weights * row.inverse(sums)
