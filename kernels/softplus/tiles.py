"""One block of rows of softplus attention over the tiles of keys that it sees, forward and backward.

With c folded into q, per row N visible keys, theta the mean (0 in free and dead rows) and rho the largest excess:

    f = softplus(q k)      S = sum f      u = max(f - theta, 0) / rho      T = sum u^p      o = sum u^p v / T

    dV  = (u^p)' (do / T)
    dy  = p u^(p-1) (do v - D) / (T rho),  D = sum do o         G = sum dy
    dz  = sigmoid(z) (dy - h),  h = G / N where theta is the mean, else 0
    dq  = c dz k,  dk = dz' (c q)

The re-weighting needs S before u and G before dz, so a block keeps its scores (and dy) of all the keys that it sees,
tile by tile: that is linear in the length, and saves a second product of q and k. LSSA needs neither. Tiles in which no
score exceeds theta do no work with V.

An eps in the denominators adds E = eps (mean / rho)^p to T and p D E / (T S) to h.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch

from farspan.kernels.softplus.config import DEAD, Config
from farspan.kernels.softplus.maps import LINEAR, apply_map, map_slope
from farspan.kernels.workspace import Workspace


class Tile(NamedTuple):
    """Keys of one tile; mask: 1 where visible, else 0, [rows, keys]; None where all are."""

    keys: slice
    mask: torch.Tensor | None

    @property
    def width(self) -> int:
        return self.keys.stop - self.keys.start


class Block:
    """Rows `rows` of documents after `prefix` keys, `shared` query heads to a key head, and the tiles they see."""

    def __init__(self, rows: slice, prefix: int, shared: int, width: int, config: Config, like: torch.Tensor) -> None:
        self.rows, self.shared = rows, shared
        first, end = prefix + rows.start, prefix + rows.stop
        low = 0 if config.window is None else max(0, first - config.window + 1)
        edges = [*range(low, first, width), *range(first, end, width), end]
        positions = torch.arange(first, end, device=like.device)
        self.counts = config.visible(positions).repeat(shared)[:, None]
        self.largest_count = end if config.window is None else min(end, config.window)
        self.tiles = []
        for start, stop in pairwise(edges):
            mask = None
            if stop - 1 > first or (config.window is not None and start < end - config.window):
                keys = torch.arange(start, stop, device=like.device)
                seen = keys <= positions[:, None]
                if config.window is not None:
                    seen &= keys > positions[:, None] - config.window
                mask = seen.to(like.dtype)
            self.tiles.append(Tile(slice(start, stop), mask))

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """x: [units, shared, length, C]. Returns [units, shared * rows, C]."""
        return x[:, :, self.rows].flatten(1, 2)

    def write(self, x: torch.Tensor, values: torch.Tensor) -> None:
        x[:, :, self.rows] = values.unflatten(1, (self.shared, -1))

    def hide(self, x: torch.Tensor, tile: Tile) -> None:
        """x [units, shared * rows, keys] becomes 0 where the tile is hidden."""
        if tile.mask is not None:
            x.unflatten(1, (self.shared, -1)).mul_(tile.mask)


class _Scores:
    """Scores of one block and their maps; `plain` is softplus on bounded scores, the path that has to be fast."""

    def __init__(self, block: Block, q: torch.Tensor, k: torch.Tensor, config: Config, work: Workspace) -> None:
        self.block, self.q, self.k, self.config, self.work = block, q, k, config, work
        constant, slope = config.factors(k.shape[-1])
        bounded = config.qk_norm and constant + slope * math.log(block.largest_count) < LINEAR - 1
        self.plain = config.phi == "softplus" and bounded
        self.shift: torch.Tensor | None = None

    def z(self, tile: Tile, name: str | tuple[str, int]) -> torch.Tensor:
        z = self.work.get(name, *self.q.shape[:2], tile.width)
        return torch.bmm(self.q, self.k[:, tile.keys].transpose(1, 2), out=z)

    def find_shift(self) -> torch.Tensor:
        """Largest score of every row, [units, rows, 1]: what exp is taken relative to."""
        largest = self.q.new_full((*self.q.shape[:2], 1), -math.inf)
        for tile in self.block.tiles:
            z = self.z(tile, "z")
            if tile.mask is not None:
                z = z.unflatten(1, (self.block.shared, -1)).masked_fill(tile.mask == 0, -math.inf).flatten(1, 2)
            torch.maximum(largest, z.amax(-1, keepdim=True), out=largest)
        self.shift = largest
        return largest

    def map(self, tile: Tile, kept: str | tuple[str, int], name: str | tuple[str, int]) -> torch.Tensor:
        """f of a tile in buffer `name`, 0 where hidden; in buffer `kept` what `slope_` needs."""
        z, f = self.z(tile, kept), self.work.get(name, *self.q.shape[:2], tile.width)
        if self.plain:
            torch.log1p(z.exp_(), out=f)
        else:
            f.copy_(apply_map(z, self.config.phi, self.shift))
        self.block.hide(f, tile)
        return f

    def slope_(self, dz: torch.Tensor, tile: Tile, kept: torch.Tensor, name: str) -> None:
        """df becomes dz: times the slope of the map, 0 where hidden. The buffer `name` is overwritten."""
        slope = self.work.get(name, *dz.shape)
        if self.plain:  # kept is exp(z)
            torch.add(kept, 1, out=slope)
            torch.div(kept, slope, out=slope)
        else:
            f = apply_map(kept, self.config.phi, self.shift) if self.config.phi in ("exp", "sigmoid") else None
            slope.copy_(map_slope(kept, self.config.phi, f))
        dz.mul_(slope)
        self.block.hide(dz, tile)


def forward_block(
    block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config, work: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [units, rows, D], times c; k, v: [units, keys, D]. Returns o [units, rows, D] and statistics [units, rows, 3]:
    S, the largest f (of exp the largest z instead), T.
    """
    scores = _Scores(block, q, k, config, work)
    shift = scores.find_shift() if config.phi == "exp" else None
    total, largest, sums = (q.new_zeros(*q.shape[:2], 1) for _ in range(3))
    o = torch.zeros_like(q)
    if not config.power:
        for tile in block.tiles:
            f = scores.map(tile, "z", "f")
            total += _sum(f, config)
            o.baddbmm_(f, v[:, tile.keys])
        o *= _inverse(_divisor(total, block, config))
        return o, torch.cat([total, total if shift is None else shift, total], dim=-1)

    tops = []
    for index, tile in enumerate(block.tiles):
        f = scores.map(tile, "z", ("f", index))
        total += _sum(f, config)
        tops.append(f.amax(-1, keepdim=True))
        torch.maximum(largest, tops[-1], out=largest)
    row = _Row(total, largest, block, config)
    for index, tile in enumerate(block.tiles):
        if not bool((tops[index] <= row.theta).all()):  # NaN goes on, and shows
            u = work.get(("f", index), *q.shape[:2], tile.width)
            weights, _ = row.weights(u, work)
            sums += weights.sum(-1, keepdim=True)
            o.baddbmm_(weights, v[:, tile.keys])
    sums += row.damping
    o *= row.inverse(sums)
    return o, torch.cat([total, largest if shift is None else shift, sums], dim=-1)


def backward_block(
    block: Block,
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    statistics: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    config: Config,
    work: Workspace,
) -> torch.Tensor:
    """As `forward_block`, with a channel of ones behind v's own. Adds to dk and dv; returns dq before it is times c."""
    scores = _Scores(block, q, k, config, work)
    total, largest, sums = statistics.split(1, dim=-1)
    if config.phi == "exp":
        scores.shift, largest = largest, torch.ones_like(largest)
    centre = (do * o).sum(-1, keepdim=True)
    dq = torch.zeros_like(q)
    if not config.power:
        signed = config.phi == "gelu"
        scaled = do * _inverse(_divisor(total, block, config))
        centre = centre * _inverse(total + config.eps) if config.l1 else torch.zeros_like(centre)
        wide = torch.cat([scaled, torch.zeros_like(centre) if signed else -centre], dim=-1)
        for tile in block.tiles:
            f = scores.map(tile, "z", "f")
            kept, keys = work.get("z", *f.shape), tile.keys
            dv[:, keys].baddbmm_(f.transpose(1, 2), scaled)
            dz = torch.bmm(wide, v[:, keys].transpose(1, 2), out=work.get("dy", *f.shape))
            if signed:
                dz -= centre * f.sign()
            scores.slope_(dz, tile, kept, "f")
            dq.baddbmm_(dz, k[:, keys])
            dk[:, keys].baddbmm_(dz.transpose(1, 2), q)
        return dq

    row = _Row(total, largest, block, config)
    inverse = row.inverse(sums)
    scaled = do * inverse
    factor = row.power * inverse * row.excess_inverse
    wide = torch.cat([do * factor, -centre * factor], dim=-1)
    gathered, live = torch.zeros_like(centre), []
    for index, tile in enumerate(block.tiles):
        u, keys = scores.map(tile, ("z", index), "f"), tile.keys
        weights, slopes = row.weights(u, work)
        live.append(weights is not None)
        if weights is None:
            continue
        dv[:, keys].baddbmm_(weights.transpose(1, 2), scaled)
        dy = torch.bmm(wide, v[:, keys].transpose(1, 2), out=work.get(("dy", index), *u.shape))
        dy.mul_(slopes)
        gathered += dy.sum(-1, keepdim=True)
    h = row.held(gathered, centre, sums, total)
    for index, tile in enumerate(block.tiles):
        kept, dz = (work.get((name, index), *q.shape[:2], tile.width) for name in ("z", "dy"))
        if config.phi == "gelu":
            signed = h * apply_map(kept, "gelu").sign()
            dz = dz.sub_(signed) if live[index] else dz.copy_(-signed)
        elif live[index]:
            dz.sub_(h)
        else:
            dz.copy_(-h.expand_as(dz))
        scores.slope_(dz, tile, kept, "f")
        dq.baddbmm_(dz, k[:, tile.keys])
        dk[:, tile.keys].baddbmm_(dz.transpose(1, 2), q)
    return dq


class _Row:
    """What the re-weighting has for every row of a block, [units, rows, 1]: theta, 1 / rho, the power, E."""

    def __init__(self, total: torch.Tensor, largest: torch.Tensor, block: Block, config: Config) -> None:
        self.config, self.counts = config, block.counts
        self.mean = (total + config.eps) / block.counts
        theta = torch.where(block.counts > config.free_rows, self.mean, 0.0)
        self.dead = (largest - theta) <= DEAD * largest
        self.has_dead = bool(self.dead.any())
        self.shifted = (block.counts > config.free_rows) & ~self.dead
        self.theta = torch.where(self.shifted, self.mean, 0.0)
        self.excess_inverse = _inverse(largest - self.theta)
        self.power = torch.where(self.dead, 1.0, config.power)
        self.damping = torch.zeros_like(total)
        if config.eps:
            ratio = self.mean * self.excess_inverse
            self.damping = config.eps * torch.where(self.dead, self.excess_inverse, ratio.pow(config.power))

    def weights(self, f: torch.Tensor, work: Workspace) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """u^p and u^(p-1) of a tile, made of its f in place; None, None where no f exceeds theta."""
        u = f.sub_(self.theta).clamp_min_(0)
        if bool(u.amax() <= 0):
            return None, None
        u.mul_(self.excess_inverse)
        slopes = _power(u, self.config.power - 1, work.get("slopes", *u.shape))
        if self.has_dead:
            torch.where(self.dead, u.sign(), slopes, out=slopes)
        return u.mul_(slopes), slopes

    def inverse(self, sums: torch.Tensor) -> torch.Tensor:
        """1 / T, 0 in rows that give nothing."""
        inverse = _inverse(sums)
        return inverse.masked_fill(self.dead, 0) if self.config.dead_row == "zero" else inverse

    def held(self, gathered, centre, sums, total) -> torch.Tensor:
        """h: what every visible key of the row takes from the gradient of the others."""
        h = torch.where(self.shifted, gathered / self.counts, 0.0)
        if self.config.eps:
            share = (self.damping * _inverse(sums)).nan_to_num(1.0)  # E and T both overflowed: the row is damped to 0
            own = self.config.power * centre * share * _inverse(total + self.config.eps)
            h = h + torch.where(self.dead, 0.0, own)
        return h


def _power(u: torch.Tensor, exponent: float, out: torch.Tensor) -> torch.Tensor:
    """u ** exponent for u in [0, 1] and exponent >= 0, by squaring where that is an integer; u ** 0 is 0 at 0."""
    if exponent == 0:
        return torch.sign(u, out=out)
    if exponent != int(exponent):
        return torch.pow(u, exponent, out=out)
    bits = bin(int(exponent))[3:]
    out.copy_(u) if not bits else torch.pow(u, 2 + int(bits[0]), out=out)
    for bit in bits[1:]:
        out.square_()
        if bit == "1":
            out.mul_(u)
    return out


def _sum(f: torch.Tensor, config: Config) -> torch.Tensor:
    return (f.abs() if config.phi == "gelu" else f).sum(-1, keepdim=True)


def _divisor(total: torch.Tensor, block: Block, config: Config) -> torch.Tensor:
    return total + config.eps if config.l1 else block.counts.to(total.dtype).expand_as(total)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 where x is."""
    return x.masked_fill(x == 0, math.inf).reciprocal()
