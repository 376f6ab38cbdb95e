"""The state of mixers that see a window or everything: a ring as in `window`, or a cache as in `softmax`."""

from __future__ import annotations

import torch

from farspan.kernels.softmax import write_slots
from farspan.layers.mixer import State
from farspan.layers.sequence import Sequence
from farspan.layers.softmax import reserve, slots_for
from farspan.layers.window import Window


class OptionalWindow(Window):
    """A base of mixers whose option `window` may be None. State: keys and values, all of them in a cache that grows by
    blocks, or the last `window` in a ring.
    """

    def _write_new(self, state: State, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> None:
        """Keys and values [1, T, Hk, D] of these tokens into the state."""
        if self.options.window is not None:
            return self._write(state, *self._last(k, v, sequence), sequence)
        for name, new in (("key", k), ("value", v)):
            cache = reserve(state[name], max(sequence.totals))
            state[name] = write_slots(cache, sequence.document_of_token, sequence.positions, new[0])

    def _write_whole(self, state: State, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> None:
        """Of a shard, the whole documents' keys and values into the state of every rank."""
        if self.options.window is not None:
            return self._write(state, *self._ends(k, v, sequence), sequence.whole)
        self._write_new(state, *(sequence.shard.whole(x) for x in (k, v)), sequence.whole)

    def _entering(self, state: State, sequence: Sequence) -> tuple[tuple[torch.Tensor, torch.Tensor], ...] | None:
        """For each document the keys and values that the state has of the tokens before; None where none is needed."""
        if sequence.fresh or sequence.single_tokens:
            return None
        return tuple(self._before(state, *document) for document in enumerate(sequence.offsets))

    def _before(self, state: State, row: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.options.window is not None:
            return super()._before(state, row, offset)
        return tuple(state[name][row, :, :offset].transpose(0, 1) for name in ("key", "value"))

    def _used(self, sequence: Sequence) -> int:
        """Slots of the state that may hold something after these tokens."""
        return self._slots(max(sequence.totals))

    def _slots(self, length: int) -> int:
        return slots_for(length) if self.options.window is None else self.options.window
