"""Softplus attention: cosine scores that grow with ln N, clipped at their mean and raised to a power."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from farspan.kernels.attention_statistics.softplus import SoftplusMap
from farspan.kernels.softplus import Config, attend, normalise, softplus_step
from farspan.layers.attention import Projections
from farspan.layers.attention_tap import MapWeights, Weights
from farspan.layers.mixer import GroupedOptions, Mixer, State, register
from farspan.layers.optional_window import OptionalWindow
from farspan.layers.rotary import Rope
from farspan.layers.sequence import Sequence
from farspan.layers.softmax import slots_for
from farspan.parallel.comm import exchange
from farspan.parallel.fetch import FetchPlan, plan_fetch
from farspan.parallel.heads import grouped_to_heads, plan_heads, to_tokens
from farspan.parallel.layout import Segment


@dataclass(frozen=True, kw_only=True)
class SoftplusOptions(GroupedOptions):
    """rope: rotary positions, None for none. qk_norm: scores of unit queries and keys (no learned gain is offered: the
    unit norm would cancel it). compat_eps: `eps` of `kernels.softplus.Config`; the rest: as there.
    """

    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    power: float = Config.power
    window: int | None = Config.window
    free_rows: int = Config.free_rows
    scale_multiplier: float = Config.scale_multiplier
    dead_row: str = Config.dead_row
    compat_eps: float = Config.eps
    phi: str = Config.phi
    qk_norm: bool = Config.qk_norm
    l1: bool = Config.l1
    length_scale: str = Config.length_scale

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config.check_head_dim(self.head_dim)

    @property
    def config(self) -> Config:
        """What the operator is told; `eps`, which is that of norms in every mixer, is `compat_eps` here."""
        values = {field.name: getattr(self, field.name) for field in fields(Config) if field.name != "eps"}
        return Config(eps=self.compat_eps, **values)


@register("softplus", SoftplusOptions)
class Softplus(OptionalWindow):
    """LSSA (power 0) or LSSAR attention. State: normalised keys, and values; every one so far in a cache that grows by
    blocks, or with a window a ring of the last ones.

    On a shard: Ulysses within a ring slot; between slots the keys before each piece, as far as it sees, are fetched.
    """

    exchanges_heads = True

    def __init__(self, options: SoftplusOptions) -> None:
        Mixer.__init__(self, options)
        self.config = options.config
        self.projections = Projections(options, options.rope)
        self.attends = options.phi != "gelu"  # whose weights can be negative

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        """q: [1, T, H, D]; k, v: [1, T, Hk, D]. Returns [1, T, H, D]; writes normalised k, and v, into the state."""
        if state is not None:
            self._check_state(state, sequence if sequence.shard is None else sequence.whole)
        if self.config.qk_norm:
            q, k = normalise(q), normalise(k)
        if sequence.shard is not None:
            if state is not None:
                self._write_whole(state, k, v, sequence)
            return self._sharded(q, k, v, sequence)
        if state is None:
            return self._attend(q, k, v, sequence)
        before = self._entering(state, sequence)
        self._write_new(state, k, v, sequence)
        if not sequence.single_tokens:
            return self._attend(q, k, v, sequence, before)
        keys, values = (state[name][:, :, : self._used(sequence)] for name in ("key", "value"))
        counts = self.config.visible(sequence.positions)
        return softplus_step(q.transpose(0, 1), keys, values, counts, self.config).transpose(0, 1)

    def weights(self, q: torch.Tensor, k: torch.Tensor, sequence: Sequence) -> Weights:
        if self.config.qk_norm:
            q, k = normalise(q), normalise(k)
        return MapWeights(SoftplusMap(q, k, sequence.lengths, self.config), self.options.backend)

    def _attend(self, q, k, v, sequence, before=None) -> torch.Tensor:
        return attend(q, k, v, sequence.lengths, self.config, before, self.options.backend)

    def _check_state(self, state: State, sequence: Sequence) -> None:
        _, heads, slots, head_dim = state["key"].shape
        options, window = self.options, self.config.window
        fits = slots == window if window is not None else slots == slots_for(slots) >= max(sequence.offsets)
        if (heads, head_dim) != (options.kv_heads, options.head_dim) or not fits:
            raise ValueError(
                f"the state has {heads} key heads of {head_dim} channels in {slots} slots; it was made with other "
                f"options than kv_heads={options.kv_heads}, head_dim={options.head_dim}, window={window}"
            )

    def _sharded(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        context, slot = sequence.shard.context, sequence.slot
        ulysses = context.mesh.ulysses
        plan = plan_heads(q.shape[2], k.shape[2], ulysses.size)
        q, k, v = grouped_to_heads(q, k, v, plan, ulysses)
        before = self._halo(k, v, slot) if context.ring > 1 else None
        return to_tokens(self._attend(q, k, v, slot, before), plan.queries, ulysses)

    def _halo(self, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Of a slot, the keys and values before each piece, as far as its first token sees; possibly none.

        Every piece takes its part, so that every rank's backward pass comes by the exchange. A key that many ranks
        fetched gets its gradients added up in fp32 or wider.
        """
        shard, window = sequence.shard, self.config.window

        def reach(offset: int) -> int:
            return offset if window is None else min(window - 1, offset)

        def plan() -> FetchPlan:
            wanted = [
                [Segment(p.start - reach(p.offset), reach(p.offset)) for p in shard.pieces_of(rank)]
                for rank in range(shard.axis.size)
            ]
            return plan_fetch(shard.layout, wanted, shard.axis.rank).to(k.device)

        plan = sequence.table(("softplus halo", window), plan)
        both = torch.stack([k[0], v[0]], dim=1)
        sent = both.to(torch.promote_types(both.dtype, torch.float32)).index_select(0, plan.index).to(both.dtype)
        halo = exchange(sent, plan.send, plan.receive, shard.axis).index_select(0, plan.order)
        return tuple(part.unbind(1) for part in halo.split([reach(offset) for offset in sequence.offsets]))

    @classmethod
    def check_sharding(cls, options: SoftplusOptions, layout: str, ring: int, ulysses: int) -> None:
        super().check_sharding(options, layout, ring, ulysses)
        plan_heads(options.heads, options.kv_heads, ulysses)

    def flops(self, length: int, causal: bool = True) -> float:
        """Of the two products of the definition; the kernels' passes over the keys are in docs/softplus.md."""
        reach = length if self.config.window is None else min(length, self.config.window)
        keys = reach - reach * (reach - 1) / (2 * length) if causal else reach
        return self.projections.flops() + 4 * self.options.heads * self.options.head_dim * keys
