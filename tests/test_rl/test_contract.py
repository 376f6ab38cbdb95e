"""What the trainer takes for granted of trl: held against the version that is installed."""

import inspect
from importlib.metadata import version

import pytest
import torch

from farspan.lm.rl.credit import weights
from farspan.lm.rl.statistics import attention_statistics
from farspan.lm.rl.trainer import credit_trainer


def test_version():
    assert version("trl").startswith("1.16."), "read the rest of this file, and the trainer, before moving the pin"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_generate_single_turn", ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]),
        ("_get_per_token_logps_and_entropies", ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_tokenize_prompts", ["self", "prompts"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_get_output_dir", ["self", "trial"]),
        ("create_scheduler", ["self", "num_training_steps", "optimizer"]),
        ("create_model_card", ["self"]),
    ],
)
def test_what_is_overridden_or_called_is_there(name, parameters):
    from trl import GRPOTrainer

    found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert found[: len(parameters)] == parameters


def test_nothing_of_the_trainer_is_hidden_by_accident():
    """Attributes that the subclass sets must not be methods of trl's or transformers' trainer."""
    from trl import GRPOTrainer

    own = {
        "recipe",
        "samples",
        "_checkpoint_saver",
        "_waiting",
        "_frozen",
        "_heard",
        "_listens",
        "_uncredited",
        "_last_heads",
        "_writing",
    }
    assert not own & set(dir(GRPOTrainer))


@pytest.fixture(scope="module")
def build(policy):
    """`build(recipe)` -> a trainer on the tiny policy, without a run folder."""

    def make(recipe, folder):
        from farspan.lm.load import load
        from farspan.lm.rl.arguments import trl_arguments
        from farspan.lm.rl.inputs import Scorer, open_rl_inputs

        model, tokenizer = load(recipe.start, device="cpu", dtype="float32")
        trainer = credit_trainer()(
            model=model.train(),
            reward_funcs=[Scorer("digits", print, lambda text, _: sum(map(str.isdigit, text)))],
            args=trl_arguments(recipe, recipe.resolve(1), folder),
            train_dataset=open_rl_inputs(recipe).dataset(),
            processing_class=tokenizer,
            recipe=recipe,
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def rollout(trainer):
    rows = [trainer.train_dataset[i // 4] for i in range(16)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_the_loss_of_a_fresh_batch(recipe, build, tmp_path, loss):
    """At ratio 1 the objective is the mean of the tokens' advantages, averaged as the loss says."""
    trainer = build(recipe(update={"minibatches": 1, "loss": loss}), tmp_path)
    output = rollout(trainer)
    measured = trainer._compute_loss(trainer.model, output).item()  # its forward pass gives the credit
    advantages, mask = output["advantages"], output["completion_mask"]
    assert advantages.shape == mask.shape and not advantages.requires_grad
    total = (advantages * mask).sum()
    expected = {
        "grpo": ((advantages * mask).sum(1) / mask.sum(1)).mean(),
        "bnpo": total / mask.sum(),
        "dapo": total / output["num_items_in_batch"],
        "dr_grpo": total / (len(mask) * trainer.max_completion_length),
    }
    assert measured == pytest.approx(-expected[loss].item(), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_credit_of_an_update_is_that_of_a_pass_of_its_own(recipe, build, tmp_path, checkpointing):
    """Some rows at a time, and with layers that the backward pass computes again."""
    shape = recipe(update={"minibatches": 1, "rows_per_device": 8}, parallel={"checkpointing": checkpointing})
    trainer = build(shape, tmp_path)
    whole = rollout(trainer)
    plain, width = whole["advantages"], whole["completion_ids"].shape[1]
    assert plain.ndim == 1 and plain.abs().max() > 0
    ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1)
    attention = torch.cat([whole["prompt_mask"], whole["completion_mask"]], 1)
    response = attention * (torch.arange(ids.shape[1]) >= ids.shape[1] - width)
    credit = shape.credit
    found = attention_statistics(trainer.model, ids, attention, response, window=3, horizon=credit.fai_horizon)
    values = {name: getattr(found, name)[:, -width:] for name in ("waad", "fai", "fai_count")}
    expected = plain[:, None] * weights(credit, whole["completion_mask"].bool(), **values).gamma
    mask = whole["completion_mask"].bool()
    for first in (0, 8):
        part = {name: value[first : first + 8] if value.ndim else value for name, value in whole.items()}
        trainer._compute_loss(trainer.model, part).backward()
        own = mask[first : first + 8]
        assert torch.equal(part["advantages"][own], expected[first : first + 8][own])
    assert len(trainer.samples) == 1  # keep_samples, of the first rows


def test_minibatches_are_alike_on_any_number_of_ranks(recipe, build, tmp_path):
    trainer = build(recipe(update={"minibatches": 4}), tmp_path)
    whole = trainer._order(0, 16).view(4, 4)
    halves = [first + trainer._order(first, 8).view(4, 2) for first in (0, 8)]
    assert torch.equal(whole, torch.cat(halves, dim=1)) and sorted(whole.flatten().tolist()) == list(range(16))
    trainer.state.global_step = 4
    assert not torch.equal(whole, trainer._order(0, 16).view(4, 4))


def gradients(trainer, inputs):
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_scaling_the_advantage_is_weighting_the_loss(recipe, build, tmp_path):
    """Also where ratios are outside of the clip, for advantages of both signs; and a constant scales the gradient."""
    trainer = build(recipe(update={"minibatches": 1}, credit={"strategy": "uniform"}), tmp_path)
    output = rollout(trainer)
    old = torch.randn(output["completion_ids"].shape) - 4
    gamma = 1 + torch.rand(old.shape)
    plain = output["advantages"][:, None].expand_as(gamma)
    with torch.no_grad():
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, old.shape[1])
    ratio, mask = (now - old).exp(), output["completion_mask"]
    assert ((ratio > 1.2) & (plain > 0)).any() and ((ratio < 0.8) & (plain < 0)).any()
    per_token = -torch.min(ratio * plain, ratio.clamp(0.8, 1.2) * plain)
    expected = ((gamma * per_token * mask).sum(1) / mask.sum(1)).mean().item()
    changed = {**output, "old_per_token_logps": old, "advantages": plain * gamma}
    assert trainer._compute_loss(trainer.model, changed).item() == pytest.approx(expected, rel=1e-4)
    one = gradients(trainer, {**changed, "advantages": plain})
    larger = gradients(trainer, {**changed, "advantages": 1.5 * plain})
    assert (larger - 1.5 * one).norm() <= 1e-4 * larger.norm()  # single entries are sums that cancel, in fp32


def test_a_model_without_attention_statistics_is_refused(recipe, build, tmp_path, policy):
    from farspan import DecoderConfig, DecoderForCausalLM
    from farspan.lm.load import load

    _, tokenizer = load(str(policy), device="cpu")
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
        pad_token_id=3,
    )
    config.mixer_pattern = [{"mixer": "titans", "variant": "memory"}]
    DecoderForCausalLM(config).save_pretrained(tmp_path / "titans")
    tokenizer.save_pretrained(tmp_path / "titans")
    with pytest.raises(ValueError, match=r"has no attention statistics; credit\.strategy: uniform needs none"):
        build(recipe(start=str(tmp_path / "titans")), tmp_path)
