"""Metrics survive a kill, rewind to a checkpoint, and are drawn."""

import json
import sys

import pytest

from farspan.lm.train.metrics import MetricsWriter, read
from farspan.lm.train.plots import plot_loss


def written(run, steps):
    writer = MetricsWriter(run)
    for step in steps:
        writer.write(
            {"kind": "train", "step": step, "loss": 4.0 - step / 100, "learning_rate": 0.01, "skipped": step // 4}
        )
    return writer


def steps(run):
    return [record["step"] for record in read(run)]


def test_each_record_is_a_line_at_once(tmp_path):
    writer = written(tmp_path, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    writer.write({"kind": "validation", "step": 2, "loss": float("nan")})
    writer.close()
    assert read(tmp_path)[-1] == {"kind": "validation", "step": 2, "loss": None}
    assert read(tmp_path / "missing") == []


def test_a_record_without_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no kind"):
        MetricsWriter(tmp_path).write({"step": 1})


def test_rewind_and_continue(tmp_path):
    writer = written(tmp_path, range(1, 9))
    writer.write({"kind": "baseline", "loss": 3.9})
    writer.rewind(5)
    writer.write({"kind": "train", "step": 6, "loss": 1.0})
    writer.close()
    records = read(tmp_path)
    assert [r.get("step") for r in records] == [1, 2, 3, 4, 5, None, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    written(tmp_path, [1, 2]).close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert steps(tmp_path) == [1, 2]
    written(tmp_path, [3]).close()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\nrubbish\n{"kind": "train"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read(tmp_path)


@pytest.mark.parametrize(
    "options, module", [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "project"}, "wandb")]
)
def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch, options, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {module.split('.')[-1]}"):
        MetricsWriter(tmp_path, **options)


def test_optional_writers_stay_unimported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    written(tmp_path, [1]).close()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write({"kind": "train", "step": 3, "loss": 2.5, "batch": "ab12"})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]


def test_plot_is_a_picture_for_any_amount_of_data(tmp_path):
    writer = MetricsWriter(tmp_path)
    for part in ([], [1], range(2, 40)):
        for step in part:
            loss = float("nan") if step == 7 else 5 - step / 20
            writer.write({"kind": "train", "step": step, "loss": loss, "learning_rate": 0.1, "skipped": int(step >= 7)})
        path = plot_loss(tmp_path)
        assert path == tmp_path / "loss.png" and path.read_bytes().startswith(b"\x89PNG")
    writer.write({"kind": "validation", "step": 30, "loss": 4.0})
    writer.write({"kind": "baseline", "name": "bigram", "loss": 3.9})
    before = path.read_bytes()
    assert plot_loss(tmp_path).read_bytes() != before
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
