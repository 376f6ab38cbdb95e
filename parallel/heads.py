"""Ulysses: tokens of all heads become all tokens of some heads, and back, by one all-to-all each way.

A mixer whose heads do not mix (per head: projections in, core, projections out) runs its core unchanged between
`to_heads` and `to_tokens`. Query heads are dealt out in consecutive runs that differ by one at most, so their number
need not divide; a rank gets the key heads that its queries read, and a key head goes to every rank that reads it. The
gradients of its copies are summed by the backward of the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from farspan.parallel.comm import exchange
from farspan.parallel.mesh import Axis

Heads = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HeadPlan:
    """queries, keys: for each rank the query heads that it has, and the key heads that these read.

    reads: for each rank, which of its key heads each of its query heads reads.
    """

    queries: Heads
    keys: Heads
    reads: Heads

    @property
    def load(self) -> float:
        """Mean query heads per rank, of the most: how busy the ranks are."""
        counts = [len(heads) for heads in self.queries]
        return sum(counts) / (len(counts) * max(counts))


@lru_cache(maxsize=64)
def plan_heads(heads: int, key_heads: int, ranks: int, interleaved: bool = False) -> HeadPlan:
    """Deals out `heads` query heads, of which head h reads key head h // (heads / key_heads).

    interleaved: head h reads key head h mod key_heads instead. Raises ValueError where there are fewer heads than
    ranks.
    """
    if heads < ranks:
        raise ValueError(
            f"{heads} heads are fewer than {ranks} Ulysses ranks; use parallel.ulysses={heads} or less, and "
            "parallel.ring for the rest"
        )
    share, extra = divmod(heads, ranks)
    queries, keys, reads, first = [], [], [], 0
    for rank in range(ranks):
        own = tuple(range(first, first + share + (rank < extra)))
        first += len(own)
        read = [head % key_heads if interleaved else head * key_heads // heads for head in own]
        used = tuple(sorted(set(read)))
        queries.append(own)
        keys.append(used)
        reads.append(tuple(used.index(head) for head in read))
    return HeadPlan(tuple(queries), tuple(keys), tuple(reads))


def to_heads(x: torch.Tensor, heads: Heads, axis: Axis) -> torch.Tensor:
    """x: [1, n, H, D], n tokens of each rank. Returns [1, ranks * n, own, D]: all ranks' tokens, in the order of ranks,
    of the heads that `heads` gives this rank. A head may be given to several ranks.
    """
    if axis.size == 1:
        return x
    _, tokens, _, channels = x.shape
    parts = [_pick(x[0], own).reshape(-1) for own in heads]
    own = len(heads[axis.rank])
    received = exchange(torch.cat(parts), [part.numel() for part in parts], [tokens * own * channels] * axis.size, axis)
    return received.view(1, axis.size * tokens, own, channels)


def to_tokens(x: torch.Tensor, heads: Heads, axis: Axis) -> torch.Tensor:
    """Inverts `to_heads` where every head was given to one rank. x: [1, ranks * n, own, D]; returns [1, n, H, D]."""
    if axis.size == 1:
        return x
    _, tokens, own, channels = x.shape
    tokens //= axis.size
    counts = [tokens * len(part) * channels for part in heads]
    received = exchange(x.reshape(-1), [tokens * own * channels] * axis.size, counts, axis)
    parts = received.split(counts)
    return torch.cat([part.view(1, tokens, -1, channels) for part in parts], dim=2)


def grouped_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [1, n, H, D] and k, v [1, n, Hk, D] to all tokens of the rank's own heads, in one message.

    The key heads come back so that query head h reads key head h // (own query heads / own key heads): repeated where
    the rank's query heads do not read them evenly.
    """
    if axis.size == 1:
        return q, k, v
    queries, keys = q.shape[2], k.shape[2]
    lists = tuple(
        (*own, *(queries + head for head in used), *(queries + keys + head for head in used))
        for own, used in zip(plan.queries, plan.keys, strict=True)
    )
    own, used = len(plan.queries[axis.rank]), len(plan.keys[axis.rank])
    q, k, v = to_heads(torch.cat([q, k, v], dim=2), lists, axis).split((own, used, used), dim=2)
    reads = plan.reads[axis.rank]
    if own % used or reads != tuple(head * used // own for head in range(own)):
        k, v = _pick(k, reads, dim=2), _pick(v, reads, dim=2)
    return q, k, v


def own_heads(parameter: torch.Tensor, plan: HeadPlan, axis: Axis) -> torch.Tensor:
    """The rows of a per-head parameter [H, ...] that belong to this rank's query heads; the others get no gradient
    here, and theirs from the ranks that own them.
    """
    return parameter if axis.size == 1 else _pick(parameter, plan.queries[axis.rank], dim=0)


def _pick(x: torch.Tensor, heads: Sequence[int], dim: int = 1) -> torch.Tensor:
    """The heads of x, as a view where they are consecutive."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x.narrow(dim, heads[0], len(heads))
    return x.index_select(dim, torch.tensor(heads, device=x.device))
