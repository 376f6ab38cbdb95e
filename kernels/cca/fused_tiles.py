"""How the fused kernels of core-context-aware attention are cut and launched: tiles per head dim, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from farspan.kernels.cca.fused_backward import columns_backward_kernel, queries_backward_kernel
from farspan.kernels.cca.fused_forward import SIZES, attend_kernel
from farspan.kernels.cca.fused_pool import pool_kernel, pool_queries_backward_kernel, pool_rows_backward_kernel
from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import Tile

# (architecture, padded head dim) -> tiles of attend, queries_backward and columns_backward for two-byte elements,
# chosen by the compiler's report (no spills); not yet tuned on a device. Four-byte elements take half of M and N.
TILES = {
    (80, 64): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (80, 128): (Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    (80, 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    (90, 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 2)),
    (90, 128): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    (90, 256): (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
}

# Elements of a tile of groups, tokens and channels that a pooling program holds; four warps.
ELEMENTS = 2048


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for `heads` query heads, and heads of keys and cores, on an architecture (80, 90)."""

    heads: int
    key_heads: int
    core_heads: int
    dim: int
    itemsize: int
    arch: int

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def tiles(self) -> tuple[Tile, Tile, Tile]:
        """Of attend, queries_backward, columns_backward."""
        tiles = TILES[90 if self.arch >= 90 else 80, max(64, self.padded)]
        if self.itemsize <= 2:
            return tiles
        return tuple(Tile(max(16, t.M // 2), max(16, t.N // 2), t.num_warps, t.stages) for t in tiles)

    def queries(self, tile: Tile) -> dict[str, int]:
        """Constants of a kernel that owns queries."""
        return {"HEADS": self.heads, "KEY_HEADS": self.key_heads, "CORE_HEADS": self.core_heads, **self._blocks(tile)}

    def columns(self, tile: Tile, cores: bool) -> dict[str, int]:
        """Constants of the kernel that owns keys, or cores."""
        heads = self.core_heads if cores else self.key_heads
        return {"HEADS": self.heads, "KEY_HEADS": heads, **self._blocks(tile), "CORES": cores}

    def _blocks(self, tile: Tile) -> dict[str, int]:
        shape = {"DIM": self.dim, "PADDED": self.padded}
        return {**shape, "M": tile.M, "N": tile.N, "STAGES": tile.stages, "num_warps": tile.num_warps}

    def pool(self, group: int, elements: int, pooled: bool) -> dict[str, int]:
        """Constants of a pooling kernel: R tokens of N groups at a time."""
        r = min(triton.next_power_of_2(group), max(1, elements // self.padded))
        n = max(1, elements // (r * self.padded))
        heads = {"CORE_HEADS": self.core_heads, "KEY_HEADS": self.key_heads}
        return {**heads, "DIM": self.dim, "PADDED": self.padded, "N": n, "R": r, "POOLED": pooled, "num_warps": 4}


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "q k v x core_k core_v dcore_k dcore_v o do dq dk dv dx",
    "*fp32": "lse delta",
    "*i64": "table segments starts",
    "i32": " ".join(SIZES),
    "i32:16": "q_stride k_stride v_stride x_stride core_k_stride core_v_stride dcore_k_stride dcore_v_stride",
    "fp32": "scale bias",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched for the published shape: 32 query and 8 key heads, groups of 16.

    Pooling once with a core for every query head, and once (`_shared`) with one for every key head, whose evaluators
    are fp32, and with other keys to pool.
    """
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    number = int(arch.removeprefix("sm_"))
    launch, shared = (Launch(32, 8, cores, head_dim, dtype.itemsize, number) for cores in (32, 8))

    def entry(kernel, constants: dict[str, Any], suffix="", multiplies=False, **other: str) -> Compilation:
        constants = dict(constants)
        warps = constants.pop("num_warps")
        arguments = {name: other.get(name, types[name]) for name in kernel.arg_names if name not in constants}
        name = kernel.__name__.removesuffix("_kernel") + suffix
        return Compilation(name, kernel, arguments, constants, warps, multiplies)

    attend, queries, columns = launch.tiles
    few = {"dk": "*fp32", "dv": "*fp32"}  # the parts of a sum over queries that are split
    compiled = [
        entry(attend_kernel, launch.queries(attend), multiplies=True),
        entry(queries_backward_kernel, launch.queries(queries), multiplies=True),
        entry(columns_backward_kernel, launch.columns(columns, False), "_keys", True),
        entry(columns_backward_kernel, launch.columns(columns, True), "_cores", True),
        entry(columns_backward_kernel, shared.columns(columns, True), "_shared_cores", True, **few),
    ]
    wide = {"q": "*fp32", "dq": "*fp32"}  # evaluators that are means
    for kernel in (pool_kernel, pool_queries_backward_kernel, pool_rows_backward_kernel):
        compiled += [
            entry(kernel, launch.pool(16, ELEMENTS, pooled=False)),
            entry(kernel, shared.pool(16, ELEMENTS, pooled=True), "_shared", **wide),
        ]
    return compiled
