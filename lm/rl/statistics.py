"""WAAD and FAI of the tokens of responses, from a policy's own attention (arXiv 2510.13554, sections 3.1 and 3.2).

Statistics are linear in the attention map, so they are computed head by head, layer by layer as the forward pass comes
by; only then are heads ranked by how far back they look, and the groups' statistics averaged.

Two ways, one result. `attention_statistics` runs a forward pass of its own, up to the last sampled layer. `collect`
listens to a forward pass that runs anyway, such as the one for the old log-probabilities, and adds little to it:

    with collect(model, attention_mask, response_mask) as collector:
        logits = model(input_ids, attention_mask=attention_mask).logits      # or some rows at a time, in order
    statistics = collector.statistics()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from farspan.kernels.attention_statistics import check_numbers
from farspan.lm.rl.statistics_collect import Collected, Collector
from farspan.lm.rl.statistics_heads import HeadGroups, head_groups
from farspan.lm.rl.tap import attending_layers, listen, policy_of, sampled_layers

__all__ = ["HeadGroups", "Options", "Statistics", "attention_statistics", "collect", "head_groups", "sampled_layers"]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a padded batch, without gradients; zeros outside the responses.

    waad: [batch, time] fp32, 0 to the window: how far back the local heads look from a token.
    fai: [batch, time] fp32, 0 to 1: how much the tokens of the horizon come back to a token in the global heads.
    fai_count: [batch, time] int32: over how many tokens fai is the mean; fai means nothing where it is 0.
    head_distance: [batch, heads in the pool] fp32, tokens: mean backward distance of each head over the response.
    local_heads, global_heads: [batch, n_group] int64, indices into the pool.
    pool: (layer, head) of each head.
    """

    waad: torch.Tensor
    fai: torch.Tensor
    fai_count: torch.Tensor
    head_distance: torch.Tensor
    local_heads: torch.Tensor
    global_heads: torch.Tensor
    pool: list[tuple[int, int]]


@dataclass(frozen=True)
class Options:
    """layers: how many are sampled in the middle third. window: W of WAAD. horizon: of FAI, in tokens, both inclusive.
    head_fraction: of the pool in each group. head_scope: heads are ranked by "response", by "batch", or "frozen".
    frozen: the groups, for that.
    """

    layers: int = 5
    window: int = 10
    horizon: tuple[int, int] = (10, 100)
    head_fraction: float = 0.30
    head_scope: str = "response"
    frozen: HeadGroups | None = None

    def __post_init__(self) -> None:
        check_numbers(self.window, self.horizon)
        if not 0 < self.head_fraction <= 0.5:
            raise ValueError(f"head_fraction={self.head_fraction} must be above 0 and at most 0.5: groups are disjoint")
        if self.head_scope not in ("response", "batch", "frozen"):
            raise ValueError(f"head_scope={self.head_scope!r} is not one of response, batch, frozen")
        if (self.head_scope == "frozen") != (self.frozen is not None):
            raise ValueError("head_scope: frozen and the frozen groups of heads go together; give both or neither")


@torch.no_grad()
def attention_statistics(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    layers: int = Options.layers,
    window: int = Options.window,
    horizon: tuple[int, int] = Options.horizon,
    head_fraction: float = Options.head_fraction,
    head_scope: str = Options.head_scope,
    frozen: HeadGroups | None = None,
) -> Statistics:
    """Statistics of sequences [prompt, response] from one forward pass without gradients, in evaluation mode.

    model: a farspan decoder, or a model of transformers that uses its attention interface, wrapped or not.
    input_ids, attention_mask, response_mask: [batch, time]; padding anywhere; response_mask is 1 at the tokens that
    carry loss. Options as in `Options`. Modules are left in the mode that they were in.
    Raises ValueError in one line for a model without attention statistics, and for masks that disagree.
    """
    options = Options(layers, window, tuple(horizon), head_fraction, head_scope, frozen)
    collector = _collector(model, attention_mask, response_mask, options)
    base = policy_of(model).base_model
    collector.stop_early = not _partitioned(base)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with listen(model, collector.listen), collector.until_done():
            base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for module in training:
            module.training = True
    return _statistics(collector.collected(), options)


class Listening:
    """What `collect` yields."""

    def __init__(self, collector: Collector, options: Options) -> None:
        self._collector, self._options = collector, options

    def statistics(self) -> Statistics:
        """Of what has come by. Raises RuntimeError unless every row of the batch has."""
        with torch.no_grad():
            return _statistics(self._collector.collected(), self._options)


@contextmanager
def collect(
    model: nn.Module, attention_mask: torch.Tensor, response_mask: torch.Tensor, options: Options | None = None
) -> Iterator[Listening]:
    """Statistics of forward passes that run inside the block, which must have all rows of the batch, in order.

    attention_mask, response_mask: [batch, time], as in `attention_statistics`. Each pass may take some rows, all of
    their columns. Passes with a cache are not listened to by farspan's decoders; keep generation out of the block.
    """
    options = options or Options()
    collector = _collector(model, attention_mask, response_mask, options)
    with listen(model, collector.listen):
        yield Listening(collector, options)


def _collector(model, attention_mask, response_mask, options: Options) -> Collector:
    if attention_mask.shape != response_mask.shape or attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)} and response_mask {list(response_mask.shape)} must both be "
            "[batch, time]"
        )
    modules = attending_layers(model)
    chosen = {part: layer for layer in sampled_layers(model, options.layers) for part in modules[layer].modules()}
    return Collector(chosen, attention_mask.bool(), response_mask.bool(), options.window, options.horizon)


def _statistics(collected: Collected, options: Options) -> Statistics:
    responses = collected.response_mask
    distance = collected.mean_distance()
    groups = options.frozen
    if groups is None:
        scoped = distance
        if options.head_scope == "batch":
            counts = responses.sum(1, keepdim=True).to(distance.dtype)
            scoped = ((distance * counts).sum(0) / counts.sum().clamp(min=1)).expand_as(distance)
        groups = head_groups(scoped, options.head_fraction)
    groups = groups.of(len(responses), len(collected.pool), distance.device)
    return Statistics(
        waad=collected.unpack(collected.group_mean(collected.waad, groups.local_heads)),
        fai=collected.unpack(collected.group_mean(collected.fai, groups.global_heads)),
        fai_count=collected.unpack(collected.count.to(torch.int32)),
        head_distance=distance.float(),
        local_heads=groups.local_heads,
        global_heads=groups.global_heads,
        pool=collected.pool,
    )


def _partitioned(model: nn.Module) -> bool:
    """Whether parameters are shared out over ranks (ZeRO-3, FSDP), whose prefetching wants whole forward passes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or "ds_id" in vars(p) for p in model.parameters())
