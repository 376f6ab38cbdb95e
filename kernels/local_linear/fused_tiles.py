"""How the fused kernels of local linear attention are cut and launched: tiles per head dim, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import Tile
from farspan.kernels.local_linear.fused_backward import (
    keys_backward_kernel,
    queries_backward_kernel,
    solve_backward_kernel,
)
from farspan.kernels.local_linear.fused_forward import output_kernel, solve_kernel
from farspan.kernels.local_linear.fused_solve import LINES, SIZES, VECTORS

# (architecture, padded head dim) -> tiles of solve, solve_backward, output, queries_backward and keys_backward, for
# two-byte elements, chosen by the compiler's report; not yet tuned on a device. Four-byte elements take half of M
# and N.
TILES = {
    (80, 64): (Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1)),
    (80, 128): (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 4, 2), Tile(32, 16, 2, 1), Tile(32, 32, 4, 1)),
    (90, 64): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
    (90, 128): (Tile(64, 32, 4, 2), Tile(64, 16, 4, 1), Tile(64, 64, 4, 2), Tile(64, 16, 4, 2), Tile(32, 64, 4, 2)),
}
# What other settings than the defaults need instead, by place in the tuple, so that nothing spills.
OTHER_SETTINGS = {
    (80, 128): {4: Tile(32, 32, 8, 1)},
    (90, 64): {3: Tile(64, 32, 4, 2)},
    (90, 128): {0: Tile(128, 16, 8, 1), 4: Tile(16, 64, 4, 2)},
}
LARGEST = 128


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for `heads` query heads and `key_heads` of keys, on an architecture (80, 90).

    windowed, diagonal, absolute, rbf: what the settings ask for, so that a kernel has no code for the rest.
    """

    heads: int
    key_heads: int
    dim: int
    value_dim: int
    itemsize: int
    arch: int
    windowed: bool = False
    diagonal: bool = False
    absolute: bool = False
    rbf: bool = False

    @property
    def split(self) -> bool:
        """Whether an fp32 operand is the sum of two."""
        return self.itemsize == 2

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Of solve, solve_backward, output, queries_backward, keys_backward."""
        key = (90 if self.arch >= 90 else 80, self._widest)
        other = OTHER_SETTINGS.get(key, {}) if self.windowed or self.diagonal or self.absolute or self.rbf else {}
        tiles = tuple(other.get(place, tile) for place, tile in enumerate(TILES[key]))
        if self.split:
            return tiles
        return tuple(Tile(max(16, t.M // 2), max(16, t.N // 2), t.num_warps, t.stages) for t in tiles)

    @property
    def solve(self) -> dict[str, Any]:
        """Of solve_kernel; the backward solver needs the values as well."""
        constants = {**self._blocks(self.tiles[0]), "DIAGONAL": self.diagonal, "ABSOLUTE": self.absolute}
        return {name: value for name, value in constants.items() if not name.startswith("VALUE")}

    @property
    def solve_backward(self) -> dict[str, Any]:
        return {**self._blocks(self.tiles[1]), "DIAGONAL": self.diagonal, "ABSOLUTE": self.absolute}

    @property
    def output(self) -> dict[str, Any]:
        return self._blocks(self.tiles[2])

    @property
    def queries_backward(self) -> dict[str, Any]:
        return self._blocks(self.tiles[3])

    @property
    def keys_backward(self) -> tuple[dict[str, Any], ...]:
        """One launch, or one for dk and one for dv."""
        blocks = self._blocks(self.tiles[4])
        parts = ((True, True),) if self._widest <= 64 else ((True, False), (False, True))
        return tuple({**blocks, "KEYS": keys, "VALUES": values} for keys, values in parts)

    @property
    def workspace(self) -> int:
        """fp32 numbers that a solving program needs for each of its queries."""
        return VECTORS.value * _padded(self.dim) + LINES.value

    @property
    def _widest(self) -> int:
        return max(64, _padded(self.dim), _padded(self.value_dim))

    def _blocks(self, tile: Tile) -> dict[str, Any]:
        return {
            "HEADS": self.heads,
            "KEY_HEADS": self.key_heads,
            "DIM": self.dim,
            "PADDED": _padded(self.dim),
            "VALUE_DIM": self.value_dim,
            "VALUE_PADDED": _padded(self.value_dim),
            "M": tile.M,
            "N": tile.N,
            "STAGES": tile.stages,
            "WINDOWED": self.windowed,
            "RBF": self.rbf,
            "SPLIT": self.split,
            "num_warps": tile.num_warps,
        }


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "q k v o do dq dk dv pairs",
    "*fp32": "ridge scale half x lse found scalars space",
    "*i64": "table",
    "i32": " ".join(SIZES),
    "i32:16": "q_stride k_stride v_stride do_stride ridge_stride",
    "fp32": "tolerance",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched for 32 query and 8 key heads: by the defaults, and with all other settings on."""
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    shape = (32, 8, head_dim, head_dim, dtype.itemsize, int(arch.removeprefix("sm_")))

    def entry(kernel, constants: dict[str, Any], suffix: str) -> Compilation:
        constants = dict(constants)
        warps = constants.pop("num_warps")
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        name = kernel.__name__.removesuffix("_kernel") + suffix
        return Compilation(name, kernel, arguments, constants, warps, multiplies=True)

    found = []
    for suffix, launch in (("", Launch(*shape)), ("_all", Launch(*shape, True, True, True, True))):
        found += [
            entry(solve_kernel, launch.solve, suffix),
            entry(output_kernel, launch.output, suffix),
            entry(solve_backward_kernel, launch.solve_backward, suffix),
            entry(queries_backward_kernel, launch.queries_backward, suffix),
            *(
                entry(keys_backward_kernel, constants, f"_{number}{suffix}")
                for number, constants in enumerate(launch.keys_backward)
            ),
        ]
    return found
