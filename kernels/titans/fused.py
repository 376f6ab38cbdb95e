"""The Titans memory in Triton kernels: what they cover, and how a call is put together from them.

The whole blocks of the documents go through `fused_linear` (one layer, no norm) or `fused_mlp` (two layers). What
stands inside a block where the call begins or ends is less than `refresh` tokens of each document, and goes as in the
chunked backend.
"""

from __future__ import annotations

import torch

from farspan.kernels.launch import architecture
from farspan.kernels.titans.chunked import run_blocks
from farspan.kernels.titans.fused_linear import titans_linear
from farspan.kernels.titans.fused_mlp import titans_mlp
from farspan.kernels.titans.fused_tiles import LONGEST, TWO_LAYERS_FROM, WIDEST, compilations
from farspan.kernels.titans.state import Gates, Memory, MemoryState

__all__ = ["compilations", "titans_fused", "uncovered"]


def uncovered(v: torch.Tensor, memory: Memory, refresh: int, decay_to: str) -> str | None:
    """What of a call the kernels do not cover, in a few words; None where they cover it."""
    depth, dim = len(memory.weights), v.shape[-1]
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{v.dtype}, only bfloat16, float16 and float32"
    if depth > 2:
        return f"a memory of {depth} layers, only 1 and 2"
    if dim > WIDEST[depth]:
        return f"head_dim={dim} for a memory of {depth} layer(s), only up to {WIDEST[depth]}"
    if refresh > LONGEST[depth]:
        return f"refresh={refresh} for a memory of {depth} layer(s), only up to {LONGEST[depth]}"
    if depth == 2 and v.is_cuda and architecture(v.device) < TWO_LAYERS_FROM:
        return f"a memory of two layers on sm_{architecture(v.device)}, only from sm_{TWO_LAYERS_FROM} on"
    if depth == 1 and memory.norm is not None:
        return "a norm on a memory of one layer"
    if depth == 2 and decay_to == "init":
        return "decay_to='init' for a memory of two layers"
    return None


def titans_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState | None,
    lengths: tuple[int, ...],
    offsets: tuple[int, ...],
    refresh: int,
    read: str,
    decay_to: str,
    activation: str,
    return_state: bool,
) -> tuple[torch.Tensor, MemoryState | None]:
    """Arguments as `kernels.titans.titans_memory`; saves the inputs and a state every few tiles.

    q, k and v are operands in v's dtype, accumulated in fp32; states and gates are fp32. ValueError for what is not
    covered.
    """
    missing = uncovered(v, memory, refresh, decay_to)
    if missing is not None:
        raise ValueError(f"titans: backend='fused' does not cover {missing}; use backend='auto'")
    rest = (lengths, offsets, refresh, read, decay_to, activation, return_state)
    return run_blocks(titans_linear, titans_mlp, q.to(v.dtype), k.to(v.dtype), v, gates, memory, state, *rest)
