"""Rows from wherever they are: the halo before a segment, over as many hops as it takes, in one all-to-all.

Every rank knows the layout, so every rank knows what every other wants and has: sizes are derived on both sides from
the same plan and nothing has to be asked for. A window layer wants the w - 1 tokens before each of its segments; a
prefill wants the tokens that end each document. Backward: the gradients go back the same way and are added to their
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from farspan.parallel.comm import exchange
from farspan.parallel.layout import Layout, Segment
from farspan.parallel.mesh import Axis


@dataclass(frozen=True)
class FetchPlan:
    """index: int64, own rows to send, those for rank 0 first. send, receive: how many for and from each rank.

    order: int64, which of the received rows each wanted one is.
    """

    index: torch.Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    order: torch.Tensor

    def to(self, device: torch.device) -> FetchPlan:
        return FetchPlan(self.index.to(device), self.send, self.receive, self.order.to(device))


def plan_fetch(layout: Layout, wanted: Sequence[Sequence[Segment]], rank: int) -> FetchPlan:
    """wanted: for each rank the runs of the row's tokens that it wants, in the order in which it wants them."""
    places = [layout.place[_tokens(runs)] for runs in wanted]
    owners = [place // layout.local for place in places]
    index = [place[owner == rank] - rank * layout.local for place, owner in zip(places, owners, strict=True)]
    receive = torch.bincount(owners[rank], minlength=layout.ranks)
    by_owner = owners[rank].argsort(stable=True)
    order = torch.empty_like(by_owner).scatter_(0, by_owner, torch.arange(len(by_owner)))
    return FetchPlan(torch.cat(index), tuple(map(len, index)), tuple(receive.tolist()), order)


def fetch(x: torch.Tensor, plan: FetchPlan, axis: Axis) -> torch.Tensor:
    """x: [local, ...], this rank's tokens. Returns [wanted, ...]; differentiable.

    Every rank must use the result, also where it is empty: the backward pass communicates.
    """
    return exchange(x.index_select(0, plan.index), plan.send, plan.receive, axis).index_select(0, plan.order)


def _tokens(runs: Sequence[Segment]) -> torch.Tensor:
    parts = [torch.arange(run.start, run.start + run.length) for run in runs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
