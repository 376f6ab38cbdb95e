"""Window attention that always sees the persistent rows: the short-term memory of MAG and MAL."""

from __future__ import annotations

import torch

from farspan.kernels.softmax import attention_step
from farspan.kernels.window.prefix import prefix_window_attention
from farspan.layers.attention_tap import offer
from farspan.layers.mixer import State
from farspan.layers.sequence import Sequence
from farspan.layers.state import new_rows
from farspan.layers.titans_options import TitansOptions
from farspan.layers.titans_state import keep_persistent
from farspan.layers.window import Window, WindowOptions

Pair = tuple[torch.Tensor, torch.Tensor]


class PersistentWindow(Window):
    """Attention over the persistent rows and the last `window` tokens.

    State: key and value, [B, H, P + window, D]: the persistent rows', then the ring of `Window`.
    """

    def __init__(self, options: TitansOptions) -> None:
        shared = ("width", "heads", "head_dim", "bias", "eps", "backend", "window", "rope")
        super().__init__(WindowOptions(**{name: getattr(options, name) for name in shared}))
        self.persistent = options.persistent

    def attend(
        self, x: torch.Tensor, rows: torch.Tensor | None, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        """x: [1, T, width]; rows: [1, P, width], not rotated, or None. Returns [1, T, width]; brings the state up to
        date.
        """
        q, k, v = self.projections(x, sequence)
        offer(self, sequence, state, lambda: self.weights(q, k, sequence))
        prefix = None
        if rows is not None:
            linears = self.projections.key, self.projections.value
            prefix = tuple(linear(rows)[0].unflatten(-1, (-1, self.options.head_dim)) for linear in linears)
        if state is not None and prefix is not None:
            self._keep(state, prefix, sequence)
        return self.projections.merge(self.core(q, k, v, sequence, state, prefix))

    def core(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequence: Sequence,
        state: State | None,
        prefix: Pair | None = None,
    ) -> torch.Tensor:
        """q, k, v: [1, T, H, D]; prefix: keys and values [P, H, D]. Returns [1, T, H, D]."""
        if sequence.shard is not None:
            if state is not None:
                self._write(state, *self._ends(k, v, sequence), sequence.whole)
            return self._seen(q, k, v, sequence, self._halo(k, v, sequence), prefix)
        if state is None:
            return self._seen(q, k, v, sequence, None, prefix)
        if sequence.single_tokens:
            self._write(state, *self._last(k, v, sequence), sequence)
            counts = self.persistent + (sequence.positions + 1).clamp(max=self.options.window)
            return attention_step(q.transpose(0, 1), state["key"], state["value"], counts).transpose(0, 1)
        before = None
        if not sequence.fresh:
            before = tuple(self._before(state, *document) for document in enumerate(sequence.offsets))
        self._write(state, *self._last(k, v, sequence), sequence)
        return self._seen(q, k, v, sequence, before, prefix)

    def _seen(self, q, k, v, sequence, before, prefix) -> torch.Tensor:
        if prefix is None:
            return self._attend(q, k, v, sequence, before)
        return prefix_window_attention(
            *(q, k, v, prefix, sequence.lengths, self.options.window),
            initial_state=before,
            backend=self.options.backend,
        )

    def _keep(self, state: State, prefix: Pair, sequence: Sequence) -> None:
        """The persistent rows' keys and values in front of the ring, written as a document begins."""
        if sequence.shard is None and sequence.single_tokens:
            new = sequence.positions == 0
        else:
            documents = sequence if sequence.shard is None else sequence.whole
            new = new_rows(documents.offsets, state["key"].device)
        keep_persistent(state, prefix, new)

    def _before(self, state: State, row: int, offset: int) -> Pair:
        window, device = self.options.window, state["key"].device
        slots = torch.arange(max(0, offset - window + 1), offset, device=device) % window + self.persistent
        return state["key"][row, :, slots].transpose(0, 1), state["value"][row, :, slots].transpose(0, 1)

    def _ring(self, sequence: Sequence) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        last, rows, slots = super()._ring(sequence)
        return last, rows, slots + self.persistent
