"""The mesh of processes: data x ring x Ulysses, the innermost last, and the process groups of its axes.

    rank = (data rank * ring + ring rank) * ulysses + Ulysses rank

The ring x Ulysses ranks of one data rank are neighbours and share each row's tokens: the context axis. Ulysses ranks
are innermost because their all-to-all is what gains most from a fast link.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Seconds that a rank may keep the others of its context group waiting.
TIMEOUT = 300.0


@dataclass(frozen=True, eq=False)
class Axis:
    """Processes that communicate: `ranks` of the job in order, of which this process is number `rank`.

    group: their process group, None where there is only one. returning: a second one for what travels the other way in
    a ring's backward pass, so that the two do not wait for each other; the same as group elsewhere.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    group: Any = None
    returning: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, eq=False)
class Mesh:
    """The axes that this process is on. data: the ranks that hold the same tokens of other rows. context: ring x
    Ulysses, in the order of the layout's ranks.
    """

    data: Axis
    ring: Axis
    ulysses: Axis
    context: Axis

    @classmethod
    def create(cls, data: int, ring: int, ulysses: int, timeout: float = TIMEOUT) -> Mesh:
        """Makes the process groups; every process of the job calls it once, after `init_process_group`.

        timeout: seconds after which a rank that waits for another one of its context group gives up. Raises ValueError
        where the sizes do not multiply to the number of processes.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        check_sizes(world, data, ring, ulysses)
        numbers = torch.arange(world).view(data, ring, ulysses)
        lists = {
            "data": numbers.flatten(1).t(),
            "ring": numbers.transpose(1, 2).reshape(-1, ring),
            "ulysses": numbers.reshape(-1, ulysses),
            "context": numbers.flatten(1),
        }
        axes = {name: _axis(name, ranks.tolist(), rank, timeout) for name, ranks in lists.items()}
        return cls(**axes)


def check_sizes(world: int, data: int, ring: int, ulysses: int) -> None:
    """ValueError unless data x ring x ulysses ranks are the `world` processes of the job."""
    if min(data, ring, ulysses) < 1 or data * ring * ulysses != world:
        raise ValueError(
            f"data {data} x ring {ring} x ulysses {ulysses} is {data * ring * ulysses} ranks, there are {world} "
            "processes; change parallel.ring, parallel.ulysses or --nproc"
        )


def _axis(name: str, lists: list[list[int]], rank: int, timeout: float) -> Axis:
    own = next(ranks for ranks in lists if rank in ranks)
    if len(own) == 1:
        return Axis(name, tuple(own), 0)
    limit = timedelta(seconds=timeout)
    group, _ = dist.new_subgroups_by_enumeration(lists, timeout=limit)
    returning = group
    if name == "ring":
        returning, _ = dist.new_subgroups_by_enumeration(lists, timeout=limit)
    return Axis(name, tuple(own), own.index(rank), group, returning)
