"""RCMHA: attention whose queries, keys and values are convolved, and whose scores know distances (arXiv 2308.03429)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from farspan.kernels.attention_statistics.relative import RelativeMap
from farspan.kernels.relative import Sinusoid, Table, relative_attention, relative_step
from farspan.layers.attention import Projections
from farspan.layers.attention_tap import MapWeights, Weights, offer
from farspan.layers.mixer import GroupedOptions, Mixed, Mixer, State, register
from farspan.layers.optional_window import OptionalWindow
from farspan.layers.rcmha_convolution import INITIALS, HeadConvolution
from farspan.layers.rcmha_sharding import sharded_relative
from farspan.layers.sequence import Sequence
from farspan.layers.short_convolution import entering_tails, tails_before, tails_of_documents
from farspan.layers.state import store
from farspan.parallel.heads import plan_heads
from farspan.parallel.layout import LAYOUTS

RELATIVE = ("sinusoid", "table")


@dataclass(frozen=True, kw_only=True)
class RCMHAOptions(GroupedOptions):
    """kernel: tokens that the convolutions reach over, the token itself included. conv_shared_heads: one kernel for all
    heads of the queries, one for those of the keys, one of the values, as in the released code; else one for each head.
    conv_init: "primer" (0.5 for the token itself, 0.5 / kernel for others), "identity", "uniform" (the release).
    relative: what scores know about distances: "sinusoid" (Transformer-XL) or a learned "table" (the released code).
    sinusoids: channels of sines and cosines; head_dim when None.
    distances: rows of the table. clamp: whether larger distances use its last row; else they are refused.
    window: keys that a token sees, itself included; None for all.
    """

    kernel: int = 3
    conv_shared_heads: bool = False
    conv_init: str = "primer"
    relative: str = "sinusoid"
    sinusoids: int | None = None
    distances: int = 8192
    clamp: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinusoids is None:
            object.__setattr__(self, "sinusoids", self.head_dim)
        if self.kernel < 1:
            raise ValueError(f"kernel={self.kernel} must be at least 1: the token itself (1: no other token)")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself")
        if self.distances < 1:
            raise ValueError(f"distances={self.distances} must be at least 1: that of a token from itself")
        for name, value, valid in (("relative", self.relative, RELATIVE), ("conv_init", self.conv_init, INITIALS)):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not known to rcmha; valid: {', '.join(valid)}")
        if self.relative == "sinusoid" and (self.sinusoids < 2 or self.sinusoids % 2):
            raise ValueError(f"sinusoids={self.sinusoids} must be even: pairs of a sine and a cosine")

    def check_reach(self, length: int) -> None:
        """ValueError where a document of `length` tokens has larger distances than the table."""
        reach = length if self.window is None else min(length, self.window)
        if self.relative == "table" and not self.clamp and reach > self.distances:
            raise ValueError(
                f"rcmha: a document of {length} tokens has distances up to {reach - 1}, the table has "
                f"distances={self.distances}; use distances: {reach}, window: {self.distances}, or clamp: true, "
                "by which larger distances use the table's last row"
            )


@register("rcmha", RCMHAOptions)
class RCMHA(OptionalWindow):
    """State: the rows before the next token that the convolutions read, not yet convolved; every convolved key and
    value so far as in `softmax`, or with a window a ring of the last ones.

    On a shard: the rows before each segment that the convolutions read are fetched; then Ulysses within a ring slot,
    gathered keys or a ring between slots, as `softmax`. With a window, the keys before each segment, as `window`.
    """

    layouts, exchanges_heads = LAYOUTS, True
    options: RCMHAOptions

    def __init__(self, options: RCMHAOptions) -> None:
        Mixer.__init__(self, options)  # of the window mixer only the ring and the halo are used
        heads, channels = options.heads, options.heads * options.head_dim
        self.projections = Projections(options, rope=None)
        sides = options.heads, options.kv_heads, options.kv_heads
        self.convolution = HeadConvolution(
            sides, options.head_dim, options.kernel, options.conv_shared_heads, options.conv_init
        )
        # Flat, like all vectors of a mixer: the optimizer neither decays nor orthogonalises them.
        self.u = nn.Parameter(torch.empty(channels))
        self.position = self.nu = self.table = self.beta = None
        if options.relative == "sinusoid":
            self.position = nn.Linear(options.sinusoids, channels, bias=False)
            self.nu = nn.Parameter(torch.empty(channels))
        else:
            self.table = nn.Parameter(torch.empty(options.distances * channels))
            self.beta = nn.Parameter(torch.empty(options.distances * heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every bias and the table are 0, as in the released code; the convolutions as `conv_init` says."""
        self.convolution.reset_parameters()
        for parameter in (self.u, self.nu, self.table, self.beta):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def biases(self) -> tuple[torch.Tensor, Table | Sinusoid]:
        """u [H, D] and what is learned about distances, of all heads."""
        options = self.options
        heads, head_dim = options.heads, options.head_dim
        u = self.u.view(heads, head_dim)
        if self.table is None:
            projection = self.position.weight.view(heads, head_dim, -1).mT
            return u, Sinusoid(projection, self.nu.view(heads, head_dim))
        return u, Table(self.table.view(heads, -1, head_dim), self.beta.view(heads, -1))

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        options, linears = self.options, self.projections
        self.options.check_reach(max(sequence.totals if sequence.shard is None else sequence.whole.totals))
        projected = torch.cat([linears.query(x), linears.key(x), linears.value(x)], dim=-1)
        q, k, v = self._convolved(projected, sequence, state).unflatten(-1, (-1, options.head_dim)).split(
            (options.heads, options.kv_heads, options.kv_heads), dim=2
        )  # fmt: skip
        offer(self, sequence, state, lambda: self.weights(q, k, sequence))
        return Mixed(linears.merge(self.core(q, k, v, sequence, state)))

    def weights(self, q: torch.Tensor, k: torch.Tensor, sequence: Sequence) -> Weights:
        relative = RelativeMap(q, k, *self.biases(), sequence.lengths, self.options.window)
        return MapWeights(relative, self.options.backend)

    def _convolved(self, projected: torch.Tensor, sequence: Sequence, state: State | None) -> torch.Tensor:
        """projected: [1, T, C], queries, keys and values side by side; brings the state's tail up to date."""
        start = projected.new_zeros(1, self.convolution.reach, projected.shape[2])
        if sequence.shard is not None:
            tails = tails_before(projected, start, sequence)
            mixed, _ = self.convolution(projected, tails, sequence.lengths)
            if state is not None:
                store(state, {"tail": tails_of_documents(projected, start, sequence)})
            return mixed
        tails = entering_tails(None if state is None else state["tail"], start, sequence.offsets)
        mixed, tails = self.convolution(projected, tails, sequence.lengths)
        if state is not None:
            store(state, {"tail": tails})
        return mixed

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        """q: [1, T, H, D]; k, v: [1, T, Hk, D]. Returns [1, T, H, D]; brings the state's keys and values up to date."""
        if sequence.shard is not None:
            return self._on_shard(q, k, v, sequence, state)
        if state is None:
            return self._attend(q, k, v, sequence)
        before = self._entering(state, sequence)
        self._write_new(state, k, v, sequence)
        return self._step(q, sequence, state) if sequence.single_tokens else self._attend(q, k, v, sequence, before)

    def _attend(self, q, k, v, sequence: Sequence, before=None) -> torch.Tensor:
        options = {"window": self.options.window, "initial_state": before, "backend": self.options.backend}
        return relative_attention(q, k, v, *self.biases(), sequence.lengths, sequence.cu_seqlens, **options)[0]

    def _step(self, q: torch.Tensor, sequence: Sequence, state: State) -> torch.Tensor:
        window, at = self.options.window, sequence.positions[:, None]
        used = self._used(sequence)
        slots = torch.arange(used, device=q.device)
        distances = at - slots
        if window is not None:
            distances = distances % window
            distances = torch.where(distances > at, -1, distances)  # slots that are still empty
        caches = state["key"][:, :, :used], state["value"][:, :, :used]
        return relative_step(q.transpose(0, 1), *caches, *self.biases(), distances, used - 1).transpose(0, 1)

    def _on_shard(self, q, k, v, sequence: Sequence, state: State | None) -> torch.Tensor:
        if state is not None:
            self._write_whole(state, k, v, sequence)
        if self.options.window is None:
            return sharded_relative(q, k, v, *self.biases(), sequence, self.options.backend)
        return self._attend(q, k, v, sequence, self._halo(k, v, sequence))

    @classmethod
    def check_sharding(cls, options: RCMHAOptions, layout: str, ring: int, ulysses: int) -> None:
        super().check_sharding(options, layout, ring, ulysses)
        if options.window is None:
            plan_heads(options.heads, options.kv_heads, ulysses)

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        tail = torch.zeros(batch, self.convolution.reach, self.convolution.channels, **self._place(device, dtype))
        return super().new_state(batch, device, dtype, capacity) | {"tail": tail}

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        item = self._place(None, dtype)["dtype"].itemsize
        return super().state_bytes(length, dtype) + self.convolution.reach * self.convolution.channels * item

    def flops(self, length: int, causal: bool = True) -> float:
        """Two products of the definition with keys and values, and one with distances; convolutions are not counted."""
        options = self.options
        reach = length if options.window is None else min(length, options.window)
        distances = min(reach, options.distances) if options.relative == "table" else reach
        keys, rows = (x - x * (x - 1) / (2 * length) if causal else x for x in (reach, distances))
        position = 0 if self.position is None else 2 * self.position.weight.numel()
        return self.projections.flops() + position + options.heads * options.head_dim * (4 * keys + 2 * rows)
