"""`benchmarks/titans_loop.py`: its loop is the chunked memory, and it writes its file."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "titans_loop.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_titans_loop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_compute_the_same(script):
    options = SimpleNamespace(tokens=128, heads=2, head_dim=4, expansion=2, depth=2)
    tensors, dy = script.inputs(options)
    tensors, dy = [x.detach().double().requires_grad_() for x in tensors], dy.double()
    results = []
    for side in (script.chunked, script.loop):
        y = side(tensors, 16)
        for x in tensors:
            x.grad = None
        torch.autograd.backward(y, dy)
        results.append([y.detach(), *(x.grad for x in tensors)])
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-9, atol=1e-9)


def test_the_script_writes_its_file(script, tmp_path, monkeypatch, capsys):
    options = ["--tokens", "64", "--heads", "1", "--head-dim", "4", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    monkeypatch.setattr(script, "keep_freed_memory", lambda: None)  # of the whole process
    script.main()
    found = json.loads((tmp_path / "titans_loop.json").read_text())
    assert found["tokens"] == 64 and [len(x) for x in found["seconds"].values()] == [2, 2]
    assert "times as fast" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tokens", "65"])
    with pytest.raises(SystemExit):
        script.main()
