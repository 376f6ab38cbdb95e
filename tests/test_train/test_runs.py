"""Whole runs on real processes: resume, skipped steps, stopping, and what a run folder holds."""

import json
import os
import signal
import time

import pytest
import torch


def losses(records):
    return [record["loss"] for record in records]


def test_a_run_writes_its_folder(run, recipe_file, records, tmp_path):
    every = {"train": {"steps": 4, "validate_every": 2, "sample_every": 2, "checkpoint_every": 2}}
    assert run(recipe_file(every, {"optimizer": {"name": "muon"}})) == [0]
    folder = tmp_path / "runs" / "run"
    files = {
        "recipe.yaml",
        "command.txt",
        "environment.json",
        "metrics.jsonl",
        "loss.png",
        "samples.txt",
        "summary.json",
    }
    assert files <= {path.name for path in folder.iterdir()}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-2", "step-4"}
    assert (folder / "logs" / "rank-0.log").read_text().count("loss") >= 4
    order = (
        "step percent loss loss_max grad_norm learning_rate tokens_per_second mfu_causal mfu_full memory_gib data_wait"
    )
    assert list(records()[0])[1:15] == [*order.split(), "skipped", "seconds_left", "batch"]
    assert len(records(kind="validation")) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_loss"] == records(kind="validation")[-1]["loss"]
    assert summary["bigram_loss"] == records(kind="baseline")[0]["loss"]

    weights = folder / "checkpoints" / "step-4" / "deepspeed" / "mp_rank_00_model_states.pt"
    saved = torch.load(weights, weights_only=False)
    assert saved["universal_checkpoint_info"]["universal_checkpoint_version"] > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    import farspan  # noqa: F401 - registers the decoder

    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    ids = AutoTokenizer.from_pretrained(folder / "hf")("def return", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_is_uninterrupted_bit_for_bit(run, recipe_file, records, optimizer):
    recipe = recipe_file({"optimizer": {"name": optimizer}}, {"batch": {"rows_per_device": 2}})
    assert run(recipe, name="whole") == [0]
    killed = [{"point": "after_backward", "step": 4, "do": "kill"}]
    assert run(recipe, faults=killed) == [-signal.SIGKILL]
    assert run(recipe, resume=True) == [0]
    changing = ("tokens_per_second", "memory_gib", "data_wait", "seconds_left")
    kept = [{key: record[key] for key in record if key not in changing} for record in records()]
    assert kept == [{key: record[key] for key in record if key not in changing} for record in records("whole")]
    assert records(kind="validation")[-1] == records("whole", "validation")[-1]


@pytest.mark.parametrize(("zero", "optimizer"), [(1, "muon"), (2, "adamw"), (3, "adamw"), (3, "muon")])
def test_two_ranks_resume_and_equal_one(run, recipe_file, records, tmp_path, zero, optimizer):
    """2 ranks x 2 micro-batches, killed and resumed, against 2 ranks and against 1 x 1 of ZeRO 1 uninterrupted."""
    sections = {"optimizer": {"name": optimizer}}
    assert run(recipe_file(sections), name="one") == [0]
    recipe = recipe_file(sections, {"parallel": {"zero": zero}, "batch": {"rows_per_device": 1}})
    assert run(recipe, ranks=2, name="whole") == [0, 0]
    killed = [{"point": "after_backward", "step": 4, "do": "kill"}]
    assert run(recipe, ranks=2, faults=killed) == [-signal.SIGKILL] * 2
    assert run(recipe, ranks=2, resume=True) == [0, 0]
    assert losses(records()) == pytest.approx(losses(records("whole")), abs=1e-6)
    assert losses(records()) == pytest.approx(losses(records("one")), abs=2e-5)  # sums in another order, through Muon
    norms = [[record["grad_norm"] for record in records(name)] for name in ("run", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)
    validation = [records(name, "validation")[-1]["loss"] for name in ("run", "one")]
    assert validation[0] == pytest.approx(validation[1], abs=2e-5)

    from safetensors.torch import load_file

    exported = [load_file(tmp_path / "runs" / name / "hf" / "model.safetensors") for name in ("run", "one")]
    assert exported[0].keys() == exported[1].keys()
    for name, weight in exported[0].items():
        torch.testing.assert_close(weight, exported[1][name], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("zero", "optimizer", "precision"),
    [(1, "muon", "fp32"), (2, "adamw", "fp32"), (3, "muon", "fp32"), (1, "muon", "bf16"), (2, "muon", "bf16")],
)
def test_a_bad_step_changes_nothing(run, recipe_file, tmp_path, records, zero, optimizer, precision):
    """Weights, moments and momentum after a last step that was not applied are those of the step before."""
    from safetensors.torch import load_file

    sections = {"optimizer": {"name": optimizer}, "parallel": {"zero": zero, "precision": precision}}
    recipe = recipe_file(
        sections, {"train": {"steps": 3, "checkpoint_every": 1}, "schedule": {"name": "wsd", "decay": 0.01}}
    )
    assert run(recipe, faults=[{"point": "loss", "step": 3, "do": "nan"}]) == [0]
    assert [record["skipped"] for record in records()] == [0, 0, 1]
    assert records()[2]["loss"] is None and records()[2]["grad_norm"] is None
    files = [path / "deepspeed" for path in sorted((tmp_path / "runs" / "run" / "checkpoints").iterdir())]
    assert len(files) == 2
    states = [torch.load(next(path.glob("*optim_states.pt")), weights_only=False) for path in files]
    before, after = (_tensors(state["optimizer_state_dict"]) for state in states)
    assert len(before) == len(after) > 5
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert load_file(tmp_path / "runs" / "run" / "hf" / "model.safetensors")


def _tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in _tensors(value)]


def test_a_spike_is_not_applied(run, recipe_file, records):
    spike = {"window": 8, "history": 4}
    recipe = recipe_file({"train": {"steps": 8, "checkpoint_every": None, "spike": spike}})
    assert run(recipe, faults=[{"point": "loss", "step": 6, "do": "spike", "factor": 50.0}]) == [0]
    assert [record["skipped"] for record in records()] == [0] * 5 + [1] * 3


def test_too_many_bad_steps_stop_the_run(run, recipe_file, tmp_path):
    recipe = recipe_file({"train": {"spike": {"max_skipped": 2}}})
    bad = [{"point": "loss", "step": step, "do": "nan"} for step in (3, 4)]
    assert run(recipe, faults=bad) == [1]
    assert "2 steps in a row were not finite or spikes" in run.errors[0]
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-2").is_dir()


@pytest.mark.parametrize("point", ["data", "after_backward", "validation"])
def test_sigterm_saves_and_exits_0(run, recipe_file, records, tmp_path, point):
    recipe = recipe_file({"train": {"validate_every": 3, "checkpoint_every": None}})
    step = 4 if point == "data" else 3
    assert run(recipe, ranks=2, faults=[{"point": point, "step": step, "do": "terminate", "rank": 1}]) == [0, 0]
    assert [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert run(recipe, ranks=2, resume=True) == [0, 0]
    assert len(records()) == 6


def test_sigterm_while_waiting_for_data(run, recipe_file, tmp_path, monkeypatch):
    """The request arrives while the fourth step's data does not: three steps are saved, the fourth is not taken."""
    from farspan.lm.data.loader import Loader

    batch = Loader.batch

    def stuck(self, step, *arguments):
        if step == 3:
            time.sleep(0.5)  # the loop has come to wait for this thread
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return batch(self, step, *arguments)

    monkeypatch.setattr(Loader, "batch", stuck)
    assert run(recipe_file()) == [0]
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-3").is_dir()


def test_a_full_disk_is_one_line_and_loses_nothing(run, recipe_file, tmp_path):
    full = [{"point": "mid_save", "step": 4, "do": "full"}]
    assert run(recipe_file(), faults=full) == [2]
    assert "No space left on device" in run.errors[0]
    assert [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert run(recipe_file(), resume=True) == [0]


def test_resume_refuses_another_number_of_ranks(run, recipe_file):
    recipe = recipe_file({"train": {"steps": 2}})
    assert run(recipe, faults=[{"point": "after_save", "step": 2, "do": "kill"}]) == [-signal.SIGKILL]
    assert run(recipe, ranks=2, resume=True) == [2, 2]
    assert "use --nproc 1" in run.errors[0]


def test_a_run_of_minutes_decides_its_steps_once(run, recipe_file, records, tmp_path):
    recipe = recipe_file({"train": {"steps": None, "minutes": 0.002}})
    killed = [{"point": "after_backward", "step": 3, "do": "kill"}]
    assert run(recipe, faults=killed) == [-signal.SIGKILL]
    decided = json.loads((tmp_path / "runs" / "run" / "length.json").read_text())["total_steps"]
    assert run(recipe, resume=True) == [0]
    assert records()[-1]["step"] == decided
