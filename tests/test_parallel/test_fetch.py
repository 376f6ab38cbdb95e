"""Halos and other rows from wherever they are, and their gradients back."""

import pytest
import torch

from farspan.parallel import ContextParallel
from farspan.parallel.fetch import fetch, plan_fetch
from farspan.parallel.layout import Segment, make_layout

# On 4 ranks of 4 tokens a contiguous layout has edges at 4, 8, 12, and a zigzag one at every second token.
DOCUMENTS = {
    "one over all ranks": (16,),
    "start at edges": (4, 4, 8),
    "start just before an edge": (3, 4, 9),
    "start just after an edge": (5, 4, 7),
    "one over three ranks": (2, 9, 5),
    "single tokens": (1, 1, 1, 1, 8, 1, 1, 2),
    "a rank of padding": (9,),
    "padding and more documents": (3, 6, 1),
}
layouts = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])


def row(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(layout, axis, wanted):
    """Errors of what this rank wanted, and of the gradient of its own tokens; the gradient arrives transposed."""
    plan = plan_fetch(layout, wanted, axis.rank)
    x, own = row(layout.tokens, 2, 3), layout.own(axis.rank)
    tokens = [[t for run in runs for t in range(run.start, run.start + run.length)] for runs in wanted]
    weights = [row(3, len(t), 2, seed=rank) for rank, t in enumerate(tokens, start=1)]
    local = x[own].clone().requires_grad_()
    fetched = fetch(local, plan, axis)
    (gradient,) = torch.autograd.grad((fetched.permute(2, 0, 1) * weights[axis.rank]).sum(), local)
    expected = torch.zeros_like(x)
    for rows, weight in zip(tokens, weights, strict=True):
        expected.index_add_(0, torch.tensor(rows, dtype=torch.int64), weight.permute(1, 2, 0))
    wrong = gradient - expected[own]
    return torch.equal(fetched, x[tokens[axis.rank]]), float(wrong.abs().max()), len(fetched)


def halos(mesh, layout, lengths, reach):
    """`compare` for the `reach` tokens of its document before each piece of a shard."""
    shard = ContextParallel(mesh, layout).shard(lengths)
    wanted = [
        [Segment(p.start - min(reach, p.offset), min(reach, p.offset)) for p in shard.pieces_of(rank)]
        for rank in range(shard.axis.size)
    ]
    return compare(shard.layout, shard.axis, wanted)


@layouts
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)], ids=str)
def test_halos_over_any_number_of_hops(run_distributed, mesh, layout, lengths):
    for reach in (1, 3, 5, 11, 100):  # a rank has 4 tokens: 5 are on two ranks before it, 11 on three
        for same, wrong, _ in run_distributed(halos, mesh, layout, lengths, reach):
            assert same and wrong <= 1e-12


def test_a_rank_that_wants_nothing_still_gives(run_distributed):
    results = run_distributed(halos, (4, 1), "contiguous", (9,), 5)  # padded to 12: the last rank has padding alone
    assert [count for _, _, count in results] == [0, 3, 5, 0]


def fetches_the_same(mesh, kind):
    """`compare` where all ranks want the same rows, out of order and some of them twice."""
    layout = make_layout(kind, 16, mesh.ring.size, mesh.ulysses.size)
    runs = [Segment(9, 4), Segment(0, 0), Segment(2, 5), Segment(15, 1), Segment(3, 2)]
    return compare(layout, mesh.context, [runs] * layout.ranks)


@layouts
@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=str)
def test_rows_that_all_ranks_want_collect_all_gradients(run_distributed, mesh, layout):
    for same, wrong, count in run_distributed(fetches_the_same, mesh, layout):
        assert same and wrong <= 1e-12 and count == 12
