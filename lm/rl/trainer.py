"""GRPO with credit for tokens: trl's GRPOTrainer, its advantages multiplied by what attention says of each token.

What is overridden, and why (tests/test_rl/test_contract.py holds it against the pinned trl):

    _generate_and_score_completions     advantages [B] become [B, T]; everything after it is trl's
    _get_per_token_logps_and_entropies  the pass for old log-probabilities is listened to: no other pass is needed
    _compute_loss                       where there is none, the update's own forward pass is
    _prepare_inputs                     minibatches are composed alike on any number of ranks
    _generate_single_turn               responses are sampled by `lm/rl/sampling.py`, the same on any number of ranks
    create_scheduler                    the recipe's schedule
    _save_checkpoint, _load_optimizer_and_scheduler   checkpoints that are whole or not there, with the rollout in use
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from farspan.lm.rl.credit import Weights, scaled, weights
from farspan.lm.rl.metrics import credit_metrics
from farspan.lm.rl.sampling import response_seed, sample
from farspan.lm.rl.spec import RLRecipe
from farspan.lm.rl.statistics import HeadGroups, Options, Statistics, collect, head_groups
from farspan.lm.train.schedule import factor

_ROLLOUT = "rollout-{rank}.pt"


@functools.cache
def credit_trainer() -> type:
    """The trainer's class, made at the first use: trl takes seconds to import."""
    from trl import GRPOTrainer

    return type("CreditTrainer", (_CreditTrainer, GRPOTrainer), {"_tag_names": ["trl", "grpo", "farspan"]})


class _CreditTrainer:
    """What trl's GRPOTrainer leaves to the recipe.

    recipe: its rollout, update and credit sections; the rest comes as trl's own arguments do.
    save: called with (step, write) at each checkpoint, in place of a folder in output_dir; `write(path)` fills `path`.
    waiting: makes a context around sampling, which may take minutes and which nothing is lost by breaking off.
    """

    def __init__(
        self,
        *arguments: Any,
        recipe: RLRecipe,
        save: Callable[[int, Callable[[Path], None]], None] | None = None,
        waiting: Callable[[], Any] = nullcontext,
        **options: Any,
    ) -> None:
        self.recipe, self._checkpoint_saver, self._waiting = recipe, save, waiting
        self._frozen: HeadGroups | None = None
        self._heard: Statistics | None = None
        self._listens = False
        self._uncredited: dict[str, Any] | None = None
        self._last_heads: torch.Tensor | None = None
        self.samples: list[dict[str, Any]] = []
        self._writing: Path | None = None
        super().__init__(*arguments, **options)
        if recipe.credit.looks_at_attention:
            from farspan.lm.rl.tap import sampled_layers

            sampled_layers(self.model, recipe.credit.layers)  # a model without attention statistics is refused here

    # Generation

    @property
    def rollout_number(self) -> int:
        """Of the rollout in use, from 0."""
        return self.state.global_step // self.recipe.updates_per_step

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        with self.policy() as model:
            first = self.accelerator.process_index * len(prompt_ids)
            seeds = [response_seed(self.args.seed, self.rollout_number, first + row) for row in range(len(prompt_ids))]
            rollout = self.recipe.rollout
            return self.sample(model, prompt_ids, seeds, rollout.temperature, rollout.rows_per_device), None

    def sample(self, model: Any, prompts: list[list[int]], seeds, temperature: float, rows: int | None = None):
        """Responses to tokenized prompts, by the recipe's length; `model` is that of `policy`."""
        with self._waiting():
            return sample(
                model,
                prompts,
                tokens=self.recipe.rollout.tokens,
                temperature=temperature,
                seeds=seeds,
                ends=self.eos_token_ids,
                padding=self._tokenizer.pad_token_id,
                rows=rows,
            )

    def policy(self) -> Any:
        """A context with the policy as a model that generates, its parameters gathered under ZeRO-3."""
        from trl.models.utils import unwrap_model_for_generation

        return unwrap_model_for_generation(self.model_wrapped, self.accelerator)

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        number, steps = self._step, self.args.steps_per_generation
        if self._buffered_inputs is None or number % (steps * self.num_iterations) == 0:
            from trl.trainer.utils import split_tensor_dict

            rollout = self._generate_and_score_completions(generation_batch)
            count = len(rollout["completion_ids"])
            order = self._order(self.accelerator.process_index * count, count).to(rollout["completion_ids"].device)
            rows = {name: value[order] if value.ndim else value for name, value in rollout.items()}
            self._buffered_inputs = split_tensor_dict(rows, steps)
        return self._buffered_inputs[number % steps]

    def _order(self, first: int, count: int) -> torch.Tensor:
        """Rows first .. first + count of the rollout, minibatch after minibatch.

        Of every run of as many rows as there are minibatches each takes one, by a hash: a rank needs its own rows only.
        """
        minibatches, order = self.recipe.update.minibatches, []
        for start in range(0, count, minibatches):
            seed = response_seed(self.args.seed, self.rollout_number, first + start, "minibatches")
            order.append(start + torch.randperm(minibatches, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(order, dim=1).flatten()

    # Credit

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        credit = self.recipe.credit
        self._heard, self._listens, self.samples = None, credit.looks_at_attention, []
        try:
            output = super()._generate_and_score_completions(inputs)
            if self._listens and self._heard is None and self._options().head_scope == "batch":
                self._score(output)  # heads are ranked by the whole rollout, so the passes of updates come too late
        finally:
            self._listens = False
        if credit.strategy != "uniform" and (self._heard is not None or not credit.looks_at_attention):
            self._give_credit(output, self._heard)
        return output

    def _compute_loss(self, model, inputs):
        if self.model.training and self.recipe.credit.looks_at_attention and inputs["advantages"].ndim == 1:
            self._uncredited = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._uncredited = None

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **options):
        """The pass of an update gives the credit that its loss is about to use."""
        score = super()._get_per_token_logps_and_entropies
        inputs, self._uncredited = self._uncredited, None
        if inputs is None and not (self._listens and model is self.model):
            return score(model, input_ids, attention_mask, logits_to_keep, *rest, **options)
        responses = _responses(attention_mask, logits_to_keep)
        with collect(model, attention_mask, responses, self._options()) as listening:
            result = score(model, input_ids, attention_mask, logits_to_keep, *rest, **options)
        if inputs is None:
            self._heard = self._agreed(listening.statistics())
        else:
            self._give_credit(inputs, listening.statistics())
        return result

    def _give_credit(self, output: dict[str, Any], statistics: Statistics | None) -> None:
        """Replaces the advantages [B] by [B, T], and logs what was weighted."""
        credit, mask = self.recipe.credit, output["completion_mask"].bool()
        advantages, width = output["advantages"], mask.shape[1]
        given: dict[str, Any] = {}
        if credit.strategy == "random":
            first = self.accelerator.process_index * len(mask)
            given["seeds"] = [
                response_seed(self.args.seed, self.rollout_number, first + row, "credit") for row in range(len(mask))
            ]
        elif credit.strategy == "entropy":
            given["entropy"] = self._score(output)[1]
        else:
            given = {name: getattr(statistics, name)[:, -width:] for name in ("waad", "fai", "fai_count")}
        made = weights(credit, mask, **given)
        output["advantages"] = scaled(advantages, made.gamma, credit.sign)
        heads = None if statistics is None else self._heads(statistics)
        for name, value in credit_metrics(made, mask, given, statistics, self._last_heads, heads).items():
            self._metrics["train"][f"credit/{name}"].append(self._mean_over_ranks(value))
        self._last_heads = heads
        self._keep_samples(output, made, advantages, given)

    def _options(self) -> Options:
        credit = self.recipe.credit
        scope = credit.head_scope
        if scope == "frozen" and self._frozen is None:
            scope = "batch"  # the first rollout ranks the heads for good
        frozen = self._frozen if scope == "frozen" else None
        return Options(credit.layers, credit.waad_window, credit.fai_horizon, credit.head_fraction, scope, frozen)

    def _agreed(self, statistics: Statistics) -> Statistics:
        """Keeps the heads of the first rollout, the main rank's, where they are to be frozen."""
        if self.recipe.credit.head_scope == "frozen" and self._frozen is None:
            from accelerate.utils import broadcast

            groups = (broadcast(heads[0].contiguous()) for heads in (statistics.local_heads, statistics.global_heads))
            self._frozen = HeadGroups(*(heads.cpu() for heads in groups))
        return statistics

    def _score(self, output: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Log-probabilities and entropies [B, T] of a rollout, without gradients."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        width, rows = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
        with torch.no_grad():
            return self._get_per_token_logps_and_entropies(
                self.model, ids, attention, width, rows, compute_entropy=True
            )

    def _heads(self, statistics: Statistics) -> torch.Tensor:
        """Local and global heads of the batch's mean distances, to see how much the groups move."""
        groups = head_groups(statistics.head_distance.mean(0), self.recipe.credit.head_fraction)
        return torch.stack([groups.local_heads, groups.global_heads])

    def _mean_over_ranks(self, value: float) -> float:
        gathered = self.accelerator.gather(torch.tensor([value], dtype=torch.float64, device=self.args.device))
        return gathered.nanmean().item()

    def _keep_samples(self, output, made: Weights, advantages: torch.Tensor, given: dict[str, Any]) -> None:
        """The first responses of the rollout, token by token, for `samples.jsonl`."""
        for row in range(min(self.recipe.train.keep_samples - len(self.samples), len(advantages))):
            length = int(output["completion_mask"][row].sum())
            tokens = self._tokenizer.convert_ids_to_tokens(output["completion_ids"][row, :length].tolist())
            values = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
            columns = {name: value[row, :length].tolist() for name, value in {**values, "gamma": made.gamma}.items()}
            self.samples.append({"advantage": advantages[row].item(), "tokens": tokens, **columns})

    def create_scheduler(self, num_training_steps, optimizer=None):
        spec = self.recipe.schedule
        if self.lr_scheduler is None:
            rate = (lambda _: 1.0) if spec is None else functools.partial(factor, spec, total_steps=num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
        return self.lr_scheduler

    # Checkpoints

    def _get_output_dir(self, trial):
        return str(self._writing) if self._writing is not None else super()._get_output_dir(trial)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """The run folder says what there is to say."""

    def _save_checkpoint(self, model, trial):
        if self._checkpoint_saver is None:
            return super()._save_checkpoint(model, trial)

        def write(path: Path) -> None:
            self._writing = path
            try:
                super(_CreditTrainer, self)._save_checkpoint(model, trial)
            finally:
                self._writing = None
            torch.save(self._rollout_state(), path / _ROLLOUT.format(rank=self.accelerator.process_index))

        self._checkpoint_saver(self.state.global_step, write)

    def _rollout_state(self) -> dict[str, Any]:
        """What trl forgets: the rollout that the next updates learn from, and the log line that is being made."""
        frozen = None if self._frozen is None else [self._frozen.local_heads, self._frozen.global_heads]
        return {
            "step": self._step,
            "buffered": self._buffered_inputs,
            "frozen": frozen,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "heads": self._last_heads,
        }

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._checkpoint_saver is None:
            return
        file = Path(checkpoint).parent / _ROLLOUT.format(rank=self.accelerator.process_index)
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        self._step, self._buffered_inputs, self._last_heads = state["step"], state["buffered"], state["heads"]
        self._frozen = None if state["frozen"] is None else HeadGroups(*(heads.cpu() for heads in state["frozen"]))
        for name, values in state["metrics"].items():
            self._metrics["train"][name] = values


def _responses(attention_mask: torch.Tensor, width: int) -> torch.Tensor:
    """The attention mask's last `width` columns; 0 before."""
    responses = attention_mask.clone()
    responses[:, : attention_mask.shape[1] - width] = 0
    return responses
