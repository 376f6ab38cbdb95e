"""Where a result comes from: versions, device, commit."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(ranks: int) -> dict[str, Any]:
    """Versions (None for a package that is not installed), device and commit of this process."""
    packages = ("farspan", "torch", "triton", "transformers", "deepspeed", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # benchmarks run without deepspeed, and from a checkout on the path
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, with "+" if it was changed since; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
