"""`farspan bench decode`: what it measures, writes and refuses."""

import json

import pytest
import torch

import farspan.layers.window
from farspan.cli import bench as command
from farspan.eval import bench_decode
from farspan.eval.bench_decode import Decoding, check, filled_state
from farspan.eval.peers import _Attention, _sdpa, named_options, sides
from farspan.layers import MIXERS, build
from farspan.layers.mixer import parse_options

CPU = torch.device("cpu")
TINY = ["--width", 16, "--heads", 2, "--batch", 3, "--device", "cpu"]


def decoding(**changed):
    fields = {"width": 16, "heads": 2, "batch": 3, "context": 70, "steps": 4, "dtype": torch.float32, "device": CPU}
    return Decoding(**{**fields, **changed})


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_filled_state_has_room_for_the_context(name):
    mixer = build(name, width=16, heads=2)
    with torch.no_grad():
        state = filled_state(mixer, torch.randn(3, 1, 16), 300)
        assert sum(value.nbytes for value in state.values()) == 3 * mixer.state_bytes(300)
        assert all(value.std() > 0.5 for value in state.values() if value.is_floating_point())
        places = {key: value.data_ptr() for key, value in state.items() if key != "position"}
        state["position"].fill_(280)
        for _ in range(20):
            mixer(torch.randn(3, 1, 16), state=state)
    assert state["position"].tolist() == [300] * 3
    assert places == {key: value.data_ptr() for key, value in state.items() if key != "position"}


def test_it_writes_what_it_prints(bench, tmp_path):
    status, out, err = bench("decode", *TINY, "--context", 70, "--steps", 4, "--output", tmp_path)
    assert status == 0, out + err
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "ms/step" in out and "ms/step" in (tmp_path / "decode.txt").read_text()
    result = json.loads((tmp_path / "decode.json").read_text())
    assert result["decoding"]["context"] == 70 and result["command"].startswith("farspan bench decode")
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == command.MIXERS.split(",")
    for name, row in rows.items():
        assert row["check"]["passed"] and len(row["seconds"]) == 4 and not row["graph"]
        mixer, options = named_options(name)
        assert row["state_bytes"] == 3 * (build(mixer, width=16, heads=2, **options).state_bytes(70) - 8)


def test_numbers_follow_from_the_clock(monkeypatch):
    times = iter([4.0, 1.0, 2.0, 4.0, 9.0, 3.0])  # the second step is in the opposite order
    monkeypatch.setattr(bench_decode, "stopwatch", lambda device: lambda work: next(times))
    said = []
    softmax, window = bench_decode.bench_decode(["window"], decoding(steps=3), said.append)["rows"]
    assert len(said) == 4
    assert softmax["seconds"] == [4.0, 4.0, 9.0] and window["seconds"] == [1.0, 2.0, 3.0]
    assert (window["median_seconds"], window["ratio"], window["tokens_per_second"]) == (2.0, 3.0, 1.5)


def test_the_last_step_ends_at_the_context(monkeypatch):
    seen = []
    forward = farspan.layers.window.Window.mix

    def mix(self, x, sequence, state):
        seen.append(sequence.totals)
        return forward(self, x, sequence, state)

    monkeypatch.setattr(farspan.layers.window.Window, "mix", mix)
    bench_decode.bench_decode(["window"], decoding())
    last = seen[-bench_decode.WARM_STEPS - 4 :]
    assert last == [(total,) * 3 for total in range(64, 71)]


def test_a_wrong_step_gets_no_number(bench, monkeypatch, tmp_path):
    right = farspan.layers.window.attention_step
    wrong = lambda q, keys, values, counts: right(q, keys, values, counts - 1)  # noqa: E731
    monkeypatch.setattr(farspan.layers.window, "attention_step", wrong)
    arguments = ["--mixers", "window", "--context", 70, "--steps", 2, "--output", tmp_path]
    status, out, _ = bench("decode", *TINY, *arguments)
    assert status == 1 and "wrong" in next(line for line in out.splitlines() if "window" in line)
    softmax, window = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert "seconds" in softmax and "seconds" not in window and not window["check"]["passed"]


def test_a_state_that_grows_is_refused(monkeypatch):
    monkeypatch.setattr(farspan.layers.window.Window, "state_bytes", lambda self, length: 1)
    with pytest.raises(RuntimeError, match="window: the state holds"):
        bench_decode.bench_decode(["window"], decoding(steps=1))


def test_a_peer_decodes_from_the_cache_of_softmax():
    (side,) = sides([], 16, 2, CPU)
    attend = _sdpa(torch.nn.attention.SDPBackend.MATH)
    options = parse_options("softmax", {"width": 16, "heads": 2})
    peer = bench_decode.Side("peer", lambda: _Attention(options, attend), side.define)
    assert check(peer, decoding()).passed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", 20, "--steps", 18], "a context of 20 tokens has no room for 18 steps"),
        (["--mixers", "windows"], "unknown mixer 'windows'; did you mean 'window'?"),
    ],
)
def test_bad_input_is_one_line(bench, arguments, message):
    status, _, err = bench("decode", *TINY, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu_steps_are_graphs(bench, tmp_path):
    arguments = ["--width", 256, "--heads", 4, "--batch", 8, "--context", 512, "--steps", 5]
    status, out, err = bench("decode", *arguments, "--output", tmp_path)
    assert status == 0, out + err
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert {"softmax", "window", "rat"} <= {row["name"] for row in rows if row["graph"]}
