"""Test-time regression: what is drawn, what each estimator sees, the global fit against the local one, tables."""

import json

import pytest
import torch

from farspan.eval.regression import ESTIMATORS, Protocol, Setting, draw, global_ridge, predictions, regress
from farspan.kernels.local_linear import local_linear_attention

SMALL = Protocol((Setting(16, 256),), length=512, sequences=2, scales=(10.0, 40.0), ridges=(1e-4, 1e-3))


def test_a_segment_has_one_map_and_inputs_of_length_one():
    x, y = draw(Setting(4, 32), 64, seed=3)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(64, dtype=torch.float64))
    maps = [torch.linalg.lstsq(x[part], y[part]).solution for part in (slice(0, 32), slice(32, 64))]
    for part, solution in zip((slice(0, 32), slice(32, 64)), maps, strict=True):
        torch.testing.assert_close(x[part] @ solution, y[part])
    assert (maps[0] - maps[1]).abs().max() > 0.1
    again, other = draw(Setting(4, 32), 64, seed=3), draw(Setting(4, 32), 64, seed=4)
    assert torch.equal(again[0], x) and not torch.equal(other[0], x)


def test_targets_have_unit_variance():
    targets = torch.cat([draw(Setting(16, 16), 512, seed)[1] for seed in range(8)])
    assert abs(targets.square().mean().item() - 1) < 0.1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_prediction_sees_earlier_targets_only(name):
    x, y = draw(Setting(3, 16), 32, seed=0)
    changed = y.clone()
    changed[20] += 1.0
    before, after = (predictions(x, targets, (5.0,), (1e-3,))[name] for targets in (y, changed))
    same = (before == after).all(-1).all(0)  # row t is of token t + 1
    assert same[:20].all() and not same[20:].any()


def test_scales_and_ridges_are_where_the_table_says():
    x, y = draw(Setting(3, 16), 32, seed=0)
    scales, ridges = (2.0, 20.0), (1e-4, 1e-1)
    found = predictions(x, y, scales, ridges)
    for index, (scale, ridge) in enumerate((scale, ridge) for scale in scales for ridge in ridges):
        alone = predictions(x, y, (scale,), (ridge,))["local"][0]
        torch.testing.assert_close(found["local"][index], alone, rtol=1e-9, atol=1e-9)
    weights = ((x[1:] @ x[:-1].T) * 20.0).masked_fill(torch.ones(31, 31).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found["softmax"][1], weights @ y[:-1])
    last = torch.linalg.solve(x[:-1].T @ x[:-1] + 31 * 0.1 * torch.eye(3), x[:-1].T @ y[:-1])
    torch.testing.assert_close(found["ridge"][1][-1], x[-1] @ last)


def test_the_global_fit_is_the_local_one_without_bandwidth_on_mirrored_data():
    """Where every pair (k, v) has its (-k, -v), means are 0 and the intercept is, too."""
    keys, values = draw(Setting(3, 24), 24, seed=1)
    mirrored = [torch.stack([side, -side], 1).flatten(0, 1)[None, :, None] for side in (keys, values)]
    queries = keys.roll(1, 0)
    twice = queries.repeat_interleave(2, 0)[None, :, None]
    offsets, ridge = torch.tensor([0, 48], dtype=torch.int32), torch.tensor([0.01], dtype=torch.float64)
    local, _, _ = local_linear_attention(twice, *mirrored, ridge, (48,), offsets, scale=0.0)
    torch.testing.assert_close(global_ridge(queries, keys, values, 0.01), local[0, 1::2, 0])


def test_local_linear_attention_meets_its_targets_on_a_small_case():
    result = regress(SMALL)
    rows = {row["estimator"]: row for row in result["rows"]}
    assert rows["local"]["mse"] < 0.4 * rows["softmax"]["mse"] and rows["local"]["mse"] < rows["ridge"]["mse"]
    assert [len(rows[name]["last_quarters"]) for name in ESTIMATORS] == [2, 2, 2]
    assert rows["ridge"]["last_quarters"][1] > 10 * rows["ridge"]["last_quarters"][0]
    pairs = [draw(Setting(16, 256), 512, seed) for seed in (0, 1)]
    best = rows["softmax"]["scale"]
    errors = [(predictions(x, y, (best,), (1.0,))["softmax"][0] - y[1:]).square().mean(-1) for x, y in pairs]
    errors = torch.stack(errors)
    assert rows["softmax"]["mse"] == pytest.approx(errors[:, 31:].mean().item())  # from token 32 = 2 x 16 on
    assert rows["softmax"]["last_quarters"][0] == pytest.approx(errors[:, 191:255].mean().item())  # tokens 192 to 255
    holds = {target["claim"]: target["holds"] for target in result["targets"]}
    assert len(holds) == 6 and sum(holds.values()) >= 5


def test_the_command_writes_table_and_picture(farspan, tmp_path):
    options = ("--settings", "4:32,3:64", "--length", 64, "--sequences", 1)
    status, out, err = farspan("eval", "regression", *options, "--output", tmp_path)
    assert status == 0, err
    assert "local" in out and "mse of local" in (tmp_path / "regression.txt").read_text()
    result = json.loads((tmp_path / "regression.json").read_text())
    assert [(row["channels"], row["segment"]) for row in result["rows"]] == [(4, 32)] * 3 + [(3, 64)] * 3
    assert all(len(row["curve"]) == 63 for row in result["rows"])
    assert (tmp_path / "regression.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--settings", "16"), "--settings 16 are not CHANNELS:SEGMENT"),
        (("--settings", "4:30", "--length", "64"), "length=64 is no whole number of segments of 30"),
        (("--settings", "32:64", "--length", "64"), "leaves nothing to score"),
        (("--settings", "4:2", "--length", "64"), "setting 4:2 needs"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(farspan, tmp_path, options, message):
    status, _, err = farspan("eval", "regression", *options, "--output", tmp_path)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
