"""The map of softmax attention in linear memory, on any device: its log-sum-exp, its distances, its blocks.

With the log-sum-exp any rectangle of the map is exp(s - lse); where the layer has it, the mean distances of rows are
summed from such tiles. Where not, the mean distance is an ordinary attention whose values are the positions, t - E[s],
so torch's flash kernel gives it together with the log-sum-exp; where there is none (CUDA in fp32, a soft cap) the rows
are taken a block at a time.
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, first_tokens
from farspan.kernels.blocks import attention_block
from farspan.kernels.window.chunked import _window_forward
from farspan.kernels.workspace import LOG2E, Workspace, with_column

# Scores of a block of rows, where there is no flash kernel.
SCORES = 4 * 1024 * 1024
# Rows, keys and scores at most of a tile of weights: 1 MB of fp32.
ROWS, KEYS, TILE = 64, 4096, 64 * 4096


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
        lse: torch.Tensor | None = None,
    ) -> None:
        """q: [1, T, H, D]; k: [1, T, Hk, D]. pieces: tokens of the runs that attention does not leave, of which the
        documents are made. scale: a number, or [H]. lse: [T, H] of the scores, where it is known, be it roughly.
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
        self.at, self.lse = at, None if lse is None else lse.to(wide)

    def moments(self) -> Moments:
        """Also finds `lse`, [T, H], where it is not known."""
        if self.lse is not None and self.softcap is None:
            mean, self.lse = self._by_lse()
        elif self.device.type == "cpu" and self.softcap is None:
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

    def _by_lse(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean position and lse, [T, H]: a tile of the map is one product and an exponential.

        What the layer in half precision is off by is mended by the rows' sums, which otherwise would not be 1.
        """
        groups, work = self.k.shape[1], Workspace(self.q)
        queries = (with_column(self.q, -self.lse) * LOG2E).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).contiguous()
        keys = with_column(self.k, 1.0).permute(1, 2, 0).contiguous()
        columns = torch.stack([self._centred, torch.ones_like(self._centred)], dim=1)
        sums = self.q.new_zeros(*queries.shape[:3], 2)
        begins, shared = self.first.tolist(), queries.shape[1]
        for start in range(0, len(self.q), ROWS):
            stop = min(start + ROWS, len(self.q))
            rows = shared * (stop - start)
            hidden = self.at[start:stop] > self.at[start:stop, None]
            for low in range(begins[start], stop, KEYS):
                high = min(low + KEYS, stop)
                edge = min(begins[stop - 1], high)  # left of it, some rows belong to a later piece or window
                gone = self.at[low:edge] < self.first[start:stop, None] if edge > low else None
                step = max(1, TILE // (rows * (high - low)))
                for some in (slice(first, first + step) for first in range(0, groups, step)):
                    q = queries[some, :, start:stop].reshape(-1, rows, queries.shape[3])
                    tile = work.get("tile", len(q), rows, high - low)
                    a = torch.bmm(q, keys[some, :, low:high], out=tile).exp2_().unflatten(1, (shared, -1))
                    if high > start:
                        from_ = max(low, start)
                        a[..., from_ - low :].masked_fill_(hidden[:, from_ - start : high - start], 0.0)
                    if gone is not None:
                        a[..., : edge - low].masked_fill_(gone, 0.0)
                    sums[some, :, start:stop] += a @ columns[low:high]
        position, mass = sums.flatten(0, 1).transpose(0, 1).unbind(-1)
        return position / mass, self.lse + mass.log()

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
