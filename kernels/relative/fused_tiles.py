"""How the fused kernels are cut and launched: tiles and warps per head dim and architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import Tile
from farspan.kernels.relative.fused_backward import (
    distances_backward_kernel,
    keys_backward_kernel,
    queries_backward_kernel,
)
from farspan.kernels.relative.fused_forward import SIZES, forward_kernel

# (bytes per element, architecture, padded head dim) -> tiles of forward, queries, keys (and distances) of each form,
# chosen by the compiler's report (no spills); not yet tuned on a device. Of a table M is N or 2N.
SINUSOID = {
    (2, 80, 64): (Tile(128, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    (2, 80, 128): (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (2, 90, 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 1), Tile(64, 64, 8, 1)),
    (2, 90, 128): (Tile(128, 64, 8, 2), Tile(128, 16, 8, 1), Tile(32, 64, 8, 1)),
    (4, 80, 64): (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (4, 80, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}
TABLE = {
    (2, 80, 64): (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    (2, 80, 128): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    (2, 90, 64): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    (2, 90, 128): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    (4, 80, 64): (Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),
    (4, 80, 128): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for `heads` heads of `dim` channels on `groups` key heads, with `rank` channels of
    positions, on an architecture (80, 90).
    """

    heads: int
    groups: int
    dim: int
    rank: int
    itemsize: int
    arch: int
    sinusoid: bool
    windowed: bool

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Of the forward pass, of queries, keys and (of a table) distances in the backward one."""
        arch = 90 if self.arch >= 90 and self.itemsize == 2 else 80
        return (SINUSOID if self.sinusoid else TABLE)[self.itemsize, arch, max(64, _pad(self.dim), _pad(self.rank))]

    def constants(self, tile: Tile) -> dict[str, Any]:
        shape = {"HEADS": self.heads, "GROUPS": self.groups, "DIM": self.dim, "PADDED": _pad(self.dim)}
        blocks = {"M": tile.M, "N": tile.N, "STAGES": tile.stages, "num_warps": tile.num_warps}
        kind = {"SINUSOID": self.sinusoid, "WINDOWED": self.windowed}
        return {**shape, "RANK": self.rank, "WIDE": _pad(self.rank), **blocks, **kind}


def _pad(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "a p k v positions o do da dp dk dv",
    "*fp32": "beta lse delta dr dbeta",
    "*i64": "table",
    "i32": " ".join((*SIZES, "splits", "rows")),
    "i32:16": "a_stride p_stride k_stride v_stride do_stride",
    "fp32": "factor scale",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched for 16 heads on 4 key heads: both forms, and sinusoids in a window."""
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    kernels = forward_kernel, queries_backward_kernel, keys_backward_kernel, distances_backward_kernel
    entries = []
    for suffix, sinusoid, windowed in (("_sinusoid", True, False), ("_window", True, True), ("_table", False, False)):
        launch = Launch(16, 4, head_dim, head_dim, dtype.itemsize, int(arch.removeprefix("sm_")), sinusoid, windowed)
        for kernel, tile in zip(kernels, launch.tiles, strict=False):
            parts = {"": {}}
            if kernel is queries_backward_kernel:
                parts = {"": {"CONTENT": True}} | ({} if sinusoid else {"_positions": {"CONTENT": False}})
            for part, more in parts.items():
                constants: dict[str, Any] = {**launch.constants(tile), **more}
                warps = constants.pop("num_warps")
                arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
                name = kernel.__name__.removesuffix("_kernel") + part + suffix
                entries.append(Compilation(name, kernel, arguments, constants, warps, multiplies=True))
    return entries
