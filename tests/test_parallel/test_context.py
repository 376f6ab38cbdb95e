"""A row cut into shards and joined again, the labels with it, and rows that differ between ranks."""

import pytest
import torch

from farspan.layers import Sequence
from farspan.parallel import ContextParallel
from farspan.parallel.layout import LAYOUTS

ROWS = [(53,), (1, 2, 9, 16, 17, 1, 30), (1,), (40, 1, 1), (3, 64)]
MESHES = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def cut_and_joined(mesh, grid):
    """Whether `take` and `whole` invert each other, what is padded, and what a piece is."""
    for layout in LAYOUTS:
        for lengths in ROWS:
            shard = ContextParallel(mesh, layout).shard(lengths, grid)
            row = torch.randn(1, sum(lengths), 3, dtype=torch.float64).requires_grad_()
            torch.distributed.broadcast(row.data, 0)
            part = shard.take(row)
            sequence = Sequence.sharded(shard)
            assert part.shape[1] == sequence.tokens == shard.layout.local
            assert torch.equal(shard.whole(part), row)
            (gradient,) = torch.autograd.grad(shard.whole(part).sum(), row)
            torch.distributed.all_reduce(gradient)
            assert torch.equal(gradient, torch.full_like(row, mesh.context.size))  # from each rank's sum
            numbers = torch.arange(1, sum(lengths) + 1)[None]
            own = shard.take(numbers, -7)[0]
            starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
            positions = torch.cat([torch.arange(n) for n in lengths])
            real = own > 0
            assert torch.equal(sequence.positions[real], positions[own[real] - 1])
            assert (own[~real] == -7).all() and len(starts) == len(lengths)
            for piece in shard.pieces:
                assert piece.offset == 0 or piece.offset % grid == 0  # no chunk is cut
            padding = shard.layout.tokens - sum(lengths)
            edges = len(shard.layout.edges)
            step = shard.layout.tokens // shard.layout.local * grid * 2
            assert padding < step + edges * (grid - 1) + 1
    return True


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("grid", [1, 4, 16])
def test_a_row_is_cut_and_joined(run_distributed, sizes, grid):
    assert all(run_distributed(cut_and_joined, sizes, grid))


def shares_of_a_loss(mesh):
    """Labels shifted on the whole row give each token the same label in every layout."""
    labels = torch.arange(100, 176).view(1, -1)
    for layout in LAYOUTS:
        own = ContextParallel(mesh, layout).shard(ROWS[1], 4).take(labels, -100)
        total = torch.where(own >= 0, own, 0).sum()
        torch.distributed.all_reduce(total)
        assert total == labels.sum()
    return True


def test_no_label_is_lost(run_distributed):
    assert all(run_distributed(shares_of_a_loss, (2, 2)))


def other_batch(mesh):
    lengths = (20, 20) if mesh.context.rank == 1 else (40,)
    try:
        ContextParallel(mesh).shard(lengths)
    except ValueError as error:
        return str(error)
    return ""


def test_another_batch_on_a_rank_is_refused_everywhere(run_distributed):
    for message in run_distributed(other_batch, (2, 2)):
        assert "the batch on ranks [1] is not that of rank 0" in message


def unknown_names(mesh):
    found = []
    for name in ("layout", "attention"):
        try:
            ContextParallel(mesh, **{name: "striped"})
        except ValueError as error:
            found.append(str(error))
    return found


def test_unknown_names_are_refused(run_distributed):
    expected = ["layout='striped' is not one of contiguous, zigzag", "attention='striped' is not one of gather, ring"]
    assert run_distributed(unknown_names, (2, 1)) == [expected] * 2
