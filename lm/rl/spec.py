"""The recipe of `farspan rl`: which model, which task, how much is sampled, how it is learned, what gets the credit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from farspan.lm.recipe import Fraction, Positive, PositiveFloat, ScheduleSpec, Section, listed

GENERATED = ("arithmetic", "countdown")
STRATEGIES = ("local", "anchor", "coupled")  # those that look at attention
Threshold = float | Annotated[str, Field(pattern=r"^(median|quantile:(0(\.\d+)?|1(\.0+)?|\.\d+))$")]


class TaskSpec(Section):
    """What is asked and how it is scored: a generated task, or records with a question and an answer.

    name: arithmetic, countdown (generated); gsm8k, boxed, choice (records, by the reward they are scored with)
    jsonl, hub: glob of files or name on the hub (with subset and split), for any name but the generated ones
    question, answer: columns of a record. template: text around the question, "{question}"; default: the task's own
    chat: questions become conversations in the tokenizer's chat template, after `system` if there is one
    numbers, largest, operations: of a generated expression
    held_out: records kept for validation (from the end), or generated ones that training never sees
    """

    name: Literal["arithmetic", "countdown", "gsm8k", "boxed", "choice"]
    jsonl: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    question: str = "question"
    answer: str = "answer"
    template: str | None = None
    chat: bool = False
    system: str | None = None
    numbers: Annotated[int, Field(ge=2, le=6)] = 3
    largest: Annotated[int, Field(ge=1)] = 9
    operations: Annotated[str, Field(pattern=r"^[-+*/]+$")] = "+-*"
    held_out: Positive = 256

    @model_validator(mode="after")
    def _one_origin(self) -> TaskSpec:
        given = [key for key in ("jsonl", "hub") if getattr(self, key) is not None]
        if self.name in GENERATED and given:
            raise ValueError(f"task.{given[0]} has no meaning for {self.name}, which is generated; remove it")
        if self.name not in GENERATED and len(given) != 1:
            found = " and ".join(f"task.{key}" for key in given) or "neither"
            raise ValueError(f"task.name={self.name} needs exactly one of task.jsonl and task.hub; found {found}")
        if self.template is not None and "{question}" not in self.template:
            raise ValueError('task.template does not contain "{question}", where the question goes')
        if self.system is not None and not self.chat:
            raise ValueError(
                "task.system is a turn of a conversation; set task.chat=true, or put it into task.template"
            )
        return self


class RolloutSpec(Section):
    """What is sampled at a step, over all ranks: `prompts` questions, `group` answers to each, of at most `tokens`."""

    prompts: Positive
    group: Annotated[int, Field(ge=2)]
    tokens: Positive
    temperature: PositiveFloat = 1.0
    rows_per_device: Positive | None = None  # answers written at once; default: all of the device's


class UpdateSpec(Section):
    """How a rollout is learned: in `minibatches` updates, `passes` times over, by the clipped objective.

    epsilon: the ratio's clip below 1, and above where epsilon_high is not given. loss: how tokens are averaged, by
    trl's names. kl: weight of the divergence from the initial policy, which costs a second model.
    """

    minibatches: Positive = 1
    passes: Positive = 1
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epsilon_high: PositiveFloat | None = None
    kl: Annotated[float, Field(ge=0)] = 0.0
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    scale: Literal["group", "batch", "none"] = "group"
    mask_truncated: bool = False
    rows_per_device: Positive | None = None  # responses whose gradient is computed at once; default: all


class CreditSpec(Section):
    """Which tokens get more weight, see `lm/rl/credit.py` and docs/rl.md.

    strategy: uniform is plain GRPO. bottom: the lowest scores instead of the highest, a control that must hurt.
    The first published version is `sign: nonneg` and `fai_horizon: [10, 50]`; the defaults are the second's.
    """

    strategy: Literal["uniform", "random", "entropy", "local", "anchor", "coupled"] = "coupled"
    bottom: bool = False
    sign: Literal["both", "nonneg", "neg"] = "both"
    gamma_amp: Annotated[float, Field(ge=1)] = 1.5
    top_fraction: Fraction = 0.4
    alpha: Fraction = 0.5
    k: Annotated[int, Field(ge=0)] = 3
    tau_waad: Threshold = "median"
    tau_delta: Threshold = "median"
    delta_mode: Literal["abs", "drop"] = "abs"
    intro_count: Literal["set", "multi"] = "set"
    renorm: Literal["none", "mean1"] = "none"
    fai_min_count: Positive = 1
    row_shift: Literal[0, -1] = 0
    layers: Positive = 5
    head_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.30
    head_scope: Literal["response", "batch", "frozen"] = "response"
    waad_window: Positive = 10
    fai_horizon: tuple[Annotated[int, Field(ge=0)], Positive] = (10, 100)

    @model_validator(mode="after")
    def _meaningful(self) -> CreditSpec:
        low, high = self.fai_horizon
        if low > high:
            raise ValueError(f"credit.fai_horizon=[{low}, {high}] ends before it begins; the second is the farther")
        if self.bottom and self.strategy in ("uniform", "random"):
            raise ValueError(f"credit.bottom has no meaning for {self.strategy}, which ranks nothing; remove it")
        return self

    @property
    def looks_at_attention(self) -> bool:
        return self.strategy in STRATEGIES


class RLOptimizerSpec(Section):
    """AdamW; clip: of the gradient's norm."""

    lr: PositiveFloat = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: PositiveFloat = 1.0


class LoraSpec(Section):
    """Low-rank adapters in place of all weights (needs peft). targets: names of linear layers; default: all of them."""

    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | None = None


class RLParallelSpec(Section):
    """zero: 0 keeps everything on every rank; 2 and 3 are DeepSpeed's."""

    zero: Literal[0, 2, 3] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    checkpointing: bool = False  # recompute activations in the backward pass


class RLTrainSpec(Section):
    """Everything is counted in steps: one rollout and all of its updates."""

    steps: Positive
    log_every: Positive = 1
    validate_every: Positive | None = 50
    checkpoint_every: Positive | None = 50
    keep_checkpoints: Positive = 2
    keep_samples: Annotated[int, Field(ge=0)] = 4  # responses of each logged step in samples.jsonl, token by token
    tensorboard: bool = False
    wandb: str | None = None  # the wandb project


class RLEvaluationSpec(Section):
    """Held-out accuracy: `samples` answers to each of `prompts` held-out questions; greedy at temperature 0."""

    prompts: Positive = 128
    samples: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True)
class RLShares:
    """How a step's responses are cut: `rows` = updates * accumulation * micro_rows * ranks."""

    rows: int
    updates: int
    micro_rows: int
    accumulation: int
    ranks: int
    reason: str


class RLRecipe(Section):
    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]
    description: str = ""
    expected: str = "not yet measured"
    seed: int = 0
    start: Annotated[str, Field(min_length=1)]  # the policy to begin with: MODEL, as the command line takes it
    task: TaskSpec
    rollout: RolloutSpec
    update: UpdateSpec = UpdateSpec()
    credit: CreditSpec = CreditSpec()
    optimizer: RLOptimizerSpec = RLOptimizerSpec()
    schedule: ScheduleSpec | None = None  # default: a constant rate
    lora: LoraSpec | None = None
    parallel: RLParallelSpec = RLParallelSpec()
    train: RLTrainSpec
    evaluation: RLEvaluationSpec = RLEvaluationSpec()

    @model_validator(mode="after")
    def _possible(self) -> RLRecipe:
        rows = self.rollout.prompts * self.rollout.group
        if rows % self.update.minibatches:
            raise ValueError(
                f"rollout.prompts={self.rollout.prompts} times rollout.group={self.rollout.group} is {rows} responses, "
                f"which update.minibatches={self.update.minibatches} does not divide"
            )
        if self.lora is not None and self.parallel.zero == 3:
            raise ValueError("lora with parallel.zero=3 cannot be merged at the end; use parallel.zero=2")
        if self.evaluation.prompts > self.task.held_out:
            raise ValueError(
                f"evaluation.prompts={self.evaluation.prompts} is more than task.held_out={self.task.held_out}; "
                "raise the latter"
            )
        return self

    def resolve(self, ranks: int) -> RLShares:
        """Cuts the responses of a step over `ranks` processes; ValueError where they do not divide."""
        rows, updates = self.rollout.prompts * self.rollout.group, self.update.minibatches
        if rows % (updates * ranks):
            counts = [n for n in range(1, rows // updates + 1) if rows // updates % n == 0]
            raise ValueError(
                f"an update has {rows // updates} responses (rollout.prompts * rollout.group / update.minibatches), "
                f"which {ranks} processes do not divide; use --nproc {listed(counts)}"
            )
        own = rows // (updates * ranks)
        most = min(self.update.rows_per_device or own, own)
        micro = max(n for n in range(1, most + 1) if own % n == 0)
        reason = (
            f"{rows} responses a step: {updates * self.update.passes} updates of {rows // updates}, on each of {ranks} "
            f"{'rank' if ranks == 1 else 'ranks'} {own // micro} times {micro}"
        )
        return RLShares(rows, updates, micro, own // micro, ranks, reason)

    @property
    def updates_per_step(self) -> int:
        return self.update.minibatches * self.update.passes

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
