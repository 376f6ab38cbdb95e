"""Times of things that take turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Work = Callable[[], Any]

# More than the L2 cache of any GPU so far: writing it before a measurement leaves nothing of the inputs in the cache.
FLUSHED_BYTES = 256 * 1024 * 1024


def stopwatch(device: torch.device) -> Callable[[Work], float]:
    """A function that runs work once and returns its seconds; on CUDA by events, behind a cold L2 cache."""
    if device.type != "cuda":
        return _wall_seconds
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def seconds(work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()  # also keeps the device busy while the first kernels of the work are launched
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def _wall_seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    sides: dict[str, Work], rounds: Iterable[int], seconds: Callable[[Work], float]
) -> dict[str, list[float]]:
    """Seconds of every side in every round; each odd round runs the sides in the opposite order."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in rounds:
        for name in list(sides)[:: 1 if round_ % 2 == 0 else -1]:
            times[name].append(seconds(sides[name]))
    return times


def median_ratio(baseline: list[float], times: list[float]) -> float:
    """How many times as fast as the baseline: the median over the rounds of baseline / times."""
    return statistics.median(a / b for a, b in zip(baseline, times, strict=True))
