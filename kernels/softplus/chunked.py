"""Softplus attention in linear memory, forward and backward, on any device.

Documents that follow each other with the same lengths are taken together, and in them a few heads at a time; the query
heads that share a key head are rows of one matrix. Blocks of rows then go over tiles of the keys that they see
(`kernels.softplus.tiles`):

    forward   o, and per row S = sum f, the largest score, T = sum u^p        saved: q, k, v, o, those three
    backward  the same blocks over the same tiles, everything else recomputed

No max is tracked and nothing is rescaled along the tiles: softplus cannot overflow, and the re-weighting divides by the
row's largest excess before it takes the power.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from itertools import groupby

import torch

from farspan.kernels.softplus.config import Config
from farspan.kernels.softplus.tiles import Block, backward_block, forward_block
from farspan.kernels.workspace import Workspace

# Rows of a block, and scores of a tile: 512 KB of fp32, so that a few tiles stay in a core's cache.
ROWS = 256
TILE = 128 * 1024


def softplus_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    config: Config,
) -> torch.Tensor:
    """Arguments and result as `kernels.softplus.reference.softplus_reference`."""
    return _softplus_forward(q, k, v, list(lengths), list(prefixes), *astuple(config))[0]


@torch.library.custom_op("farspan::softplus_forward", mutates_args=())
def _softplus_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    power: float,
    window: int | None,
    free_rows: int,
    scale_multiplier: float,
    dead_row: str,
    eps: float,
    phi: str,
    qk_norm: bool,
    l1: bool,
    length_scale: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, D] and the rows' statistics [3, T, H] (fp32, float64 for float64)."""
    config = Config(power, window, free_rows, scale_multiplier, dead_row, eps, phi, qk_norm, l1, length_scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = q.new_empty(3, *q.shape[1:3], dtype=wide)
    for run in _runs(lengths, prefixes, k.shape[2]):
        queries, keys, values = run.rows(q[0], wide), run.keys(k[0], wide), run.keys(v[0], wide)
        queries *= run.scale(config, q)[:, None]
        out, saved = torch.empty_like(queries), queries.new_empty(*queries.shape[:3], 3)
        work = Workspace(queries)
        for units, block in run.blocks(config, queries):
            mine = block.rows_of(queries[units])
            part, rows = forward_block(block, mine, keys[units], values[units], config, work)
            block.write(out[units], part)
            block.write(saved[units], rows)
        run.write_rows(o[0], out)
        run.write_rows(statistics.permute(1, 2, 0), saved)
    return o, statistics


@_softplus_forward.register_fake
def _(q, k, v, lengths, prefixes, *options):
    statistics = q.new_empty(3, *q.shape[1:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), statistics


@torch.library.custom_op("farspan::softplus_backward", mutates_args=())
def _softplus_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    statistics: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    power: float,
    window: int | None,
    free_rows: int,
    scale_multiplier: float,
    dead_row: str,
    eps: float,
    phi: str,
    qk_norm: bool,
    l1: bool,
    length_scale: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = Config(power, window, free_rows, scale_multiplier, dead_row, eps, phi, qk_norm, l1, length_scale)
    wide = statistics.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for run in _runs(lengths, prefixes, k.shape[2]):
        scale = run.scale(config, q)[:, None]
        queries, gradients, outputs = (run.rows(x[0], wide) for x in (q, do, o))
        keys, values = run.keys(k[0], wide), run.keys(v[0], wide)
        values = torch.cat([values, values.new_ones(*values.shape[:2], 1)], dim=-1)
        saved = run.rows(statistics.permute(1, 2, 0), wide)
        queries *= scale
        dqueries, dkeys, dvalues = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(keys)
        work = Workspace(queries)
        for units, block in run.blocks(config, queries):
            do_rows, q_rows, o_rows, saved_rows = (
                block.rows_of(x[units]) for x in (gradients, queries, outputs, saved)
            )
            read, added = (keys[units], values[units]), (dkeys[units], dvalues[units])
            part = backward_block(block, do_rows, q_rows, *read, o_rows, saved_rows, *added, config, work)
            block.write(dqueries[units], part)
        run.write_rows(dq[0], dqueries.mul_(scale))
        run.write_keys(dk[0], dkeys)
        run.write_keys(dv[0], dvalues)
    return dq, dk, dv


@_softplus_backward.register_fake
def _(do, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    gradients = _softplus_backward(do, *ctx.saved_tensors, *ctx.constants)
    return *gradients, *(None for _ in ctx.constants)


_softplus_forward.register_autograd(_backward, setup_context=_save)


class _Run:
    """`count` documents of `length` tokens after `prefix` earlier keys, one after the other in the packed row.

    Its units are its documents' key heads: queries [units, shared, length, D], shared of them to a key head, and keys
    [units, prefix + length, D].
    """

    def __init__(self, query: int, key: int, count: int, length: int, prefix: int, heads: int) -> None:
        self.query, self.key, self.count = query, key, count
        self.length, self.prefix, self.heads = length, prefix, heads

    def rows(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x: [T, H, C]. Returns a contiguous copy [units, shared, length, C]."""
        x = self._rows_view(x)
        return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 1)

    def keys(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x: [keys, Hk, C]. Returns a contiguous copy [units, prefix + length, C]."""
        x = self._keys_view(x)
        return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(0, 1)

    def write_rows(self, x: torch.Tensor, values: torch.Tensor) -> None:
        view = self._rows_view(x)
        view.copy_(values.view(view.shape))

    def write_keys(self, x: torch.Tensor, values: torch.Tensor) -> None:
        view = self._keys_view(x)
        view.copy_(values.view(view.shape))

    def scale(self, config: Config, like: torch.Tensor) -> torch.Tensor:
        """c of every row, [length]."""
        positions = torch.arange(self.prefix, self.prefix + self.length, device=like.device)
        wide = torch.promote_types(like.dtype, torch.float32)
        return config.row_scale(config.visible(positions), like.shape[-1], wide)

    def blocks(self, config: Config, queries: torch.Tensor) -> Iterator[tuple[slice, Block]]:
        """(units, block of their rows), until every row was in one."""
        units, shared = queries.shape[:2]
        most = ROWS if config.window is None else min(ROWS, max(64, config.window // 4))
        step = max(1, min(self.length, most // shared))
        width = max(1, TILE // (shared * step))
        together = max(1, min(units, TILE // (shared * step * min(width, self.prefix + self.length))))
        for first in range(0, units, together):
            for start in range(0, self.length, step):
                rows = slice(start, min(start + step, self.length))
                yield slice(first, first + together), Block(rows, self.prefix, shared, width, config, queries)

    def _rows_view(self, x: torch.Tensor) -> torch.Tensor:
        x = x[self.query : self.query + self.count * self.length]
        return x.unflatten(1, (self.heads, -1)).unflatten(0, (self.count, -1)).permute(0, 2, 3, 1, 4)

    def _keys_view(self, x: torch.Tensor) -> torch.Tensor:
        x = x[self.key : self.key + self.count * (self.prefix + self.length)]
        return x.unflatten(0, (self.count, -1)).transpose(1, 2)


def _runs(lengths: list[int], prefixes: list[int], heads: int) -> Iterator[_Run]:
    query, key = 0, 0
    for (length, prefix), same in groupby(zip(lengths, prefixes, strict=True)):
        count = len(list(same))
        yield _Run(query, key, count, length, prefix, heads)
        query, key = query + count * length, key + count * (prefix + length)
