"""How the fused RAT kernels are cut and launched: tiles and warps per head dim and architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import Tile
from farspan.kernels.rat.fused_backward import (
    gate_backward_kernel,
    keys_backward_kernel,
    queries_backward_kernel,
    states_backward_kernel,
)
from farspan.kernels.rat.fused_forward import SIZES, attend_kernel, carry_kernel, piece_ends_kernel, states_kernel
from farspan.kernels.rat.fused_step import step_constants, step_kernel

# (architecture, padded head dim) -> tiles of attend, keys_backward and queries_backward for two-byte elements, chosen
# by the compiler's report (no spills); not yet tuned on a device. Four-byte elements take half of M and N.
TILES = {
    (80, 64): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    (80, 128): (Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (80, 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    (90, 64): (Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3)),
    (90, 128): (Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    (90, 256): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 1), Tile(64, 32, 8, 2)),
}


@dataclass(frozen=True)
class Lockstep:
    """Elements of one state that a program walks with, its warps, and the stages of its pipeline of loads."""

    elements: int
    num_warps: int
    stages: int


FORWARD, BACKWARD = Lockstep(2048, 4, 3), Lockstep(1024, 4, 3)

# Channels per program where states are carried over pieces; rows per program where the output gate goes backward.
CARRIED, GATE_ROWS = 256, 32


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for `heads` heads of `dim` channels in `groups` groups, on an architecture (80, 90)."""

    heads: int
    groups: int
    dim: int
    itemsize: int
    arch: int

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def share(self) -> int:
        """Heads per group."""
        return self.heads // self.groups

    @property
    def _shape(self) -> dict[str, int]:
        return {"HEADS": self.heads, "GROUPS": self.groups, "DIM": self.dim, "PADDED": self.padded}

    def lockstep(self, walk: Lockstep) -> dict[str, int]:
        """Constants of a kernel that walks over slots; N rows and SHARE heads of a group at once."""
        share = min(triton.next_power_of_2(self.share), max(1, walk.elements // self.padded))
        n = max(1, walk.elements // (self.padded * share))
        return {**self._shape, "N": n, "SHARE": share, "STAGES": walk.stages, "num_warps": walk.num_warps}

    def parts(self, walk: Lockstep) -> int:
        """Programs that together own all heads of some rows: for each group, one per SHARE heads."""
        return self.groups * triton.cdiv(self.share, self.lockstep(walk)["SHARE"])

    @property
    def tiles(self) -> tuple[Tile, Tile, Tile]:
        """Of attend, keys_backward, queries_backward."""
        tiles = TILES[90 if self.arch >= 90 else 80, max(64, self.padded)]
        if self.itemsize <= 2:
            return tiles
        return tuple(Tile(max(16, t.M // 2), max(16, t.N // 2), t.num_warps, t.stages) for t in tiles)

    def blocks(self, tile: Tile) -> dict[str, int]:
        """Constants of a kernel that multiplies tiles."""
        return {**self._shape, "M": tile.M, "N": tile.N, "STAGES": tile.stages, "num_warps": tile.num_warps}

    @property
    def gate(self) -> dict[str, int]:
        return {"HEADS": self.heads, "DIM": self.dim, "PADDED": self.padded, "M": GATE_ROWS, "num_warps": 4}


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "q k v gate bias z turned tilde keys values y dy do dz dq dk dv dgate scratch",
    "*fp32": "cos sin initial_key initial_value incoming_key incoming_value score lse delta dkeys dvalues dturned "
    "final_key final_value dfinal_key dfinal_value out_key out_value scalars dbias "
    "product end_key end_value ends start carried running_key running_value out",
    "*i64": "table positions",
    "i32": " ".join(SIZES),
    "i32:16": "width q_stride k_stride v_stride gate_stride z_stride dy_stride turned_stride",
    "fp32": "scale",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched for the published shape: 16 heads in 2 groups, with rotation."""
    launch = Launch(16, 2, head_dim, dtype.itemsize, int(arch.removeprefix("sm_")))
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}

    def entry(kernel, constants: dict[str, Any], suffix: str = "", multiplies: bool = False) -> Compilation:
        constants = dict(constants)
        warps = constants.pop("num_warps")
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        name = kernel.__name__.removesuffix("_kernel") + suffix
        return Compilation(name, kernel, arguments, constants, warps, multiplies)

    forward, backward = launch.lockstep(FORWARD), launch.lockstep(BACKWARD)
    whole, pieces = {"ROTATE": True, "PIECES": False}, {"ROTATE": True, "PIECES": True}
    attend, keys, queries = (launch.blocks(tile) for tile in launch.tiles)
    return [
        entry(piece_ends_kernel, forward),
        entry(carry_kernel, {"WIDE": CARRIED, "REVERSE": False, "num_warps": 4}),
        entry(states_kernel, forward | whole),
        entry(attend_kernel, attend, multiplies=True),
        entry(gate_backward_kernel, launch.gate),
        entry(keys_backward_kernel, keys, multiplies=True),
        entry(queries_backward_kernel, queries, multiplies=True),
        entry(states_backward_kernel, backward | whole | {"GRADIENTS": True}),
        entry(states_backward_kernel, backward | pieces | {"GRADIENTS": False}, suffix="_first_pass"),
        entry(states_backward_kernel, backward | pieces | {"GRADIENTS": True}, suffix="_second_pass"),
        entry(step_kernel, step_constants(launch.heads, launch.groups, head_dim) | {"ROTATE": True}),
    ]
