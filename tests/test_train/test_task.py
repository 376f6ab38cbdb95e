"""Runs on a synthetic task: no corpus, no tokenizer, the same on any ranks; what `farspan eval recall` says of them."""

import json

import pytest
import yaml

from farspan.eval.recall import score
from farspan.lm.data.spec import TaskSpec
from farspan.lm.data.tasks import examples
from farspan.lm.recipe import load_recipe

MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def task_recipe(tmp_path):
    """`task_recipe("recall", ...)` -> the path of a tiny recipe on that task, with these sections merged in."""

    def write(task, **sections):
        values = {
            "data": {"task": {"name": task, "vocab_size": 128, "items": 4}},
            "model": MODEL,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "batch": {"tokens": 256, "sequence_length": 32},
            "train": {"steps": 4, "log_every": 1, "checkpoint_every": 2, "validate_every": 2, "sample_every": None},
            "evaluation": {"tokens": 256},
        }
        path = tmp_path / f"{task}.yaml"
        path.write_text(yaml.safe_dump({**values, **sections}))
        return path

    return write


def test_ranks_and_context_change_nothing(run, task_recipe, records):
    assert run(task_recipe("permutations"), name="one") == [0]
    assert run(task_recipe("permutations", parallel={"ring": 2}), ranks=4, name="four") == [0] * 4
    losses = [[record["loss"] for record in records(name)] for name in ("one", "four")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert [r["batch"] for r in records("one")] == [r["batch"] for r in records("four")]
    assert run(task_recipe("permutations"), name="one", resume=True) == [0]


def test_a_run_on_a_task_is_trained_and_judged(command, task_recipe, tmp_path):
    status, out, err = command("train", task_recipe("recall"))
    assert status == 0, err
    assert "accuracy" in out
    assert not list((tmp_path / "runs" / "recall" / "hf").glob("tokenizer*"))
    status, out, err = command(
        "eval", "recall", "runs/recall", "--multiples", "1,2", "--rows", "8", "--output", "found"
    )
    assert status == 0, err
    assert "softmax" in out and "(trained)" in out
    rows = json.loads((tmp_path / "found" / "recall.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [32, 64] and all(row["answers"] == 32 for row in rows)
    assert (tmp_path / "found" / "recall.png").stat().st_size > 5000
    status, _, err = command("generate", "runs/recall", "def ")
    assert status == 2 and "has no tokenizer: it was trained on a task" in err


def test_needles_are_looked_for_while_a_run_trains(command, task_recipe, recipe_file, records, tmp_path):
    needle = {"tasks": ["needle_tok"], "lengths": [20, 40], "depths": [0, 100], "samples": 2}
    recipe = task_recipe("needle", evaluation={"tokens": 64, "needle": needle})
    status, out, err = command("train", recipe)
    assert status == 0, err
    assert "needle_tok_tf" in out and "accuracy" in out
    run = tmp_path / "runs" / "needle"
    assert (run / "needle.png").read_bytes() == (run / "needle" / "step-4" / "heatmap_needle_tok_tf.png").read_bytes()
    assert {path.name for path in (run / "needle").iterdir()} == {"step-2", "step-4"}
    assert all(0 <= record["needle_tok_tf"] <= 1 for record in records("needle", "validation"))
    text = {"evaluation": {"needle": {"lengths": [300], "depths": [50], "samples": 1}}, "train": {"steps": 2}}
    status, out, err = command("train", recipe_file(text))
    assert status == 0, err
    assert "needle_s1_tf" in out and (tmp_path / "runs" / "tiny" / "needle.png").is_file()


@pytest.mark.parametrize(
    ("needle", "message"),
    [({"tasks": ["needle_s11"]}, "the nearest names are needle_s1"), ({}, "is text, a run on data.task has none")],
)
def test_impossible_needles_stop_before_the_run(command, task_recipe, tmp_path, needle, message):
    status, _, err = command("train", task_recipe("needle", evaluation={"needle": needle}))
    assert status == 2 and message in err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/none",), "runs/none is not a run folder"),
        (("runs/none", "--multiples", "1,x"), "not whole numbers separated by commas"),
    ],
)
def test_wrong_runs_are_one_line(command, arguments, message):
    status, _, err = command("eval", "recall", *arguments)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tokenizer": {"path": "t"}}, "leave the tokenizer section out"),
        ({"data": {"task": {"name": "recal"}}}, "data.task.name"),
        ({"data": {"task": {"name": "recall"}, "path": "corpus"}}, "data.task is made, not read"),
    ],
)
def test_impossible_recipes_are_one_line(task_recipe, sections, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(task_recipe("recall", **sections))


class Knowing:
    """A model that gives the answers it was told, all but every third."""

    def __init__(self, task, length, seed):
        import torch

        made = examples(task, length, (seed, 1), 0, 32)
        self.by_row = {tokens.tobytes(): labels for tokens, labels in zip(*made, strict=True)}
        self.weight, self.training, self.vocabulary = torch.zeros(1), False, task.vocab_size

    def parameters(self):
        return iter([self.weight])

    def eval(self):
        return self

    def train(self, mode):
        self.training = mode

    def __call__(self, tokens, use_cache):
        import torch
        from transformers.modeling_outputs import CausalLMOutput

        labels = torch.stack([torch.from_numpy(self.by_row[row.numpy().tobytes()]) for row in tokens])
        asked = (labels != -100).cumsum(1)
        labels = torch.where(asked % 3 == 0, (labels + 1) % self.vocabulary, labels).clamp(min=0)
        return CausalLMOutput(logits=torch.nn.functional.one_hot(labels, self.vocabulary).float() * 50)


def test_scores_count_answers():
    task = TaskSpec(name="permutations", vocab_size=120)
    found = score(Knowing(task, 30, 5), task, 30, 32, 5)
    assert found.answers == 32 * 30 and found.accuracy == pytest.approx(2 / 3) and found.exact == 0
    assert found.low < 2 / 3 < found.high
