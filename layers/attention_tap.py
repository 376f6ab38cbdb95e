"""Where a mixer hands out its attention map: to a listener, as something that computes statistics of it by itself.

A mixer with effective weights of tokens on tokens says so by `attends` and calls `offer` once, with what it takes to
form them. In an ordinary forward pass nobody listens, and nothing is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from farspan.kernels.attention_statistics import (
    EffectiveMap,
    HeadStatistics,
    attention_statistics,
    effective_statistics,
)
from farspan.layers.mixer import Mixer, State
from farspan.layers.sequence import Sequence


class Weights(Protocol):
    """The attention map of one layer on a packed row."""

    documents: tuple[int, ...]
    heads: int

    def statistics(self, rows: torch.Tensor, waad_window: int, horizon: tuple[int, int]) -> HeadStatistics:
        """As `kernels.attention_statistics`; rows: bool [T]."""


@dataclass(frozen=True)
class SoftmaxWeights:
    """Softmax attention; the fields are arguments of `kernels.attention_statistics.attention_statistics`.

    q: [1, T, H, D]; k: [1, T, Hk, D]. pieces: tokens of the runs that attention does not leave, the documents if None.
    """

    q: torch.Tensor
    k: torch.Tensor
    documents: tuple[int, ...]
    pieces: tuple[int, ...] | None = None
    window: int | None = None
    scale: torch.Tensor | float | None = None
    softcap: float | None = None
    lse: torch.Tensor | None = None
    backend: str = "auto"

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    def statistics(self, rows: torch.Tensor, waad_window: int, horizon: tuple[int, int]) -> HeadStatistics:
        return attention_statistics(
            *(self.q, self.k, rows, self.pieces or self.documents),
            documents=self.documents,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            lse=self.lse,
            waad_window=waad_window,
            horizon=horizon,
            backend=self.backend,
        )


@dataclass(frozen=True)
class MapWeights:
    """Any effective map. backend: "reference" writes it out."""

    effective: EffectiveMap
    backend: str = "auto"

    @property
    def documents(self) -> tuple[int, ...]:
        return self.effective.documents

    @property
    def heads(self) -> int:
        return self.effective.heads

    def statistics(self, rows: torch.Tensor, waad_window: int, horizon: tuple[int, int]) -> HeadStatistics:
        return effective_statistics(
            self.effective, rows, waad_window=waad_window, horizon=horizon, backend=self.backend
        )


@dataclass(frozen=True)
class WeightsBeside:
    """Several maps of the same row, of some heads each."""

    parts: tuple[Weights, ...]

    @property
    def documents(self) -> tuple[int, ...]:
        return self.parts[0].documents

    @property
    def heads(self) -> int:
        return sum(part.heads for part in self.parts)

    def statistics(self, rows: torch.Tensor, waad_window: int, horizon: tuple[int, int]) -> HeadStatistics:
        parts = [part.statistics(rows, waad_window, horizon) for part in self.parts]
        distance, waad, fai = (torch.cat(side, dim=1) for side in list(zip(*parts, strict=True))[:3])
        return HeadStatistics(distance, waad, fai, parts[0].count)


# listener(layer's module, weights); a global and no context variable, so that torch.compile guards on it.
Listener = Callable[[torch.nn.Module, Callable[[], Weights]], None]
_LISTENER: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, whole forward passes (without states) hand the weights of each layer to `listener`.

    It is called as listener(module, build), and calls build() only for layers that it wants. Raises RuntimeError if
    somebody listens already.
    """
    global _LISTENER
    if _LISTENER is not None:
        raise RuntimeError("attention is listened to already; leave the first block before the second one begins")
    _LISTENER = listener
    try:
        yield
    finally:
        _LISTENER = None


def listened(state: State | None) -> bool:
    """Whether `offer` would hand something out: a layer may then keep what it otherwise drops."""
    return _LISTENER is not None and state is None


def offer(mixer: Mixer, sequence: Sequence, state: State | None, build: Callable[[], Weights]) -> None:
    """Hand `build` to the listener, if there is one. Steps and prefills, which have a state, are not handed out."""
    if listened(state):
        _hand_out(mixer, sequence, build)


@torch.compiler.disable
@torch.no_grad()
def _hand_out(mixer: Mixer, sequence: Sequence, build: Callable[[], Weights]) -> None:
    if recomputing():
        return
    if sequence.shard is not None:
        raise ValueError("attention statistics need whole sequences on every rank; set parallel.context: 1")
    _LISTENER(mixer, build)


def recomputing() -> bool:
    """Whether this forward pass is activation checkpointing's second one: it runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1
