"""RAT's summaries on a shard of a row: gathered from all ranks, gradients summed back.

No chunk is cut by a shard (the packer sees to it), so every rank finishes whole chunks. Its summaries are sent in as
many slots as it has chunks of tokens, each at the slot in which its chunk begins; there a rank finds, by the layout
alone, the earlier chunks of the documents that go on in its pieces. The bytes are 1 / chunk of those of gathered keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.layers.sequence import Sequence
from farspan.parallel import Shard
from farspan.parallel.comm import all_gather, gather, reduce_scatter
from farspan.parallel.mesh import Axis


@dataclass(frozen=True)
class SummaryTables:
    """slots: that this rank sends. own: int64, the slot of each chunk that it finishes. before: int64, where among all
    ranks' slots the chunks before its pieces are. finished: where those of all documents of the row are.

    pieces: of the rank that has most. ends: int64 [documents], where among all ranks' pieces each document's last one
    is.
    """

    slots: int
    own: torch.Tensor
    before: torch.Tensor
    finished: torch.Tensor
    pieces: int
    ends: torch.Tensor

    @classmethod
    def of(cls, sequence: Sequence, chunk: int) -> SummaryTables:
        shard, layout = sequence.shard, sequence.shard.layout
        slots = -(-layout.local // chunk)

        def places(start: int, chunks: int) -> torch.Tensor:
            """Of the first chunks of a document that begins at token `start` of the row."""
            rank_of, local = _divided(layout.place[start + chunk * torch.arange(chunks)], layout.local)
            return rank_of * slots + local // chunk

        pieces = shard.pieces
        own = [torch.arange(p.length // chunk) * chunk + p.local for p in pieces]
        before = [places(p.start - p.offset, p.offset // chunk) for p in pieces]
        finished = [places(start, n // chunk) for start, n in zip(shard.starts, shard.lengths, strict=True)]
        most, ends = _last_pieces(shard)
        tables = (torch.cat(own) // chunk, torch.cat(before), torch.cat(finished), ends)
        own, before, finished, ends = (table.to(sequence.positions.device) for table in tables)
        return cls(slots, own, before, finished, most, ends)


class SummaryExchange:
    """The exchange of one layer in one step, as `kernels.rat` takes it; afterwards, the state of the whole row."""

    def __init__(self, tables: SummaryTables, axis: Axis) -> None:
        self._tables, self._axis = tables, axis
        self._gathered: torch.Tensor | None = None

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = keys.new_zeros(self._tables.slots, 2, *keys.shape[1:])
        own[self._tables.own] = torch.stack([keys, values], dim=1)
        self._gathered = all_gather(own, self._axis).flatten(0, 1)
        return self._gathered.index_select(0, self._tables.before).unbind(1)

    def backward(self, dkeys: torch.Tensor, dvalues: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.stack([dkeys, dvalues], dim=1)
        parts = gradient.new_zeros(self._axis.size * self._tables.slots, *gradient.shape[1:])
        parts.index_add_(0, self._tables.before, gradient)
        own = reduce_scatter(parts.unflatten(0, (self._axis.size, -1)), self._axis)
        return own.to(dkeys.dtype).index_select(0, self._tables.own).unbind(1)

    def all_summaries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of every document of the row, [chunks, H, D], after `forward`; no communication."""
        return self._gathered.index_select(0, self._tables.finished).unbind(1)

    def last_states(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The running states [documents, H, D] at the ends of the row's documents, from those of this rank's pieces."""
        own = torch.stack([key, value], dim=1)
        own = torch.cat([own, own.new_zeros(self._tables.pieces - len(own), *own.shape[1:])])
        return gather(own, self._axis).flatten(0, 1).index_select(0, self._tables.ends).unbind(1)


def _last_pieces(shard: Shard) -> tuple[int, torch.Tensor]:
    """Pieces of the rank that has most, and for every document of the row as it was given its last piece's place among
    all ranks' pieces, each rank's filled up to that many.
    """
    by_rank = [shard.pieces_of(rank) for rank in range(shard.axis.size)]
    most = max(map(len, by_rank))
    found = {}
    for rank, pieces in enumerate(by_rank):
        for number, piece in enumerate(pieces):
            found[piece.start + piece.length] = rank * most + number
    ends = [found[start + length] for start, length in zip(shard.starts, shard.lengths, strict=True)]
    return most, torch.tensor(ends)


def _divided(places: torch.Tensor, local: int) -> tuple[torch.Tensor, torch.Tensor]:
    return places // local, places % local
