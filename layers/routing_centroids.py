"""Centroids that follow the queries by online k-means on the sphere, outside the optimizer, the same on every rank.

Per head, in fp32, from the nearest centroid of every token since the last step, n_c of them with the sum s_c:

    N <- decay N + (1 - decay) n     m <- decay m + (1 - decay) s     mu_c = sqrt(d) m_c / |m_c|

A centroid whose N stays below 1 % of the mean for 100 steps is dead: it becomes one of the last queries, with the mean
N. Source: arXiv 2003.05997 and its released code, which divide m by N instead; the sphere keeps the direction, and a
tight cluster does not win tokens by a longer centroid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

DEAD_SHARE, DEAD_STEPS = 0.01, 100
KEPT_SHARE = 1e-3  # a centroid with fewer tokens than this share of the mean stays where it is


class Centroids(nn.Module):
    """Buffers, exempt from casts to half precision: at a decay of 0.999 bf16 would lose every update.

    mu: [H, C, D] centroids of norm sqrt(D). size: [H, C] and total: [H, C, D], the averages N and m. idle: [H, C],
    steps below the share of the dead. steps: how many were taken. new_size, new_total, sample:
    what was counted since the last step; saved although zero by then, since loaders leave unsaved buffers unwritten.
    """

    def __init__(self, heads: int, clusters: int, head_dim: int, decay: float, early_decay: float, early: int) -> None:
        super().__init__()
        self.decay, self.early_decay, self.early = decay, early_decay, early
        shape = heads, clusters, head_dim
        sizes = {name: shape for name in ("mu", "total", "new_total", "sample")}
        sizes |= {name: shape[:2] for name in ("size", "idle", "new_size")} | {"steps": ()}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Random directions; every cluster as if it held one token."""
        for buffer in self.buffers():
            buffer.zero_()
        self.mu.copy_(nn.functional.layer_norm(torch.randn_like(self.mu), self.mu.shape[-1:]))
        self.total.copy_(self.mu)
        self.size.fill_(1.0)

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype.itemsize < 4:
                self._buffers[name] = before[name].to(buffer.device)
        return self

    def scores(self, q: torch.Tensor, heads: Sequence[int] | None = None) -> torch.Tensor:
        """q . mu, [T, H, C] in fp32 or wider, without gradient. q: [T, H, D] of all heads or of those given."""
        wide = torch.promote_types(q.dtype, torch.float32)
        mu = self.mu if heads is None else self.mu[list(heads)]
        with torch.no_grad():
            return torch.einsum("thd,hcd->thc", q.to(wide), mu.to(wide))

    def nearest(self, scores: torch.Tensor, choices: int = 1) -> torch.Tensor:
        """The best clusters of every token, int64 [T, H, choices]; of equal ones the first."""
        if choices == 1:
            return scores.argmax(-1, keepdim=True)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :choices]

    def count(self, q: torch.Tensor, assigned: torch.Tensor, heads: list[int]) -> None:
        """Take tokens into the next step's averages. q: [T, H', D] of the heads given; assigned: int64 [T, H'], their
        nearest centroids.

        Nothing is counted in a backward pass: activation checkpointing runs a forward pass there again.
        """
        _count(self.new_size, self.new_total, self.sample, self.steps, q.detach(), assigned, heads)

    @torch.no_grad()
    def update(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """One step from what was counted on all ranks; `reduce` sums over them."""
        size, total = reduce(self.new_size.clone()), reduce(self.new_total.clone())
        rate = torch.where(self.steps < self.early, 1 - self.early_decay, 1 - self.decay)
        self.size.lerp_(size, rate)
        self.total.lerp_(total, rate)
        norm = self.total.norm(dim=-1, keepdim=True)
        mean = self.size.mean(-1, keepdim=True)
        moves = ((self.size > KEPT_SHARE * mean) & (norm[..., 0] > 0))[..., None]
        on_sphere = self.total / norm.clamp(min=1e-30) * self.mu.shape[-1] ** 0.5
        self.mu.copy_(torch.where(moves, on_sphere, self.mu))
        self.idle.copy_(torch.where(self.size < DEAD_SHARE * mean, self.idle + 1, 0))
        dead = self.idle >= DEAD_STEPS
        if dead.any():  # the same on every rank
            self._revive(dead, mean, reduce)
        self.steps += 1
        for counted in (self.new_size, self.new_total, self.sample):
            counted.zero_()

    def _revive(self, dead: torch.Tensor, mean: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Of every rank's sampled queries each dead centroid takes one, that of a rank which has any: another rank at
        every step, by its number.
        """
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        samples = self.sample.new_zeros(ranks, *self.sample.shape)
        samples[rank] = self.sample
        samples = reduce(samples)
        turn = (torch.arange(ranks, device=samples.device) - int(self.steps)) % ranks
        there = samples.square().sum(-1) > 0
        chosen = torch.where(there, turn[:, None, None], ranks).argmin(0)
        query = samples.gather(0, chosen[None, ..., None].expand(1, *self.sample.shape))[0]
        alive = dead & there.any(0)
        self.mu.copy_(torch.where(alive[..., None], query, self.mu))
        self.size.copy_(torch.where(alive, mean, self.size))
        self.total.copy_(torch.where(alive[..., None], self.size[..., None] * self.mu, self.total))
        self.idle.masked_fill_(alive, 0)

    def balance(self, assigned: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of int64 [T, H] nearest centroids, means over heads: the entropy over that of an even share; the fewest and
        most tokens of a cluster over an even share.
        """
        heads, clusters = assigned.shape[1], self.mu.shape[1]
        flat = (assigned + clusters * torch.arange(heads, device=assigned.device)).flatten()
        counts = torch.zeros(heads * clusters, device=flat.device).index_add_(0, flat, torch.ones_like(flat).float())
        share = counts.view(heads, clusters) / assigned.shape[0]
        entropy = torch.special.entr(share).sum(-1).mean()
        return {
            "routing_entropy": entropy / torch.tensor(float(max(2, clusters))).log(),
            "routing_smallest": share.amin(-1).mean() * clusters,
            "routing_largest": share.amax(-1).mean() * clusters,
        }


@torch.library.custom_op("farspan::routing_count", mutates_args=("size", "total", "sample"))
def _count(
    size: torch.Tensor,
    total: torch.Tensor,
    sample: torch.Tensor,
    steps: torch.Tensor,
    q: torch.Tensor,
    assigned: torch.Tensor,
    heads: list[int],
) -> None:
    tokens = len(q)
    if torch._C._current_graph_task_id() != -1 or not tokens or not heads:  # inside of a backward pass, or nothing
        return
    clusters = size.shape[1]
    for place, head in enumerate(heads):
        one_hot = nn.functional.one_hot(assigned[:, place], clusters).to(total.dtype)
        size[head] += one_hot.sum(0)
        total[head] += one_hot.t() @ q[:, place].to(total.dtype)  # a product, not a scatter: no atomics
    # one query for each cluster, spread over the row and shifted from step to step by the golden section
    shift = torch.arange(clusters, device=q.device) / clusters + steps * 0.6180339887
    index = ((shift % 1.0) * tokens).long().clamp(max=tokens - 1)
    sample[heads] = q[index].transpose(0, 1).to(sample.dtype)


@_count.register_fake
def _(size, total, sample, steps, q, assigned, heads):
    return None
