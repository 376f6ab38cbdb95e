"""The pool: results in order of the ranks, and failures of a process that are told instead of waited for."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from farspan.parallel.pool import Pool


def describe(word):
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return word, dist.get_rank(), int(os.environ["RANK"]), dist.get_world_size(), total.item(), torch.get_num_threads()


def test_results_come_in_order_of_the_ranks(run_distributed):
    assert run_distributed(describe, 3, "hello") == [("hello", rank, rank, 3, 3.0, 1) for rank in range(3)]


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ArithmeticError(f"rank {rank} divided by zero")
    return "fine"


def test_an_error_of_a_rank_is_raised_with_its_traceback():
    pool = Pool(3, timeout=20)
    assert pool.is_open and pool.run(fail_on, None) == ["fine"] * 3
    with pytest.raises(RuntimeError, match=r"fail_on failed on ranks \[2\]") as failure:
        pool.run(fail_on, 2)
    told = str(failure.value)
    assert "--- rank 2: Traceback" in told and "in fail_on" in told and "ArithmeticError: rank 2 divided" in told
    assert not pool.is_open and not any(process.is_alive() for process in pool.processes)


def exit_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    return "fine"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_that_died_is_told_at_once(rank):
    """Whichever it is: processes forked before it hold copies of its pipe; only the first one's shows its end."""
    pool = Pool(3, timeout=20)
    pool.run(exit_on, None)  # all have met: one that still looks for a dead one cannot answer
    begun = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match=rf"failed on ranks \[{rank}\]\n--- rank {rank}: died \(exit code 7\)"):
            pool.run(exit_on, rank)
    finally:
        pool.close()
    assert time.monotonic() - begun < 10


def wait_on(rank):
    if dist.get_rank() == rank:
        threading.Event().wait()


def test_a_process_that_does_not_answer_is_told_and_ended():
    pool = Pool(2, timeout=3)
    with pytest.raises(RuntimeError, match=r"--- rank 1: did not answer within 3 s"):
        pool.run(wait_on, 1)
    assert not pool.is_open


def test_a_pool_that_failed_is_replaced(run_distributed):
    with pytest.raises(RuntimeError, match="divided by zero"):
        run_distributed(fail_on, 2, 0)
    assert run_distributed(fail_on, 2, None) == ["fine", "fine"]
