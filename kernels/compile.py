"""Ahead-of-time compilation of every Triton kernel, without a GPU: registers, spills, shared memory, matrix units.

An operator whose fused backend is Triton has a function `compilations(head_dim, dtype, arch)` in its fused.py, which
lists its kernels as they are launched; nothing else has to be done for a kernel to be judged here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90")

# Bytes of shared memory that one program may use. sm_80 has 163 KB, but its tiles also serve sm_86 and sm_89 (99 KB).
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


@dataclass(frozen=True)
class Compilation:
    """One kernel as it is launched.

    arguments: type of each argument that is not a constexpr, e.g. "*bf16", "i32", "fp32"; "i32:16" is an integer that
    is a multiple of 16, which pointers always are. multiplies: whether it multiplies matrices.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    multiplies: bool = False


@dataclass(frozen=True)
class Report:
    """What a kernel became: registers per thread, spilled and shared bytes, and whether it uses (warpgroup) matrix
    instructions.
    """

    operator: str
    kernel: str
    arch: str
    head_dim: int
    num_warps: int
    registers: int
    spilled: int
    shared: int
    matrix: str
    multiplies: bool

    @property
    def faults(self) -> list[str]:
        """What is wrong with it; empty for a kernel that may ship."""
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"needs {self.shared} bytes of shared memory of {SHARED_MEMORY[self.arch]}")
        wanted = "wgmma" if self.arch == "sm_90" else "mma"
        if self.multiplies and self.matrix != wanted:
            found.append(f"multiplies with {self.matrix or 'no matrix instruction'}, not {wanted}")
        return found


def compile_report(
    arch: str = "sm_90",
    head_dims: Iterable[int] = (64, 128),
    dtype: torch.dtype = torch.bfloat16,
    operators: Iterable[str] | None = None,
    workers: int = 1,
) -> list[Report]:
    """Compile every Triton kernel of the package for `arch` and say what became of it.

    operators: names, all with Triton kernels when None. workers: processes. Needs no GPU, but a process in which
    TRITON_INTERPRET is off (RuntimeError otherwise). ValueError for an architecture that is not known.
    """
    import triton

    if arch not in ARCHITECTURES:
        raise ValueError(f"arch={arch!r} is not one of {', '.join(ARCHITECTURES)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it in this process")
    jobs = [
        (operator, head_dim, index, arch, dtype)
        for operator in (triton_operators() if operators is None else operators)
        for head_dim in head_dims
        for index in range(len(_compilations(operator)(head_dim, dtype, arch)))
    ]
    if workers == 1:
        return [_report(*job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_report, *zip(*jobs, strict=True)))


def triton_operators() -> list[str]:
    """Operators whose fused backend is written in Triton."""
    import farspan.kernels
    from farspan.kernels.operator import OPERATORS

    for folder in sorted(Path(farspan.kernels.__file__).parent.iterdir()):
        if (folder / "__init__.py").exists():
            import_module(f"farspan.kernels.{folder.name}")
    return [operator.name for operator in OPERATORS.values() if operator.fused == "triton"]


def _compilations(operator: str) -> Callable[[int, torch.dtype, str], list[Compilation]]:
    return import_module(f"farspan.kernels.{operator}.fused").compilations


def _report(operator: str, head_dim: int, index: int, arch: str, dtype: torch.dtype) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = _compilations(operator)(head_dim, dtype, arch)[index]
    names = entry.kernel.arg_names
    missing = set(names) ^ (set(entry.arguments) | set(entry.constants))
    assert not missing, f"{operator}/{entry.name}: arguments declared and not declared differ in {sorted(missing)}"
    signature = {name: entry.arguments.get(name, "constexpr").removesuffix(":16") for name in names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if entry.arguments.get(name, "").startswith("*") or entry.arguments.get(name, "").endswith(":16")
    }
    source = ASTSource(entry.kernel, signature, entry.constants, aligned)
    capability = int(arch.removeprefix("sm_"))
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": entry.num_warps},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    matrix = "wgmma" if "wgmma.mma_async" in compiled.asm["ptx"] else "mma" if "mma.sync" in compiled.asm["ptx"] else ""
    return Report(
        operator,
        entry.name,
        arch,
        head_dim,
        entry.num_warps,
        usage["REG"],
        usage["LOCAL"] + usage["STACK"],
        compiled.metadata.shared,
        matrix,
        entry.multiplies,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel of a cubin, from the cuobjdump that triton ships."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
