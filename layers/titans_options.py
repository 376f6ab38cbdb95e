"""Options of the Titans mixer, and the bounds that keep its inner steps stable."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from farspan.layers.mixer import GroupedOptions, MixerOptions
from farspan.layers.rotary import Rope

VARIANTS = ("memory", "mac", "mag", "mal")
GATES = ("norm_sigmoid", "hadamard", "norm_both", "hymba")

# Largest rate / (1 - momentum) at which memories of unit keys stayed bounded, by refresh; a power of it between these.
# Keys of silu, then l2: with a linear memory, and with an MLP without norm.
LINEAR_LIMIT = {1: 2.0, 4: 1.9, 16: 1.05, 64: 0.27}
PLAIN_MLP_LIMIT = {1: 0.9, 16: 0.45, 64: 0.22}
# No memory stays bounded above this: a step overshoots by more than it corrects, whatever the keys.
LARGEST_KAPPA = 2.0


@dataclass(frozen=True, kw_only=True)
class TitansOptions(MixerOptions):
    """variant: "memory" (the memory alone), "mac" (its reading as context of attention in segments), "mag" (beside
    window attention, one gates the other) or "mal" (in front of window attention).

    depth: layers of the memory, 1 to 4. expansion: width of its hidden layers, in head dims. norm: "none", or "ln_res"
    for x + LayerNorm(memory(x)); by default "none" for depth 1, else "ln_res". activation: "silu" or "gelu".
    refresh: tokens whose inner gradients are taken at the same weights; by default 1 for depth 1, else 16.
    read: "post" reads the memory with the token written, "pre" without it. decay_to: "zero" or "init", what the weights
    decay to.
    theta_mode: "ema" bounds the rate by kappa (1 - momentum), "raw" by kappa alone, with the momentum bounded instead.
    kappa: by default min(1, 4 / refresh), less for an MLP without norm. momentum, decay: False takes them out. write:
    False freezes the memory.
    conv: width of the short convolutions after the projections, 0 for none.
    persistent: learned rows in front of every document. window: keys that attention sees beside them (mag, mal).
    segment: tokens of a segment, a multiple of refresh (mac). gate: how attention and memory are joined (mac, mag):
    norm_sigmoid, hadamard, norm_both or hymba. rope: of the attention, None for none.
    h_query: mac's reading is asked by the tokens of the "current" segment or of the one before ("prev").
    mac_update_source: mac writes the "output" of its attention, or its "input".
    """

    variant: str = "memory"
    depth: int = 2
    expansion: int = 4
    norm: str | None = None
    refresh: int | None = None
    read: str = "post"
    decay_to: str | None = None
    activation: str = "silu"
    theta_mode: str = "ema"
    kappa: float | None = None
    momentum: bool = True
    decay: bool = True
    write: bool = True
    conv: int = 4
    persistent: int = 16
    window: int = 2048
    segment: int = 512
    gate: str = "norm_sigmoid"
    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    h_query: str = "current"
    mac_update_source: str = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.depth <= 4:
            raise ValueError(f"depth={self.depth} is not between 1 and 4 layers of memory")
        if self.norm is None:
            object.__setattr__(self, "norm", "none" if self.depth == 1 else "ln_res")
        if self.refresh is None:
            object.__setattr__(self, "refresh", 1 if self.depth == 1 else 16)
        if self.decay_to is None:
            object.__setattr__(self, "decay_to", "init" if self.norm == "ln_res" else "zero")
        for name, least in (("expansion", 1), ("refresh", 1), ("window", 1), ("segment", 1), ("persistent", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.conv < 0:
            raise ValueError(f"conv={self.conv} must be the width of a convolution, or 0 for none")
        for name, valid in (
            ("variant", VARIANTS),
            ("norm", ("none", "ln_res")),
            ("read", ("post", "pre")),
            ("decay_to", ("zero", "init")),
            ("activation", ("silu", "gelu")),
            ("theta_mode", ("ema", "raw")),
            ("gate", GATES),
            ("h_query", ("current", "prev")),
            ("mac_update_source", ("output", "input")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known to titans; valid: {', '.join(valid)}")
        if self.variant == "mac" and self.segment % self.refresh:
            raise ValueError(
                f"segment={self.segment} is not a multiple of refresh={self.refresh}: a segment ends with a refresh; "
                f"use segment={max(1, self.segment // self.refresh) * self.refresh}"
            )
        if self.variant != "memory" and self.rope is not None:
            self.rope.pairs(self.head_dim)
        if self.kappa is None:
            object.__setattr__(self, "kappa", self._usual_kappa)
        self._check_kappa()

    def _check_kappa(self) -> None:
        if not 0 < self.kappa <= LARGEST_KAPPA:
            raise ValueError(
                f"kappa={self.kappa} must be above 0 and at most {LARGEST_KAPPA:g}: no memory stays bounded"
            )
        if self.theta_mode == "raw" and self.kappa >= self.stable_rate:
            raise ValueError(
                f"kappa={self.kappa} leaves no room for momentum with theta_mode: raw, refresh={self.refresh}; "
                f"use less than {self.stable_rate:.3g}"
            )
        if self.kappa > self.stable_rate:
            warnings.warn(
                f"titans: kappa={self.kappa:g} is above {self.stable_rate:.3g}, where memories with refresh="
                f"{self.refresh} began to diverge; watch memory/weight_norm, or use kappa={self._usual_kappa:.3g}",
                stacklevel=4,
            )

    @property
    def _usual_kappa(self) -> float:
        """min(1, 4 / refresh), or half of where an MLP without norm diverges, which is earlier than the others do."""
        usual = min(1.0, 4 / self.refresh)
        return min(usual, self.stable_rate / 2) if self.depth > 1 and self.norm == "none" else usual

    @property
    def stable_rate(self) -> float:
        """rate / (1 - momentum) up to which the memory was seen to stay bounded. With the norm inside, any up to 2."""
        if self.norm == "ln_res":
            return LARGEST_KAPPA
        table = LINEAR_LIMIT if self.depth == 1 else PLAIN_MLP_LIMIT
        known = sorted(table)
        if self.refresh >= known[-1]:
            return table[known[-1]] * known[-1] / self.refresh
        low = max(b for b in known if b <= self.refresh)
        high = min(b for b in known if b > self.refresh)
        share = math.log(self.refresh / low) / math.log(high / low)
        return table[low] * (table[high] / table[low]) ** share

    @property
    def largest_momentum(self) -> float:
        """1 where the rate is bounded along with the momentum, else what keeps rate / (1 - momentum) stable."""
        return 1.0 if self.theta_mode == "ema" else 1 - self.kappa / self.stable_rate

    @property
    def sizes(self) -> tuple[int, ...]:
        """Widths d_0 .. d_L of the memory's layers."""
        hidden = self.expansion * self.head_dim
        return (self.head_dim, *[hidden] * (self.depth - 1), self.head_dim)

    @property
    def memory_weights(self) -> int:
        """Weights of one head's memory."""
        return sum(a * b for a, b in zip(self.sizes, self.sizes[1:], strict=False))

    @property
    def attention(self) -> GroupedOptions:
        """Of the attention inside."""
        shared = ("width", "heads", "head_dim", "bias", "eps", "backend")
        return GroupedOptions(**{name: getattr(self, name) for name in shared})
