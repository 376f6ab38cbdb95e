"""Softmax attention over the last `window` tokens, in linear time and memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.kernels.softmax import attention_step, write_slots
from farspan.kernels.window import window_attention
from farspan.layers.attention import Projections
from farspan.layers.attention_tap import SoftmaxWeights, Weights, offer
from farspan.layers.halo import last_rows, rows_before
from farspan.layers.mixer import Mixed, Mixer, State, register
from farspan.layers.sequence import Sequence
from farspan.layers.softmax import SoftmaxOptions
from farspan.parallel.layout import LAYOUTS


@dataclass(frozen=True, kw_only=True)
class WindowOptions(SoftmaxOptions):
    """window: keys that a token sees, itself included (the published RAT hybrid has 1025)."""

    window: int = 1025

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself")


@register("window", WindowOptions)
class Window(Mixer):
    """Sliding-window causal attention. State: a ring of the last `window` keys and values, slot = position % window.

    On a shard: the window - 1 keys before each segment are fetched from the ranks that hold them.
    """

    layouts = LAYOUTS
    attends = True

    def __init__(self, options: WindowOptions) -> None:
        super().__init__(options)
        self.projections = Projections(options, options.rope, options.qk_norm)

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        q, k, v = self.projections(x, sequence)
        offer(self, sequence, state, lambda: self.weights(q, k, sequence))
        return Mixed(self.projections.merge(self.core(q, k, v, sequence, state)))

    def weights(self, q: torch.Tensor, k: torch.Tensor, sequence: Sequence) -> Weights:
        """The attention map of q [1, T, H, D] on k [1, T, Hk, D]."""
        return SoftmaxWeights(q, k, sequence.lengths, window=self.options.window, backend=self.options.backend)

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        """q: [1, T, H, D]; k, v: [1, T, Hk, D]. Returns [1, T, H, D]; writes the last k and v into the ring."""
        if sequence.shard is not None:
            if state is not None:
                self._write(state, *self._ends(k, v, sequence), sequence.whole)
            return self._attend(q, k, v, sequence, self._halo(k, v, sequence))
        if state is None:
            return self._attend(q, k, v, sequence)
        if sequence.single_tokens:
            self._write(state, *self._last(k, v, sequence), sequence)
            counts = (sequence.positions + 1).clamp(max=self.options.window)
            return attention_step(q.transpose(0, 1), state["key"], state["value"], counts).transpose(0, 1)
        before = None
        if not sequence.fresh:
            before = tuple(self._before(state, *document) for document in enumerate(sequence.offsets))
        self._write(state, *self._last(k, v, sequence), sequence)
        return self._attend(q, k, v, sequence, before)

    def _attend(self, q, k, v, sequence, before=None) -> torch.Tensor:
        return window_attention(
            q,
            k,
            v,
            sequence.lengths,
            sequence.cu_seqlens,
            self.options.window,
            initial_state=before,
            backend=self.options.backend,
        )[0]

    def _before(self, state: State, row: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that row `row` keeps of the tokens before `offset`, in their order."""
        window = self.options.window
        slots = torch.arange(max(0, offset - window + 1), offset, device=state["key"].device) % window
        return state["key"][row, :, slots].transpose(0, 1), state["value"][row, :, slots].transpose(0, 1)

    def _last(self, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """The last `window` keys and values of every document (all of a shorter one), [kept, Hk, D]."""
        last, _, _ = self._ring(sequence)
        return (k[0], v[0]) if last is None else (k[0, last], v[0, last])

    def _write(self, state: State, keys: torch.Tensor, values: torch.Tensor, sequence: Sequence) -> None:
        """Bring the ring up to date with what `_last` returns; no slot is written twice."""
        _, rows, slots = self._ring(sequence)
        state["key"] = write_slots(state["key"], rows, slots, keys)
        state["value"] = write_slots(state["value"], rows, slots, values)

    def _ring(self, sequence: Sequence) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        window = self.options.window
        return sequence.table(("ring", window), lambda: ring_slots(sequence, window))

    def _halo(self, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Of a shard, the keys and values before each piece, as far as its first token sees; possibly none."""
        reach = self.options.window - 1
        halo = rows_before(torch.stack([k[0], v[0]], dim=1), reach, sequence)
        return tuple(part.unbind(1) for part in halo.split([min(reach, offset) for offset in sequence.offsets]))

    def _ends(self, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a shard, what `_last` returns for the whole row, on every rank."""
        return last_rows(torch.stack([k[0], v[0]], dim=1), self.options.window, sequence).unbind(1)

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        shape = (batch, self.options.kv_heads, self._slots(capacity), self.options.head_dim)
        place = self._place(device, dtype)
        return {
            "key": torch.zeros(shape, **place),
            "value": torch.zeros(shape, **place),
            "position": torch.zeros(batch, dtype=torch.int64),
        }

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        item = self._place(None, dtype)["dtype"].itemsize
        return self._slots(length) * 2 * self.options.kv_heads * self.options.head_dim * item + 8

    def _slots(self, length: int) -> int:
        """Of the state for a context of that length."""
        return self.options.window

    def flops(self, length: int, causal: bool = True) -> float:
        reach = min(length, self.options.window)
        keys = reach - reach * (reach - 1) / (2 * length) if causal else reach
        return self.projections.flops() + 4 * self.options.heads * self.options.head_dim * keys


def ring_slots(sequence: Sequence, window: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Tokens to write (None: all), and for each the row and slot: int64 [kept]."""
    if max(sequence.lengths) <= window:
        return None, sequence.document_of_token, sequence.positions % window
    device = sequence.positions.device
    ends = sequence.cu_seqlens[1:].long()[sequence.document_of_token]
    kept = sum(min(length, window) for length in sequence.lengths)
    inside = torch.arange(sequence.tokens, device=device) >= ends - window
    last = torch.nonzero_static(inside, size=kept)[:, 0]
    return last, sequence.document_of_token[last], sequence.positions[last] % window
