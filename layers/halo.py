"""Rows of tokens that lie on other ranks: those before each piece of a shard, and the last ones of each document."""

from __future__ import annotations

import torch

from farspan.layers.sequence import Sequence
from farspan.parallel.fetch import FetchPlan, fetch, plan_fetch
from farspan.parallel.layout import Segment


def rows_before(x: torch.Tensor, reach: int, sequence: Sequence) -> torch.Tensor:
    """Of x [n, ...], the tokens of this shard: the `reach` rows before each of its pieces, fewer where its document
    begins, one piece after the other.

    Every piece takes its part, so that every rank's backward pass comes by the exchange.
    """
    shard = sequence.shard

    def plan() -> FetchPlan:
        wanted = [
            [Segment(p.start - min(reach, p.offset), min(reach, p.offset)) for p in shard.pieces_of(rank)]
            for rank in range(shard.axis.size)
        ]
        return plan_fetch(shard.layout, wanted, shard.axis.rank).to(x.device)

    return fetch(x, sequence.table(("halo", reach), plan), shard.axis)


def last_rows(x: torch.Tensor, count: int, sequence: Sequence) -> torch.Tensor:
    """The last `count` rows of every document of the whole row, all of a shorter one, on every rank; x: [n, ...]."""
    shard = sequence.shard

    def plan() -> FetchPlan:
        documents = zip(shard.starts, shard.lengths, strict=True)
        ends = [Segment(start + max(0, n - count), min(n, count)) for start, n in documents]
        return plan_fetch(shard.layout, [ends] * shard.axis.size, shard.axis.rank).to(x.device)

    return fetch(x, sequence.table(("ends", count), plan), shard.axis)
