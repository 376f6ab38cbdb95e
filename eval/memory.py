"""How much memory a piece of work needs, in bytes of tensors."""

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that `function()` held at once, over what was allocated before it.

    Counts what torch's allocators hand out and take back, buffers inside operators included: on CUDA where it is in
    use, else on the CPU. Repeatable to the byte, but `function` runs slower. On the CPU, memory that was allocated
    before and is freed inside is not taken off.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
