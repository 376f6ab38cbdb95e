"""The map of core-context-aware attention: near tokens by their own weights, the others by their share in a core.

    a[t, r] = p[t, r]                  for the tokens that t sees one by one
    a[t, s] = p[t, core j] w[j, s]     for s in group j, with the weights w that pooled it (they sum to 1)

Where raw tokens and cores have a softmax each, p is that of either times its share. Rows have mass 1, and a mean
distance that the operator itself computes, on positions for values: a core's position is sum_s w s.
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, first_tokens
from farspan.kernels.cca.chunked import _attend_forward
from farspan.kernels.cca.pieces import Piece
from farspan.kernels.cca.pool import _blocks, _weights


class CoreMap(EffectiveMap):
    """Whole documents; every tensor as `layers.cca` hands it to `core_attention`."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        core_k: torch.Tensor,
        pieces: tuple[Piece, ...],
        starts: torch.Tensor,
        group: int,
        window: int,
        *,
        pool: str = "significance",
        core_bias: float = 0.0,
        share: torch.Tensor | None = None,
    ) -> None:
        """q: [1, T, H, D]; k: [1, T, Hk, D]; core_k: [1, M, Hc, D] of the groups whose first tokens are `starts`.

        share: [T, H], of the cores' softmax in its mixture with the raw tokens'; None for one softmax over both.
        Raises ValueError for pool="max", which has no weights.
        """
        if pool not in ("significance", "mean"):
            raise ValueError(f"cores with pool={pool} are no weighted means of tokens: no attention statistics")
        wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.core_k = (x.to(wide) for x in (q, k, core_k))
        self.documents = tuple(piece.length for piece in pieces)
        self.heads, self.device = q.shape[2], q.device
        self.pieces, self.group, self.window, self.core_bias, self.share = pieces, group, window, core_bias, share
        self.scale = q.shape[-1] ** -0.5
        self.at, self.begins = torch.arange(q.shape[1], device=q.device), first_tokens(self.documents, q.device)
        seen = ((self.at - self.begins + 1 - window).clamp(min=0) // group) * group
        self.raw = self.begins + seen  # the first token that is seen by itself
        self._share_in_core(pool, starts)
        self.lse: tuple[torch.Tensor, torch.Tensor] | None = None

    def _share_in_core(self, pool: str, starts: torch.Tensor) -> None:
        """weight: [T, Hc], of a token in its core; core: int64 [T], which that is (0 for tokens in none)."""
        tokens, cores = (self.q.shape[1], self.core_k.shape[2]), len(starts)
        self.weight = self.q.new_zeros(tokens)
        rows = (starts[:, None] + torch.arange(self.group, device=self.device)).flatten()
        self.core = torch.zeros_like(self.at).index_copy(
            0, rows, torch.arange(cores, device=self.device).repeat_interleave(self.group)
        )
        if pool == "mean":
            self.weight[rows] = 1.0 / self.group
            return
        evaluator = self.q.index_select(1, starts + self.group - 1)
        if tokens[1] != self.heads:
            evaluator = evaluator.unflatten(2, (tokens[1], -1)).mean(3)
        for _, places, e, keys, _, _ in _blocks(evaluator, self.k, self.k, None, starts, self.group):
            weights = _weights(e, keys, self.scale)  # [m, Hk, Hc / Hk, group]
            self.weight[places] = weights.flatten(1, 2).transpose(1, 2).flatten(0, 1)

    def moments(self) -> Moments:
        position = (self.at - self.begins).to(self.q.dtype)
        values, cores = torch.zeros_like(self.k), torch.zeros_like(self.core_k)
        values[0, :, :, 0] = position[:, None]
        cores[0, :, :, 0].index_add_(0, self.core, self.weight * position[:, None])
        numbers = [number for piece in self.pieces for number in piece]

        def attend(parts: str) -> tuple[torch.Tensor, torch.Tensor]:
            sizes = (numbers, self.group, self.window, self.core_bias if parts == "both" else 0.0, self.scale, parts)
            o, lse = _attend_forward(self.q, self.k, values, self.core_k, cores, *sizes)
            return o[0, :, :, 0], lse.t()

        if self.share is None:
            mean, lse = attend("both")
            self.lse = lse, lse
        else:
            (mean, raw), (far, other) = attend("raw"), attend("cores")
            share = self.share.to(mean.dtype)
            mean = torch.lerp(mean, far, share)
            self.lse = raw - torch.log1p(-share), other - share.log()
        return Moments((position[:, None] - mean).clamp(min=0), None)

    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        own, other = self.at[rows, None], self.at[keys]
        a = self._softmax(rows, self.k[0, keys], 0.0, self.lse[0])
        a.masked_fill_((other > own) | (other < self.raw[rows, None]), 0.0)
        far = (other < self.raw[rows, None]) & (other >= self.begins[rows, None])
        if bool(far.any()):
            first, last = (int(x) for x in self.core[keys][far.any(0)].aminmax())
            p = self._softmax(rows, self.core_k[0, first : last + 1], self.core_bias, self.lse[1])
            spread = p[..., (self.core[keys] - first).clamp(0, last - first)]
            heads = self.weight.shape[1]
            share = self.weight[keys].t().repeat_interleave(self.heads // heads, dim=0)
            a += (spread * share[:, None]).masked_fill(~far, 0.0)
        return a

    def _softmax(self, rows: slice, k: torch.Tensor, bias: float, lse: torch.Tensor) -> torch.Tensor:
        """exp(scale q k' + bias - lse), [H, rows, keys]; k: [keys, Hx, D]."""
        queries = self.q[0, rows].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2) * self.scale
        scores = torch.bmm(queries, k.permute(1, 2, 0)).view(self.heads, -1, len(k))
        return scores.add_(bias).sub_(lse[rows].t()[..., None]).clamp_(max=0).exp_()
