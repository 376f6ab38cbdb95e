"""The mesh: which ranks share a row, a ring, the heads."""

import pytest
import torch

from farspan.parallel import Mesh
from farspan.parallel.comm import all_gather
from farspan.parallel.mesh import check_sizes


def axes(sizes):
    """Of every axis its ranks and this process's number, and who is heard over it."""
    mesh = Mesh.create(*sizes)
    rank, found = mesh.data.ranks[mesh.data.rank], {}
    for name in ("data", "ring", "ulysses", "context"):
        axis = getattr(mesh, name)
        heard = all_gather(torch.tensor(rank), axis).tolist()
        found[name] = (axis.name, axis.ranks, heard, axis.ranks[axis.rank] == rank, (axis.group is None))
    return found


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 1, 4)])
def test_ranks_are_data_then_ring_then_ulysses(run_distributed, sizes):
    data, ring, ulysses = sizes
    for rank, found in enumerate(run_distributed(axes, 4, sizes)):
        outer, (middle, inner) = rank // (ring * ulysses), divmod(rank % (ring * ulysses), ulysses)
        first = outer * ring * ulysses
        expected = {
            "data": tuple(d * ring * ulysses + rank - first for d in range(data)),
            "ring": tuple(first + r * ulysses + inner for r in range(ring)),
            "ulysses": tuple(first + middle * ulysses + u for u in range(ulysses)),
            "context": tuple(range(first, first + ring * ulysses)),
        }
        for name, ranks in expected.items():
            assert found[name] == (name, ranks, list(ranks), True, len(ranks) == 1)


def two_groups(mesh):
    return mesh.ring.returning is not mesh.ring.group and mesh.context.returning is mesh.context.group


def test_a_ring_has_two_groups(run_distributed):
    assert all(run_distributed(two_groups, (2, 1)))


@pytest.mark.parametrize("sizes", [(1, 2, 1), (3, 2, 1), (0, 4, 1), (-1, -4, 1), (1, 1, 1)])
def test_sizes_must_multiply_to_the_processes(sizes):
    with pytest.raises(ValueError, match=r"there are 4 processes; change parallel\.ring, parallel\.ulysses or --nproc"):
        check_sizes(4, *sizes)
