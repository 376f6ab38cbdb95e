"""The map of softmax attention in linear memory, on any device: its log-sum-exp, its distances, its blocks.

The mean distance of a row is an ordinary attention whose values are the positions, t - E[s], so torch's flash kernel
gives it together with the log-sum-exp; where there is none (CUDA in fp32, a soft cap) the rows are taken a block at a
time. With the log-sum-exp any rectangle of the map is exp(s - lse).
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, first_tokens
from farspan.kernels.blocks import attention_block
from farspan.kernels.window.chunked import _window_forward

# Scores of a block of rows, where there is no flash kernel.
SCORES = 4 * 1024 * 1024


class SoftmaxMap(EffectiveMap):
    """a[t, s] = exp(scale q_t k_s - lse_t) for the keys of the same piece, at most `window` of them."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        pieces: tuple[int, ...],
        documents: tuple[int, ...],
        window: int | None,
        scale: torch.Tensor | float,
        softcap: float | None,
    ) -> None:
        """q: [1, T, H, D]; k: [1, T, Hk, D]. pieces: tokens of the runs that attention does not leave, of which the
        documents are made. scale: a number, or [H].
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        self.documents, self.pieces, self.window, self.softcap = documents, pieces, window, softcap
        self.heads, self.device = q.shape[2], q.device
        self.q = q[0].to(wide) * (scale[:, None].to(wide) if isinstance(scale, torch.Tensor) else scale)
        self.k = k[0].to(wide)
        at = torch.arange(q.shape[1], device=q.device)
        self.first = first_tokens(pieces, q.device)
        if window is not None:
            self.first = torch.maximum(self.first, at - window + 1)
        self.at, self.lse = at, None

    def moments(self) -> Moments:
        """Also finds `lse`, [T, H]."""
        if self.device.type == "cpu" and self.softcap is None:
            mean, self.lse = self._by_flash()
        else:
            mean, self.lse = self._by_rows()
        return Moments((self._centred[:, None] - mean).clamp_(min=0), None)

    @property
    def _centred(self) -> torch.Tensor:
        """Positions in the piece, less the middle of the longest: half the size, half the rounding."""
        return (self.at - first_tokens(self.pieces, self.device)).to(self.q.dtype) - (max(self.pieces) - 1) // 2

    def _by_flash(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean position and lse, [T, H]."""
        values = self.q.new_zeros(len(self.q), 1, self.q.shape[-1])
        values[:, 0, 0] = self._centred
        values = values.expand(-1, self.k.shape[1], -1)
        if self.window is not None and self.window < max(self.pieces):
            inputs, none = (x[None] for x in (self.q, self.k, values)), [0] * len(self.pieces)
            o, lse = _window_forward(*inputs, list(self.pieces), none, self.window, 1.0, max(64, -(-self.window // 4)))
            return o[0, :, :, 0], lse
        if len(set(self.pieces)) == 1:
            rows = (x.unflatten(0, (len(self.pieces), -1)).transpose(1, 2) for x in (self.q, self.k, values))
            o, lse = attention_block(*rows, 1.0, causal=True)
            return o[..., 0].transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        means, sums = [], []
        for parts in zip(*(x.split(self.pieces) for x in (self.q, self.k, values)), strict=True):
            o, lse = attention_block(*(x[None].transpose(1, 2) for x in parts), 1.0, causal=True)
            means.append(o[0, :, :, 0].t())
            sums.append(lse[0].t())
        return torch.cat(means), torch.cat(sums)

    def _by_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        means, sums, start = [], [], 0
        centred, begins = self._centred, self.first.tolist()
        while start < len(self.q):
            stop = min(len(self.q), start + max(1, SCORES // (self.heads * (start + 64 - begins[start]))), start + 512)
            keys = slice(begins[start], stop)
            scores = self._scores(slice(start, stop), keys)
            lse = scores.logsumexp(-1, keepdim=True)
            means.append((scores.sub_(lse).exp_() @ centred[keys]).t())
            sums.append(lse[..., 0].t())
            start = stop
        return torch.cat(means), torch.cat(sums)

    def _scores(self, rows: slice, keys: slice) -> torch.Tensor:
        """[H, rows, keys], -inf where hidden."""
        key_heads = self.k.shape[1]
        queries = self.q[rows].unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = torch.bmm(queries, self.k[keys].permute(1, 2, 0)).view(self.heads, -1, keys.stop - keys.start)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        own, other = self.at[rows, None], self.at[keys]
        return scores.masked_fill_((other > own) | (other < self.first[rows, None]), float("-inf"))

    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        return self._scores(rows, keys).sub_(self.lse[rows].t()[..., None]).exp_()
