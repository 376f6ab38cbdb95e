"""`farspan doctor`: what works on this machine, and what to install for the rest."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import typer

from farspan.lm.console import console

OK, MISSING, BROKEN, NONE = "ok", "missing", "broken", "none"
# Without these nothing runs. They are imported to see that they do; of the others only the versions are compared.
CORE = ("torch", "transformers")
USES = {
    "torch": "tensors",
    "triton": "fused kernels",
    "transformers": "models, generation",
    "deepspeed": "training",
    "datasets": "corpora from the hub and Parquet",
    "sentencepiece": "tokenizer training",
    "lm-eval": "evaluation harness",
    "trl": "reinforcement learning",
    "matplotlib": "plots",
    "tensorboard": "train.tensorboard",
    "wandb": "train.wandb",
}


@dataclass(frozen=True)
class Finding:
    """One row: a thing, its version or size, how it is, and what to do or what it is for."""

    name: str
    version: str
    status: str
    note: str
    core: bool = False


def doctor() -> None:
    """Show what works on this machine, and what to install for the rest.

    Exit status 1 if the core (Python, torch, transformers) is broken.

    Example: `farspan doctor`
    """
    with console.status("looking"):
        findings = examine()
    show(findings)
    if any(finding.core and finding.status != OK for finding in findings):
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Every check of this machine, in the order of the table. Raises nothing: what fails is a finding."""
    packages = [_package(name, use) for name, use in USES.items()]
    checks: list[Callable[[], Finding]] = [_cuda, _interpreter, _compiler, _threads, _memory, _disk]
    return [_python(), *packages, *(_guarded(check) for check in checks)]


def show(findings: list[Finding]) -> None:
    from rich.table import Table

    colours = {OK: "green", MISSING: "yellow", BROKEN: "red", NONE: "dim"}
    table = Table("", "version", "status", "note", box=None, pad_edge=False, header_style="dim")
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(finding.name, finding.version, f"[{colour}]{finding.status}[/{colour}]", finding.note)
    console.print(table)


def _python() -> Finding:
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    note = sys.platform if good else "farspan is tested with Python 3.11 and 3.12; make a new environment with one"
    return Finding("python", platform.python_version(), OK if good else BROKEN, note, core=True)


def _package(name: str, use: str) -> Finding:
    """Installed, in a version that farspan's own metadata asks for, and, for the core, importable."""
    core = name in CORE
    requirement = _requirements().get(name, "")
    install = f'pip install "{name}{requirement}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "", MISSING, f"{use}: {install}", core)
    if not _satisfies(version, requirement):
        return Finding(name, version, BROKEN, f"farspan needs {requirement}: {install}", core)
    if core:
        try:
            importlib.import_module(name)
        except Exception as error:
            return Finding(name, version, BROKEN, f"does not import: {' '.join(str(error).split())}", core)
    return Finding(name, version, OK, use, core)


def _requirements() -> dict[str, str]:
    """{distribution: version specifier} of farspan, its extras included."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in metadata.requires("farspan") or ()]
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def _satisfies(version: str, requirement: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(requirement).contains(version, prereleases=True)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(check.__name__.strip("_"), "", BROKEN, " ".join(str(error).split()))


def _cuda() -> Finding:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        note = "no device: float32 on the CPU, chunked kernels" if built else "this torch is built for the CPU alone"
        return Finding("CUDA", built or "", NONE, note)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    first = devices[0]
    note = f"{len(devices)} x {first.name}, sm_{first.major}{first.minor}, {first.total_memory / 2**30:.3g} GiB"
    return Finding("CUDA", torch.version.cuda or "", OK, note)


def _interpreter() -> Finding:
    """Triton reads its mode when it is imported, so it is asked in a process of its own."""
    program = "import triton.runtime.interpreter as i; from triton import language; print('ok')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return Finding("triton interpreter", "", OK, "fused kernels can be tested without a GPU")
    return Finding("triton interpreter", "", BROKEN, (done.stderr.strip().splitlines() or ["no message"])[-1])


def _compiler() -> Finding:
    path = shutil.which("g++")
    if path is None:
        return Finding("g++", "", MISSING, "torch.compile on the CPU: apt install g++")
    version = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True).stdout.strip()
    return Finding("g++", version, OK, "torch.compile on the CPU")


def _threads() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0))
    setting = os.environ.get("OMP_NUM_THREADS")
    note = f"torch uses {torch.get_num_threads()}" + (f" (OMP_NUM_THREADS={setting})" if setting else "")
    return Finding("cores", str(cores), OK, note)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding("memory", f"{total / 2**30:.3g} GiB", OK, "")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    enough = free > 5 * 2**30
    note = "free in this folder" if enough else "free in this folder; checkpoints need room: free some"
    return Finding("disk", f"{free / 2**30:.3g} GiB", OK if enough else BROKEN, note)
