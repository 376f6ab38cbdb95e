"""A causal depthwise convolution over a few tokens of the same document, whose tail is its state."""

from __future__ import annotations

import torch
from torch import nn

from farspan.layers.halo import last_rows, rows_before
from farspan.layers.sequence import Sequence
from farspan.layers.state import new_rows, where_new


class ShortConvolution(nn.Module):
    """y_t = sum over j < width of weight[j] * x_(t - width + 1 + j), per channel; width 0 leaves x as it is."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        # Flat, like all vectors of a mixer: the optimizer neither decays nor orthogonalises it.
        self.weight = nn.Parameter(torch.empty(width * channels)) if width else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform like torch's own convolutions: deviation about 0.29 at width 4."""
        if self.weight is not None:
            nn.init.uniform_(self.weight, -(self.width**-0.5), self.width**-0.5)

    @property
    def reach(self) -> int:
        """Tokens before a document's first that it reads."""
        return max(0, self.width - 1)

    def forward(
        self, x: torch.Tensor, tails: torch.Tensor, lengths: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [1, T, C], packed documents of `lengths`; tails: [documents, reach, C], what came before each.

        Returns y [1, T, C] and the tails after these tokens.
        """
        if self.weight is None:
            return x, tails
        tails = tails.to(x.dtype)
        if len(set(lengths)) == 1:
            extended = torch.cat([tails, x.unflatten(1, (len(lengths), -1))[0]], dim=1)
            return self._convolve(extended).flatten(0, 1)[None], extended[:, lengths[0] :]
        parts = [part for document in zip(tails, x[0].split(lengths), strict=True) for part in document]
        extended = torch.cat(parts)[None]
        y = self._convolve(extended)[0]
        kept, ends, start = [], [], 0
        for length in lengths:
            kept.append(y[start : start + length])
            ends.append(extended[0, start + length : start + length + self.reach])
            start += length + self.reach
        return torch.cat(kept)[None], torch.stack(ends)

    def taps(self) -> torch.Tensor:
        """[width, channels]."""
        return self.weight.unflatten(0, (self.width, self.channels))

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """[n, reach + T, C] -> [n, T, C]."""
        taps = self.taps().to(x.dtype)
        length = x.shape[1] - self.reach
        y = x[:, :length] * taps[0]
        for j in range(1, self.width):
            y = torch.addcmul(y, x[:, j : j + length], taps[j])
        return y


def entering_tails(tails: torch.Tensor | None, start: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    """The rows [documents, reach, C] before these tokens: `start` [1, reach, C] where a document has seen none, else
    its row of a state's `tails`.
    """
    if tails is None or not any(offsets):
        return start.expand(len(offsets), *start.shape[1:])
    return tails if all(offsets) else where_new(new_rows(offsets, tails.device), start.to(tails.dtype), tails)


def tails_before(x: torch.Tensor, start: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """The rows [pieces, reach, C] before each piece of this shard, of x [1, n, C]; start: as in `entering_tails`."""
    return _tails(rows_before, x, start, sequence, sequence.offsets)


def tails_of_documents(x: torch.Tensor, start: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """The last rows [documents, reach, C] of every document of the whole row, on every rank; as `tails_before`."""
    return _tails(last_rows, x, start, sequence, sequence.shard.lengths)


def _tails(fetched, x: torch.Tensor, start: torch.Tensor, sequence: Sequence, before: tuple[int, ...]) -> torch.Tensor:
    """before: how many rows of its document there are for each tail."""
    reach = start.shape[1]
    if not reach:
        return start.expand(len(before), *start.shape[1:])
    parts = fetched(x[0], reach, sequence).split([min(reach, count) for count in before])
    return torch.stack([torch.cat([start[0, len(part) :].to(part.dtype), part]) for part in parts])
