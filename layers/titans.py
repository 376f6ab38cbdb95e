"""Titans: a neural memory that goes on learning as it reads (arXiv 2501.00663), in all of its architectures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from farspan.kernels.titans.state import Gates
from farspan.layers.attention_tap import SoftmaxWeights, offer
from farspan.layers.mixer import Mixed, Mixer, State, register
from farspan.layers.rotary import rope_tables
from farspan.layers.sequence import Sequence
from farspan.layers.short_convolution import entering_tails, tails_before, tails_of_documents
from farspan.layers.state import store, where_new
from farspan.layers.titans_join import Join
from farspan.layers.titans_mac import MemoryAsContext
from farspan.layers.titans_memory import NeuralMemory, Start
from farspan.layers.titans_options import TitansOptions
from farspan.layers.titans_pieces import Row
from farspan.layers.titans_shard import final_states, mac_on_shard, memory_on_shard
from farspan.layers.titans_state import (
    Shapes,
    check_state,
    entering,
    entries,
    keep_persistent,
    may_be,
    memory_shapes,
    memory_state,
    mixed,
)
from farspan.layers.titans_window import PersistentWindow
from farspan.parallel.heads import plan_heads
from farspan.parallel.layout import LAYOUTS

__all__ = ["Titans", "TitansOptions"]


@register("titans", TitansOptions)
class Titans(Mixer):
    """State: the memory's weights and momentum at the last refresh and the tokens since, in fp32, the tails of the
    convolutions, and what the attention of the variant sees. Its size does not depend on the context.

    On a shard: heads are exchanged within a ring slot and the memory relayed between slots; MAC relays over all ranks.
    """

    layouts, exchanges_heads = LAYOUTS, True
    options: TitansOptions

    def __init__(self, options: TitansOptions) -> None:
        super().__init__(options)
        self.memory = NeuralMemory(options)
        self.persistent = nn.Parameter(torch.empty(options.persistent * options.width)) if options.persistent else None
        self.window = PersistentWindow(options) if options.variant in ("mag", "mal") else None
        self.window_norm = nn.RMSNorm(options.width, eps=options.eps) if options.variant == "mal" else None
        self.join = Join(options) if options.variant == "mag" else None
        self.context = MemoryAsContext(options) if options.variant == "mac" else None
        self.attends = options.variant != "memory"
        self.grid = options.segment if options.variant == "mac" else options.refresh
        self._started: tuple[tuple, Start] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.memory.reset_parameters()
        if self.persistent is not None:
            nn.init.normal_(self.persistent, std=0.02)
        for part in (self.join, self.context):
            if part is not None:
                part.reset_parameters()

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        if state is not None:
            documents = sequence if sequence.shard is None else sequence.whole
            check_state(state, self._shapes(), documents.documents)
        if self.context is not None:
            return self._mix_context(x, sequence, state)
        start = self._start(x.dtype, sequence, state)
        m, metrics = self._remember(x, start, sequence, state)
        if self.window is None:
            return Mixed(m, metrics=metrics)
        rows = None if start is None else start.rows
        if self.join is not None:
            return Mixed(self.join(self.window.attend(x, rows, sequence, state), m), metrics=metrics)
        rows = None if rows is None else self.window_norm(rows)
        return Mixed(self.window.attend(self.window_norm(m), rows, sequence, state), metrics=metrics)

    def _remember(
        self, x: torch.Tensor, start: Start | None, sequence: Sequence, state: State | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The memory written and read by every token: [1, T, width], and its metrics."""
        projected = self.memory.project(x)
        y, metrics = self.core(projected, x, start, sequence, state)
        return self.memory.merge(y, self.memory.opened(x)), metrics

    def core(
        self, projected: torch.Tensor, x: torch.Tensor, start: Start | None, sequence: Sequence, state: State | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """projected: [1, T, 3 C]; x: [1, T, width], for the gates; start: None where no document begins.

        Returns y [1, T, H, D]; brings the state up to date.
        """
        layer, options = self.memory, self.options
        initial = layer.memory(x.dtype)
        if sequence.shard is not None:
            tails = tails_before(projected, start.tail, sequence)
            inputs, _ = layer.inputs(projected, x, tails, sequence.lengths)
            y, finals = memory_on_shard(layer, inputs, initial, start, sequence)
            if state is not None:
                store(state, final_states(finals, sequence, options, by_heads=True))
                store(state, {"tail": tails_of_documents(projected, start.tail, sequence)})
            return y, memory_metrics(inputs.gates, finals, options)
        if state is not None and sequence.single_tokens:
            known, tails = memory_state(state, options), state["tail"]
            if start is not None:
                new = sequence.positions == 0
                known, tails = mixed(known, start, new, options), where_new(new, start.tail.to(tails.dtype), tails)
            inputs, tails = layer.inputs(projected, x, tails, sequence.lengths)
            y, after = layer.step(inputs, initial, known, sequence.positions)
            store(state, {**entries(after, options), "tail": tails})
            return y, {}
        tails = entering_tails(None if state is None else state["tail"], start.tail, sequence.offsets)
        inputs, tails = layer.inputs(projected, x, tails, sequence.lengths)
        known = entering(state, start, sequence.offsets, options)
        y, after = layer.run(
            *(inputs, initial, sequence.lengths),
            offsets=sequence.offsets,
            initial_state=known,
            return_state=True,
        )
        after = entries(after, options)
        if state is not None:
            store(state, {**after, "tail": tails})
        return y, memory_metrics(inputs.gates, after, options)

    def _mix_context(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        layer, part, options = self.memory, self.context, self.options
        initial, start = layer.memory(x.dtype), layer.start(None, x.dtype)
        stepping = state is not None and sequence.single_tokens and sequence.shard is None
        reads = part.read_query(x)
        before = reads.new_zeros(1, part.read_convolution.reach, reads.shape[-1])
        if sequence.shard is not None:
            tails = tails_before(reads, before, sequence)
        elif stepping:
            new = sequence.positions == 0
            tails = where_new(new, before.to(state["read_tail"].dtype), state["read_tail"])
        else:
            tails = entering_tails(None if state is None else state["read_tail"], before, sequence.offsets)
        asked, tails = part.read_convolution(reads, tails, sequence.lengths)
        row = part.row(layer, x, asked, self._segment_rope(sequence, x.dtype), self._persistent())
        offer(self, sequence, state, lambda: self._weights(row, sequence))
        if stepping:
            begun = self._begun(state, row.persistent, start, new)
            out, after = part.step(layer, initial, row, begun, sequence.positions)
            store(state, {**after, "read_tail": tails})
            return Mixed(out)
        if sequence.shard is not None:
            out, finals, gates = mac_on_shard(part, layer, initial, row, start, sequence, state is not None)
            if state is not None:
                store(state, final_states(finals, sequence, options, by_heads=False))
                store(state, {"read_tail": tails_of_documents(reads, before, sequence)})
            return Mixed(out, metrics=memory_metrics(gates, finals, options))
        carry = dict(state) if state is not None else {}
        carry |= entries(entering(state, start, sequence.offsets, options), options)
        carry["tail"] = entering_tails(None if state is None else state["tail"], start.tail, sequence.offsets)
        carry.pop("position", None)
        carry.pop("read_tail", None)
        out, after, gates = part.run(
            *(layer, initial, row, sequence.lengths, sequence.offsets, carry), keep=state is not None
        )
        if state is not None:
            store(state, {**after, "read_tail": tails})
        return Mixed(out, metrics=memory_metrics(gates, after, options))

    def _weights(self, row: Row, sequence: Sequence) -> SoftmaxWeights:
        """Of MAC, what a token sees of the tokens of its segment: the other keys are no tokens."""
        size, lengths = self.options.segment, sequence.lengths
        pieces = [min(size, length - start) for length in lengths for start in range(0, length, size)]
        return SoftmaxWeights(row.q[None], row.k[None], lengths, tuple(pieces), backend=self.options.backend)

    def _begun(self, state: State, persistent, start: Start, new: torch.Tensor) -> State:
        """The state of MAC with the documents `new` begun: as nobody has seen anything of them."""
        if not may_be(new):
            return state
        if persistent is not None:
            keep_persistent(state, persistent, new)
        options = self.options
        known = entries(mixed(memory_state(state, options), start, new, options), options)
        return {**state, **known, "tail": where_new(new, start.tail.to(state["tail"].dtype), state["tail"])}

    def _segment_rope(self, sequence: Sequence, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin of every token's index in its segment, [T, 1, pairs]."""
        options = self.options
        if options.rope is None:
            return None

        def build() -> Sequence:
            return replace(sequence, positions=sequence.positions % options.segment, _tables={})

        inside = sequence.table(("index in the segment", options.segment), build)
        return rope_tables(inside, options.rope, options.head_dim, dtype)

    def _persistent(self) -> torch.Tensor | None:
        return None if self.persistent is None else self.persistent.unflatten(0, (self.options.persistent, -1))

    def _start(self, dtype: torch.dtype, sequence: Sequence, state: State | None) -> Start | None:
        """What documents begin with; None where it is known that none does.

        Kept between decoding steps: in a captured step nobody knows on the host which rows begin, and reading the
        persistent rows at every token would cost more than the token.
        """
        stepping = state is not None and sequence.single_tokens and sequence.shard is None
        if stepping and not may_be(sequence.positions == 0):
            return None
        if torch.is_grad_enabled():
            return self.memory.start(self._persistent(), dtype)
        key = (dtype, *((p.data_ptr(), p._version) for p in self.parameters() if not p.is_inference()))
        if stepping and self._started is not None and self._started[0] == key:
            return self._started[1]
        start = self.memory.start(self._persistent(), dtype)
        if self._started is None or not _same_places(self._started[1], start):
            self._started = (key, start)
        else:  # in place: a captured step reads these tensors
            for kept, new in zip(_tensors(self._started[1]), _tensors(start), strict=True):
                kept.copy_(new)
            self._started = (key, self._started[1])
        return self._started[1]

    @classmethod
    def check_sharding(cls, options: TitansOptions, layout: str, ring: int, ulysses: int) -> None:
        super().check_sharding(options, layout, ring, ulysses)
        if options.variant != "mac":
            plan_heads(options.heads, options.heads, ulysses)

    def _shapes(self) -> Shapes:
        """Shapes of one row's entries but its position."""
        options = self.options
        channels = options.heads * options.head_dim
        reach = self.memory.convolution.reach
        shapes = {**memory_shapes(options), "tail": (reach, 3 * channels)}
        if self.window is not None:
            slots = options.persistent + options.window
            shapes |= {name: (options.heads, slots, options.head_dim) for name in ("key", "value")}
        if self.context is not None:
            shapes |= {**self.context.shapes(), "read_tail": (reach, channels)}
        return shapes

    def _dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The memory's entries in fp32 or wider, the others as given."""
        wide = torch.promote_types(dtype, torch.float32)
        memory = memory_shapes(self.options).keys()
        return {name: wide if name in memory or name.startswith("frozen") else dtype for name in self._shapes()}

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        place = self._place(device, dtype)
        self._started = self._started and ((), self._started[1])  # weights may have changed since
        dtypes = self._dtypes(place["dtype"])
        state = {
            name: torch.zeros(batch, *shape, device=place["device"], dtype=dtypes[name])
            for name, shape in self._shapes().items()
        }
        return {**state, "position": torch.zeros(batch, dtype=torch.int64)}

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """The same for every length."""
        dtypes = self._dtypes(self._place(None, dtype)["dtype"])
        sizes = (torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in self._shapes().items())
        return sum(sizes) + 8

    def flops(self, length: int, causal: bool = True) -> float:
        """The memory by its definition (the chunked form takes more products, and fewer of them small); convolutions
        and gates are elementwise and not counted. The full convention reads the persistent rows for every document;
        they are read once a call.
        """
        options, heads = self.options, self.options.heads * self.options.head_dim
        if self.context is not None:
            return self._context_flops(length, causal)
        total = self.memory.flops() + (0 if causal else self.memory.start_flops() / length)
        if self.window is not None:
            total += self.window.flops(length, causal) + 4 * heads * options.persistent
            total += 0 if causal else 4 * heads * options.width * options.persistent / length
        return total

    def _context_flops(self, length: int, causal: bool) -> float:
        options, part, heads = self.options, self.context, self.options.heads * self.options.head_dim
        segments, rest = divmod(length, options.segment)
        if causal:
            seen = (segments * options.segment * (options.segment + 1) + rest * (rest + 1)) / length
        else:
            seen = 2 * (segments * options.segment**2 + rest**2) / length
        reading = 2 * heads * options.width + 2 * options.heads * options.memory_weights  # the query, the read
        reading += 2 * (2 + 2) * heads * options.width  # its gate and output, keys and values of what was read
        rows = 0 if causal else 4 * heads * options.width * options.persistent / length
        attention = part.projections.flops() + 4 * heads * (options.persistent + seen)
        return self.memory.flops() + reading + attention + rows


@torch.no_grad()
def memory_metrics(gates: Gates, memory: State, options: TitansOptions) -> dict[str, torch.Tensor]:
    """Means over tokens and heads of the gates, and over heads and documents of the norms of weights and of momentum,
    which is what surprise leaves behind, where documents end.
    """

    def norm(name: str) -> torch.Tensor:
        squares = [memory[f"{name}{layer}"].float().square().sum((-2, -1)) for layer in range(options.depth)]
        return sum(squares).sqrt().mean()

    return {
        "memory/surprise": norm("momentum"),
        "memory/weight_norm": norm("weights"),
        "memory/decay": -torch.expm1(gates.log_decay.float()).mean(),
        "memory/momentum": gates.log_momentum.float().exp().mean(),
        "memory/rate": gates.rate.float().mean(),
    }


def _tensors(start: Start) -> list[torch.Tensor]:
    return [*start.weights, *start.momentum, start.tail, *([] if start.rows is None else [start.rows])]


def _same_places(kept: Start, new: Start) -> bool:
    """Whether `kept` can take `new` in place."""
    pairs = zip(_tensors(kept), _tensors(new), strict=True)
    inference = torch.is_inference_mode_enabled()
    return all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.is_inference() == inference
        for a, b in pairs
    )
