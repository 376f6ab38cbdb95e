"""Routing attention on a shard: which rank has which heads, and which tokens of the row ask there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from farspan.layers.routing_lists import Row
from farspan.layers.sequence import Sequence
from farspan.parallel.heads import plan_heads, to_heads, to_tokens
from farspan.parallel.mesh import Axis


@dataclass(frozen=True)
class HeadDeal:
    """Heads dealt out so that every Ulysses rank has its share of routing heads and of local ones.

    heads: for each rank its heads, local ones (numbered below `local_heads`) before routing ones.
    """

    heads: tuple[tuple[int, ...], ...]
    local_heads: int
    all_heads: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, local_heads: int, routing_heads: int, ranks: int) -> HeadDeal:
        """ValueError where there are fewer heads than ranks."""
        total = local_heads + routing_heads
        # both kinds evenly along a line, routing ahead of local where they meet: the first rank always has one
        at = [(2 * i + 1) / local_heads for i in range(local_heads)]
        at += [(2 * i + 1) / routing_heads for i in range(routing_heads)]
        order = sorted(range(total), key=lambda head: (at[head], head < local_heads, head))
        plan = plan_heads(total, total, ranks)
        heads = tuple(tuple(sorted(order[place] for place in own)) for own in plan.queries)
        return cls(heads, local_heads, total)

    def local(self, rank: int) -> int:
        """Local heads of a rank."""
        return sum(head < self.local_heads for head in self.heads[rank])

    def routing(self, rank: int) -> tuple[int, ...]:
        """Routing heads of a rank, numbered among themselves."""
        return tuple(head - self.local_heads for head in self.heads[rank] if head >= self.local_heads)

    def to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axis: Axis) -> tuple[torch.Tensor, ...]:
        """q, v [1, n, H, D] and k [1, n, local, D] to all tokens of the rank's own heads, in one message."""
        if axis.size == 1:
            return q, k, v
        keys, values = self.all_heads, self.all_heads + self.local_heads
        lists = tuple(
            (*own, *(keys + head for head in own if head < self.local_heads), *(values + head for head in own))
            for own in self.heads
        )
        own, local = len(self.heads[axis.rank]), self.local(axis.rank)
        return to_heads(torch.cat([q, k, v], dim=2), lists, axis).split((own, local, own), dim=2)

    def to_tokens(self, o: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Inverts `to_heads` of q."""
        if axis.size == 1:
            return o
        dealt = [head for own in self.heads for head in own]
        place = torch.tensor([dealt.index(head) for head in range(self.all_heads)], device=o.device)
        return to_tokens(o, self.heads, axis).index_select(2, place)


def own_row(slot: Sequence) -> Row:
    """The whole row of keys, and this slot's tokens of it as those that ask; padding does not."""

    def build() -> Row:
        whole, device = slot.whole, slot.positions.device
        own = slot.shard.take(torch.arange(whole.tokens)[None], fill=-1)[0]
        asking = (own >= 0).nonzero()[:, 0]
        rows = (x.to(device) for x in (own, asking))
        return Row(whole.document_of_token, whole.documents, max(whole.lengths), *rows)

    return slot.table("routing row", build)
