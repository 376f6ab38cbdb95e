"""Softmax attention over the whole document: the baseline of everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from farspan.kernels.softmax import attention_step, attention_with_lse, softmax_attention, write_slots
from farspan.layers.attention import Projections
from farspan.layers.attention_tap import SoftmaxWeights, listened, offer
from farspan.layers.mixer import GroupedOptions, Mixed, Mixer, State, register
from farspan.layers.rotary import Rope
from farspan.layers.sequence import Sequence
from farspan.layers.sharded_attention import sharded_attention
from farspan.parallel.heads import plan_heads
from farspan.parallel.layout import LAYOUTS

# A cache grows by this many slots: copying it then costs under 2 % of reading it at every token.
CACHE_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class SoftmaxOptions(GroupedOptions):
    """rope: rotary positions, None for none. qk_norm: RMSNorm on every query and key head (before rotation)."""

    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    qk_norm: bool = False


@register("softmax", SoftmaxOptions)
class Softmax(Mixer):
    """Grouped-query causal attention. State: every key and value so far, in a cache that grows by blocks.

    On a shard: Ulysses within a ring slot, gathered keys or a ring between slots.
    """

    layouts, exchanges_heads = LAYOUTS, True
    attends = True

    def __init__(self, options: SoftmaxOptions) -> None:
        super().__init__(options)
        self.projections = Projections(options, options.rope, options.qk_norm)

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        backend, (q, k, v) = self.options.backend, self.projections(x, sequence)
        lse = None
        if listened(state) and sequence.shard is None and q.device.type == "cpu" and backend in ("auto", "chunked"):
            o, lse = attention_with_lse(q, k, v, sequence.lengths, q.shape[-1] ** -0.5)
        else:
            o = self.core(q, k, v, sequence, state)
        offer(self, sequence, state, lambda: SoftmaxWeights(q, k, sequence.lengths, lse=lse, backend=backend))
        return Mixed(self.projections.merge(o))

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        """q: [1, T, H, D]; k, v: [1, T, Hk, D]. Returns [1, T, H, D]; appends k and v to the state."""
        if sequence.shard is not None:
            o = sharded_attention(q, k, v, sequence, self.options.backend)
            if state is not None:
                self._write(state, *(sequence.shard.whole(x) for x in (k, v)), sequence.whole)
            return o
        if state is None:
            return self._attend(q, k, v, sequence)
        before = None
        if not sequence.fresh and not sequence.single_tokens:
            before = tuple(
                (_first(state["key"][row], n), _first(state["value"][row], n)) for row, n in enumerate(sequence.offsets)
            )
        self._write(state, k, v, sequence)
        if sequence.single_tokens:
            used = slots_for(max(sequence.totals))
            keys, values = state["key"][:, :, :used], state["value"][:, :, :used]
            return attention_step(q.transpose(0, 1), keys, values, sequence.positions + 1).transpose(0, 1)
        return self._attend(q, k, v, sequence, before)

    def _write(self, state: State, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> None:
        for name, new in (("key", k), ("value", v)):
            cache = reserve(state[name], max(sequence.totals))
            state[name] = write_slots(cache, sequence.document_of_token, sequence.positions, new[0])

    def _attend(self, q, k, v, sequence, before=None) -> torch.Tensor:
        return softmax_attention(
            q, k, v, sequence.lengths, sequence.cu_seqlens, initial_state=before, backend=self.options.backend
        )[0]

    @classmethod
    def check_sharding(cls, options: SoftmaxOptions, layout: str, ring: int, ulysses: int) -> None:
        super().check_sharding(options, layout, ring, ulysses)
        plan_heads(options.heads, options.kv_heads, ulysses)

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        shape = (batch, self.options.kv_heads, slots_for(capacity), self.options.head_dim)
        place = self._place(device, dtype)
        return {
            "key": torch.zeros(shape, **place),
            "value": torch.zeros(shape, **place),
            "position": torch.zeros(batch, dtype=torch.int64),
        }

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        item = self._place(None, dtype)["dtype"].itemsize
        return slots_for(length) * 2 * self.options.kv_heads * self.options.head_dim * item + 8

    def flops(self, length: int, causal: bool = True) -> float:
        keys = (length + 1) / 2 if causal else length
        return self.projections.flops() + 4 * self.options.heads * self.options.head_dim * keys


def slots_for(count: int) -> int:
    """Slots of a cache with room for `count` entries."""
    return -(-count // CACHE_BLOCK) * CACHE_BLOCK


def reserve(cache: torch.Tensor, count: int) -> torch.Tensor:
    """The cache [B, Hk, capacity, D] with room for `count` entries a row."""
    extra = slots_for(count) - cache.shape[2]
    if extra <= 0:
        return cache
    return torch.cat([cache, cache.new_zeros(*cache.shape[:2], extra, cache.shape[3])], dim=2)


def _first(cache: torch.Tensor, count: int) -> torch.Tensor:
    """The first entries of one row's cache [Hk, capacity, D], as [count, Hk, D]."""
    return cache[:, :count].transpose(0, 1)
