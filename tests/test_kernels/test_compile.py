"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, without spills, within shared memory."""

import json
import os
import subprocess
import sys

import pytest
import torch

from farspan.kernels.compile import Report, compile_report, triton_operators

PROGRAM = """
import json, sys
from dataclasses import asdict
from farspan.kernels.compile import compile_report
operator, arch, dim = sys.argv[1:]
print(json.dumps([asdict(report) for report in compile_report(arch, (int(dim),), operators=(operator,))]))
"""

# A small head on the older and a large one on the newer architecture: the corners that differ most. All four of them:
# `farspan bench kernels --compile-only --arch sm_80`.
CORNERS = [("sm_80", 64), ("sm_90", 128)]


@pytest.mark.parametrize(("arch", "dim"), CORNERS)
@pytest.mark.parametrize("operator", triton_operators())
def test_every_kernel_compiles(tmp_path, operator, arch, dim):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM, operator, arch, str(dim)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reports = [Report(**report) for report in json.loads(result.stdout)]
    assert reports and any(r.multiplies for r in reports)
    faults = [f"{r.operator}/{r.kernel} {r.arch} head dim {r.head_dim}: {r.faults}" for r in reports if r.faults]
    assert not faults, "\n".join(faults)


def test_faults_are_found():
    clean = Report("x", "x", "sm_90", 64, 4, 100, 0, 1024, "wgmma", True)
    assert not clean.faults
    for field, value in (("spilled", 8), ("shared", 228 * 1024), ("matrix", "mma"), ("matrix", "")):
        assert len(Report(**{**vars(clean), field: value}).faults) == 1


def test_the_interpreter_and_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="sm_70"):
        compile_report("sm_70")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_report("sm_90", dtype=torch.bfloat16)
