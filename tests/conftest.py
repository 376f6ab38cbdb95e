"""Settings of every test process: one thread (two on a busy machine are ten times slower), a fixed seed."""

import functools
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


@pytest.fixture(scope="session")
def pools():
    """Pools of processes by their number of ranks: made at the first use, kept for the session."""
    kept = {}
    yield kept
    for pool in kept.values():
        pool.close()


@pytest.fixture
def run_distributed(pools):
    """`run_distributed(function, ranks, *arguments)` -> what the function returned on each rank of a gloo job.

    The function is one of a module: the processes are forked after collection, so they have the test's module. With
    ranks = (ring, ulysses) it gets the mesh before the arguments. It should return errors instead of asserting: a rank
    that stops early leaves the others waiting.
    """
    from farspan.parallel.pool import Pool

    def run(function, ranks, *arguments):
        if isinstance(ranks, tuple):
            function, ranks, arguments = _on_mesh, ranks[0] * ranks[1], (function, ranks, *arguments)
        if ranks not in pools or not pools[ranks].is_open:
            pools[ranks] = Pool(ranks)
        return pools[ranks].run(function, *arguments)

    return run


def _on_mesh(function, sizes, *arguments):
    return function(_mesh(*sizes), *arguments)


@functools.cache  # in each process: making the groups takes longer than most tests
def _mesh(ring, ulysses):
    from farspan.parallel import Mesh

    return Mesh.create(1, ring, ulysses)


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
