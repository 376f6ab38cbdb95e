"""CCA: near tokens one by one, distant ones by the cores of their groups, in one softmax (arXiv 2412.12465)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from farspan.kernels.attention_statistics.cca import CoreMap
from farspan.kernels.cca import CORE_HEADS, POOLS, Piece, core_attention, cores_seen, pool_groups
from farspan.kernels.cca.step import core_step
from farspan.layers.attention import Projections
from farspan.layers.attention_tap import MapWeights, offer
from farspan.layers.cca_shard import ShardTables
from farspan.layers.cca_state import CoreCache
from farspan.layers.mixer import Mixed, Mixer, State, register
from farspan.layers.rotary import rotate
from farspan.layers.sequence import Sequence
from farspan.layers.softmax import SoftmaxOptions
from farspan.parallel.layout import LAYOUTS

CHOICES = {
    "pool": POOLS,
    "core_rope": ("post", "group_end"),
    "core_heads": CORE_HEADS,
    "fusion": ("concat", "two_softmax"),
}


@dataclass(frozen=True, kw_only=True)
class CcaOptions(SoftmaxOptions):
    """group: tokens of a core. window: tokens that each token sees one by one, at least, itself included.

    pool: how a group becomes a core: "significance" (published), "mean" or "max". core_rope: "post" pools keys as they
    were turned, "group_end" turns them to the group's end first. core_heads: cores for every query head, "q"
    (published), or key-value head, "kv". fusion: one softmax over both, "concat" (published), or "two_softmax", weighed
    by a learnt number per head. core_bias: added to the scores of cores; log(group) weighs one like its tokens.
    """

    group: int = 16
    window: int = 1024
    pool: str = "significance"
    core_rope: str = "post"
    core_heads: str = "q"
    fusion: str = "concat"
    core_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1; 1 is full attention")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself")
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known to cca; valid: {', '.join(valid)}")

    @property
    def cores_have(self) -> int:
        """Heads of a core."""
        return self.heads if self.core_heads == "q" and self.pool == "significance" else self.kv_heads


@register("cca", CcaOptions)
class Cca(Mixer):
    """State: the cores of complete groups, in caches that grow by blocks, and a ring of the last window + group - 1
    keys and values.

    On a shard no group is cut: cores are made where their tokens are and gathered; the keys before each piece are
    fetched from the ranks that hold them.
    """

    layouts = LAYOUTS
    options: CcaOptions

    def __init__(self, options: CcaOptions) -> None:
        super().__init__(options)
        self.projections = Projections(options, options.rope, options.qk_norm)
        self.theta = nn.Parameter(torch.empty(options.heads)) if options.fusion == "two_softmax" else None
        self.cache = CoreCache(options)
        self.grid = options.group
        self.attends = options.pool != "max"  # a maximum is no weighted mean of tokens
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The cores' share of two_softmax begins small: sigmoid(-2) = 0.12."""
        if self.theta is not None:
            self.theta.fill_(-2.0)

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        q, k, v = self.projections(x, sequence)
        return Mixed(self.projections.merge(self.core(q, k, v, sequence, state)))

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        """q: [1, T, H, D]; k, v: [1, T, Hk, D]. Returns [1, T, H, D]; brings the state up to date."""
        if state is not None:
            self.cache.check(state)
        if sequence.shard is not None:
            return self._on_shard(q, k, v, sequence, state)
        if state is None:
            pieces, starts = sequence.table(("cca", *self._sizes), lambda: self._whole(sequence))
            cores = self._pool(q, k, v, starts + self.options.group - 1, starts)
            if self.attends:
                offer(self, sequence, state, lambda: self._weights(q, k, cores[0], pieces, starts, sequence))
            return self._attend(q, k, v, *cores, pieces, sequence)
        if sequence.single_tokens:
            return self._step(q, k, v, sequence, state)
        return self._go_on(q, k, v, sequence, state)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.options.group, self.options.window

    def _whole(self, sequence: Sequence) -> tuple[tuple[Piece, ...], torch.Tensor]:
        """Whole documents as pieces, and the first tokens of the groups whose cores are seen, int64 [M]."""
        pieces, starts, token, core = [], [], 0, 0
        for length in sequence.lengths:
            pieces.append(Piece(length, 0, 0, token, core))
            count = cores_seen(length - 1, *self._sizes)
            starts.append(token + self.options.group * torch.arange(count))
            token, core = token + length, core + count
        return tuple(pieces), torch.cat(starts).to(sequence.positions.device)

    def _pool(self, q, k, v, ends: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cores [1, M, Hc, D] of the groups that begin at the rows `starts` of k and v and end at the rows `ends` of q,
        int64 [M].
        """
        options, pooled = self.options, None
        if options.core_rope == "group_end" and options.rope is not None:
            rows = (starts[:, None] + torch.arange(options.group, device=k.device)).flatten()
            k, v = k.index_select(1, rows), v.index_select(1, rows)
            pooled, starts = self._turned(k), torch.arange(0, len(rows), options.group, device=k.device)
        return pool_groups(
            q.index_select(1, ends) if options.pool == "significance" else None,
            k,
            v,
            starts,
            options.group,
            pooled_keys=pooled,
            core_heads=options.core_heads,
            pool=options.pool,
            backend=options.backend,
        )

    def _turned(self, k: torch.Tensor) -> torch.Tensor:
        """Keys of whole groups, [..., M * group, Hk, D], turned on from their own positions to their groups' ends."""
        rope, group, wide = self.options.rope, self.options.group, torch.promote_types(k.dtype, torch.float32)
        frequencies = torch.tensor(rope.pairs(k.shape[-1]), dtype=torch.float64)
        angles = (torch.arange(group - 1, -1, -1, dtype=torch.float64)[:, None] * frequencies).to(k.device)
        tables = (t.to(wide).repeat(k.shape[-3] // group, 1)[:, None] for t in (angles.cos(), angles.sin()))
        return rotate(k, tuple(tables))

    def _attend(self, q, k, v, core_k, core_v, pieces: tuple[Piece, ...], sequence: Sequence) -> torch.Tensor:
        options = self.options
        inputs = (q, k, v, core_k, core_v, pieces, options.group, options.window)
        if self.theta is None:
            return core_attention(*inputs, core_bias=options.core_bias, backend=options.backend)
        raw, cores = (core_attention(*inputs, parts=parts, backend=options.backend) for parts in ("raw", "cores"))
        return torch.lerp(raw, cores, self._share(sequence).to(raw.dtype))

    def _weights(self, q, k, core_k, pieces, starts, sequence: Sequence) -> MapWeights:
        share = None if self.theta is None else self._share(sequence)[..., 0]
        options = {"pool": self.options.pool, "core_bias": self.options.core_bias, "share": share}
        return MapWeights(CoreMap(q, k, core_k, pieces, starts, *self._sizes, **options), self.options.backend)

    def _share(self, sequence: Sequence) -> torch.Tensor:
        """[T, H, 1]: the weight of cores in two_softmax, 0 for tokens that see none."""
        sees = sequence.positions + 1 - self.options.window >= self.options.group
        return torch.where(sees[:, None], torch.sigmoid(self.theta), 0.0)[..., None]

    def _go_on(self, q, k, v, sequence: Sequence, state: State) -> torch.Tensor:
        """Several tokens of each row after the state's; the groups that they complete are added to its cores."""
        plan = sequence.table(("cca state", *self._sizes), lambda: self.cache.plan(sequence))
        keys, values = self.cache.with_prefixes(state, k, v, plan)
        new = self._pool(q, keys, values, plan.ends, plan.starts)
        cores = self.cache.with_cores(state, *new, plan)
        self.cache.write(state, k, v, *new, sequence, plan)
        return self._attend(q, keys, values, *cores, plan.pieces, sequence)

    def _step(self, q, k, v, sequence: Sequence, state: State) -> torch.Tensor:
        """The next token of every row. Each row's group is pooled, complete or not, so that the host need not know
        which are: a core is not seen before its group is complete, and is then what the last token made of it.
        """
        options, cache = self.options, self.cache
        cache.write_token(state, k, v, sequence)
        keys, values = cache.last_groups(state, sequence.positions)
        starts = torch.arange(0, keys.shape[1], options.group, device=k.device)
        new = self._pool(q, keys, values, torch.arange(q.shape[1], device=q.device), starts)
        cache.write_core(state, *new, sequence)
        share = None if self.theta is None else self._share(sequence)[:, None]
        inputs = (q.transpose(0, 1), *cache.read(state, sequence), sequence.positions, *self._sizes)
        return core_step(*inputs, options.core_bias, share).transpose(0, 1)

    def _on_shard(self, q, k, v, sequence: Sequence, state: State | None) -> torch.Tensor:
        shard, group = sequence.shard, self.options.group
        tables = sequence.table(("cca shard", *self._sizes), lambda: ShardTables.of(sequence, *self._sizes))
        own = self._pool(q, k, v, tables.starts + group - 1, tables.starts)
        cores, row_cores = tables.gathered(*own, shard)
        if state is not None:
            self.cache.fill(state, *tables.ends_of(k, v, shard), *row_cores, sequence.whole)
        keys, values = tables.with_halos(k, v, shard)
        return self._attend(q, keys, values, *cores, tables.pieces, sequence)

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int = 0,
    ) -> State:
        return self.cache.new(batch, capacity, **self._place(device, dtype))

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        return self.cache.bytes(length, self._place(None, dtype)["dtype"].itemsize)

    def flops(self, length: int, causal: bool = True) -> float:
        """Pooling of the groups whose cores are seen, and attention; two_softmax counts like one."""
        options, (group, window) = self.options, self._sizes
        cores = cores_seen(length - 1, group, window)
        keys = length - (group - 1) * cores
        if causal:
            rest = max(0, length - window) - group * cores  # of sum_t c(t), what is left over whole groups
            seen = group * cores * (cores - 1) / 2 + cores * (rest + 1)
            keys = (length + 1) / 2 - (group - 1) * seen / length
        pooled = group * cores / length if options.pool == "significance" else 0
        pooling = 6 * options.cores_have * options.head_dim * pooled
        return self.projections.flops() + 4 * options.heads * options.head_dim * keys + pooling
