"""The training benchmark and the memory that it counts."""

import json

import pytest
import torch

from farspan.eval import bench_train
from farspan.eval.memory import peak_bytes
from farspan.lm import llama

TINY = ["--width", 16, "--layers", 1, "--heads", 2, "--vocabulary", 32, "--length", 8, "--rows", 2]


def test_peak_bytes_counts_what_lives_at_once():
    def work():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return torch.cat([b, b])

    if torch.cuda.is_available():
        pytest.skip("on CUDA the allocator's blocks are counted, which are larger")
    assert peak_bytes(work) == peak_bytes(work) == 12_000


def test_bench_train_compares_and_writes(farspan, tmp_path):
    status, out, err = farspan("bench", "train", "--rounds", 2, "--steps", 1, *TINY, "--output", tmp_path)
    assert status == 0, err
    assert "median ratio" in out and "farspan softmax" in out and "transformers Llama" in out
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["loss_difference"] <= bench_train.TOLERANCE
    assert all(len(speeds) == 2 for speeds in result["tokens_per_second"].values())
    assert all(size > 0 for size in result["peak_bytes"].values())
    assert result["command"].startswith("farspan bench train") and result["torch"] == torch.__version__
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_where_the_sides_differ(monkeypatch):
    monkeypatch.setitem(llama._PARTS, "self_attn.q_proj", "mixer.projections.key")
    monkeypatch.setitem(llama._PARTS, "self_attn.k_proj", "mixer.projections.query")
    shape = bench_train.Shape(32, 16, 44, 1, 2, 2, 8, 2)
    rounds = iter(range(3))
    with pytest.raises(RuntimeError, match="do not compute the same"):
        bench_train.bench_train(shape, 1, "cpu", rounds)
    assert next(rounds) == 0


def test_a_width_that_the_heads_do_not_divide_is_refused(farspan):
    status, _, err = farspan("bench", "train", "--width", 33)
    assert status == 2 and err == "error: --width 33 is not divisible by --heads 8; use a multiple\n"
