"""Collectives against what one process computes from everyone's tensors, forward and backward."""

import pytest
import torch

from farspan.parallel import comm
from farspan.parallel.mesh import Axis

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool]


def everyone(ranks: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """A float64 tensor for each rank, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(ranks)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).abs().max()) if found.numel() else 0.0


# Which rank sends how many rows to which: uneven; rank 1 receives nothing, rank 2 sends nothing.
TABLE = [[1, 0, 2, 1], [2, 0, 1, 0], [0, 0, 0, 0], [3, 0, 0, 2]]


def plan(ranks: int, rank: int) -> tuple[list[int], list[int]]:
    """What `rank` sends and receives by TABLE."""
    return TABLE[rank][:ranks], [TABLE[other][rank] for other in range(ranks)]


# gather


def gathers(mesh):
    """Errors of the result and the gradient. Every rank weighs the result differently, through a transpose, so that
    the gradient that comes back is not contiguous.
    """
    axis = mesh.context
    xs, weights = everyone(axis.size, 3, 5), everyone(axis.size, axis.size, 5, 3, seed=1)
    x = xs[axis.rank].clone().requires_grad_()
    gathered = comm.gather(x, axis)
    (gradient,) = torch.autograd.grad((gathered.transpose(1, 2) * weights[axis.rank]).sum(), x)
    expected = sum(weight[axis.rank].T for weight in weights)
    return error(gathered, torch.stack(xs)), error(gradient, expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gather_and_its_gradient(run_distributed, ranks):
    for forward, backward in run_distributed(gathers, (ranks, 1)):
        assert forward == 0 and backward <= 1e-12


def gathers_in_bf16(mesh):
    axis = mesh.context
    xs = [x.bfloat16() for x in everyone(axis.size, 64)]
    x = xs[axis.rank].clone().requires_grad_()
    weights = [w.bfloat16() for w in everyone(axis.size, axis.size, 64, seed=1)]
    (gradient,) = torch.autograd.grad((comm.gather(x, axis) * weights[axis.rank]).sum(), x)
    expected = sum(weight[axis.rank].double() for weight in weights)
    return gradient.dtype, error(gradient, expected.bfloat16())


def test_gradients_of_half_precision_are_summed_in_fp32(run_distributed):
    """Rounded once, at the end: a sum of bf16 partial sums differs."""
    assert run_distributed(gathers_in_bf16, (4, 1)) == [(torch.bfloat16, 0.0)] * 4


# exchange


def exchanges(mesh):
    """As `gathers`, of an uneven exchange; also how often the backward pass came by."""
    axis = mesh.context
    send, receive = plan(axis.size, axis.rank)
    plans = [plan(axis.size, rank) for rank in range(axis.size)]
    xs = [everyone(1, sum(to), 2, 3, seed=rank)[0] for rank, (to, _) in enumerate(plans)]
    weights = [everyone(1, 3, sum(come), 2, seed=9 + rank)[0] for rank, (_, come) in enumerate(plans)]
    x = xs[axis.rank].clone().requires_grad_()
    received = comm.exchange(x, send, receive, axis)
    (gradient,) = torch.autograd.grad((received.permute(2, 0, 1) * weights[axis.rank]).sum(), x)
    pieces = [x.split(to) for x, (to, _) in zip(xs, plans, strict=True)]
    expected = torch.cat([pieces[other][axis.rank] for other in range(axis.size)])
    returned = [w.permute(1, 2, 0).split(come) for w, (_, come) in zip(weights, plans, strict=True)]
    expected_gradient = torch.cat([returned[other][axis.rank] for other in range(axis.size)])
    return len(received), error(received, expected), error(gradient, expected_gradient)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_exchange_and_its_gradient(run_distributed, ranks):
    """Rank 1 receives nothing and rank 2 sends nothing: both come by the backward exchange all the same."""
    results = run_distributed(exchanges, (ranks, 1))
    assert [count for count, _, _ in results] == [sum(plan(ranks, rank)[1]) for rank in range(ranks)]
    assert results[1][0] == 0 and all(there == back == 0 for _, there, back in results)


def test_one_rank_needs_no_messages():
    axis, x = Axis("ring", (0,), 0), torch.randn(2, 3, requires_grad=True)
    assert torch.equal(comm.all_gather(x, axis), x[None])
    assert torch.equal(comm.reduce_scatter(x[None].bfloat16(), axis), x.bfloat16().float())
    assert torch.equal(comm.all_to_all(x, [2], [2], axis), x)
    comm.agree([1, 2], "the batch", axis)
    (gradient,) = torch.autograd.grad((comm.gather(x, axis) * 2 + comm.exchange(x, [2], [2], axis)).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3))


# The plain collectives


def collects(mesh, dtype):
    """Whether what arrives is what was sent, to the bit; the tensors that are sent are transposed ones."""
    axis = mesh.context
    xs = [(4 * x).to(dtype).T for x in everyone(axis.size, 3, 5)]
    gathered = comm.all_gather(xs[axis.rank], axis)
    send, receive = plan(axis.size, axis.rank)
    rows = [(4 * everyone(1, 2, 7, seed=rank)[0]).to(dtype).T[: sum(plan(axis.size, rank)[0])] for rank in range(4)]
    received = comm.all_to_all(rows[axis.rank], send, receive, axis)
    parts = [row.split(plan(axis.size, rank)[0]) for rank, row in enumerate(rows[: axis.size])]
    passed = comm.Pass(xs[axis.rank], axis, axis.returning).wait()
    same = [
        torch.equal(gathered, torch.stack(xs)),
        torch.equal(received, torch.cat([part[axis.rank] for part in parts])),
        torch.equal(passed, xs[axis.rank - 1]),
        {gathered.dtype, received.dtype, passed.dtype} == {dtype},
    ]
    return all(same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives(run_distributed, dtype):
    assert run_distributed(collects, (4, 1), dtype) == [True] * 4


def reduces(mesh, dtype):
    axis = mesh.context
    xs = [x.to(dtype) for x in everyone(axis.size, 5, axis.size)]
    own = comm.reduce_scatter(xs[axis.rank].T, axis)  # a part for each rank: [ranks, 5], transposed
    wide = torch.promote_types(dtype, torch.float32)
    return own.dtype == wide, error(own.double(), sum(x.double() for x in xs)[:, axis.rank])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_reduce_scatter_sums_in_fp32_or_wider(run_distributed, dtype, tolerance):
    for is_wide, wrong in run_distributed(reduces, (4, 1), dtype):
        assert is_wide and wrong <= tolerance


def sends(mesh):
    """Rank 0 sends a transposed tensor to all others, one after the other."""
    axis, x = mesh.context, everyone(1, 3, 4)[0].T
    if axis.rank == 0:
        for other in range(1, axis.size):
            comm.send(x, other, axis)
        return True
    return torch.equal(comm.receive(torch.full((4, 3), torch.nan, dtype=x.dtype), 0, axis), x)


def test_send_and_receive(run_distributed):
    assert run_distributed(sends, (3, 1)) == [True] * 3


# agree


def agrees(mesh, values):
    try:
        comm.agree(values[mesh.context.rank], "the batch", mesh.context)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([(1, 2, 3)] * 4, None),
        ([(1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 2, 3)], [2]),
        ([(1, 2), (2, 1), (1, 2), (1, 2, 0)], [1, 3]),
        ([(), (1,), (1,), (1,)], [1, 2, 3]),
    ],
)
def test_agree_names_the_ranks_that_differ(run_distributed, values, ranks):
    for told in run_distributed(agrees, (4, 1), values):
        assert told is None if ranks is None else told.startswith(f"the batch on ranks {ranks} is not that of rank 0")


def test_a_message_that_does_not_fit_its_plan_is_refused():
    with pytest.raises(AssertionError, match="plan does not fit"):
        comm.all_to_all(torch.zeros(3), [2], [2], Axis("ring", (0,), 0))
