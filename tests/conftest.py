"""Settings of every test process: one thread (two on a busy machine are ten times slower), a fixed seed."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["COLUMNS"] = "200"  # tables of the command line keep their lines whole; read when the console is made

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def farspan(monkeypatch, capsys):
    """`farspan("doctor", ...)` -> (exit status, standard output, standard error) of the command, in this process."""

    def run(*arguments):
        from farspan.cli import main

        monkeypatch.setattr(sys, "argv", ["farspan", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as leave:
            status = leave.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        absent = pytest.mark.skip(reason="no CUDA device here; benchmarks/gpu.sh runs these")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(absent)
