"""How the fused softplus kernels are cut and launched: tiles and warps per head dim and architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import Tile
from farspan.kernels.softplus.fused_backward import keys_backward_kernel, queries_backward_kernel
from farspan.kernels.softplus.fused_forward import SIZES, attend_kernel

# (bytes per element, architecture, padded head dim) -> tiles of attend, queries_backward and keys_backward, chosen by
# the compiler's report (no spills); not yet tuned on a device.
TILES = {
    (2, 80, 64): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 128, 8, 1)),
    (2, 80, 128): (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 1)),
    (2, 80, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (2, 90, 64): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 1)),
    (2, 90, 128): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(16, 64, 8, 2)),
    (2, 90, 256): (Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(16, 64, 8, 1)),
    (4, 80, 64): (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (4, 80, 128): (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (4, 80, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for `heads` heads of `dim` channels on `groups` key heads, on an architecture (80, 90).

    power: of the re-weighting, 0 for none. dead_zero: whether dead rows give 0.
    """

    heads: int
    groups: int
    dim: int
    itemsize: int
    arch: int
    power: float
    windowed: bool
    dead_zero: bool

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def tiles(self) -> tuple[Tile, Tile, Tile]:
        """Of attend, queries_backward, keys_backward."""
        arch = 90 if self.arch >= 90 and self.itemsize == 2 else 80
        return TILES[self.itemsize, arch, max(64, self.padded)]

    @property
    def exponent(self) -> int:
        """The power where it is an integer that is worth a kernel of its own, else -1."""
        return int(self.power) if self.power == int(self.power) and self.power < 256 else -1

    def constants(self, tile: Tile) -> dict[str, int | bool]:
        shape = {"HEADS": self.heads, "GROUPS": self.groups, "DIM": self.dim, "PADDED": self.padded}
        blocks = {"M": tile.M, "N": tile.N, "STAGES": tile.stages, "num_warps": tile.num_warps}
        return {**shape, **blocks, "EXPONENT": self.exponent, "WINDOWED": self.windowed}


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "q k v o do dq dk dv",
    "*fp32": "rows held",
    "*i64": "table",
    "i32": " ".join(SIZES),
    "i32:16": "q_stride k_stride v_stride do_stride",
    "fp32": "scale power",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched for 16 heads on 4 key heads: LSSA, the published power, and that in a window."""
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    entries = []
    for suffix, power, windowed in (("_lssa", 0.0, False), ("", 15.0, False), ("_window", 15.0, True)):
        launch = Launch(16, 4, head_dim, dtype.itemsize, int(arch.removeprefix("sm_")), power, windowed, False)
        kernels = attend_kernel, queries_backward_kernel, keys_backward_kernel
        for kernel, tile in zip(kernels, launch.tiles, strict=True):
            constants: dict[str, Any] = launch.constants(tile)
            warps = constants.pop("num_warps")
            if kernel is attend_kernel:
                constants["ZERO"] = launch.dead_zero
            arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
            name = kernel.__name__.removesuffix("_kernel") + suffix
            entries.append(Compilation(name, kernel, arguments, constants, warps, multiplies=True))
    return entries
