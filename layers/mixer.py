"""The interface of a token mixer, its strict options, and the registry that builds one by name."""

from __future__ import annotations

import difflib
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from farspan.layers.sequence import Sequence

State = dict[str, torch.Tensor]


class Mixed(NamedTuple):
    """What a mixer returns.

    output: [batch, time, width], the dtype of the input.
    loss: fp32 scalar to add to the training loss, or None.
    metrics: detached fp32 scalars by name, for the training log.
    """

    output: torch.Tensor
    loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = types.MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class MixerOptions:
    """Options that every mixer has.

    width: channels of the residual stream. heads: query heads. head_dim: channels of a head, width / heads when None.
    bias: biases in the projections. eps: of the norms inside the mixer.
    backend: of its operators ("auto", "reference", "chunked", "fused").
    """

    width: int
    heads: int
    head_dim: int | None = None
    bias: bool = False
    eps: float = 1e-6
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.width < 1 or self.heads < 1:
            raise ValueError(f"width={self.width} and heads={self.heads} must be at least 1")
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(
                    f"width={self.width} is not divisible by heads={self.heads}; use a multiple, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)


@dataclass(frozen=True, kw_only=True)
class GroupedOptions(MixerOptions):
    """Options of mixers whose key-value heads may be fewer than their query heads.

    kv_heads: key-value heads, a divisor of heads; heads when None.
    """

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}; use a divisor")


class Mixer(nn.Module, ABC):
    """Project, mix tokens head by head in `core`, project back.

    A subclass implements `mix`, `new_state`, `state_bytes` and `flops`. For a sequence that is shared out over ranks it
    says by `layouts` for which layouts it has a rule, by `exchanges_heads` whether that rule uses Ulysses ranks, and by
    `grid` at which multiple of tokens a document must start that an edge of a shard cuts. `attends` says that it hands
    out its effective attention weights (`layers/attention_tap.py`).
    """

    name: ClassVar[str]
    options_type: ClassVar[type[MixerOptions]]
    layouts: ClassVar[tuple[str, ...]] = ()
    exchanges_heads: ClassVar[bool] = False
    grid: int = 1
    attends: bool = False

    def __init__(self, options: MixerOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor, sequence: Sequence | None = None, state: State | None = None) -> Mixed:
        """Mix the tokens of every document with those before them.

        x: [batch, time, width]. Without a sequence every row is one document; with one, x is the packed row
        [1, tokens, width] that it describes.
        state: from `new_state(documents)`; document i continues row i, and the state is brought up to date in place
        (its tensors are replaced where gradients flow through them).
        On a shard a state must be new: it is filled with the whole documents, on every rank.
        Returns Mixed, its output shaped like x. Raises ValueError where x, sequence and state disagree.
        """
        if sequence is None:
            offsets = None if state is None else state["position"].tolist()
            sequence = Sequence.rows(x.shape[0], x.shape[1], x.device, offsets)
        elif x.shape[:2] != (1, sequence.tokens):
            raise ValueError(f"x is {list(x.shape)}, its sequence is a packed row of {sequence.tokens} tokens")
        documents = sequence
        if sequence.shard is not None:
            context, documents = sequence.shard.context, sequence.whole
            self.check_sharding(self.options, context.layout, context.ring, context.ulysses)
        if state is not None and tuple(state["position"].tolist()) != documents.offsets:
            raise ValueError(
                f"the state stands at {state['position'].tolist()[:8]}, the sequence at {documents.offsets[:8]}"
            )
        mixed = self.mix(x.reshape(1, sequence.tokens, x.shape[-1]), sequence, state)
        if state is not None:
            state["position"] = torch.tensor(documents.totals)
        return mixed._replace(output=mixed.output.reshape(x.shape))

    @abstractmethod
    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        """`forward` on the packed row x [1, tokens, width]; writes every entry of the state but its position."""

    @classmethod
    def check_sharding(cls, options: MixerOptions, layout: str, ring: int, ulysses: int) -> None:
        """Raise ValueError unless a mixer with these options can be sharded in this layout over ring x ulysses."""
        if layout not in cls.layouts:
            has = f"it has rules for {', '.join(cls.layouts)}" if cls.layouts else "it has none for any layout"
            raise ValueError(
                f"mixer {cls.name} has no rule for a sequence sharded in a {layout} layout; {has}; "
                "set parallel.context: 1, or parallel.layout"
            )

    @classmethod
    def check_length(cls, options: MixerOptions, length: int) -> None:
        """Raise ValueError where a mixer with these options makes no sense on training rows of `length` tokens."""

    @abstractmethod
    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        """An empty state for `batch` rows: batch-first tensors, among them `position`, int64 [batch] on the host.

        capacity: tokens to make room for at once, so that no later step has to grow a cache.
        """

    @abstractmethod
    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of one row of a state that has seen `length` tokens."""

    @abstractmethod
    def flops(self, length: int, causal: bool = True) -> float:
        """Forward FLOPs per token on documents of `length` tokens, multiply-add as 2.

        causal=False counts what the usual full convention counts: every query as if it saw as many keys as the last.
        """

    def reset_parameters(self) -> None:
        """Initialise the mixer's own parameters: all but the linear layers and norms, which the decoder initialises."""

    def after_step(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Update what learns outside the optimizer; `reduce` sums a tensor over the data-parallel ranks."""

    def extra_repr(self) -> str:
        return ", ".join(f"{field.name}={getattr(self.options, field.name)}" for field in fields(self.options))

    def _place(self, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Any]:
        """Device and dtype for new states: as given, else those of the parameters."""
        parameter = next(self.parameters())
        return {"device": device or parameter.device, "dtype": dtype or parameter.dtype}


MIXERS: dict[str, type[Mixer]] = {}


def register(name: str, options: type[MixerOptions]) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: enter a mixer into the registry under its one name."""

    def enter(mixer: type[Mixer]) -> type[Mixer]:
        assert name not in MIXERS, f"mixer {name} is registered twice"
        mixer.name, mixer.options_type = name, options
        MIXERS[name] = mixer
        return mixer

    return enter


def build(name: str, **options: Any) -> Mixer:
    """The mixer `name` with the given options, e.g. `build("window", width=512, heads=8, window=257)`.

    Raises ValueError for an unknown name or option (naming the nearest valid ones) and for ill-typed values.
    """
    parsed = parse_options(name, options)
    return MIXERS[name](parsed)


def mixer_type(name: str) -> type[Mixer]:
    """The class registered under `name`; ValueError with the nearest names if there is none."""
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}; {nearest(name, MIXERS)}")
    return MIXERS[name]


def parse_options(name: str, values: dict[str, Any]) -> MixerOptions:
    """The options dataclass of mixer `name` filled from `values`, every name and type checked."""
    options = mixer_type(name).options_type
    hints = get_type_hints(options)
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown option {key!r} of mixer {name}; {nearest(key, hints)}")
        check_type(f"{name}: {key}", value, hints[key])
    required = [f.name for f in fields(options) if f.default is MISSING and f.default_factory is MISSING]
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}")
    return options(**values)


def nearest(name: str, valid: Any) -> str:
    """`did you mean 'x'?` where something is close, then the valid names."""
    close = difflib.get_close_matches(str(name), list(valid), n=2)
    hint = f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
    return f"{hint}valid: {', '.join(sorted(valid))}"


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError, naming `name`, unless value is what a field annotated with `hint` takes (an int is a float)."""
    if not _is_a(value, hint):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; it takes {_describe(hint)}")


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_a(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(hint))
    return "none" if hint is type(None) else (get_origin(hint) or hint).__name__
