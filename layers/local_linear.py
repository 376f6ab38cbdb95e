"""Local linear attention: a line fitted to the softmax-weighted past, read at the query (arXiv 2510.01450)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from farspan.kernels.local_linear import Settings, Statistics, local_linear_attention, local_linear_step
from farspan.layers.attention import Projections
from farspan.layers.attention_tap import SoftmaxWeights, Weights, offer
from farspan.layers.local_linear_sharding import Operands, sharded_local_linear
from farspan.layers.mixer import GroupedOptions, Mixed, Mixer, State, register
from farspan.layers.optional_window import OptionalWindow
from farspan.layers.rotary import Rope, rope_tables, rotate
from farspan.layers.sequence import Sequence
from farspan.parallel.heads import plan_heads
from farspan.parallel.layout import LAYOUTS

NORMS, BANDWIDTHS = ("plain", "shared", "none"), ("fixed", "learned")


@dataclass(frozen=True, kw_only=True)
class LocalLinearOptions(GroupedOptions):
    """rope: rotary positions, None for none; rotated queries and keys are the features of the fit as well.
    window: keys that a token sees, itself included; None for all.
    ridge_init, ridge_min: of each head's ridge, ridge_min + softplus(a parameter). They have the scale of squared keys,
    which is head_dim with a qk_norm. ridge_mode: "relative" to the weights of the fit, or "absolute".
    bandwidth: of the weights, head_dim ** 0.5, "fixed" or "learned" by head. kernel: "dot" or "rbf".
    qk_norm: RMSNorm of every query and key head (before rotation): "plain", "shared" with one gain for both, "none".
    output_norm: RMSNorm of every head's output, which can be longer than any value. gate: sigmoid(W x) on the output.
    solver: "auto", "gram" or "cg"; tolerance, iterations: where conjugate gradients stop (16 are for ridges from 1 on,
    32 from 0.1 on, 64 below).
    """

    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    window: int | None = None
    ridge_init: float = 1.0
    ridge_min: float = 0.1
    ridge_mode: str = "relative"
    bandwidth: str = "fixed"
    kernel: str = "dot"
    qk_norm: str = "plain"
    output_norm: bool = True
    gate: bool = False
    solver: str = "auto"
    tolerance: float = 1e-3
    iterations: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings.check()
        for name, value, valid in (("qk_norm", self.qk_norm, NORMS), ("bandwidth", self.bandwidth, BANDWIDTHS)):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not known to local_linear; valid: {', '.join(valid)}")
        if not self.ridge_min > 0:
            raise ValueError(f"ridge_min={self.ridge_min} must be above 0: early tokens see fewer keys than channels")
        if not self.ridge_min < self.ridge_init < math.inf:
            raise ValueError(
                f"ridge_init={self.ridge_init} must be above ridge_min={self.ridge_min}, which no ridge falls below"
            )

    @property
    def settings(self) -> Settings:
        return Settings(*(getattr(self, name) for name in Settings._fields))


@register("local_linear", LocalLinearOptions)
class LocalLinear(OptionalWindow):
    """State: every key and value so far as in `softmax`, or a ring of the last `window` as in `window`.

    On a shard: Ulysses within a ring slot and gathered keys between slots; with a window, the keys before each segment.
    """

    layouts, exchanges_heads = LAYOUTS, True
    options: LocalLinearOptions

    def __init__(self, options: LocalLinearOptions) -> None:
        Mixer.__init__(self, options)  # of the window mixer only the ring and the halo are used
        if options.rope is not None:
            options.rope.pairs(options.head_dim)  # refuses an odd head_dim now, not in the first step
        # Queries and keys live in one space, k - q is a feature: no gains of their own. Norm and rotation are below.
        self.projections = Projections(options, rope=None)
        self.ridge_logit = nn.Parameter(torch.empty(options.heads))
        self.log_scale = nn.Parameter(torch.empty(options.heads)) if options.bandwidth == "learned" else None
        self.qk_norm = nn.RMSNorm(options.head_dim, eps=options.eps) if options.qk_norm == "shared" else None
        self.output_norm = nn.RMSNorm(options.head_dim, eps=options.eps) if options.output_norm else None
        self.gate = nn.Linear(options.width, options.heads * options.head_dim, bias=False) if options.gate else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every head's ridge is ridge_init, its scale head_dim ** -0.5."""
        excess = self.options.ridge_init - self.options.ridge_min
        nn.init.constant_(self.ridge_logit, excess + math.log(-math.expm1(-excess)))  # inverse of softplus
        if self.log_scale is not None:
            nn.init.zeros_(self.log_scale)

    def ridge(self) -> torch.Tensor:
        """[heads], fp32 or wider whatever the dtype of the parameters."""
        wide = torch.promote_types(self.ridge_logit.dtype, torch.float32)
        return self.options.ridge_min + F.softplus(self.ridge_logit.to(wide))

    def scale(self) -> torch.Tensor | float:
        """Of the scores: a number, or [heads] in fp32 or wider where it is learned."""
        fixed = self.options.head_dim**-0.5
        if self.log_scale is None:
            return fixed
        return fixed * self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32)).exp()

    def mix(self, x: torch.Tensor, sequence: Sequence, state: State | None) -> Mixed:
        options = self.options
        q, k, v = self.projections(x, sequence)
        if options.qk_norm == "plain":
            q, k = (F.rms_norm(y, (options.head_dim,), eps=options.eps) for y in (q, k))
        elif self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if options.rope is not None:
            tables = rope_tables(sequence, options.rope, options.head_dim, x.dtype)
            q, k = rotate(q, tables), rotate(k, tables)
        offer(self, sequence, state, lambda: self.weights(q, k, sequence))
        ridge = self.ridge()
        o, statistics = self.core(Operands(q, k, v, ridge, self.scale()), sequence, state)
        if self.output_norm is not None:
            o = self.output_norm(o)
        if self.gate is not None:
            o = o * torch.sigmoid(self.gate(x)).view(o.shape)
        metrics = {} if statistics is None else self._metrics(statistics, ridge)
        return Mixed(self.projections.merge(o), metrics=metrics)

    def weights(self, q: torch.Tensor, k: torch.Tensor, sequence: Sequence) -> Weights:
        """The weights of the fit. (Those of its value at the query, which it may give a negative sign, are others.)"""
        options = self.options
        if options.kernel == "rbf":  # - k k / 2 in the scores, by a channel more
            wide = torch.promote_types(k.dtype, torch.float32)
            q = torch.cat([q.to(wide), q.new_ones(*q.shape[:3], 1, dtype=wide)], dim=-1)
            k = torch.cat([k.to(wide), k.to(wide).square().sum(-1, keepdim=True) / -2], dim=-1)
        window, scale = options.window, self.scale()
        return SoftmaxWeights(q, k, sequence.lengths, window=window, scale=scale, backend=options.backend)

    def core(
        self, operands: Operands, sequence: Sequence, state: State | None
    ) -> tuple[torch.Tensor, Statistics | None]:
        """o [1, T, H, D], and how the solver fared (None of a decoding step); appends k and v to the state."""
        q, k, v, ridge, scale = operands
        if state is not None:
            self._check_state(state)
        if sequence.shard is not None:
            return self._on_shard(operands, sequence, state)
        if state is None:
            return self._attend(operands, sequence)
        before = self._entering(state, sequence)
        self._write_new(state, k, v, sequence)
        if not sequence.single_tokens:
            return self._attend(operands, sequence, before)
        counts = sequence.positions + 1
        if self.options.window is not None:
            counts = counts.clamp(max=self.options.window)
        caches = (state[name][:, :, : self._used(sequence)] for name in ("key", "value"))
        kind = {"kernel": self.options.kernel, "ridge_mode": self.options.ridge_mode}
        o = local_linear_step(q.transpose(0, 1), *caches, counts, ridge, scale=scale, **kind)
        return o.transpose(0, 1), None

    def _on_shard(self, operands: Operands, sequence: Sequence, state: State | None) -> tuple[torch.Tensor, Statistics]:
        k, v = operands.k, operands.v
        if state is not None:
            self._write_whole(state, k, v, sequence)
        if self.options.window is None:
            return sharded_local_linear(operands, sequence, self.options.settings, self.options.backend)
        return self._attend(operands, sequence, self._halo(k, v, sequence))

    def _attend(self, operands: Operands, sequence: Sequence, before=None) -> tuple[torch.Tensor, Statistics]:
        q, k, v, ridge, scale = operands
        rest = {"scale": scale, "initial_state": before, "backend": self.options.backend}
        arguments = (q, k, v, ridge, sequence.lengths, sequence.cu_seqlens)
        o, _, statistics = local_linear_attention(*arguments, **self.options.settings._asdict(), **rest)
        return o, statistics

    def _metrics(self, statistics: Statistics, ridge: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "solver_iterations": statistics.iterations.float(),
            "solver_iterations_max": statistics.iterations_max.float(),
            "solver_residual": statistics.residual_max.float(),
            "local_linear_reach": statistics.reach_max.float(),
            "ridge": ridge.detach().float().mean(),
        }

    def _check_state(self, state: State) -> None:
        slots, expected = self.options.window, (self.options.kv_heads, self.options.head_dim)
        for name in ("key", "value"):
            _, heads, own, channels = state[name].shape
            if (heads, channels) != expected or (slots is not None and own != slots):
                raise ValueError(
                    f"state {name} is {list(state[name].shape)}, this mixer's are "
                    f"[rows, {expected[0]}, {slots or 'slots'}, {expected[1]}]; use its own new_state"
                )

    @classmethod
    def check_sharding(cls, options: LocalLinearOptions, layout: str, ring: int, ulysses: int) -> None:
        super().check_sharding(options, layout, ring, ulysses)
        if options.window is None:
            plan_heads(options.heads, options.kv_heads, ulysses)

    def flops(self, length: int, causal: bool = True) -> float:
        """The operator as it is defined, matrices in full, whichever solver runs; the solve itself is not counted."""
        channels, reach = self.options.head_dim, length
        if self.options.window is not None:
            reach = min(length, self.options.window)
        keys = reach - reach * (reach - 1) / (2 * length) if causal else reach
        gate = 0 if self.gate is None else 2 * self.gate.weight.numel()
        return self.projections.flops() + gate + self.options.heads * (8 * channels + 2 * channels**2) * keys
