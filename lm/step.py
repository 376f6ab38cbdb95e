"""One decoding step of the whole decoder with static shapes: on CUDA, captured once and replayed as a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from farspan.layers.sequence import Sequence

if TYPE_CHECKING:
    from farspan.lm.cache import DecoderCache
    from farspan.lm.decoder import Decoder


class StaticStep:
    """All blocks and the final norm for one token of every row of a cache of fixed capacity.

    The host's numbers in the step are the same every time (each row as if it stood at the last position that the cache
    has room for); what changes, the tokens and their positions, lies in tensors on the device. States change in place.
    """

    def __init__(self, decoder: Decoder, cache: DecoderCache, x: torch.Tensor) -> None:
        self.decoder, self.cache, rows = decoder, cache, cache.batch_size
        self.x = torch.empty_like(x.reshape(1, rows, -1))
        self.positions = torch.zeros(rows, dtype=torch.int64, device=x.device)
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=x.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, 1, width], embedded tokens at the rows' own positions. Returns hidden states [1, B, width]."""
        offsets = self.cache.offsets
        self.x.copy_(x.reshape(self.x.shape))
        self.positions.copy_(torch.tensor(offsets))
        if x.is_cuda:
            if self.graph is None:
                self._capture()
            self.graph.replay()
        else:
            self.output = self._run()
        self._stand_at(torch.tensor(offsets) + 1)
        return self.output.clone()

    def _run(self) -> torch.Tensor:
        rows, last = self.cache.batch_size, self.cache.capacity - 1
        self._stand_at(torch.full((rows,), last))
        sequence = Sequence((1,) * rows, (last,) * rows, self.cu_seqlens, self.positions)
        return self.decoder.run_blocks(self.x, sequence, self.cache.states)[0]

    def _capture(self) -> None:
        """Record the step; the runs that warm it up are undone in the states."""
        saved = [{name: value.clone() for name, value in state.items()} for state in self.cache.states]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        for state, before in zip(self.cache.states, saved, strict=True):
            for name, value in before.items():
                state[name].copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self._run()

    def _stand_at(self, positions: torch.Tensor) -> None:
        for state in self.cache.states:
            state["position"] = positions.clone()
