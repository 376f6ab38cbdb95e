"""The one adapter between the mixers' states and transformers' `Cache`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from farspan.layers.mixer import State
from farspan.lm.step import StaticStep


class DecoderCache(Cache):
    """The states of all layers for a batch, and how many columns of `input_ids` they have seen.

    A column may be padding in some rows: `get_seq_length` counts columns, as transformers' generation needs it, while
    each row's own number of tokens is its states' `position`.
    """

    layers = ()  # transformers asks its key-value layers whether they can be compiled, cropped, ...: there are none
    is_croppable = False

    def __init__(self, states: list[State], capacity: int | None = None) -> None:
        """capacity: tokens that a row may ever hold, where the decoding step is captured; None to let it grow."""
        self.states = states
        self.capacity = capacity
        self.columns = 0
        self.step: StaticStep | None = None

    @property
    def batch_size(self) -> int:
        return self.states[0]["position"].shape[0]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Tokens that each row has seen."""
        return tuple(self.states[0]["position"].tolist())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def __len__(self) -> int:
        return len(self.states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, int64, in that order."""
        self.states = select(self.states, indices)
        self.step = None  # it holds the tensors that were

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def merge(self, rows: Sequence[int], states: list[State]) -> None:
        """Put the states of some rows, which went on alone, back among the others."""
        index = torch.tensor(rows)
        self.step = None
        for whole, part in zip(self.states, states, strict=True):
            for name, new in part.items():
                old = whole[name]
                if old.shape[1:] != new.shape[1:]:  # a growing cache grew
                    grown = old.new_zeros(old.shape[0], *new.shape[1:])
                    grown[tuple(slice(size) for size in old.shape)] = old
                    old = grown
                whole[name] = old.index_copy(0, index.to(old.device), new)

    def reset(self) -> None:
        """Forget everything."""
        for state in self.states:
            for name, value in state.items():
                state[name] = torch.zeros_like(value)
        self.columns, self.step = 0, None

    def crop(self, *_: int) -> None:
        raise ValueError("recurrent states cannot be cut back: prompt-lookup and assisted decoding are not supported")


def select(states: list[State], indices: torch.Tensor) -> list[State]:
    """The rows `indices` of every tensor of every state."""
    return [
        {name: value.index_select(0, indices.to(value.device)) for name, value in state.items()} for state in states
    ]


def check_cache(cache: Cache) -> DecoderCache:
    """The cache itself if it is ours; ValueError naming the foreign class otherwise."""
    if not isinstance(cache, DecoderCache):
        raise ValueError(
            f"{type(cache).__name__} cannot hold the states of a farspan decoder; pass past_key_values=None, "
            "or the cache that a previous call returned"
        )
    return cache
