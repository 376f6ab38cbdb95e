"""The lists of `kernels.interval` for every membership rule: entries sorted by head, cluster, document and position.

A row of keys is what a query may see: the tokens of a packed row, after what the states hold of each document. Queries
are tokens of that row, all of them or those of one rank. Lists are made without gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from farspan.kernels.interval import Intervals
from farspan.layers.routing_membership import Membership
from farspan.layers.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens that are sorted, and those of them that ask.

    document: int64 [T], of every token, ascending; documents: how many there are; longest: tokens of the longest one,
    those before the row included. own: int64 [n], which tokens the rows of q are, ascending within a document; asking:
    int64 [n'], which rows of q ask, None for all. counts: int64 [documents, H, C], how many tokens each ring has seen,
    where keys begin with the rings.
    """

    document: torch.Tensor
    documents: int
    longest: int
    own: torch.Tensor
    asking: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @classmethod
    def of(cls, sequence: Sequence) -> Row:
        """All tokens of a whole row, those that the states hold not among them."""
        own = torch.arange(sequence.tokens, device=sequence.positions.device)
        return cls(sequence.document_of_token, sequence.documents, max(sequence.totals), own)

    @property
    def askers(self) -> torch.Tensor:
        """int64 [n'], rows of q that ask (tokens of q)."""
        return torch.arange(len(self.own), device=self.own.device) if self.asking is None else self.asking


@torch.no_grad()
def nearest_lists(assigned: torch.Tensor, row: Row, clusters: int, window: int, hide_self: bool) -> Intervals:
    """Each token sees the last `window` tokens of its cluster, itself included; with `hide_self` itself only where
    there is no other.

    assigned: int64 [T, H, m], the clusters of every token. The rows of k: with `row.counts` first the rings,
    [documents, H, C, window], then the tokens [T, H]; without, the tokens. Shapes depend on nothing on the device.
    """
    tokens, heads, choices = assigned.shape
    device, slots = assigned.device, 0 if row.counts is None else window
    span = slots + tokens
    head = torch.arange(heads, device=device)[:, None]

    def segment(token: torch.Tensor) -> torch.Tensor:
        return (head * clusters + assigned[token]) * row.documents + row.document[token][:, None, None]

    token = torch.arange(tokens, device=device)
    places = (segment(token) * span + (slots + token)[:, None, None]).flatten()
    rows = (token[:, None, None] * heads + head).expand(assigned.shape).flatten()
    if slots:
        ring = _ring_places(row.counts, window, span)
        rows = torch.cat([torch.arange(ring.numel(), device=device), rows + ring.numel()])
        places = torch.cat([ring.flatten(), places])
    places, order = places.sort()
    keys = rows[order]

    asking = row.askers
    own = row.own[asking]
    wanted = (segment(own) * span + (slots + own)[:, None, None]).flatten()
    wanted, order = wanted.sort()
    queries = (asking[:, None, None] * heads + head).expand(len(asking), heads, choices).flatten()[order]
    place = torch.searchsorted(places, wanted)
    segments = wanted // span
    begin = torch.searchsorted(places, segments * span)
    if slots:
        by_segment = row.counts.permute(1, 2, 0).flatten()  # head, cluster, document
        begin += (window - by_segment[segments]).clamp(min=0)
    first = torch.maximum(begin, place - window + 1)
    last = place + 1 - (place > first).long() if hide_self else place + 1
    starts = torch.searchsorted(segments, torch.arange(heads * clusters * row.documents + 1, device=device))
    length = max(1, len(asking) * choices // (clusters * row.documents))
    reach = min(window, row.longest)
    return Intervals(queries, keys, first, last, starts, reach, length, repeated=choices > 1)


def _ring_places(counts: torch.Tensor, window: int, span: int) -> torch.Tensor:
    """Where the slots of rings sort to, [documents, H, C, window]: by age, those never written first."""
    documents, heads, clusters = counts.shape
    slot, seen = torch.arange(window, device=counts.device), counts[..., None]
    rank = seen - 1 - (seen - 1 - slot) % window  # of the last token written there, below 0 for none
    segment = torch.arange(heads * clusters, device=counts.device).view(heads, clusters) * documents
    segment = segment + torch.arange(documents, device=counts.device)[:, None, None]
    return segment[..., None] * span + (rank - (seen - window))


@torch.no_grad()
def ring_sources(assigned: torch.Tensor, row: Row, clusters: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What rings hold after the row: for each slot the row of k, [documents, H, C, window] (any valid one where nothing
    was ever written), and the new counts, [documents, H, C].

    assigned: int64 [T, H, 1 or more]. Rows of k as for `nearest_lists`.
    """
    heads = assigned.shape[1]
    counts = row.counts
    if counts is None:
        counts = assigned.new_zeros(row.documents, heads, clusters)
    head = torch.arange(heads, device=assigned.device)[:, None]
    segment = (row.document[:, None, None] * heads + head) * clusters + assigned
    order = segment.flatten().argsort(stable=True)
    bounds = torch.searchsorted(segment.flatten()[order], torch.arange(counts.numel() + 1, device=counts.device))
    new = bounds.diff().view_as(counts)
    total = (counts + new)[..., None]
    slot = torch.arange(window, device=counts.device)
    rank = total - 1 - (total - 1 - slot) % window
    offset = rank - counts[..., None]  # among the new tokens of the cluster
    entry = (bounds[:-1].view_as(counts)[..., None] + offset).clamp(0, max(0, len(order) - 1))
    rows = order[entry] // assigned.shape[2]
    if row.counts is None:
        return rows, total[..., 0]
    slots = torch.arange(counts.numel() * window, device=counts.device).view(*counts.shape, window)
    return torch.where(offset >= 0, rows + slots.numel(), slots), total[..., 0]


@torch.no_grad()
def member_lists(membership: Membership, rows: torch.Tensor, row: Row, window: int, hide_self: bool) -> Intervals:
    """Each token sees the members of its clusters that came before it and have not left; itself as for `nearest_lists`.

    membership: of all documents side by side, as long as the row of keys; `leaves` are tokens of that row. rows: int64
    [H, C, T], the row of k of every key. The lists are as long as there are members.
    """
    heads, clusters, tokens = membership.enters.shape
    device = rows.device
    head, cluster, token = membership.enters.nonzero(as_tuple=True)  # sorted by segment and position
    segment = (head * clusters + cluster) * row.documents + row.document[token]
    asks = torch.full((tokens,), -1, device=device)
    asks[row.own[row.askers]] = row.askers
    place = (asks[token] >= 0).nonzero()[:, 0]
    queries = asks[token[place]] * heads + head[place]
    first = torch.searchsorted(segment, segment[place])
    last = place + 1
    if hide_self and window > 1:
        last = last - (place > first).long()
    moment = segment * (tokens + 1) + token
    out = segment * (tokens + 1) + membership.leaves[head, cluster, token]
    until = torch.searchsorted(moment[place], out)
    bounds = torch.arange(heads * clusters * row.documents + 1, device=device)
    starts = torch.searchsorted(segment[place], bounds)
    length = min(row.longest, round(window * (1 + math.log(max(1.0, row.longest / window)))))
    keys = rows[head, cluster, token]
    return Intervals(queries, keys, first, last, starts, row.longest, length, until, repeated=True)
