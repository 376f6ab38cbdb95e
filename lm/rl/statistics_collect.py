"""What listens to the sampled layers, a forward pass after another, and keeps three numbers per token and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from farspan.kernels.attention_statistics import HeadStatistics
from farspan.lm.rl.tap_transformers import Padded


class _Done(Exception):
    """Raised to leave a forward pass after the last layer that is listened to."""


@dataclass(frozen=True)
class Collected:
    """Statistics of the tokens of a batch that are no padding, row after row: distance, waad, fai [N, pool], count [N].

    attention_mask, response_mask: bool [batch, time]. pool: (layer, head) of each column.
    """

    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    distance: torch.Tensor
    waad: torch.Tensor
    fai: torch.Tensor
    count: torch.Tensor
    pool: list[tuple[int, int]]

    @property
    def row(self) -> torch.Tensor:
        """int64 [N]: the row of the batch that each token is in."""
        return self.attention_mask.nonzero()[:, 0]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[N] -> [batch, time], zeros at padding."""
        return x.new_zeros(self.attention_mask.shape).masked_scatter(self.attention_mask, x)

    def mean_distance(self) -> torch.Tensor:
        """[batch, pool]: over the response of each row; 0 where there is none."""
        sums = self.distance.new_zeros(len(self.attention_mask), len(self.pool))
        sums.index_add_(0, self.row, self.distance)
        return sums / self.response_mask.sum(1, keepdim=True).clamp(min=1)

    def group_mean(self, x: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """fp32 [N]: the mean of x [N, pool] over the heads [batch, n] of each token's row."""
        member = x.new_zeros(len(heads), x.shape[1]).scatter_(1, heads, 1.0 / heads.shape[1])
        return (x * member[self.row]).sum(1).float()


class Collector:
    """Takes the weights that layers hand out, and turns them into statistics at once."""

    def __init__(
        self,
        layers: dict[nn.Module, int],
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor,
        window: int,
        horizon: tuple[int, int],
    ) -> None:
        """layers: the number of each module that is listened to (of all that are in it). Masks: bool [batch, time]."""
        if bool((response_mask & ~attention_mask).any()):
            raise ValueError("response_mask has tokens that attention_mask calls padding; take them out of it")
        self.layers, self.window, self.horizon = layers, window, horizon
        self.attention_mask, self.response_mask = attention_mask, response_mask
        self.rows = response_mask[attention_mask]
        self.stop_early = False
        self._parts: dict[int, list[HeadStatistics]] = {layer: [] for layer in layers.values()}
        self._heard = dict.fromkeys(layers.values(), 0)  # rows of padded passes

    def listen(self, module: nn.Module, build: Callable) -> None:
        """What `listen` calls for every layer of a forward pass."""
        layer = self.layers.get(module)
        if layer is None:
            return
        weights, start = build(), self._tokens(layer)
        if isinstance(weights, Padded):
            weights = weights.packed(self._mask_of(weights.q, layer))
        rows = self.rows[start : start + sum(weights.documents)]
        if len(rows) < sum(weights.documents):
            raise RuntimeError(f"layer {layer} saw more tokens than the {len(self.rows)} of the batch: one pass each")
        self._parts[layer].append(weights.statistics(rows, self.window, self.horizon))
        if self.stop_early and self._complete:
            raise _Done

    @contextmanager
    def until_done(self) -> Iterator[None]:
        """Leaves the block once every sampled layer has been heard, if `stop_early`."""
        with suppress(_Done):
            yield

    def collected(self) -> Collected:
        """Raises RuntimeError unless every layer was heard for the whole batch."""
        if not self._complete:
            heard = {layer: self._tokens(layer) for layer in self._parts}
            raise RuntimeError(f"of {len(self.rows)} tokens in the batch, forward passes brought (by layer) {heard}")
        joined = {
            layer: [torch.cat(side) for side in list(zip(*parts, strict=True))[:4]]
            for layer, parts in self._parts.items()
        }
        distance, waad, fai = (torch.cat([sides[i] for sides in joined.values()], dim=1) for i in range(3))
        pool = [(layer, head) for layer, sides in joined.items() for head in range(sides[0].shape[1])]
        count = next(iter(joined.values()))[3]
        return Collected(self.attention_mask, self.response_mask, distance, waad, fai, count, pool)

    def _tokens(self, layer: int) -> int:
        return sum(len(part.count) for part in self._parts[layer])

    @property
    def _complete(self) -> bool:
        return all(self._tokens(layer) == len(self.rows) for layer in self._parts)

    def _mask_of(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """bool [b, time]: the padding of the rows that this pass has."""
        first = self._heard[layer]
        mask = self.attention_mask[first : first + q.shape[0]]
        self._heard[layer] += q.shape[0]
        if mask.shape != q.shape[:2]:
            raise RuntimeError(
                f"a forward pass has {list(q.shape[:2])} tokens, the batch {list(self.attention_mask.shape)}; give it "
                "some rows with all of their columns, in order"
            )
        return mask
