"""Recipes: everything a run needs, in one YAML file, validated before anything is built.

A recipe may `extends: other.yaml` (relative to itself), and the command line overrides single values with
`key.path=value` (the value is YAML). Recipes are data: they are read with `yaml.safe_load` and can run no code.
"""

import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from farspan.lm.data.spec import DataSpec, TokenizerSpec
from farspan.lm.parallelism import Parallelism, choose_parallelism
from farspan.lm.recipe_file import LENGTHS, read_recipe

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StartSpec(Section):
    """Weights in place of random ones, see `lm/initial.py`; the command line's MODEL.

    trainable: all, qkv (the mixers without what projects their output back) or qkvo (the mixers); the rest is frozen.
    """

    weights: Annotated[str, Field(min_length=1)]
    trainable: Literal["all", "qkv", "qkvo"] = "all"


class OptimizerSpec(Section):
    """AdamW for everything, or Muon for the hidden matrices with AdamW for embeddings, head and 1-D parameters."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 3e-4
    adam_lr: PositiveFloat | None = None  # muon only: the rate of its AdamW part; default lr / 4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = False
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: Fraction | None = None  # muon only; default 0.95
    clip: PositiveFloat | None = None  # adamw only; default 1.0

    @model_validator(mode="after")
    def _one_kind(self) -> "OptimizerSpec":
        if self.name == "muon" and self.clip is not None:
            raise ValueError(
                "optimizer.clip has no meaning with muon, whose update has the same size for any gradient; remove it"
            )
        for key in ("adam_lr", "momentum"):
            if self.name == "adamw" and getattr(self, key) is not None:
                raise ValueError(f"optimizer.{key} belongs to muon; remove it, or set optimizer.name=muon")
        return self


class ScheduleSpec(Section):
    """The learning rate over the run: a factor on the optimizer's rates, see `lm/train/schedule.py`."""

    name: Literal["cosine", "wsd"] = "cosine"
    warmup: Annotated[int | float, Field(ge=0)] = (
        0.02  # steps if a whole number of 1 or more, else a fraction of the run
    )
    decay: Annotated[float, Field(gt=0, le=1)] | None = None  # wsd only: fraction of the run; default 0.2
    final: Fraction = 0.1

    @model_validator(mode="after")
    def _shares(self) -> "ScheduleSpec":
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"schedule.warmup={self.warmup} is neither a number of steps nor a fraction below 1")
        if self.name == "cosine" and self.decay is not None:
            raise ValueError("schedule.decay belongs to wsd; remove it, or set schedule.name=wsd")
        if self.warmup < 1 and self.warmup + (self.decay or 0) > 1:
            raise ValueError(f"schedule.warmup={self.warmup} and decay={self.decay} are more than the whole run")
        return self


class BatchSpec(Section):
    """One optimizer step, over all ranks."""

    tokens: Positive
    sequence_length: Positive
    rows_per_device: Positive | None = None  # most rows that one device takes at once; default: all of its rows

    @model_validator(mode="after")
    def _whole_rows(self) -> "BatchSpec":
        if self.tokens % self.sequence_length:
            nearest = max(1, round(self.tokens / self.sequence_length)) * self.sequence_length
            raise ValueError(
                f"batch.tokens={self.tokens} is not a multiple of batch.sequence_length={self.sequence_length}; "
                f"use batch.tokens={nearest}"
            )
        return self


class ParallelSpec(Section):
    zero: Literal[1, 2, 3] = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    checkpointing: bool = False  # recompute activations in the backward pass
    context: Positive | None = None  # ranks that share the tokens of each row; default: ring x ulysses, or 1
    ring: Positive | None = (
        None  # of these, ranks between which keys travel; what is left out is chosen (lm/parallelism.py)
    )
    ulysses: Positive | None = None  # ranks that exchange heads, neighbours on one node
    layout: Literal["auto", "contiguous", "zigzag"] = "auto"  # which tokens a rank holds
    attention: Literal["auto", "gather", "ring"] = "auto"  # how full attention meets the keys of other ring ranks
    timeout: PositiveFloat = 300.0  # seconds that a rank may keep the others of its context waiting

    @property
    def context_size(self) -> int:
        """Ranks that share each row."""
        return self.context or (self.ring or 1) * (self.ulysses or 1)

    @model_validator(mode="after")
    def _multiplies(self) -> "ParallelSpec":
        given = {name: getattr(self, name) for name in ("ring", "ulysses") if getattr(self, name) is not None}
        ranks = math.prod(given.values())
        if self.context is not None and (self.context % ranks or (len(given) == 2 and ranks != self.context)):
            named = " x ".join(f"parallel.{name}={value}" for name, value in given.items())
            raise ValueError(f"{named} does not give parallel.context={self.context}; change one, or leave one out")
        return self


class SpikeSpec(Section):
    """A step whose loss or gradient norm exceeds mean + sigma * deviation of the last `window` steps is not applied."""

    window: Annotated[int, Field(ge=2)] = 128
    sigma: PositiveFloat = 6.0
    history: Annotated[int, Field(ge=2)] = 64  # steps seen before anything is called a spike
    max_skipped: Positive = 16  # in a row, for any reason; then the run stops

    @model_validator(mode="after")
    def _reachable(self) -> "SpikeSpec":
        if self.history > self.window:
            raise ValueError(
                f"train.spike.history={self.history} is more than train.spike.window={self.window}; "
                "use at most the window"
            )
        return self


class TrainSpec(Section):
    steps: Positive | None = None
    minutes: PositiveFloat | None = None
    tokens: Positive | None = None
    log_every: Positive = 10
    validate_every: Positive | None = 500
    sample_every: Positive | None = 1000
    checkpoint_every: Positive | None = 1000
    keep_checkpoints: Positive = 2
    spike: SpikeSpec = SpikeSpec()
    tensorboard: bool = False
    wandb: str | None = None  # the wandb project

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        given = [f"train.{name}={getattr(self, name)}" for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"exactly one of train.steps, train.minutes, train.tokens says how long; found {found}")
        return self


class NeedleSpec(Section):
    """Needles at every validation, see `farspan eval needle`; a heat map of the newest beside the loss."""

    tasks: tuple[str, ...] = ("needle_s1",)
    lengths: tuple[Positive, ...] | None = None  # default: a half and the whole of batch.sequence_length
    depths: tuple[Annotated[float, Field(ge=0, le=100)], ...] = (0, 25, 50, 75, 100)
    samples: Positive = 5
    protocol: Literal["gen", "tf", "mc"] = "tf"


class EvaluationSpec(Section):
    tokens: Positive = 65536  # of the validation split, at each validation
    prompts: tuple[str, ...] = ("def ",)
    sample_tokens: Positive = 64
    needle: NeedleSpec | None = None


@dataclass(frozen=True)
class Shares:
    """How one step is cut: `rows` = replicas * accumulation * micro_rows.

    A replica is the `context` ranks that share each of its rows; rows_per_replica of the step are its own.
    """

    rows: int
    rows_per_replica: int
    micro_rows: int
    accumulation: int
    context: int
    reason: str

    @property
    def replicas(self) -> int:
        return self.rows // self.rows_per_replica


class Recipe(Section):
    name: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+$")]
    description: str = ""
    expected: str = "not yet measured"
    seed: int = 0
    tokenizer: TokenizerSpec | None = None  # a task has none
    data: DataSpec
    start: StartSpec | None = None  # default: random weights
    model: dict[str, Any] = {}
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    batch: BatchSpec
    parallel: ParallelSpec = ParallelSpec()
    train: TrainSpec
    evaluation: EvaluationSpec = EvaluationSpec()

    @property
    def rows(self) -> int:
        """Of one optimizer step."""
        return self.batch.tokens // self.batch.sequence_length

    @model_validator(mode="after")
    def _tokenizer_or_task(self) -> "Recipe":
        if (self.tokenizer is None) != (self.data.task is not None):
            raise ValueError(
                "tokenizer is missing; every recipe with a corpus states it"
                if self.tokenizer is None
                else "data.task is made of tokens; leave the tokenizer section out (tokenizer=null)"
            )
        return self

    def resolve(self, world_size: int) -> Shares:
        """Cuts the batch over `world_size` ranks; ValueError where it does not divide."""
        length, rows = self.batch.sequence_length, self.rows
        context = self.parallel.context_size
        if world_size % context:
            raise ValueError(
                f"parallel.context={context} ranks share each row, which do not divide {world_size} "
                f"{'process' if world_size == 1 else 'processes'}; use --nproc {context}, or a multiple of it"
            )
        replicas = world_size // context
        if rows % replicas:
            below, above = rows // replicas * replicas * length, -(-rows // replicas) * replicas * length
            sizes = f"{below} or {above}" if below else f"{above}"
            shared = f" in groups of {context}" if context > 1 else ""
            counts = [divisor * context for divisor in _divisors(rows)]
            raise ValueError(
                f"batch.tokens={self.batch.tokens} is {rows} rows of {length}, which {world_size} processes{shared} do "
                f"not divide; use batch.tokens={sizes}, or --nproc {listed(counts)}"
            )
        own = rows // replicas
        most = min((self.batch.rows_per_device or own) * context, own)
        micro = max(rows for rows in _divisors(own) if rows <= most)
        accumulation = own // micro
        reason = (
            f"gradient accumulation {accumulation}, because {self.batch.tokens} tokens / {replicas} "
            f"{'replica' if context > 1 else 'rank'}{'' if replicas == 1 else 's'} / {micro * length} tokens per "
            f"{f'replica of {context} devices' if context > 1 else 'device'}"
        )
        return Shares(rows, own, micro, accumulation, context, reason)

    def parallelism(self, world_size: int, per_node: int) -> Parallelism:
        """The mesh of `world_size` ranks, `per_node` of them on each machine; ValueError where it cannot be."""
        spec = self.parallel
        return choose_parallelism(
            world_size,
            per_node,
            self.decoder_config().mixers(),
            context=spec.context_size,
            ring=spec.ring,
            ulysses=spec.ulysses,
            layout=spec.layout,
            attention=spec.attention,
        )

    def steps(self) -> int | None:
        """Optimizer steps of the run; None where a wall-clock budget decides (see `lm/train/schedule.py`)."""
        if self.train.tokens is not None:
            return -(-self.train.tokens // self.batch.tokens)
        return self.train.steps

    def decoder_config(self, tokenizer: Any = None, vocab_size: int | None = None) -> Any:
        """The DecoderConfig of `model`; what it leaves open comes from the tokenizer and the batch.

        vocab_size: of the corpus; the recipe's own when None. ValueError where the fields do not fit.
        """
        from farspan.layers.mixer import mixer_type
        from farspan.lm.config import DecoderConfig

        defaults: dict[str, Any] = {"max_position_embeddings": self.batch.sequence_length}
        stated = self.data.task.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size
        if (vocab_size := vocab_size or stated) is not None:
            defaults["vocab_size"] = vocab_size
        if tokenizer is not None:
            defaults |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        try:
            config = DecoderConfig(**{**defaults, **self.model})
            for name, options in config.mixers():
                mixer_type(name).check_length(options, self.batch.sequence_length)
            return config
        except (ValueError, TypeError) as error:
            raise ValueError(f"model: {error}") from None

    def to_yaml(self) -> str:
        values = self.model_dump(mode="json")
        # A source takes no option of another kind, not even at its default.
        values["data"]["sources"] = [source.model_dump(mode="json", exclude_unset=True) for source in self.data.sources]
        if self.data.task is None:
            del values["data"]["task"]
        else:
            values["data"] = {"task": values["data"]["task"]}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe with what it extends, applies `key.path=value` overrides and validates all of it.

    Raises ValueError, one line that says what to change, for unknown keys (naming the nearest valid ones), values of
    the wrong type and combinations that cannot work; FileNotFoundError where a file is missing. What a recipe that
    starts from weights leaves open in `model` is read from their configuration.
    """
    recipe = read_recipe(Recipe, path, overrides)
    if recipe.start is not None:
        from farspan.lm.initial import model_fields

        recipe = recipe.model_copy(update={"model": model_fields(recipe)})
    recipe.decoder_config()  # knows which sizes fit together; nothing is allocated
    return recipe


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
