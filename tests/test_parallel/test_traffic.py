"""Bytes that a rank sends: of every collective, forward and backward, and what is told apart."""

import pytest
import torch
import torch.distributed as dist

from farspan.parallel import ContextParallel, comm
from farspan.parallel.traffic import count_traffic

RANKS = 3
# Rows from each rank to each: [from][to].
TABLE = [[1, 0, 2], [2, 1, 1], [0, 3, 0]]
ROW = 5 * 4  # bytes of a row of five fp32 numbers


def counted(mesh, operation):
    with count_traffic() as traffic:
        operation(mesh.context, mesh.ring)
    return dict(traffic.sent), traffic.total, traffic.control.total()


def gathers(axis, _):
    comm.all_gather(torch.ones(7, 5), axis)


def gathers_bf16(axis, _):
    comm.all_gather(torch.ones(7, 5, dtype=torch.bfloat16), axis)


def scatters(axis, _):
    comm.reduce_scatter(torch.ones(axis.size, 7, 5), axis)


def scatters_bf16(axis, _):
    comm.reduce_scatter(torch.ones(axis.size, 7, 5, dtype=torch.bfloat16), axis)


def passes(axis, ring):
    comm.Pass(torch.ones(7, 5), ring).wait()


def sends(axis, _):
    """From rank 0 to rank 1, in two messages."""
    for _ in range(2):
        if axis.rank == 0:
            comm.send(torch.ones(7, 5), 1, axis)
        elif axis.rank == 1:
            comm.receive(torch.empty(7, 5), 0, axis)


def waits(axis, _):
    dist.barrier(axis.group)


EVERYONE = (RANKS - 1) * 7 * ROW
CASES = [
    (gathers, {"all-gather": EVERYONE}),
    (gathers_bf16, {"all-gather": EVERYONE // 2}),
    (scatters, {"reduce-scatter": EVERYONE}),
    (scatters_bf16, {"reduce-scatter": EVERYONE}),  # summed, and sent, in fp32
    (passes, {"send": 7 * ROW}),
    (waits, {}),
]


@pytest.mark.parametrize(("operation", "sent"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_each_collective_is_counted(run_distributed, operation, sent):
    results = run_distributed(counted, (RANKS, 1), operation)
    assert results == [(sent, sum(sent.values()), 0)] * RANKS


def test_a_message_is_counted_by_its_sender(run_distributed):
    totals = [total for _, total, _ in run_distributed(counted, (RANKS, 1), sends)]
    assert totals == [2 * 7 * ROW, 0, 0]


def exchanges(mesh):
    """All-to-all by TABLE, and its gradient."""
    axis = mesh.context
    send, receive = TABLE[axis.rank], [row[axis.rank] for row in TABLE]
    x = torch.ones(sum(send), 5, requires_grad=True)
    with count_traffic() as forward:
        y = comm.exchange(x, send, receive, axis)
    with count_traffic() as backward:
        y.sum().backward()
    return dict(forward.sent), dict(backward.sent)


def test_an_all_to_all_sends_what_leaves_the_rank(run_distributed):
    for rank, (forward, backward) in enumerate(run_distributed(exchanges, (RANKS, 1))):
        leaving = sum(TABLE[rank]) - TABLE[rank][rank]
        arriving = sum(row[rank] for row in TABLE) - TABLE[rank][rank]
        assert forward == {"all-to-all": leaving * ROW} and backward == {"all-to-all": arriving * ROW}


def exchanges_evenly(mesh):
    """torch's form without splits."""
    with count_traffic() as traffic:
        x = torch.ones(4 * RANKS, 5)
        dist.all_to_all_single(torch.empty_like(x), x, group=mesh.context.group)
    return traffic.total


def test_an_all_to_all_in_even_parts(run_distributed):
    assert run_distributed(exchanges_evenly, (RANKS, 1)) == [(RANKS - 1) * 4 * ROW] * RANKS


def agrees(mesh):
    with count_traffic() as traffic:
        comm.agree((1, 2, 3), "the batch", mesh.context)
        ContextParallel(mesh).shard((5, 7, 11))
        comm.all_gather(torch.tensor([1, 2]), mesh.context)  # data, though integers
    return dict(traffic.sent), dict(traffic.control)


def test_checks_of_the_batch_are_told_apart(run_distributed):
    for sent, control in run_distributed(agrees, (RANKS, 1)):
        assert sent == {"all-gather": (RANKS - 1) * 2 * 8}
        assert control == {"all-gather": 2 * (RANKS - 1) * 2 * 8}  # two calls, of a length and a digest each


def counts_blocks(mesh):
    totals = []
    for _ in range(2):
        comm.all_gather(torch.ones(100), mesh.context)
        with count_traffic() as traffic:
            comm.all_gather(torch.ones(3), mesh.context)
        totals.append(traffic.total)
    return totals


def test_only_the_block_counts(run_distributed):
    assert run_distributed(counts_blocks, (RANKS, 1)) == [[(RANKS - 1) * 3 * 4] * 2] * RANKS


def reduces(mesh):
    try:
        with count_traffic():
            dist.all_reduce(torch.ones(3), group=mesh.context.group)
    except RuntimeError as error:
        return str(error)


def test_a_collective_without_a_rule_is_an_error(run_distributed):
    for message in run_distributed(reduces, (RANKS, 1)):
        assert "no rule for the bytes of c10d.allreduce_" in message


def alone(mesh):
    with count_traffic() as traffic:
        comm.gather(torch.ones(3, requires_grad=True), mesh.context).sum().backward()
    return traffic.total


def test_one_rank_sends_nothing(run_distributed):
    assert run_distributed(alone, (1, 1)) == [0]
