"""CCA on a shard of a row: cores gathered from all ranks, near keys fetched from those before; gradients summed back.

No group is cut by a shard (the packer sees to it), so every rank pools its own tokens. Its cores are sent in as many
slots as it has groups of tokens, each at the slot in which its group begins; there a rank finds, by the layout alone,
those of the documents that go on in its pieces. The bytes are 1 / group of those of gathered keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.kernels.cca import Piece, cores_seen, prefix_needed
from farspan.kernels.packing import with_prefixes
from farspan.layers.sequence import Sequence
from farspan.parallel import Shard
from farspan.parallel.comm import gather
from farspan.parallel.fetch import FetchPlan, fetch, plan_fetch
from farspan.parallel.layout import Segment

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ShardTables:
    """What this rank's shard needs to know; every int64 tensor is on the device.

    pieces: as `kernels.cca` takes them, each with its halo of keys before it and the cores of its document.
    starts: rows of this rank's tokens where its groups begin. slots: that it sends its cores in; own: the slot of each.
    seen: where among all ranks' slots the cores are that its pieces see. finished: where those of the row are.
    halo: the keys before each piece. ends: the last tokens of every document of the row, as many as a state holds.
    """

    pieces: tuple[Piece, ...]
    starts: torch.Tensor
    slots: int
    own: torch.Tensor
    seen: torch.Tensor
    finished: torch.Tensor
    halo: FetchPlan
    ends: FetchPlan

    @classmethod
    def of(cls, sequence: Sequence, group: int, window: int) -> ShardTables:
        shard, layout, device = sequence.shard, sequence.shard.layout, sequence.positions.device
        slots = -(-layout.local // group)

        def places(start: int, groups: int) -> torch.Tensor:
            """Of the first groups of a document that begins at token `start` of the row."""
            place = layout.place[start + group * torch.arange(groups)]
            return place // layout.local * slots + place % layout.local // group

        counts: dict[int, int] = {}  # cores that a document's pieces here see, by its first token
        for p in shard.pieces:
            start, count = p.start - p.offset, cores_seen(p.offset + p.length - 1, group, window)
            counts[start] = max(count, counts.get(start, 0))
        pieces, key = [], 0
        for p in shard.pieces:
            prefix = prefix_needed(p.offset, group, window)
            core = sum(count for start, count in counts.items() if start < p.start - p.offset)
            pieces.append(Piece(p.length, p.offset, prefix, key, core))
            key += prefix + p.length
        starts = torch.cat([p.local + group * torch.arange(p.length // group) for p in shard.pieces])
        tables = (
            starts,
            starts // group,
            torch.cat([places(start, count) for start, count in sorted(counts.items())]),
            torch.cat([places(start, n // group) for start, n in zip(shard.starts, shard.lengths, strict=True)]),
        )
        starts, own, seen, finished = (table.to(device) for table in tables)
        kept = window + group - 1
        documents = zip(shard.starts, shard.lengths, strict=True)
        last = [Segment(start + max(0, n - kept), min(n, kept)) for start, n in documents]
        halos = [[_halo(p, group, window) for p in shard.pieces_of(rank)] for rank in range(shard.axis.size)]
        halo, ends = (plan_fetch(layout, wanted, shard.axis.rank).to(device) for wanted in (halos, [last] * len(halos)))
        return cls(tuple(pieces), starts, slots, own, seen, finished, halo, ends)

    def with_halos(self, k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Pair:
        """k, v [1, N, Hk, D] of the pieces, each with the keys before it that it sees one by one.

        Every piece takes its part, possibly none, so that every rank's backward pass comes by the exchange.
        """
        halo = fetch(torch.stack([k[0], v[0]], dim=1), self.halo, shard.axis)
        parts = tuple(part.unbind(1) for part in halo.split([piece.prefix for piece in self.pieces]))
        return with_prefixes(k, v, tuple(piece.length for piece in self.pieces), parts)[:2]

    def ends_of(self, k: torch.Tensor, v: torch.Tensor, shard: Shard) -> Pair:
        """The last tokens of every document of the row, [kept, Hk, D], on every rank."""
        return fetch(torch.stack([k[0], v[0]], dim=1), self.ends, shard.axis).unbind(1)

    def gathered(self, core_k: torch.Tensor, core_v: torch.Tensor, shard: Shard) -> tuple[Pair, Pair]:
        """This rank's own cores [1, M, Hc, D] to those that its pieces see, [1, seen, Hc, D], and those of all groups
        of the row, document by document, [groups, Hc, D].
        """
        cores = torch.stack([core_k[0], core_v[0]], dim=1)
        sent = cores.new_zeros(self.slots, *cores.shape[1:]).index_copy(0, self.own, cores)
        everyone = gather(sent, shard.axis).flatten(0, 1)
        seen, row = (everyone.index_select(0, places).unbind(1) for places in (self.seen, self.finished))
        return (seen[0][None], seen[1][None]), row


def _halo(piece, group: int, window: int) -> Segment:
    count = prefix_needed(piece.offset, group, window)
    return Segment(piece.start - count, count)
