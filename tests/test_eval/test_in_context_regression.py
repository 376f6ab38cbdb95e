"""In-context regression: what models see, that training lowers the error, references, the command."""

import json
from dataclasses import replace

import pytest
import torch

from farspan.eval.in_context_regression import (
    Protocol,
    Regressor,
    Segments,
    Setting,
    draws,
    in_context_regression,
    reference_errors,
    squared_errors,
    train,
)

SMALL = Protocol((Setting(3, 8),), length=16, width=16, heads=2, steps=3, rows=4, held_out=8)
MIXERS = ["softmax", "local_linear", "rat:chunk=4", "titans:depth=1"]


def test_the_data_are_linear_in_each_segment_and_held_out_sequences_are_others():
    setting = SMALL.settings[0]
    following = draws(setting, SMALL, held_out=False)
    first, second = following(2), following(2)
    for x, y in ((first.x[0], first.y[0]), (second.x[1], second.y[1])):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(16))
        maps = [torch.linalg.lstsq(x[part].double(), y[part].double()).solution for part in (slice(8), slice(8, 16))]
        torch.testing.assert_close(x[8:].double() @ maps[1], y[8:].double(), atol=1e-4, rtol=1e-4)
        assert (maps[0] - maps[1]).abs().max() > 0.1
    again = draws(setting, SMALL, held_out=False)(4)
    assert torch.equal(again.x, torch.cat([first.x, second.x])) and torch.equal(again.y[2:], second.y)
    others = [draws(setting, SMALL, held_out=True), draws(setting, replace(SMALL, seed=1), held_out=False)]
    seen = {row.numpy().tobytes() for row in again.x}
    assert not any(row.numpy().tobytes() in seen for other in others for row in other(4).x)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_prediction_sees_its_own_input_and_earlier_pairs_only(mixer):
    torch.manual_seed(0)
    model = Regressor(mixer, 3, 16, 2)
    x, y = draws(SMALL.settings[0], SMALL, held_out=False)(1)
    with torch.no_grad():
        before, _ = model(x, y)
        later, _ = model(x, y + torch.nn.functional.one_hot(torch.tensor(5), 16)[None, :, None])
        other, _ = model(x + torch.nn.functional.one_hot(torch.tensor(5), 16)[None, :, None], y)
    assert torch.equal(before[:, :6], later[:, :6]) and (before - later)[0, 6:].abs().amax() > 1e-4
    assert torch.equal(before[:, :5], other[:, :5]) and (before - other)[0, 5].abs().amax() > 1e-4


def test_rows_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    model = Regressor("softmax", 3, 16, 2)
    data = draws(SMALL.settings[0], SMALL, held_out=False)(3)
    whole, alone = squared_errors(model, data, 3), squared_errors(model, data, 1)
    torch.testing.assert_close(whole, alone)
    found, _ = model(*data)
    torch.testing.assert_close((found - data.y).square().mean(-1).detach(), whole)


def test_references_are_told_where_segments_begin():
    torch.manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(2, 16, 3), dim=-1), torch.randn(2, 16, 3)
    found = reference_errors(Segments(x, y), 8)
    x, y = x.double(), y.double()
    for row, token in ((0, 3), (1, 13)):
        begin = token // 8 * 8
        mean = y[row, begin:token].mean(0)
        assert found["segment mean"][row, token].item() == pytest.approx((mean - y[row, token]).square().mean().item())
        k, v = x[row, begin:token], y[row, begin:token]
        fit = torch.linalg.solve(k.T @ k + len(k) * 1e-4 * torch.eye(3), k.T @ v)
        error = (x[row, token] @ fit - y[row, token]).square().mean().item()
        assert found["segment ridge"][row, token].item() == pytest.approx(error)
    for name in found:
        torch.testing.assert_close(found[name][:, [0, 8]], y[:, [0, 8]].square().mean(-1))


def test_training_beats_saying_zero_and_later_pairs_beat_the_first():
    protocol = Protocol((Setting(4, 16),), length=32, width=32, steps=150, rows=16, lr=1e-2, held_out=64)
    result = in_context_regression(["softmax"], protocol)
    _, ridge, softmax = result["rows"]
    assert [row["mixer"] for row in result["rows"]] == ["segment mean", "segment ridge", "softmax"]
    assert softmax["mse"] < 0.75 and softmax["quarters"][3] < 0.8 * softmax["quarters"][0]
    assert ridge["mse"] < softmax["mse"] and ridge["quarters"][3] < 1e-3
    assert softmax["curve"][0] > 0.8  # nothing is known of a new segment


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_seed_decides_all(mixer):
    first, again = (in_context_regression([mixer], SMALL)["rows"] for _ in range(2))
    assert first == again
    other = in_context_regression([mixer], replace(SMALL, seed=1))["rows"]
    assert other[-1]["mse"] != first[-1]["mse"]


def test_mixers_share_their_sequences_and_progress_is_told():
    told = []
    rows = in_context_regression(["softmax", "rat:chunk=4", "softmax"], SMALL, told.append)["rows"]
    assert [row["mixer"] for row in rows[2:]] == ["softmax", "rat:chunk=4"] and len(told) == 2 * SMALL.steps
    assert "softmax, segments of 8" in told[0] and "rat" in told[-1]
    assert rows[3] == in_context_regression(["rat:chunk=4"], SMALL)["rows"][2]
    model = train("rat:chunk=4", SMALL.settings[0], SMALL, told.append)
    data = draws(SMALL.settings[0], SMALL, held_out=True)(SMALL.held_out)
    assert rows[3]["mse"] == pytest.approx(squared_errors(model, data, 4).mean().item())


def test_the_command_writes_table_and_picture(farspan, tmp_path):
    options = ("--mixers", "softmax,rat:chunk=4", "--segments", "8,16", "--channels", 3, "--length", 16, "--steps", 2)
    status, out, err = farspan(
        "eval", "in-context-regression", *options, "--width", 16, "--held-out", 4, "--output", tmp_path
    )
    assert status == 0, err
    assert "rat:chunk=4" in out and "(segment ridge)" in (tmp_path / "in_context_regression.txt").read_text()
    result = json.loads((tmp_path / "in_context_regression.json").read_text())
    assert [row["segment"] for row in result["rows"]] == [8] * 4 + [16] * 4
    assert all(len(row["curve"]) == row["segment"] for row in result["rows"])
    assert (tmp_path / "in_context_regression.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--segments", "a"), "--segments a are not numbers"),
        (("--segments", "30"), "length=64 is no whole number of segments of 30"),
        (("--segments", "2"), "setting 4:2 needs"),
        (("--mixers", "softmox"), "unknown mixer 'softmox'"),
        (("--mixers", "rat:chunk"), "'chunk' is no option=value"),
        (("--mixers", "rat:chonk=4"), "unknown option 'chonk'"),
        (("--mixers", ","), "no mixer is named"),
        (("--heads", "3"), "width=64 is not divisible by heads=3"),
        (("--lr", "0"), "lr=0.0 must be above 0"),
        (("--seed", 2**31), "below 2^31"),
    ],
)
def test_what_cannot_be_trained_is_one_line(farspan, tmp_path, options, message):
    status, _, err = farspan("eval", "in-context-regression", *options, "--output", tmp_path)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
