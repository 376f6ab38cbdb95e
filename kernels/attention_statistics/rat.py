"""The map of RAT: softmax over finished chunks and the token's own state, times what a state keeps of its tokens.

With gates g and c(t) the chunk of t, per channel

    kappa[s -> t] = (1 - g_s) prod_{s < u <= t} g_u          for s and t in one chunk
    a[t, s] = alpha[t, own] kappa[s -> t]                    in the chunk of t
    a[t, s] = alpha[t, c(s)] kappa[s -> end of c(s)]         in earlier ones

and the map of a head is the mean over its channels. States start at zero, so rows have less mass than 1. The operator
itself has the moments, on values of 1 and of positions.
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, moments_of
from farspan.kernels.rat.chunked import _Inputs, _times_group, forward_pass, turn
from farspan.kernels.rat.grid import make_grid


class RecurrentMap(EffectiveMap):
    """Whole documents; arguments as `kernels.rat.rat` takes them."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        gate: torch.Tensor,
        gate_bias: torch.Tensor,
        lengths: tuple[int, ...],
        chunk: int,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """q, k: [1, T, G, D]; gate: [1, T, H, D]; gate_bias: [H, D]; rope: cos and sin [chunks, D / 2], or None."""
        wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.gate, self.bias = (x.to(wide) for x in (q, k, gate, gate_bias))
        self.documents, self.chunk, self.heads, self.device = lengths, chunk, gate.shape[2], q.device
        self.cos, self.sin = (None, None) if rope is None else rope
        self.scale = q.shape[-1] ** -0.5
        self.grid = make_grid(lengths, (0,) * len(lengths), chunk, q.device)
        slot = self.grid.slots  # counted through rows of whole chunks
        self.row, self.slot = slot // chunk, slot % chunk
        finished = torch.zeros(self.grid.rows, dtype=torch.int64, device=q.device)
        finished[self.grid.finished_rows] = 1
        self.summary = (finished.cumsum(0) - finished)[self.row]  # of its chunk among the finished ones
        first = torch.tensor([document.first for document in self.grid.documents], device=q.device)
        self.first_row = first.repeat_interleave(torch.tensor(lengths, device=q.device))
        self.lse: torch.Tensor | None = None

    def moments(self) -> Moments:
        position = (self.slot + self.chunk * (self.row - self.first_row)).to(self.q.dtype)
        mass = self._run(torch.ones_like(self.gate))
        mean = self._run(position[None, :, None, None].expand_as(self.gate).contiguous())
        self._find_shares()
        return moments_of((position[:, None] * mass - mean).clamp(min=0), mass)

    def _run(self, v: torch.Tensor) -> torch.Tensor:
        """sum_s a[t, s] v_s, the mean over channels, [T, H]. Keeps the summaries' keys and the log-sum-exp."""
        nothing = v.new_zeros(len(self.documents), *v.shape[2:])
        none = v.new_zeros(0, *v.shape[2:])
        inputs = (self.q, self.k, v, self.gate, self.bias, v, self.cos, self.sin, nothing, nothing, none, none)
        sizes = (list(self.documents), [0] * len(self.documents), self.chunk, self.scale)
        (_, self.keys, *_), (*_, o, lse) = forward_pass(*inputs, *sizes)
        self.lse = self.grid.collect(lse)
        return o[0].mean(-1)

    def _find_shares(self) -> None:
        """own: [T, H], alpha of a token's own state; kept: [T, H], kappa to the end of its chunk."""
        grid = self.grid
        inputs = _Inputs.spread(self.q, self.k, self.gate, self.gate, self.bias, None, grid, self.q.dtype)
        own = self.q.new_empty(grid.rows, self.chunk, self.heads)
        kept = torch.empty_like(own)
        for rows in grid.blocks():
            block = inputs.rows(rows)
            key, _ = block.scan()
            own[rows] = self.scale * _times_group(key, block.q).sum(-1)
            opened = torch.nn.functional.logsigmoid(block.gate)
            later = opened.flip(1).cumsum(1).flip(1) - opened
            kept[rows] = (torch.sigmoid(-block.gate) * later.exp()).mean(-1)
        self.own = (grid.collect(own) - self.lse).exp_()
        self.kept = grid.collect(kept)

    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        row, other = self.row[rows, None], self.row[keys]
        a = self._inside(rows, keys)
        far = (other < row) & (other >= self.first_row[rows, None])
        if bool(far.any()):
            first, last = (int(x) for x in self.summary[keys][far.any(0)].aminmax())
            p = self._alpha(rows, slice(first, last + 1))
            spread = p[..., (self.summary[keys] - first).clamp(0, last - first)] * self.kept[keys].t()[:, None]
            a += spread.masked_fill_(~far, 0.0)
        return a

    def _alpha(self, rows: slice, summaries: slice) -> torch.Tensor:
        """[H, rows, summaries], where they are seen."""
        groups, shared = self.q.shape[2], self.heads // self.q.shape[2]
        index = self.row[rows] - self.first_row[rows]
        queries = turn(self.q[0, rows], self.cos, self.sin, index) * self.scale
        keys = self.keys[summaries].unflatten(1, (shared, groups))  # head h has the queries of group h mod groups
        scores = torch.einsum("mgd,nsgd->sgmn", queries, keys).flatten(0, 1)
        return scores.sub_(self.lse[rows].t()[..., None]).clamp_(max=0).exp_()

    def _inside(self, rows: slice, keys: slice) -> torch.Tensor:
        """[H, rows, keys]: what the running state of each row holds of its own chunk."""
        start = max(0, min(rows.start - self.chunk + 1, rows.start))
        span = slice(start, rows.stop)
        gate = self.gate[0, span] + self.bias
        opened, closed = torch.sigmoid(gate), torch.sigmoid(-gate)
        lead, count = rows.start - start, rows.stop - rows.start
        reach = min(self.chunk, rows.stop - keys.start)
        kappa = gate.new_zeros(self.heads, count, reach)
        product = torch.ones_like(gate[lead:])
        for back in range(reach):
            begin = max(0, back - lead)  # rows so near the start of everything have no token so far back
            source = slice(lead + begin - back, lead + count - back)
            if begin < count:
                kappa[:, begin:, back] = (closed[source] * product[begin:]).mean(-1).t()
                product[begin:] *= opened[source]
        distance = self.at_distance(rows, keys)
        near = (distance >= 0) & (distance < reach) & (self.row[rows, None] == self.row[keys])
        index = distance.clamp(0, reach - 1).expand(self.heads, -1, -1)
        return kappa.gather(2, index).masked_fill_(~near, 0.0).mul_(self.own[rows].t()[..., None])

    def at_distance(self, rows: slice, keys: slice) -> torch.Tensor:
        """int64 [rows, keys]: t - s."""
        own = torch.arange(rows.start, rows.stop, device=self.device)
        return own[:, None] - torch.arange(keys.start, keys.stop, device=self.device)
