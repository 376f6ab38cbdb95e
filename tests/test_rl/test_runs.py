"""Whole runs: plain GRPO bit for bit, stops and kills, several processes, ZeRO, bad rewards."""

import pytest
import torch

CREDIT_OF_ONE = {"gamma_amp": 1.0}


def same(left, right, tolerance=0.0):
    """Whether two runs ended with the same weights; bit for bit where there is no tolerance.

    DeepSpeed's gathered weights hold the head beside the embedding that it is tied to.
    """
    assert left.keys() == right.keys() - {"lm_head.weight"}
    return all(torch.allclose(left[key], right[key], rtol=0, atol=tolerance) for key in left)


def constant(text, reference):
    return 1.0


def test_weight_one_everywhere_is_plain_grpo(recipe, run, weights):
    assert run(recipe(credit={"strategy": "uniform"}), name="plain") == [0]
    assert run(recipe(credit=CREDIT_OF_ONE), name="one") == [0]
    assert run(recipe(), name="coupled") == [0]
    assert same(weights("plain"), weights("one"))
    assert not same(weights("plain"), weights("coupled"))


@pytest.mark.parametrize("strategy", ["uniform", "coupled"])
def test_a_dense_reward_rises(recipe, run, records, strategy):
    changes = {"credit": {"strategy": strategy}, "train": {"steps": 20}, "rollout": {"prompts": 8}}
    assert run(recipe(**changes, optimizer={"lr": 0.01})) == [0], run.errors
    rewards = [record["reward"] for record in records()]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2, rewards


def test_a_stopped_run_goes_on_with_the_same_bits(recipe, run, weights, records, told):
    """SIGTERM in the middle of a rollout, then a kill after the next checkpoint, then to the end."""
    every = recipe(update={"minibatches": 4}, train={"checkpoint_every": 1})
    assert run(every, name="whole") == [0]
    assert run(every, faults=[{"point": "step", "step": 6, "do": "terminate"}]) == [0]
    assert "stopped at step 1.5 of 3, saved" in told()
    assert run(every, resume=True, faults=[{"point": "step", "step": 10, "do": "kill"}]) == [-9]
    assert run(every, resume=True) == [0]
    assert same(weights("whole"), weights("run"))
    kept = ("step", "reward", "entropy", "credit/gamma", "num_tokens")
    assert [[r[key] for key in kept] for r in records("run")] == [[r[key] for key in kept] for r in records("whole")]


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2, "targets": ["gate", "up"]}}, {"parallel": {"zero": 3}}])
def test_a_run_that_is_not_finished_answers(recipe, run, policy, tmp_path, monkeypatch, changes):
    """The model of a run folder is that of its newest checkpoint, until there is an export."""
    from farspan.lm.load import load

    assert run(recipe(**changes), faults=[{"point": "step", "step": 4, "do": "terminate"}]) == [0], run.errors
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load("runs/run", device="cpu")
    ids = torch.tensor([tokenizer("1+2=")["input_ids"]])
    first, _ = load(str(policy), device="cpu")
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, first(ids).logits)
    (step,) = (tmp_path / "runs/run/checkpoints").glob("step-*")
    again, _ = load(str(step), device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    next(step.glob("checkpoint-*/*.safetensors")).write_bytes(b"")
    with pytest.raises(ValueError, match="is not usable"):
        load(str(step), device="cpu")


def test_writing_answers_may_be_broken_off(recipe, run, weights, told):
    """A stop before the first update of a rollout does not wait for its answers; nothing is lost by that."""
    assert run(recipe(), name="whole") == [0]
    assert run(recipe(), faults=[{"point": "step", "step": 3, "do": "terminate"}]) == [0]
    assert "stopped at step 1 of 3, saved" in told()
    assert run(recipe(), resume=True) == [0]
    assert same(weights("whole"), weights("run"))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_two_processes_equal_one(recipe, run, weights, records, minibatches):
    one = recipe(update={"minibatches": minibatches, "rows_per_device": 4})
    assert run(one, name="one") == [0]
    assert run(one, ranks=2, name="two") == [0, 0], run.errors
    assert [r["reward"] for r in records("two")] == pytest.approx([r["reward"] for r in records("one")])
    assert same(weights("one"), weights("two"), tolerance=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero(recipe, run, weights, records, stage):
    one = recipe(update={"minibatches": 1, "rows_per_device": 4})
    assert run(one, name="one") == [0]
    shared = recipe(update={"minibatches": 1, "rows_per_device": 4}, parallel={"zero": stage})
    assert run(shared, ranks=2, name="zero") == [0, 0], run.errors
    assert [r["reward"] for r in records("zero")] == pytest.approx([r["reward"] for r in records("one")])
    # Adam takes whole steps, of 1e-2, where gradients are rounding alone: a hundredth of one is left to it.
    assert same(weights("one"), weights("zero"), tolerance=1e-4)


def raising(text, reference):
    raise KeyError("no such thing")


def sometimes_nan(text, reference):
    return float("nan") if len(text) % 2 else digits_of(text)


def digits_of(text):
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def test_rewards_that_fail_lose_no_step(recipe, run, records, told):
    assert run(recipe(), reward=sometimes_nan) == [0]
    assert len(records()) == 3
    (first, *_) = [line for line in told().splitlines() if "failed" in line]
    assert "warning: reward arithmetic failed for " in first and first.endswith("it returned nan")


def test_a_reward_that_always_fails_stops_the_run(recipe, run, tmp_path):
    assert run(recipe(train={"steps": 12, "checkpoint_every": 3}), reward=raising) == [1]
    (error,) = run.errors
    assert "for every response of 10 rollouts in a row" in error and "KeyError" in error and "\n" not in error
    assert (tmp_path / "runs/run/checkpoints/step-18/manifest.json").is_file()


def test_groups_without_variance_teach_nothing(recipe, run, weights, policy):
    from safetensors.torch import load_file

    assert run(recipe(), reward=constant) == [0]
    assert same(weights(), load_file(policy / "model.safetensors"))


@pytest.mark.parametrize("credit", [{"strategy": "random"}, {"strategy": "entropy"}, {"head_scope": "frozen"}])
def test_other_credit(recipe, run, records, credit):
    assert run(recipe(credit=credit, update={"minibatches": 1}, train={"steps": 2})) == [0], run.errors
    assert all(1 < record["credit/gamma"] <= 1.25 for record in records())


def test_lora(recipe, run, weights, policy):
    from safetensors.torch import load_file

    small = recipe(lora={"rank": 2, "targets": ["gate", "up"]}, train={"steps": 2})
    assert run(small) == [0], run.errors
    before, after = load_file(policy / "model.safetensors"), weights()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(".gate." in key or ".up." in key for key in changed)
