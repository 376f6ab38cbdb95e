"""Options of routing attention, and what each costs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from farspan.layers.mixer import MixerOptions, nearest
from farspan.layers.rotary import Rope

LEAKY = "balanced_leaks_future"
MEMBERSHIPS = ("nearest", "streaming", LEAKY)
SELF_RULES = ("last_resort", "always")


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(MixerOptions):
    """clusters: centroids of a head. window: the last tokens of its cluster that a token sees, itself included; with
    the other memberships, the tokens that a cluster holds.
    membership: "nearest", each token in the cluster of the centroid nearest to it; "streaming", in every cluster among
    whose best `window` tokens so far it is; "balanced_leaks_future", the published rule, among the best of the whole
    document, which shows to a token something of those after it.
    choices: clusters that a token joins by "nearest"; its outputs are averaged.
    local_heads: heads with an ordinary sliding window, half when None. local_window: theirs, `window` when None.
    self_rule: "last_resort" lets a token see itself only where it sees no other (with shared queries and keys a token
    scores highest with itself), "always" at all times.
    rope: rotary positions, None for none; clusters are chosen before rotation.
    commitment: weight of the loss that draws queries to their centroids.
    decay: of the averages that centroids are; early_decay: in the first early_steps steps.
    """

    clusters: int = 16
    window: int = 512
    membership: str = "nearest"
    choices: int = 1
    local_heads: int | None = None
    local_window: int | None = None
    self_rule: str = "last_resort"
    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    commitment: float = 1e-4
    decay: float = 0.999
    early_decay: float = 0.99
    early_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_heads is None:
            object.__setattr__(self, "local_heads", self.heads // 2)
        if self.local_window is None:
            object.__setattr__(self, "local_window", self.window)
        for name, values in (("membership", MEMBERSHIPS), ("self_rule", SELF_RULES)):
            if getattr(self, name) not in values:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; {nearest(getattr(self, name), values)}")
        for name in ("clusters", "window", "local_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.choices <= self.clusters:
            raise ValueError(f"choices={self.choices} must be from 1 to clusters={self.clusters}")
        if self.choices > 1 and self.membership != "nearest":
            raise ValueError(f"choices={self.choices} belongs to membership=nearest, not {self.membership}; remove it")
        if not 0 <= self.local_heads < self.heads:
            raise ValueError(
                f"local_heads={self.local_heads} must be from 0 to {self.heads - 1} of {self.heads} heads; for windows "
                "alone use the mixer window"
            )
        if not (0 <= self.decay < 1 and 0 <= self.early_decay < 1):
            raise ValueError(f"decay={self.decay} and early_decay={self.early_decay} must be from 0 to below 1")
        if self.rope is not None:
            self.rope.pairs(self.head_dim)  # refuses an odd head_dim now, not in the first step
        if self.membership == LEAKY:
            warnings.warn(
                f"membership={LEAKY} shows every token something of the tokens after it: losses and scores of this "
                "model are leaky, and not comparable with those of causal models",
                stacklevel=3,
            )

    @property
    def routing_heads(self) -> int:
        return self.heads - self.local_heads

    @property
    def hides_self(self) -> bool:
        return self.self_rule == "last_resort" and self.window > 1

    def seen_keys(self, length: int, causal: bool) -> float:
        """Keys that a routing head reads for a token of a document of `length`, summed over its clusters, if clusters
        are equally full. causal=False: of the last token of a document that lies in one cluster.
        """
        held = min(self.window, length)
        if self.membership == "nearest":
            if not causal:
                return self.choices * held
            share = max(1.0, self.choices * length / self.clusters)
            return self.choices * _mean_keys(share, self.window)
        if not causal:
            return self.clusters * held
        if self.membership == LEAKY:
            return self.clusters * held / length * (held + 1) / 2
        entries = held * (1 + math.log(length / held))
        return self.clusters / length * (held * (held + 1) / 2 + (entries - held) * held)


def _mean_keys(length: float, window: int) -> float:
    """Keys that a token sees on average in a causal window over `length` tokens."""
    reach = min(length, window)
    return reach - reach * (reach - 1) / (2 * length)
