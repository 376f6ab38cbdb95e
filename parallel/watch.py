"""Who is missing when a collective fails: every rank's last sign of life, in the job's store.

gloo and NCCL report that a connection broke or that a wait took too long, not who is to blame. So each process has a
thread that writes to the store, once a second, how many operations the process has begun, and which. A rank that died
has stopped to write; one that hangs still writes, but its count stands behind the others'.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

_INTERVAL = 1.0
# A process that is alive writes every second, also on a machine that is busy; after this it counts as dead.
_SILENCE = 5.0
_VERDICT = "farspan/lost"


class RankLost(RuntimeError):
    """A rank died, or kept the others waiting for too long."""


class Watch:
    """The signs of life of this process; `start` once, after `init_process_group`."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self.begun, self.doing, self._heard = 0, "starting", ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write, name="signs of life", daemon=True)
        self._thread.start()

    def begin(self, doing: str) -> None:
        """The process begins an operation that the others take part in."""
        self.begun, self.doing = self.begun + 1, doing

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=2 * _INTERVAL)

    def missing(self) -> str:
        """Which ranks are dead, or else which one is furthest behind this one; empty if none is.

        The first rank that finds out tells the others, which might take it for dead itself once it has left.
        """
        before, deadline = self._read_all(), time.monotonic() + _SILENCE
        while time.monotonic() < deadline and not self._hear():
            time.sleep(_INTERVAL / 4)
        found = self._heard or self._find(before, self._read_all())
        told = bool(found) and not self._hear()
        if told:
            self._tell(found)
        if told or (found and self._rank == 0):  # without a launcher, rank 0 keeps the store
            time.sleep(2.5 * _INTERVAL)  # the store may go with this process: until all threads have heard it
        return self._heard or found

    def _find(self, before: dict[int, Any], now: dict[int, Any]) -> str:
        if self._read(self._rank) is None:  # the store is gone; without a launcher, rank 0 keeps it
            return f"rank 0 is dead or stopped, and the job's store with it{_said(before.get(0))}"
        dead = [rank for rank, signs in now.items() if signs is None or signs == before[rank]]
        if dead:
            return "; ".join(f"rank {rank} is dead or stopped{_said(now[rank] or before[rank])}" for rank in dead)
        least = min((signs["begun"] for signs in now.values()), default=self.begun)
        behind = [rank for rank, signs in now.items() if signs["begun"] == least < self.begun]
        return "; ".join(f"rank {rank} hangs{_said(now[rank])}" for rank in behind)

    def _hear(self) -> str:
        """What a rank has found out, remembered: it holds when the store is gone, too."""
        with suppress(Exception):
            if not self._heard and self._store.check([_VERDICT]):
                self._heard = self._store.get(_VERDICT).decode()
        return self._heard

    def _tell(self, found: str) -> None:
        with suppress(Exception):
            self._store.set(_VERDICT, found)

    def _write(self) -> None:
        beat = 0
        while not self._stopped.is_set():
            beat += 1
            try:
                signs = {"beat": beat, "begun": self.begun, "doing": self.doing}
                self._store.set(f"farspan/alive/{self._rank}", json.dumps(signs))
            except Exception:  # the store is gone, and with it the job
                return
            self._hear()
            self._stopped.wait(_INTERVAL)

    def _read_all(self) -> dict[int, dict[str, Any] | None]:
        return {rank: self._read(rank) for rank in range(self._world) if rank != self._rank}

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            key = f"farspan/alive/{rank}"
            return json.loads(self._store.get(key)) if self._store.check([key]) else None
        except Exception:  # the store went with the rank that kept it
            return None


def _said(signs: dict[str, Any] | None) -> str:
    return f" (last seen in: {signs['doing']})" if signs else ""


_watch: Watch | None = None


def start() -> None:
    """Starts this process's signs of life; a second call does nothing."""
    global _watch
    if _watch is None:
        store = dist.distributed_c10d._get_default_store()  # torch has no public way to the job's store
        _watch = Watch(store.clone(), dist.get_rank(), dist.get_world_size())


def stop() -> None:
    """Ends the signs of life, before the process group is destroyed."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def begin(doing: str) -> None:
    """Says what this process begins to do with the others; nothing without `start`."""
    if _watch is not None:
        _watch.begin(doing)


@contextmanager
def during(doing: str) -> Iterator[None]:
    """Around what this process does with the others: an error that a missing rank has caused becomes RankLost, which
    names both. Other errors pass.
    """
    begin(doing)
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        missing = "" if _watch is None else _watch.missing()
        if not missing:
            raise
        said = " ".join(str(error).split())[:200]
        raise RankLost(f"rank {dist.get_rank()} failed in {doing}: {missing} ({said})") from error
