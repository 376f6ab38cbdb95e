"""Routing attention: heads that see the tokens nearest to the same centroid, beside heads that see a sliding window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from farspan.kernels.attention_statistics.interval import IntervalMap
from farspan.layers.attention_tap import MapWeights, Weights, WeightsBeside, offer
from farspan.layers.mixer import Mixed, Mixer, State, register
from farspan.layers.rotary import rope_tables, rotate
from farspan.layers.routing_centroids import Centroids
from farspan.layers.routing_groups import groups
from farspan.layers.routing_lists import Row
from farspan.layers.routing_options import RoutingOptions
from farspan.layers.routing_shard import HeadDeal, own_row
from farspan.layers.sequence import Sequence
from farspan.layers.window import Window, WindowOptions
from farspan.parallel.comm import gather
from farspan.parallel.heads import plan_heads
from farspan.parallel.layout import LAYOUTS


class LocalHeads(Window):
    """The core and the state of `window` for some of the heads; no projections."""

    def __init__(self, options: RoutingOptions) -> None:
        sizes = {"width": options.width, "heads": options.local_heads, "head_dim": options.head_dim}
        # the Triton kernels of the routing heads run in an interpreter too, torch's of the window on CUDA alone
        backend = "auto" if options.backend == "fused" else options.backend
        Mixer.__init__(self, WindowOptions(**sizes, window=options.local_window, backend=backend))

    def fill_ends(self, state: State, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> None:
        """Of a shard, the last keys and values of every document into the state of every rank."""
        self._write(state, *self._ends(k, v, sequence), sequence.whole)


@register("routing", RoutingOptions)
class Routing(Mixer):
    """The first `local_heads` heads are a sliding window; the others share queries and keys, without mean and of norm
    sqrt(head_dim), by which clusters are chosen before rotation.

    State: for each cluster a ring of its last `window` keys and values, or the best ones so far; a ring of the local
    heads. On a shard: Ulysses within a ring slot; between slots queries and values of routing heads are gathered, and
    the local heads fetch the keys before each piece.
    """

    layouts, exchanges_heads = LAYOUTS, True

    def __init__(self, options: RoutingOptions) -> None:
        super().__init__(options)
        width, dim = options.width, options.head_dim
        self.query = nn.Linear(width, options.heads * dim, bias=options.bias)
        self.value = nn.Linear(width, options.heads * dim, bias=options.bias)
        self.output = nn.Linear(options.heads * dim, width, bias=options.bias)
        self.local, self.key = None, None
        if options.local_heads:
            self.local = LocalHeads(options)
            self.key = nn.Linear(width, options.local_heads * dim, bias=options.bias)
        averages = options.decay, options.early_decay, options.early_steps
        self.centroids = Centroids(options.routing_heads, options.clusters, dim, *averages)
        self.groups = groups(options)
        # the mean of several clusters' outputs has no single softmax
        self.attends = options.membership == "nearest" and options.choices == 1

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        options = self.options
        q, v = (linear(x).unflatten(-1, (-1, options.head_dim)) for linear in (self.query, self.value))
        local, routed = q.split((options.local_heads, options.routing_heads), dim=2)
        # a norm, not RMSNorm: without the mean, same cluster means large inner product, and nothing is learned
        q = torch.cat([local, nn.functional.layer_norm(routed, (options.head_dim,), eps=1e-6)], dim=2)
        k = self.key(x).unflatten(-1, (-1, options.head_dim)) if options.local_heads else q[:, :, :0]
        o, loss, metrics = self.core(q, k, v, sequence, state)
        return Mixed(self.output(o.flatten(2)), loss, metrics)

    def core(self, q, k, v, sequence: Sequence, state: State | None):
        """q, v: [1, T, H, D], local heads first, not rotated; k: [1, T, local, D]. Returns o [1, T, H, D], loss and
        metrics.
        """
        count = self.options.local_heads
        if self.attends:
            offer(self, sequence, state, lambda: self._weights(q, k, sequence))
        if sequence.shard is None:
            heads = tuple(range(self.options.routing_heads))
            routed, loss, metrics = self._routed(q[:, :, count:], v[:, :, count:], sequence, heads, state)
            if not count:
                return routed, loss, metrics
            q, k = self._rotated(q[:, :, :count], sequence), self._rotated(k, sequence)
            return torch.cat([self.local.core(q, k, v[:, :, :count], sequence, state), routed], 2), loss, metrics
        if state is not None:
            self._fill_whole(q, k, v, sequence, state)
        slot, axis = sequence.slot, sequence.shard.context.mesh.ulysses
        deal = HeadDeal.of(count, self.options.routing_heads, axis.size)
        q, k, v = deal.to_heads(q, k, v, axis)
        count, heads = deal.local(axis.rank), deal.routing(axis.rank)
        parts, loss, metrics = [], None, {}
        if count:
            local = self._rotated(q[:, :, :count], slot), self._rotated(k, slot), v[:, :, :count]
            parts.append(self.local.core(*local, slot, None))
        # also without a head, where there is a loss: every rank takes part in its sum
        if heads or self._learns:
            o, loss, metrics = self._routed(q[:, :, count:], v[:, :, count:], slot, heads, None, sequence)
            parts.append(o)
        return deal.to_tokens(torch.cat(parts, dim=2), axis), loss, metrics

    def _weights(self, q, k, sequence: Sequence) -> Weights:
        """The attention maps of local and routing heads, beside each other."""
        count = self.options.local_heads
        routed = q[:, :, count:]
        lists = self.groups.lists(self.centroids.scores(routed[0]), Row.of(sequence))
        keys = self._rotated(routed, sequence)
        weights = MapWeights(IntervalMap(keys, keys, lists, sequence.lengths), self.options.backend)
        if not count:
            return weights
        local = (self._rotated(x, sequence) for x in (q[:, :, :count], k))
        return WeightsBeside((self.local.weights(*local, sequence), weights))

    @property
    def _learns(self) -> bool:
        return self.training and self.options.commitment > 0

    def _rotated(self, x: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        rope = self.options.rope
        return x if rope is None else rotate(x, rope_tables(sequence, rope, x.shape[-1], x.dtype))

    def _routed(self, q, v, sequence: Sequence, heads: tuple[int, ...], state: State | None, shard: Sequence = None):
        """Attention of the routing heads `heads`, their share of the commitment loss, and metrics.

        q, v: [1, T, len(heads), D]. sequence: whole, or a slot of the ring of the sharded sequence `shard`.
        """
        if state is not None and sequence.single_tokens:
            keys, scores = self._rotated(q, sequence)[0], self.centroids.scores(q[0])
            return self.groups.step(keys, keys, v[0], scores, sequence, state)[None], None, {}
        row, whole, every_q, every_v = Row.of(sequence), sequence, q, v
        if sequence.shard is not None:
            row, whole = own_row(sequence), sequence.whole
            if heads:
                every_q, every_v = sequence.shard.whole(q), sequence.shard.whole(v)
        o = q.new_zeros(q.shape)
        metrics, nearest = {}, row.document.new_zeros(whole.tokens, 0)
        if heads:
            scores = self.centroids.scores(every_q[0], heads)
            nearest = self.centroids.nearest(scores)[..., 0]
            keys = self._rotated(every_q, whole)
            own = keys if sequence.shard is None else self._rotated(q, sequence)
            o, metrics = self.groups.attend(own, keys, every_v, scores, row, whole, state)
        if not self.training:
            return o, None, {}
        own_q, nearest = q[0, row.askers], nearest[row.own[row.askers]]
        if len(heads):
            self.centroids.count(own_q, nearest, list(heads))
            metrics |= self.centroids.balance(nearest)
        return o, self._commitment(own_q, nearest, heads, shard), metrics if heads else {}

    def _commitment(self, q, nearest, heads, shard: Sequence | None) -> torch.Tensor | None:
        """commitment * mean (q - mu)^2 over all tokens, heads and channels of the row; the same on every rank."""
        if not self._learns:
            return None
        wide = torch.promote_types(q.dtype, torch.float32)
        mu = self.centroids.mu[list(heads)] if heads else self.centroids.mu[:0]
        own = mu[torch.arange(len(heads), device=q.device), nearest].to(wide)
        total, tokens = (q.to(wide) - own).square().sum(), len(q)
        if shard is not None:
            total, tokens = gather(total[None], shard.shard.axis).sum(), sum(shard.shard.lengths)
        return (self.options.commitment * total / (tokens * self.options.routing_heads * q.shape[-1])).float()

    def _fill_whole(self, q, k, v, sequence: Sequence, state: State) -> None:
        """Of a shard, the whole documents into the state of every rank, all heads."""
        count, whole = self.options.local_heads, sequence.whole
        if count:
            self.local.fill_ends(state, self._rotated(k, sequence), v[:, :, :count], sequence)
        every_q, every_v = (sequence.shard.whole(x[:, :, count:]) for x in (q, v))
        scores = self.centroids.scores(every_q[0])
        self.groups.fill(self._rotated(every_q, whole), every_v, scores, Row.of(whole), whole, state)

    @classmethod
    def check_sharding(cls, options: RoutingOptions, layout: str, ring: int, ulysses: int) -> None:
        super().check_sharding(options, layout, ring, ulysses)
        plan_heads(options.heads, options.heads, ulysses)

    @classmethod
    def check_length(cls, options: RoutingOptions, length: int) -> None:
        if options.clusters > length:
            raise ValueError(
                f"clusters={options.clusters} do not suit rows of {length} tokens: most would stay empty; use at most "
                f"{length}, about {max(1, round(length / options.window))} for clusters of window={options.window}"
            )

    def after_step(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.centroids.update(reduce)

    def reset_parameters(self) -> None:
        self.centroids.reset()

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        place = self._place(device, dtype)
        state = self.groups.new(batch, **place)
        if self.options.local_heads:
            shape = (batch, self.options.local_heads, self.options.local_window, self.options.head_dim)
            state |= {"key": torch.zeros(shape, **place), "value": torch.zeros(shape, **place)}
        return state | {"position": torch.zeros(batch, dtype=torch.int64)}

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        options, dtype = self.options, self._place(None, dtype)["dtype"]
        local = 2 * options.local_heads * options.local_window * options.head_dim * dtype.itemsize
        return local + self.groups.bytes(dtype) + 8

    def flops(self, length: int, causal: bool = True) -> float:
        """Clusters are taken as equally full; in the full convention as if one held the whole document."""
        options = self.options
        linears = [linear for linear in (self.query, self.key, self.value, self.output) if linear is not None]
        projections = sum(2 * linear.weight.numel() for linear in linears)
        reach = min(length, options.local_window)
        local = reach - reach * (reach - 1) / (2 * length) if causal else reach
        routed = options.seen_keys(length, causal) + options.clusters / 2
        return projections + 4 * options.head_dim * (options.local_heads * local + options.routing_heads * routed)
