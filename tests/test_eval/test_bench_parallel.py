"""`farspan bench parallel` at tiny sizes: bytes as the formulas say, wrong layers, files, wrong options."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from farspan.eval import bytes_sent, parallel_sides
from farspan.eval.bench_parallel import Protocol, bench_parallel, pools, steps
from farspan.eval.bytes_sent import Sent
from farspan.layers.rat_summaries import SummaryExchange

TINY = ["--width", 16, "--heads", 4, "--tokens", 64, "--device", "cpu"]


def protocol(**changes):
    values = {"mixers": ("softmax", "window", "rat"), "width": 32, "heads": 4, "tokens": 256, "ranks": (1, 2, 4)}
    values |= {"layout": "contiguous", "dtype": torch.float32, "device": torch.device("cpu")}
    return Protocol(**{**values, **changes})


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_is_sent_is_what_the_formulas_say(layout):
    small, told = protocol(layout=layout), []
    with pools(small) as processes:
        result = bench_parallel(small, processes, 1, told.append)
    assert len(told) == steps(small, 1)
    rows = result["rows"]
    assert {row["ranks"] for row in rows} == {1, 2, 4} and len(rows) == 1 * 3 + 5 + 6
    for row in rows:
        assert row["check"]["passed"], row
        assert row["median_seconds"] > 0 and min(row["peak_bytes"]) > 0
    assert set(result["ring_over_rat"].values()) == {16.0}


def test_a_wrong_layer_gets_no_numbers(monkeypatch):
    """Doubled outputs of one method alone: its rows have no times, the others have."""
    from farspan.layers import softmax

    whole = softmax.sharded_attention
    monkeypatch.setattr(softmax, "sharded_attention", lambda *arguments: 2 * whole(*arguments))
    small = protocol(mixers=("softmax", "rat"), ranks=(1, 2))
    with pools(small) as processes:
        rows = bench_parallel(small, processes, 1)["rows"]
    wrong = [row for row in rows if not row["check"]["passed"]]
    assert {(row["mixer"], row["ranks"]) for row in wrong} == {("softmax", 2)} and len(wrong) == 3
    assert all("seconds" not in row and "peak_bytes" not in row for row in wrong)


def test_the_command_writes_its_files(farspan, tmp_path):
    sizes = ("--tokens", 128, "--width", 32, "--heads", 4, "--rounds", 1, "--ranks", "1,2", "--mixers", "rat")
    status, out, err = farspan("bench", "parallel", *sizes, "--output", tmp_path)
    assert status == 0, out + err
    assert "summaries" in out and {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt", ".png"}
    assert json.loads((tmp_path / "parallel.json").read_text())["ranks"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "1,x"), "not numbers separated by commas"),
        (("--ranks", "0"), "must be 1 or more"),
        (("--ranks", "3"), "128 tokens do not divide over 3 ranks in a contiguous layout; use a multiple of 48"),
        (("--layout", "striped"), "is not one of contiguous, zigzag"),
        (("--mixers", ","), "no mixer is named; valid: softmax, window, rat"),
        (("--mixers", "sofmax"), "softmax"),
        (("--ranks", "16", "--mixers", "softmax"), "heads"),
    ],
)
def test_wrong_options_are_one_line(farspan, tmp_path, options, message):
    status, _, err = farspan("bench", "parallel", "--tokens", 128, "--output", tmp_path, *options)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_the_sides_of_a_mesh():
    names = [(side.mixer, side.method) for side in parallel_sides.sides(protocol(ranks=(4,)))]
    assert names[:4] == [("softmax", method) for method in ("ulysses", "gather", "ring", "2-D, 2 x 2")]


def test_times_are_of_the_slowest_rank(monkeypatch):
    """Rank r takes r + 1 seconds: one rank 1 second, two ranks 2."""
    monkeypatch.setattr(parallel_sides, "stopwatch", lambda device: lambda work: dist.get_rank() + 1.0)
    said, shape = [], protocol(mixers=("rat",), ranks=(1, 2))
    with pools(shape) as processes:
        result = bench_parallel(shape, processes, 3, said.append)
    assert len(said) == steps(shape, 3)
    one, two = result["rows"]
    assert one["seconds"] == [1.0] * 3 and two["seconds"] == [2.0] * 3
    assert (one["speedup"], two["speedup"]) == (1.0, 0.5)


def test_two_ranks_alone_and_a_zigzag_layout(farspan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    arguments = ["--ranks", "2", "--rounds", 1, "--mixers", "window", "--layout", "zigzag", "--output", tmp_path]
    status, out, err = farspan("bench", "parallel", *TINY, *arguments)
    assert status == 0, out + err
    (row,) = json.loads((tmp_path / "parallel.json").read_text())["rows"]
    assert row["speedup"] is None and row["memory_times_ranks"] is None and row["median_seconds"] > 0
    assert "1 core: the times of 2 ranks, which share it, are no speed-up" in out


def test_a_wrong_gradient_is_named_and_ends_with_status_1(farspan, tmp_path, monkeypatch):
    right = SummaryExchange.backward
    monkeypatch.setattr(SummaryExchange, "backward", lambda *of: tuple(1.01 * x for x in right(*of)))
    arguments = ["--mixers", "rat", "--ranks", "1,2", "--rounds", 1, "--output", tmp_path]
    status, out, _ = farspan("bench", "parallel", *TINY, *arguments)
    line = next(line for line in out.splitlines() if "rat summaries" in line)
    assert status == 1 and "wrong" in line and "gradient of" in line
    one, two = json.loads((tmp_path / "parallel.json").read_text())["rows"]
    assert "seconds" in one and not two["check"]["passed"]
    assert not {"seconds", "peak_bytes", "sent"} & set(two)


def test_a_layer_that_sends_more_than_its_formula_gets_no_number(farspan, tmp_path, monkeypatch):
    formula = bytes_sent.FORMULAS["window"]
    monkeypatch.setitem(bytes_sent.FORMULAS, "window", lambda *of: formula(*of) + Sent(0, 4))
    arguments = ["--mixers", "window", "--ranks", "2", "--rounds", 1, "--output", tmp_path]
    status, out, _ = farspan("bench", "parallel", *TINY, *arguments)
    line = next(line for line in out.splitlines() if "window halo" in line)
    assert status == 1 and "wrong" in line and "bytes sent" in line
    (row,) = json.loads((tmp_path / "parallel.json").read_text())["rows"]
    assert row["sent"]["forward"] == row["formula"]["forward"] and row["sent"]["backward"] != row["formula"]["backward"]
    assert "seconds" not in row and "peak_bytes" not in row


@pytest.mark.gpu
def test_on_gpus(farspan, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    arguments = ["--width", 256, "--heads", 4, "--tokens", 4096, "--ranks", "1,2", "--rounds", 2]
    status, out, err = farspan("bench", "parallel", *arguments, "--output", tmp_path)
    assert status == 0, out + err
    assert len(json.loads((tmp_path / "parallel.json").read_text())["rows"]) == 8
