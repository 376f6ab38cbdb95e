"""How the fused Titans kernels are cut and launched: blocks and warps per head dim and architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from farspan.kernels.compile import POINTERS, Compilation
from farspan.kernels.launch import architecture
from farspan.kernels.titans.fused_coefficients import (
    SIZES,
    coefficients_kernel,
    decay_backward_kernel,
    gates_backward_kernel,
    momentum_backward_kernel,
)
from farspan.kernels.titans.fused_linear_backward import (
    channels_backward_kernel,
    local_kernel,
    scan_backward_kernel,
    scores_backward_kernel,
    solve_backward_kernel,
)
from farspan.kernels.titans.fused_linear_forward import answer_kernel, scan_kernel, solve_kernel
from farspan.kernels.titans.fused_mlp_backward import mlp_answer_backward_kernel, mlp_scan_backward_kernel
from farspan.kernels.titans.fused_mlp_forward import mlp_answer_kernel, mlp_scan_kernel

# Layers -> the most tokens between refreshes (slots of a tile for one layer), and channels of a head, whose kernels fit
# into registers; two layers hold more of a tile, and fit on sm_90 only.
SLOTS = 64
LONGEST, WIDEST = {1: SLOTS, 2: 32}, {1: 128, 2: 64}
TWO_LAYERS_FROM = 90

# Hidden units that every kernel's block divides.
HIDDEN = 64


@dataclass(frozen=True)
class Block:
    """Columns of a state, channels or hidden units at a time, warps, and stages of the pipeline of loads."""

    wide: int
    num_warps: int
    stages: int = 1


# kernel -> blocks for (architecture, padded head dim) = (80, 64), (80, 128), (90, 64), (90, 128) and two-byte elements,
# chosen by the compiler's report (no spills); not yet tuned on a device. Narrower heads take what 64 do. `_whole`: with
# one refresh per tile, for two layers of more than 16 tokens.
BLOCKS = {
    "coefficients": (Block(64, 8),) * 4,
    "solve": (Block(64, 8), Block(128, 8), Block(64, 4), Block(128, 8)),
    "scan": (Block(32, 4), Block(32, 8), Block(32, 4), Block(32, 4)),
    "answer": (Block(64, 4), Block(64, 8), Block(64, 4), Block(64, 4)),
    "local": (Block(64, 4), Block(128, 8), Block(64, 4), Block(128, 8)),
    "scan_backward": (Block(32, 8), Block(32, 8), Block(32, 4), Block(16, 8)),
    "scores_backward": (Block(64, 4), Block(128, 8), Block(64, 4), Block(128, 8)),
    "solve_backward": (Block(64, 4), Block(128, 8), Block(64, 4), Block(128, 8)),
    "channels_backward": (Block(16, 8), Block(16, 8), Block(64, 4), Block(64, 8)),
    "decay_backward": (Block(64, 8),) * 4,
    "momentum_backward": (Block(64, 8),) * 4,
    "gates_backward": (Block(64, 8),) * 4,
    "gates_backward_whole": (Block(64, 4),) * 4,
    "mlp_scan": (Block(32, 8), Block(32, 8), Block(64, 8), Block(32, 8)),
    "mlp_scan_whole": (Block(32, 8), Block(16, 8), Block(32, 8), Block(32, 8)),
    "mlp_answer": (Block(32, 8), Block(16, 8), Block(64, 8), Block(32, 8)),
    "mlp_answer_whole": (Block(32, 8), Block(16, 8), Block(32, 8), Block(32, 8)),
    "mlp_answer_backward": (Block(32, 8), Block(16, 8), Block(32, 8), Block(32, 8)),
    "mlp_answer_backward_whole": (Block(16, 8), Block(16, 8), Block(16, 8), Block(16, 8)),
    "mlp_scan_backward": (Block(16, 8), Block(16, 8), Block(32, 8), Block(16, 8)),
    "mlp_scan_backward_whole": (Block(16, 8), Block(16, 8), Block(16, 8), Block(16, 8)),
}


@dataclass(frozen=True)
class Launch:
    """Constants of every kernel for `heads` heads of `dim` channels in tiles of `slots`, on architecture 80 or 90.

    pre: the memory is read without the token written. hidden: units of the hidden layer, 0 for the linear memory.
    """

    heads: int
    dim: int
    itemsize: int
    arch: int
    refresh: int
    pre: bool
    slots: int
    hidden: int = 0
    norm: bool = False
    gelu: bool = False

    @classmethod
    def linear(cls, v: torch.Tensor, refresh: int, read: int | None) -> Launch:
        return cls(*_shape(v), refresh, read is not None, SLOTS)

    @classmethod
    def mlp(cls, v, refresh: int, read: int | None, hidden: int, norm: bool, activation: str) -> Launch:
        shape = (*_shape(v), refresh, read is not None, max(16, triton.next_power_of_2(refresh)))
        return cls(*shape, hidden, norm, activation == "gelu")

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    @property
    def padded_hidden(self) -> int:
        """Units of the hidden layer in whole blocks of every kernel."""
        if not self.hidden:
            return 0
        least = min(HIDDEN, max(16, triton.next_power_of_2(self.hidden)))
        return -(-self.hidden // least) * least

    @property
    def solves(self) -> bool:
        """Whether a tile has more than one refresh."""
        return not self.hidden and self.refresh * 2 <= self.slots

    def block(self, kernel) -> Block:
        index = 2 * (self.arch >= 90) + (self.padded > 64)
        name = kernel.fn.__name__.removesuffix("_kernel")
        whole = self.slots > 16 if self.hidden else not self.solves
        block = BLOCKS[f"{name}_whole" if whole and f"{name}_whole" in BLOCKS else name][index]
        return Block(min(block.wide, self.padded_hidden or self.padded), block.num_warps, block.stages)

    def parts(self, kernel) -> int:
        """Programs that share the columns or channels of one head."""
        return self.padded // self.block(kernel).wide

    def constants(self, kernel) -> dict[str, Any]:
        """What the kernel is compiled with, and its warps."""
        block = self.block(kernel)
        values = {
            "HEADS": self.heads,
            "DIM": self.dim,
            "PADDED": self.padded,
            "HIDDEN": self.padded_hidden,
            "SLOTS": self.slots,
            "WIDE": block.wide,
            "STAGES": block.stages,
            "PRE": self.pre,
            "SOLVE": self.solves,
            "NORM": self.norm,
            "GELU": self.gelu,
            "PRECISION": "tf32" if self.itemsize <= 2 else "ieee",
        }
        return {name: values[name] for name in kernel.arg_names if name in values} | {"num_warps": block.num_warps}


def _shape(v: torch.Tensor) -> tuple[int, int, int, int]:
    return v.shape[2], v.shape[3], v.element_size(), architecture(v.device)


# Types of the kernels' arguments by name, for compilation without tensors; `data` is the dtype of the activations.
ARGUMENTS = {
    "data": "q k v y dy dq dk dv keys momentum_keys values inverses states dstates errors dqk dkk "
    "states_in states_out hidden_deltas deltas asked dhidden dout dinputs dhidden_deltas",
    "*fp32": "log_decay log_momentum rate norm shares ends carry dcarry derrors vectors scalars partial mixed dmixed "
    "refreshed drefreshed "
    "dlog_decay dlog_momentum drate carry_in carry_out dcarry_in dcarry_out dkeys ddeltas dnorm",
    "*i64": "table sequences",
    "i32": "refresh " + " ".join(SIZES),
    "i32:16": "q_stride k_stride v_stride dy_stride",
}


def compilations(head_dim: int, dtype: torch.dtype, arch: str) -> list[Compilation]:
    """Every kernel as it is launched with 16 heads: the linear memory with a refresh per token and one per tile, the
    memory of two layers with the norm, four times as wide inside, and a refresh of 16 and of 32 tokens.
    """
    types = {name: kind.replace("data", POINTERS[dtype]) for kind, names in ARGUMENTS.items() for name in names.split()}
    shape = (16, head_dim, dtype.itemsize, int(arch.removeprefix("sm_")))

    def entry(kernel, launch: Launch, suffix: str = "", multiplies: bool = True, more=None) -> Compilation:
        constants = launch.constants(kernel) | (more or {})
        warps = constants.pop("num_warps")
        arguments = {name: types[name] for name in kernel.arg_names if name not in constants}
        name = kernel.fn.__name__.removesuffix("_kernel") + suffix
        return Compilation(name, kernel, arguments, constants, warps, multiplies)

    each, whole = (Launch(*shape, refresh, False, SLOTS) for refresh in (1, SLOTS))
    found = [entry(kernel, each) for kernel in (solve_kernel, answer_kernel, local_kernel, solve_backward_kernel)]
    for kernel in (scan_kernel, scan_backward_kernel, scores_backward_kernel, channels_backward_kernel):
        found += [entry(kernel, each), entry(kernel, whole, "_whole")]
    for kernel in (mlp_scan_kernel, mlp_answer_kernel, mlp_answer_backward_kernel, mlp_scan_backward_kernel):
        for suffix, n in (("", 16), ("_whole", LONGEST[2])):
            if shape[3] >= TWO_LAYERS_FROM and head_dim <= WIDEST[2]:
                launch = Launch(*shape, n, False, n, 4 * head_dim, True, False)
                # so few rows are not enough for a warpgroup's matrix instruction
                found.append(entry(kernel, launch, suffix, multiplies=False))
    for kernel in (decay_backward_kernel, momentum_backward_kernel):
        found += [
            entry(kernel, each, more={"REFRESHED": False}),
            entry(kernel, each, "_refreshed", more={"REFRESHED": True}),
        ]
    found += [entry(coefficients_kernel, each), entry(coefficients_kernel, whole, "_whole")]
    found += [entry(gates_backward_kernel, each, "", False), entry(gates_backward_kernel, whole, "_whole", False)]
    return found
