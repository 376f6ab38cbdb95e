"""Statistics of softmax attention in Triton kernels, forward only; the algorithm is in fused_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from farspan.kernels.attention_statistics.effective import first_tokens
from farspan.kernels.attention_statistics.fused_kernels import SIZES, columns_kernel, rows_kernel
from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import Tile, packed

__all__ = ["compilations", "statistics_fused"]

# (bytes per element, padded head dim) -> tiles of rows and of columns; chosen by the compiler's report (no spills), not
# yet tuned on a device.
TILES = {
    (2, 64): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (2, 128): (Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
    (2, 256): (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    (4, 64): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 128): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 256): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


@dataclass(frozen=True)
class _Launch:
    """Constants for `heads` heads of `dim` channels on `groups` key heads."""

    heads: int
    groups: int
    dim: int
    itemsize: int
    capped: bool

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        return TILES[self.itemsize, max(64, self.padded)]

    def constants(self, tile: Tile) -> dict[str, int | bool]:
        shape = {"HEADS": self.heads, "GROUPS": self.groups, "DIM": self.dim, "PADDED": self.padded}
        blocks = {"M": tile.M, "N": tile.N, "STAGES": tile.stages, "num_warps": tile.num_warps}
        return {**shape, **blocks, "CAPPED": self.capped}


def statistics_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    pieces: tuple[int, ...],
    window: int | None,
    scale: torch.Tensor | float,
    softcap: float | None,
    waad_window: int,
    horizon: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments as `kernels.attention_statistics.attention_statistics`; CUDA tensors (any under TRITON_INTERPRET=1).

    Returns distance, WAAD, the sums of FAI and lse, all fp32 [T, H]; lse is inf outside the rows. fp32, bf16 or fp16,
    head dims up to 256; else ValueError.
    """
    if q.shape[-1] > 256 or q.dtype == torch.float64:
        raise ValueError(
            f"attention_statistics: backend='fused' takes head dims up to 256 in fp32, bf16 or fp16, not {q.shape[-1]} "
            f"in {q.dtype}; use backend='chunked'"
        )
    tokens, heads = q.shape[1:3]
    launch = _Launch(heads, k.shape[2], q.shape[3], q.element_size(), softcap is not None)
    q, k = packed(q), packed(k.to(q.dtype))
    first = first_tokens(pieces, q.device)
    if window is not None:
        first = torch.maximum(first, torch.arange(tokens, device=q.device) - window + 1)
    first, response = first.to(torch.int32), rows.to(torch.int8)
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((heads,), scale, device=q.device)
    shared = (q, k, first, response, scale.float().contiguous())
    lse, distance, waad, sums = (q.new_empty(heads, tokens, dtype=torch.float32) for _ in range(4))
    cap, high = softcap or 0.0, min(horizon[1], max(pieces) - 1)
    row_tile, column_tile = launch.tiles
    rows_kernel[(-(-tokens // row_tile.M) * heads,)](
        *shared, lse, distance, waad, tokens, q.stride(1), k.stride(1), waad_window, cap, **launch.constants(row_tile)
    )
    columns_kernel[(-(-tokens // column_tile.N) * heads,)](
        *shared, lse, sums, tokens, q.stride(1), k.stride(1), horizon[0], high, cap, **launch.constants(column_tile)
    )
    return distance.t(), waad.t(), sums.t(), lse.t()


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of q and k.
ARGUMENTS = {
    "data": "q k",
    "*fp32": "scales lse distance waad sums",
    "*i32": "first",
    "*i8": "response",
    "i32": " ".join(SIZES),
    "i32:16": "q_stride k_stride",
    "fp32": "softcap",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Both kernels as they are launched for 16 heads on 4 key heads, and the same with a soft cap."""
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    entries = []
    for suffix, capped in (("", False), ("_capped", True)):
        launch = _Launch(16, 4, head_dim, dtype.itemsize, capped)
        for kernel, tile in zip((rows_kernel, columns_kernel), launch.tiles, strict=True):
            constants = launch.constants(tile)
            warps = constants.pop("num_warps")
            arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
            name = kernel.__name__.removesuffix("_kernel") + suffix
            entries.append(Compilation(name, kernel, arguments, constants, warps, multiplies=True))
    return entries
