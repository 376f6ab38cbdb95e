"""RAT: a gated linear recurrence inside chunks, softmax attention across their summaries (arXiv 2507.04416)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from farspan.kernels.attention_statistics.rat import RecurrentMap
from farspan.kernels.rat import RatState, rat
from farspan.kernels.rat.step import rat_step
from farspan.kernels.softmax import write_slots
from farspan.layers.attention_tap import MapWeights, offer
from farspan.layers.mixer import Mixed, Mixer, MixerOptions, State, register
from farspan.layers.rat_summaries import SummaryExchange, SummaryTables
from farspan.layers.sequence import Sequence
from farspan.layers.softmax import reserve, slots_for
from farspan.parallel.layout import LAYOUTS


@dataclass(frozen=True, kw_only=True)
class RatOptions(MixerOptions):
    """chunk: tokens that the recurrence runs over before it becomes a summary. groups: of heads that share queries and
    keys (head h belongs to group h mod groups). rope: "chunk" turns queries and summaries by the index of their chunk,
    "none" leaves positions out. theta: base of its frequencies.
    """

    chunk: int = 16
    groups: int = 2
    rope: str = "chunk"
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1")
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"heads={self.heads} is not divisible by groups={self.groups}; use a divisor")
        if self.rope not in ("chunk", "none"):
            raise ValueError(f"rope={self.rope!r} is not known to rat; valid: chunk, none")
        if self.rope == "chunk" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions; use rope: none")
        if self.bias:
            raise ValueError("rat has no biases in its projections; set bias: false")


@register("rat", RatOptions)
class Rat(Mixer):
    """State: the summaries of finished chunks, in caches that grow by blocks, and the running key and value in fp32.

    On a shard: the recurrence is local, since no chunk is cut, and the summaries of all ranks are gathered.
    """

    layouts = LAYOUTS
    attends = True
    options: RatOptions

    def __init__(self, options: RatOptions) -> None:
        super().__init__(options)
        channels, shared = options.heads * options.head_dim, options.groups * options.head_dim
        self.sizes = (channels, channels, channels, shared, shared)  # z, v, gate, q, k: the published order
        self.input = nn.Linear(options.width, sum(self.sizes), bias=False)
        self.output = nn.Linear(channels, options.width, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(channels))
        self.grid = options.chunk
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """gate_bias = log r, r uniform in [1, chunk - 1]: time constants of 2 to chunk tokens; 0 below chunks of 3."""
        nn.init.uniform_(self.gate_bias, 1.0, max(1.0, self.options.chunk - 1.0))
        self.gate_bias.log_()

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        parts = self.input(x).split(self.sizes, dim=-1)
        z, v, gate, q, k = (part.unflatten(-1, (-1, self.options.head_dim)) for part in parts)
        return Mixed(self.output(self.core(q, k, v, gate, z, sequence, state).flatten(2)))

    def core(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        z: torch.Tensor,
        sequence: Sequence,
        state: State | None,
    ) -> torch.Tensor:
        """q, k: [1, T, G, D]; v, gate, z: [1, T, H, D]. Returns [1, T, H, D]; brings the state up to date."""
        options = self.options
        rope = self._rope(sequence, v.dtype) if options.rope == "chunk" else None
        arguments = (q, k, v, gate, self.gate_bias.unflatten(0, (-1, options.head_dim)), z)
        offer(self, sequence, state, lambda: self._weights(q, k, gate, sequence, rope))
        if sequence.shard is not None:
            return self._on_shard(arguments, rope, sequence, state)
        if state is None:
            return rat(*arguments, sequence.lengths, options.chunk, rope=rope, backend=options.backend)[0]
        if sequence.single_tokens:
            *inputs, bias, z = (x if x.ndim == 2 else x.transpose(0, 1) for x in arguments)
            chunks = -(-max(sequence.totals) // options.chunk)
            for name in ("keys", "values"):
                state[name] = reserve(state[name], chunks)
            y, after = rat_step(
                *(*inputs, bias, z, sequence.positions, options.chunk),
                RatState(**{name: state[name] for name in RatState._fields}),
                rope,
                reach=slots_for(chunks),
                backend=options.backend,
            )
            state.update(after._asdict())
            return y.transpose(0, 1)
        return self._go_on(arguments, rope, sequence, state)

    def _weights(self, q, k, gate, sequence: Sequence, rope) -> MapWeights:
        options = self.options
        bias = self.gate_bias.unflatten(0, (-1, options.head_dim))
        return MapWeights(RecurrentMap(q, k, gate, bias, sequence.lengths, options.chunk, rope), options.backend)

    def _go_on(self, arguments, rope, sequence: Sequence, state: State) -> torch.Tensor:
        """Several tokens of each row after the state's; finished chunks are added to its summaries."""
        options = self.options
        known = [offset // options.chunk for offset in sequence.offsets]
        before = None
        if not sequence.fresh:
            caches = (state["keys"], state["values"])
            summaries = (
                torch.cat([cache[row, :, :count].transpose(0, 1) for row, count in enumerate(known)])
                for cache in caches
            )
            before = RatState(state["key"], state["value"], *summaries)
        y, after = rat(
            *arguments,
            sequence.lengths,
            options.chunk,
            rope=rope,
            offsets=sequence.offsets,
            initial_state=before,
            backend=options.backend,
        )
        state["keys"], state["values"] = self._append(state, (after.keys, after.values), sequence, known)
        state["key"], state["value"] = after.key, after.value
        return y

    def _on_shard(self, arguments, rope, sequence: Sequence, state: State | None) -> torch.Tensor:
        """A shard: the summaries of earlier chunks come from the ranks that finished them."""
        options = self.options
        tables = sequence.table(("summaries", options.chunk), lambda: SummaryTables.of(sequence, options.chunk))
        exchange = SummaryExchange(tables, sequence.shard.axis)
        offsets = {"offsets": sequence.offsets, "exchange": exchange, "rope": rope, "backend": options.backend}
        y, after = rat(*arguments, sequence.lengths, options.chunk, **offsets)
        if state is not None:
            whole = sequence.whole
            state["keys"], state["values"] = self._append(state, exchange.all_summaries(), whole, [0] * whole.documents)
            state["key"], state["value"] = exchange.last_states(after.key, after.value)
        return y

    def _append(self, state: State, summaries, sequence: Sequence, known: list[int]) -> list[torch.Tensor]:
        """The caches with the summaries that `sequence` finishes, written after the `known` ones of each row."""
        rows, slots = sequence.table(("finished chunks", self.options.chunk), lambda: self._finished(sequence, known))
        room = -(-max(sequence.totals) // self.options.chunk)
        caches = (reserve(state[name], room) for name in ("keys", "values"))
        return [write_slots(cache, rows, slots, new) for cache, new in zip(caches, summaries, strict=True)]

    def _finished(self, sequence: Sequence, known: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and slot of every summary that these tokens finish, int64 [chunks]."""
        counts = [total // self.options.chunk for total in sequence.totals]
        pairs = [(row, slot) for row, (a, b) in enumerate(zip(known, counts, strict=True)) for slot in range(a, b)]
        rows, slots = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return rows.to(sequence.positions.device), slots.to(sequence.positions.device)

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        options, place = self.options, self._place(device, dtype)
        slots = slots_for(-(-capacity // options.chunk))
        wide = {**place, "dtype": torch.promote_types(place["dtype"], torch.float32)}
        return {
            "key": torch.zeros(batch, options.heads, options.head_dim, **wide),
            "value": torch.zeros(batch, options.heads, options.head_dim, **wide),
            "keys": torch.zeros(batch, options.heads, slots, options.head_dim, **place),
            "values": torch.zeros(batch, options.heads, slots, options.head_dim, **place),
            "position": torch.zeros(batch, dtype=torch.int64),
        }

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        dtype = self._place(None, dtype)["dtype"]
        slots = slots_for(-(-length // self.options.chunk))
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return 2 * self.options.heads * self.options.head_dim * (slots * dtype.itemsize + wide) + 8

    def flops(self, length: int, causal: bool = True) -> float:
        """The recurrence, the self term and the gates are elementwise and not counted."""
        chunk = self.options.chunk
        chunks, rest = divmod(length, chunk)
        keys = chunks if not causal else (chunk * chunks * (chunks - 1) / 2 + rest * chunks) / length
        projections = 2 * (self.input.weight.numel() + self.output.weight.numel())
        return projections + 4 * self.options.heads * self.options.head_dim * keys

    def _rope(self, sequence: Sequence, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [chunks, head_dim / 2] for every chunk that a token of the row can be in; fp32, or float64."""
        options, wide = self.options, torch.promote_types(dtype, torch.float32)

        def build() -> tuple[torch.Tensor, torch.Tensor]:
            device = sequence.positions.device
            chunks = torch.arange(-(-max(sequence.totals) // options.chunk), dtype=torch.float64, device=device)
            pairs = torch.arange(0, options.head_dim, 2, dtype=torch.float64, device=device)
            angles = chunks[:, None] * options.theta ** (-pairs / options.head_dim)
            return angles.cos().to(wide), angles.sin().to(wide)

        return sequence.table(("chunk rope", options.chunk, options.head_dim, options.theta, wide), build)
