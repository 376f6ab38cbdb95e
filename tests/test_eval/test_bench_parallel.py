"""`farspan bench parallel` at tiny sizes: bytes as the formulas say, wrong layers, files, wrong options."""

import json

import pytest
import torch

from farspan.eval import parallel_sides
from farspan.eval.bench_parallel import Protocol, bench_parallel, pools, steps


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
    assert status == 0, err
    assert "summaries" in out and {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt", ".png"}
    assert json.loads((tmp_path / "parallel.json").read_text())["ranks"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "1,x"), "not numbers separated by commas"),
        (("--ranks", "0"), "must be 1 or more"),
        (("--layout", "striped"), "is not one of contiguous, zigzag"),
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
