"""What Triton backends share on the host: tiles, the architecture, inputs as kernels read them, parts of tables.

Nothing here imports triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """M rows (queries, tokens) and N keys (cores, summaries) at a time, warps, and stages of the pipeline of loads."""

    M: int
    N: int
    num_warps: int
    stages: int


@lru_cache(maxsize=8)
def architecture(device: torch.device) -> int:
    """80, 90, ... of a CUDA device; 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def packed(x: torch.Tensor) -> torch.Tensor:
    """x [1, T, heads, D], copied only where a token is not one run of memory."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def sum_first(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, in its order; no copy of a single part."""
    return x[0] if len(x) == 1 else x.sum(0)


def expand(counts: torch.Tensor, first: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """For owners with `counts` items numbered from `first` (0 when None): the owner and the number of every item."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    number = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    return owner, number if first is None else number + first[owner]
