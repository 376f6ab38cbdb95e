"""The map of relative attention: the softmax of its scores. Convolutions blur the sources by a token or two; they are
no part of it.
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import EffectiveMap, Moments, first_tokens
from farspan.kernels.relative import Sinusoid, Table, operands
from farspan.kernels.relative.chunked import relative_forward
from farspan.kernels.relative.spans import document_spans, flat


class RelativeMap(EffectiveMap):
    """Whole documents; arguments as `kernels.relative.relative_attention` takes them, scale D ** -0.5."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        u: torch.Tensor,
        positions: Table | Sinusoid,
        documents: tuple[int, ...],
        window: int | None,
    ) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, self.k = q.to(wide), k.to(wide)
        self.documents, self.window = documents, window
        self.heads, self.device, self.scale = q.shape[2], q.device, q.shape[-1] ** -0.5
        self.begins = first_tokens(documents, q.device)
        self.at = torch.arange(q.shape[1], device=q.device) - self.begins
        self.operands = operands(q, u, positions, self.at, max(documents))
        self.lse: torch.Tensor | None = None

    def moments(self) -> Moments:
        a, p, table, beta = self.operands
        position = self.at.to(a.dtype)
        values = torch.zeros_like(self.k)
        values[..., 0] = position[:, None]
        spans = flat(document_spans(self.documents, (0,) * len(self.documents)))
        o, self.lse = relative_forward(a, p, self.k, values, table, beta, spans, self.window, self.scale)
        return Moments((position[:, None] - o[0, :, :, 0]).clamp(min=0), None)

    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        a, p, table, beta = self.operands
        grouped = a[0, rows].unflatten(1, (self.k.shape[2], -1))
        scores = torch.einsum("rgnd,kgd->gnrk", grouped, self.k[0, keys]).flatten(0, 1)
        distance = self.at[rows, None] - self.at[keys]
        other = self.begins[rows, None] != self.begins[keys]
        hidden = other | (distance < 0)
        if self.window is not None:
            hidden |= distance >= self.window
        if beta is None:
            scores += torch.einsum("rhc,kc->hrk", p[0, rows], table[self.at[keys]].to(p.dtype))
        else:
            row = distance.masked_fill(other, 0).clamp(0, beta.shape[1] - 1)
            first, last = (int(x) for x in row.aminmax())
            among = slice(first, last + 1)
            by_distance = torch.einsum("rhd,hld->hrl", p[0, rows], table[:, among].to(p.dtype)) + beta[:, None, among]
            scores += by_distance.gather(-1, (row - first).expand(self.heads, -1, -1))
        scores = scores.mul_(self.scale).sub_(self.lse[:, rows, None])
        return scores.masked_fill_(hidden, float("-inf")).exp_()
