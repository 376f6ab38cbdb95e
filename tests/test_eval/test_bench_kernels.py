"""`farspan bench kernels`: what it measures, writes and refuses."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

import farspan.kernels.window
from farspan.cli import bench as command
from farspan.eval import bench_kernels, peers
from farspan.eval.bench_kernels import Protocol, check
from farspan.layers import build

TINY = ["--width", 16, "--heads", 2, "--device", "cpu"]


def protocol(**changed):
    fields = {"width": 16, "heads": 2, "lengths": (24,), "tokens": None, "dtype": torch.float32}
    return Protocol(**{**fields, "device": torch.device("cpu"), **changed})


def off_by(factor, forward=True):
    """The window kernel with a result, or only a gradient, that is wrong by a factor."""
    right = farspan.kernels.window.window_chunked

    def wrong(*arguments):
        o = right(*arguments)
        return o * factor if forward else o + (factor - 1) * (o - o.detach())

    return wrong


def test_it_writes_what_it_prints(bench, tmp_path):
    status, out, err = bench("kernels", *TINY, "--lengths", "60,96", "--rounds", 2, "--output", tmp_path)
    assert status == 0, out + err
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "kernels.txt").read_text()
    assert "x softmax" in table and "x softmax" in out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["command"].startswith("farspan bench kernels --width 16") and result["torch"] == torch.__version__
    assert {"commit", "device", "threads"} <= set(result)
    assert result["protocol"]["dtype"] == "float32" and result["protocol"]["device"] == "cpu"
    rows = {(row["name"], row["length"]): row for row in result["rows"]}
    assert set(rows) == {(name, length) for name in command.MIXERS.split(",") for length in (60, 96)}
    for (name, length), row in rows.items():
        assert name in table
        assert row["check"]["passed"] and row["checked_tokens"] == length and row["documents"] == 1
        assert len(row["seconds"]) == 2 and row["peak_bytes"] > 0 and row["baseline"] == "softmax"


def test_numbers_follow_from_the_clock(monkeypatch):
    """softmax takes 1, 2 and 30 seconds, window 1, 1 and 10: the medians are 2 and 1, the ratio 2."""
    times = iter([1.0, 1.0, 1.0, 2.0, 30.0, 10.0])  # the second round is in the opposite order
    monkeypatch.setattr(bench_kernels, "stopwatch", lambda device: lambda work: next(times))
    said = []
    shape = protocol(lengths=(24,), tokens=72)
    rows = bench_kernels.bench_kernels(["window"], shape, 3, said.append)["rows"]
    assert len(said) == bench_kernels.steps(shape, 3)
    softmax, window = rows
    assert softmax["seconds"] == [1.0, 2.0, 30.0] and window["seconds"] == [1.0, 1.0, 10.0]
    assert (softmax["median_seconds"], softmax["ratio"], window["ratio"]) == (2.0, 1.0, 2.0)
    assert window["documents"] == 3 and window["tokens_per_second"] == 72.0
    flops = 3 * 72 * build("softmax", width=16, heads=2).flops(24)
    assert softmax["tflops_per_second"] == pytest.approx(flops / 2.0 / 1e12)
    assert softmax["published_ratio"] is None


def test_a_costly_definition_is_asked_for_less(monkeypatch):
    monkeypatch.setitem(peers.MOST_CHECKED, "titans", 17)
    rows = bench_kernels.bench_kernels(["titans:depth=1"], protocol(), 1)["rows"]
    assert [(row["name"], row["length"], row["checked_tokens"]) for row in rows] == [
        ("softmax", 24, 24),
        ("titans:depth=1", 24, 17),
    ]
    assert all(row["documents"] == 1 and len(row["seconds"]) == 1 for row in rows)


def test_layers_alone_have_no_ratio(bench, tmp_path):
    arguments = ["--mixers", "window", "--lengths", "24,32", "--rounds", 1, "--alone", "--output", tmp_path]
    status, out, _ = bench("kernels", *TINY, *arguments)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert status == 0 and "window" in out and "softmax:" not in out
    assert [(row["name"], row["length"], row["ratio"]) for row in rows] == [("window", 24, None), ("window", 32, None)]
    assert (tmp_path / "kernels.png").stat().st_size > 5000


@pytest.mark.parametrize("forward", [True, False], ids=["result", "gradient"])
def test_a_wrong_kernel_gets_no_number(bench, monkeypatch, tmp_path, forward):
    monkeypatch.setattr(farspan.kernels.window, "window_chunked", off_by(1.001, forward))
    arguments = ["--mixers", "window", "--lengths", 24, "--rounds", 1, "--output", tmp_path]
    status, out, _ = bench("kernels", *TINY, *arguments)
    assert status == 1
    line = next(line for line in out.splitlines() if "window" in line)
    assert "wrong" in line and ("gradient of" in line or forward)
    softmax, window = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert "seconds" in softmax and "seconds" not in window and "ratio" not in window
    assert not window["check"]["passed"] and window["check"]["error"] > 1e-5


def test_without_the_backward_pass_only_the_result_counts(monkeypatch):
    monkeypatch.setattr(farspan.kernels.window, "window_chunked", off_by(1.001, forward=False))
    window = bench_kernels.bench_kernels(["window"], protocol(backward=False), 1)["rows"][1]
    assert window["check"]["passed"] and "seconds" in window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_are_checked_like_everybody(monkeypatch, dtype):
    """flash-attention's module, as far as this needs it, on torch's kernel; right, and without its causal mask."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    attend = peers._sdpa(torch.nn.attention.SDPBackend.MATH)
    module.flash_attn_func = lambda q, k, v, causal: attend(q, k, v, causal)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    found = {side.name: side for side in peers.sides(["window"], 16, 2, torch.device("cuda"))}
    assert list(found)[:5] == ["softmax", "window", "sdpa flash", "sdpa cudnn", "flash-attn"]
    assert all(side.peer for side in list(found.values())[2:])
    assert [side.name for side in found.values() if side.baseline] == ["softmax", "sdpa flash", "sdpa cudnn"]
    assert check(found["flash-attn"], protocol(dtype=dtype), 24).passed
    module.flash_attn_func = lambda q, k, v, causal: attend(q, k, v, False)
    found = {side.name: side for side in peers.sides([], 16, 2, torch.device("cuda"))}
    assert not check(found["flash-attn"], protocol(dtype=dtype), 24).passed


def test_a_peer_that_cannot_run_is_left_out(bench, monkeypatch, tmp_path):
    (right,) = peers.sides([], 16, 2, torch.device("cpu"))

    def refuse(*_):
        raise RuntimeError("No available kernel.\nAborting.")

    options = peers.parse_options("softmax", {"width": 16, "heads": 2})
    peer = peers.Side("far away", lambda: peers._Attention(options, refuse), right.define, peer=True)
    monkeypatch.setattr(bench_kernels, "sides", lambda *_: [right, peer])
    status, out, _ = bench("kernels", *TINY, "--lengths", 24, "--rounds", 1, "--output", tmp_path)
    assert status == 0 and "left out: far away (RuntimeError: No available kernel.)" in out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["softmax"]
    with pytest.raises(RuntimeError, match="No available kernel"):
        peers.checked([peers.Side("ours", peer.build, right.define)], lambda side: check(side, protocol(), 24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "64,x"], "--lengths 64,x are not numbers separated by commas"),
        (["--lengths", "0"], "must be 1 or more"),
        (["--lengths", "48", "--tokens", "100"], "100 tokens per call are no whole number of documents of 48"),
        (["--mixers", "rats"], "unknown mixer 'rats'; did you mean 'rat'?"),
        (["--mixers", "rat:chunks=4"], "unknown option 'chunks' of mixer rat; did you mean 'chunk'?"),
        (["--mixers", "rat:chunk"], "'chunk' is no option=value"),
        (["--dtype", "int8"], "--dtype int8 is not one of"),
        (["--device", "tpu"], "--device tpu is not one of"),
        (["--width", "17"], "width=17 is not divisible by heads=2"),
    ],
)
def test_bad_input_is_one_line(bench, arguments, message):
    status, _, err = bench("kernels", *TINY, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def report(**changed):
    fields = {"operator": "rat", "kernel": "attend", "arch": "sm_90", "head_dim": 64, "num_warps": 4, "registers": 168}
    fields |= {"spilled": 0, "shared": 65_536, "matrix": "wgmma", "faults": []}
    return SimpleNamespace(**{**fields, **changed})


@pytest.mark.parametrize(("faults", "status"), [([], 0), (["spills 64 bytes"], 1)])
def test_compile_only_shows_every_kernel(bench, monkeypatch, faults, status):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reports = [report(), report(kernel="states", faults=faults)]
    monkeypatch.setattr("farspan.kernels.compile.compile_report", lambda arch, workers: reports)
    left, out, err = bench("kernels", "--compile-only", "--arch", "sm_90")
    assert left == status, err
    assert "attend" in out and "65,536" in out and "wgmma" in out
    assert ("spills 64 bytes" in out) == bool(faults)


def test_compile_only_leaves_the_interpreter(bench, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls = []

    def run(arguments, env, check):
        calls.append((arguments, env))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert bench("kernels", "--compile-only", "--arch", "sm_80")[0] == 1
    ((arguments, environment),) = calls
    assert arguments[-3:] == ["--compile-only", "--arch", "sm_80"] and "TRITON_INTERPRET" not in environment


@pytest.mark.gpu
def test_on_a_gpu_with_all_peers(bench, tmp_path):
    arguments = ["--width", 256, "--heads", 4, "--lengths", "256,1024", "--tokens", 2048, "--rounds", 2]
    status, out, err = bench("kernels", *arguments, "--output", tmp_path)
    assert status == 0, out + err
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {"softmax", "window", "rat"} <= {row["name"] for row in rows}
    assert all(row["documents"] * row["length"] == 2048 for row in rows)
