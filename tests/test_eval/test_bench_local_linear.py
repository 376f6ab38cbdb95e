"""`benchmarks/local_linear.py`: its iterations are those of the layer, and it writes its files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from farspan.layers import Sequence, build

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "local_linear.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_local_linear", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_iterations_are_those_of_the_layer(script):
    torch.manual_seed(0)
    mixer = build("local_linear", width=32, heads=2, solver="cg", iterations=6, ridge_init=0.2)
    x, sequence = torch.randn(1, 300, 32), Sequence.rows(1, 300)
    found = script.solves(mixer, x, sequence)
    layer = script.Layer(mixer, 32)
    metrics = mixer(layer.norm(x), sequence).metrics
    assert found["iterations"] == pytest.approx(metrics["solver_iterations"].item(), abs=0.02)  # rounding, at the edge
    assert found["iterations_max"] == metrics["solver_iterations_max"].item()
    assert found["residual"] == pytest.approx(metrics["solver_residual"].item(), rel=1e-2)
    assert found["iterations"] <= found["iterations_p99"] <= found["iterations_max"] <= 6


def test_the_script_writes_table_and_picture(script, tmp_path, monkeypatch, capsys):
    options = ["--lengths", "16,24", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    script.main()
    rows = json.loads((tmp_path / "local_linear.json").read_text())["rows"]
    assert {(row["length"], row["head_dim"]) for row in rows} == {(16, 64), (16, 128), (24, 64), (24, 128)}
    assert {row["ridge"] for row in rows if row["solver"] == "cg"} == {0.1, 1.0, 10.0}
    assert [row["head_dim"] for row in rows if row["solver"] == "gram"] == [64, 128, 64, 128]
    assert all(row["peak_bytes"] > 0 and row["median_seconds"] > 0 for row in rows)
    assert "time x softmax" in capsys.readouterr().out and (tmp_path / "local_linear.png").stat().st_size > 5000
