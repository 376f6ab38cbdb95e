"""What is freed is kept: large tensors cost page faults once."""

import ctypes
import subprocess
import sys

import pytest

from farspan.cli.allocator import keep_freed_memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
FAULTS = """
import resource, sys, torch
from farspan.cli.allocator import keep_freed_memory
assert sys.argv[1] == "returned" or keep_freed_memory()
faults = []
for _ in range(20):
    torch.ones(16 * 2**20)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_large_tensors_cost_page_faults_once():
    found = {}
    for mode in ("kept", "returned"):
        command = [sys.executable, "-P", "-c", FAULTS, mode]
        found[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True, env={}).stdout)
    assert found["kept"] < found["returned"] / 2


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_who_has_chosen_is_left_alone(name):
    assert not keep_freed_memory({name: "1", "PATH": "/bin"})
