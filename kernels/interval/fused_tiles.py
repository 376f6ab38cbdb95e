"""How the fused interval kernels are cut and launched: tiles and warps per head dim and architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.interval.fused_backward import keys_backward_kernel, queries_backward_kernel
from farspan.kernels.interval.fused_forward import SIZES, attend_kernel
from farspan.kernels.launch import Tile

# (bytes per element, architecture, padded head dim) -> tiles of attend, queries_backward and keys_backward, chosen by
# the compiler's report (no spills); not yet tuned on a device.
TILES = {
    (2, 80, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(32, 64, 4, 1)),
    (2, 80, 128): (Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    (2, 80, 256): (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (2, 90, 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)),
    (2, 90, 128): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1)),
    (2, 90, 256): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    (4, 80, 64): (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (4, 80, 128): (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    (4, 80, 256): (Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for heads of `dim` channels, on an architecture (80, 90)."""

    dim: int
    itemsize: int
    arch: int

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def tiles(self) -> tuple[Tile, Tile, Tile]:
        """Of attend, queries_backward, keys_backward."""
        arch = 90 if self.arch >= 90 and self.itemsize == 2 else 80
        return TILES[self.itemsize, arch, max(64, self.padded)]

    def constants(self, tile: Tile) -> dict[str, int]:
        blocks = {"M": tile.M, "N": tile.N, "STAGES": tile.stages, "num_warps": tile.num_warps}
        return {"DIM": self.dim, "PADDED": self.padded, **blocks}


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "q k v o do dq dk dv",
    "*fp32": "lse delta",
    "*i64": "queries keys first last until low high places key_places table",
    "i32": " ".join(SIZES),
    "fp32": "scale",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched, with and without keys that leave."""
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    launch = Launch(head_dim, dtype.itemsize, int(arch.removeprefix("sm_")))
    attend, queries, keys = launch.tiles
    entries = []
    for kernel, tile, leaves in (
        (attend_kernel, attend, False),
        (attend_kernel, attend, True),
        (queries_backward_kernel, queries, False),
        (queries_backward_kernel, queries, True),
        (keys_backward_kernel, keys, None),
    ):
        constants = launch.constants(tile)
        warps = constants.pop("num_warps")
        if leaves is not None:
            constants["LEAVES"] = leaves
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        name = kernel.__name__.removesuffix("_kernel") + ("_leaving" if leaves else "")
        entries.append(Compilation(name, kernel, arguments, constants, warps, multiplies=True))
    return entries
