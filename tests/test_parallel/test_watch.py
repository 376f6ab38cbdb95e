"""Ranks that die or hang: the others stop, and say which rank it was and in what.

The jobs are real processes of their own. Each of these tests takes the seconds in which `watch` listens for signs of
life, most of them without work.
"""

import os
import re
import time

import pytest
import torch
import torch.distributed as dist

from farspan.parallel import Mesh, comm, watch
from farspan.parallel.pool import Pool

TIMEOUT = 2.0  # of the mesh: how long a rank may keep the others waiting


def failures(pool: Pool, function, *arguments) -> dict[int, str]:
    """What the ranks of a call that fails tell, each its own."""
    with pytest.raises(RuntimeError, match="failed on ranks") as failure:
        pool.run(function, *arguments)
    pool.close()
    parts = re.split(r"^--- rank (\d+): ", str(failure.value), flags=re.MULTILINE)[1:]
    return {int(rank): told for rank, told in zip(parts[::2], parts[1::2], strict=True)}


def train(lost, how):
    """Two steps of collectives, in the second of which rank `lost` does not come by the all-gather."""
    mesh = Mesh.create(1, 3, 1, timeout=TIMEOUT)
    x = torch.ones(3)
    comm.all_gather(x, mesh.ring)
    comm.reduce_scatter(x[:, None], mesh.ring)
    if dist.get_rank() == lost and how == "dies":
        os._exit(3)
    if dist.get_rank() == lost:
        time.sleep(TIMEOUT + 1)
        return
    comm.all_gather(x, mesh.ring)


@pytest.mark.parametrize("lost", [1, 0])
def test_a_rank_that_died_is_named(lost):
    """Rank 0 keeps the job's store in a pool, and takes it along."""
    told = failures(Pool(3, timeout=20), train, lost, "dies")
    assert list(told) == [0, 1, 2] and "died (exit code 3)" in told.pop(lost)
    for rank, error in told.items():
        message = error.splitlines()[-1] if "RankLost" in error.splitlines()[-1] else error
        assert f"RankLost: rank {rank} failed in all-gather over ring [0, 1, 2]" in message
        assert re.findall(r"rank (\d) is dead", message) == [str(lost)]
        assert "hangs" not in message


def test_a_rank_that_hangs_is_named_with_what_it_did_last():
    begun = time.monotonic()
    told = failures(Pool(3, timeout=20), train, 2, "hangs")
    assert time.monotonic() - begun < 15
    assert list(told) == [0, 1]
    for rank, error in told.items():
        assert f"RankLost: rank {rank} failed in all-gather over ring [0, 1, 2]: rank 2 hangs" in error
        assert "last seen in: reduce-scatter over ring [0, 1, 2]" in error and "is dead" not in error


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every hundredth of a second: one process plays all ranks."""
    monkeypatch.setattr(watch, "_INTERVAL", 0.01)
    monkeypatch.setattr(watch, "_SILENCE", 0.6)


def test_signs_of_life_are_read(quick):
    store = dist.HashStore()
    first, second, third = (watch.Watch(store, rank, 3) for rank in range(3))
    for each in (first, second, third):
        each.begin("the first operation")
    assert first.missing() == ""
    first.begin("the second operation")
    second.begin("the second operation")
    assert first.missing() == "rank 2 hangs (last seen in: the first operation)"
    first.stop(), second.stop(), third.stop()


def test_a_rank_that_never_wrote_is_dead(quick):
    store = dist.HashStore()
    first = watch.Watch(store, 0, 2)
    assert first.missing().startswith("rank 1 is dead")
    first.stop()


def test_an_error_with_nobody_missing_passes():
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), watch.during("the sum"):
        raise RuntimeError("shapes do not fit")
