"""A row cut into shards and joined again, the labels with it, and rows that differ between ranks."""

import time

import pytest
import torch
from torch.nn import functional as F

from farspan.layers import Sequence
from farspan.lm.head import IGNORED
from farspan.lm.packing import pack_batch
from farspan.parallel import ContextParallel, Mesh
from farspan.parallel.mesh import Axis

ROWS = [(53,), (1, 2, 9, 16, 17, 1, 30), (1,), (40, 1, 1), (3, 64)]
MESHES = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]

meshes = pytest.mark.parametrize("mesh", MESHES, ids=str)
layouts = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])


def row(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# take and whole


def cut_and_joined(mesh, layout, grid):
    """For each of ROWS what must hold, by name; and the documents of the shard."""
    results = []
    for lengths in ROWS:
        shard = ContextParallel(mesh, layout).shard(lengths, grid)
        sequence, tokens = Sequence.sharded(shard), sum(lengths)
        x, weights = row(tokens, 3), [row(tokens, 3, seed=rank + 1) for rank in range(shard.axis.size)]
        local = shard.take(x).requires_grad_()
        whole = shard.whole(local)
        (gradient,) = torch.autograd.grad((whole * weights[shard.axis.rank]).sum(), local)
        numbers = shard.take(torch.arange(tokens)[None], IGNORED)[0]
        real = numbers != IGNORED
        positions = torch.cat([torch.arange(n) for n in lengths])
        checks = {
            "inverse": torch.equal(whole, x),
            "gradient": bool((gradient - shard.take(sum(weights))).abs().max() <= 1e-12),  # none at padding
            "size": len(numbers) == sequence.tokens == shard.layout.local,
            "positions": torch.equal(sequence.positions[real], positions[numbers[real]]),
            "chunks": all(piece.offset % grid == 0 for piece in shard.pieces),
        }
        results.append((checks, shard.documents))
    return results


@meshes
@layouts
@pytest.mark.parametrize("grid", [1, 4, 16])
def test_a_row_is_cut_and_joined(run_distributed, mesh, layout, grid):
    results = run_distributed(cut_and_joined, mesh, layout, grid)
    for lengths, *told in zip(ROWS, *results, strict=True):
        assert not [name for checks, _ in told for name, holds in checks.items() if not holds]
        documents = told[0][1]
        assert all(other == documents for _, other in told)
        ends = [start + length for start, length in documents]  # documents and padding fill the row
        assert [start for start, _ in documents] == [0, *ends[:-1]] and ends[-1] % (mesh[0] * mesh[1] * grid) == 0
        placed = iter(documents)
        assert all(any(length == found for _, found in placed) for length in lengths)  # in their order


def slots(mesh, layout):
    """Whether the ring's view of a shard holds what its Ulysses ranks hold, at the same place of the same row."""
    shard = ContextParallel(mesh, layout).shard((9, 1, 13), 4)
    ring, first = shard.ring, mesh.ring.rank * mesh.ulysses.size
    held = torch.cat([shard.layout.own(first + other) for other in range(mesh.ulysses.size)])
    same = torch.equal(ring.layout.own(ring.axis.rank), held)
    return same and ring.documents == shard.documents and ring.axis is mesh.ring


@meshes
@layouts
def test_a_ring_slot_holds_what_its_ulysses_ranks_hold(run_distributed, mesh, layout):
    assert all(run_distributed(slots, mesh, layout))


# Labels


def losses(mesh, layout, grid):
    """This rank's share of a loss, its labels that count, the loss of the whole, whether tokens come back. The loss is
    a table's, [token, next token]: a label at a wrong token shows.
    """
    table = row(31, 31)[0]
    tokens = torch.randint(0, 31, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[2, 4:] = 0
    followed = mask * F.pad(mask[:, 1:], (0, 1))
    labels = tokens.roll(-1, 1).masked_fill(followed == 0, IGNORED)  # shifted before sharding
    packing = pack_batch(3, 11, torch.device("cpu"), attention_mask=mask)
    packing = packing.sharded(ContextParallel(mesh, layout), grid)
    own, wanted = packing.pack(tokens), packing.pack(labels, IGNORED)
    loss = F.cross_entropy(table[own[0]], wanted[0], ignore_index=IGNORED, reduction="sum")
    expected = F.cross_entropy(table[tokens].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    unpacked = packing.unpack(own[..., None].double())[..., 0]
    return loss, int((wanted != IGNORED).sum()), expected, torch.equal(unpacked, (tokens * mask).double())


@meshes
@layouts
@pytest.mark.parametrize("grid", [1, 4])
def test_labels_shifted_before_sharding_give_the_same_loss(run_distributed, mesh, layout, grid):
    shares, counts, expected, unpacked = zip(*run_distributed(losses, mesh, layout, grid), strict=True)
    assert all(unpacked) and sum(counts) == 5 + 10 + 3
    assert abs(sum(shares) - expected[0]) <= 1e-12 * expected[0]


# What is refused


def refusals(mesh, arguments):
    """What each rank is told of `ContextParallel(mesh, layout).shard(lengths, grid)` with its own arguments."""
    layout, lengths, grid = arguments[mesh.context.rank]
    try:
        ContextParallel(mesh, layout).shard(lengths, grid)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize(
    ("odd", "ranks"),
    [
        ({1: ("contiguous", (20, 21), 1)}, [1]),
        ({2: ("contiguous", (40,), 1)}, [2]),  # as many tokens, other documents
        ({1: ("contiguous", (20, 20), 4), 3: ("contiguous", (20, 20), 4)}, [1, 3]),  # another grid: another model
        ({3: ("zigzag", (20, 20), 1)}, [3]),
        ({0: ("contiguous", (40,), 1)}, [1, 2, 3]),  # compared to the first
    ],
)
def test_different_batches_are_refused_on_all_ranks(run_distributed, mesh, odd, ranks):
    arguments = [odd.get(rank, ("contiguous", (20, 20), 1)) for rank in range(4)]
    begun = time.monotonic()
    told = run_distributed(refusals, mesh, arguments)
    assert time.monotonic() - begun < 20  # no rank waits for the timeout of 60
    assert all(message.startswith(f"the batch on ranks {ranks} is not that of rank 0") for message in told)


@pytest.fixture
def alone():
    return Mesh(**{name: Axis(name, (0,), 0) for name in ("data", "ring", "ulysses", "context")})


def test_unknown_names_are_refused(alone):
    with pytest.raises(ValueError, match="layout='striped' is not one of contiguous, zigzag"):
        ContextParallel(alone, layout="striped")
    with pytest.raises(ValueError, match="attention='ulysses' is not one of gather, ring"):
        ContextParallel(alone, attention="ulysses")


def test_one_rank_holds_the_row(alone):
    shard = ContextParallel(alone).shard((3, 1, 5), grid=4)
    assert shard.starts == (0, 3, 4) and shard.documents == ((0, 3), (3, 1), (4, 5), (9, 3))
    x = row(9, 2)
    assert torch.equal(shard.whole(shard.take(x)), x) and shard.context.size == 1
