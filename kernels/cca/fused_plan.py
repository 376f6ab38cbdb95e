"""How pieces of documents map to the programs of the fused core attention: host tables, built once per step.

The kernels see no document boundaries, only tables: which queries a program owns and where their keys and cores lie, or
which rows of keys (or cores) it owns and which queries see them. No block crosses a piece, so no length has to be a
multiple of anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from farspan.kernels.cca.pieces import Piece
from farspan.kernels.launch import expand

# Programs that keep a device busy: four for each of the 132 multiprocessors of an H100 or H200. A constant, so that
# sums are split alike, and results the same, on every device.
PROGRAMS = 528


@dataclass(frozen=True)
class Columns:
    """Who sees which keys (or cores): blocks of rows, and for each block the runs of queries that see some of it.

    blocks: int64 [5, entries]: first row, rows, first and end of its segments, split.
    segments: int64 [6, segments]: position (or core number) of the block's first row in the document of these queries,
    first query, its position, end of the queries; tiles of queries at the front that need the mask, and tiles after
    them that see the whole block. The rest needs the mask again.
    splits: into how many sums the queries of a block are split, so that few blocks still keep a device busy.
    """

    blocks: torch.Tensor
    segments: torch.Tensor
    splits: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables for pieces of documents (`kernels.cca.pieces`) with groups of `group` tokens and a window of `window`."""

    pieces: tuple[Piece, ...]
    group: int
    window: int
    device: torch.device

    @cached_property
    def _fields(self) -> dict[str, torch.Tensor]:
        """Per piece: the fields of Piece, its first query, and the cores that its last query sees."""
        fields = torch.tensor(self.pieces).reshape(-1, len(Piece._fields)).T.contiguous()
        d = dict(zip(Piece._fields, fields, strict=True))
        cores = (d["offset"] + d["length"] - self.window).clamp(min=0) // self.group
        return {**d, "start": d["length"].cumsum(0) - d["length"], "cores": cores}

    @lru_cache(maxsize=8)  # noqa: B019 (plans live in a small cache themselves)
    def query_table(self, block: int) -> torch.Tensor:
        """int64 [5, tiles]: first query, queries, position of the first, rows of position 0 among the keys (negative
        where only later ones are there) and of core 0 among the cores.

        The tiles that see most come first: they take longest.
        """
        d = self._fields
        piece, tile = expand(-(-d["length"] // block))
        begin = tile * block
        position = d["offset"][piece] + begin
        count = (d["length"][piece] - begin).clamp(max=block)
        key = (d["key"] + d["prefix"] - d["offset"])[piece]
        table = torch.stack([d["start"][piece] + begin, count, position, key, d["core"][piece]])
        return table[:, position.argsort(descending=True, stable=True)].contiguous().to(self.device)

    @lru_cache(maxsize=8)  # noqa: B019
    def columns(self, cores: bool, rows: int, heads: int, block: int, query_block: int) -> Columns:
        """Blocks of at most `block` of all `rows` of keys (or `cores`) with `heads` heads, queries in tiles.

        Between two blocks there may begin or end a piece, never within one: all rows of a block are seen by the same
        pieces. Rows that nothing sees are in blocks without segments.
        """
        d = self._fields
        first, size = (d["core"], d["cores"]) if cores else (d["key"], d["prefix"] + d["length"])
        bounds = torch.cat([torch.tensor([0, rows]), first, first + size]).unique()
        blocks = -(-bounds.diff() // block)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)])
        interval, number = expand(blocks)
        row = bounds[interval] + number * block
        count = (bounds[interval + 1] - row).clamp(max=block)

        begin, end = (before[torch.searchsorted(bounds, x)] for x in (first, first + size))
        piece, block_number = expand(end - begin, begin)
        segments = self._segments(cores, piece, row[block_number] - first[piece], count[block_number], query_block)
        segments, seen = segments[:, segments[1] < segments[3]], block_number[segments[1] < segments[3]]
        splits = self._splits(segments, len(row) * heads, query_block)
        segments, seen = _split(segments, seen, len(row), splits, query_block)

        ends = torch.bincount(seen, minlength=splits * len(row)).cumsum(0)
        begins = torch.cat([ends.new_zeros(1), ends[:-1]])
        split = torch.arange(splits).repeat_interleave(len(row))
        table = torch.stack([row.repeat(splits), count.repeat(splits), begins, ends, split])
        work = torch.zeros(splits * len(row), dtype=torch.int64).index_add_(0, seen, segments[3] - segments[1])
        table = table[:, work.argsort(descending=True, stable=True)].contiguous()
        return Columns(table.to(self.device), self._tiles(segments, query_block).to(self.device), splits)

    def _segments(self, cores: bool, piece, within, count, query_block: int) -> torch.Tensor:
        """int64 [6, pairs of a piece and a block in it]: as in Columns, but instead of tiles the queries from and up to
        which all of the block is seen. `within`: rows of the piece before the block.
        """
        d, g, s = self._fields, self.group, self.window
        offset, end = d["offset"][piece], (d["offset"] + d["length"])[piece]
        if cores:
            index = within
            begin = torch.maximum(offset, g * (index + 1) + s - 1)
            full_begin, full_end = g * (index + count) + s - 1, end
        else:
            index = within + offset - d["prefix"][piece]
            last = index + count - 1
            begin, full_begin, full_end = torch.maximum(offset, index), last, g * (index // g + 1) + s - 1
            end = torch.minimum(end, g * (last // g + 1) + s - 1)
        shift = d["start"][piece] - offset
        return torch.stack([index, begin + shift, begin, end + shift, full_begin + shift, full_end + shift])

    def _splits(self, segments: torch.Tensor, programs: int, query_block: int) -> int:
        queries = int((segments[3] - segments[1]).max()) if segments.shape[1] else 0
        wanted = -(-PROGRAMS // 2 // max(1, programs))
        return max(1, min(wanted, queries // (8 * query_block)))

    def _tiles(self, segments: torch.Tensor, query_block: int) -> torch.Tensor:
        """Segments as in Columns: the queries that see the whole block, counted in whole tiles."""
        index, begin, position, end, full_begin, full_end = segments
        left = torch.minimum(-((begin - full_begin) // query_block), -((begin - end) // query_block)).clamp(min=0)
        whole = (torch.minimum(full_end, end) - begin - left * query_block).clamp(min=0) // query_block
        return torch.stack([index, begin, position, end, left, whole])


def _split(segments: torch.Tensor, block: torch.Tensor, blocks: int, splits: int, query_block: int):
    """Every segment in `splits` parts of whole tiles, and the entry (split * blocks + block) of each, in its order."""
    begin, end = segments[1], segments[3]
    share = -(-(end - begin) // (splits * query_block)) * query_block
    parts = []
    for split in range(splits):
        part = segments.clone()
        part[1] = torch.minimum(begin + split * share, end)
        part[2] += part[1] - begin
        part[3] = torch.minimum(part[1] + share, end)
        parts.append(part)
    segments = torch.cat(parts, dim=1)
    entry = torch.cat([block + split * blocks for split in range(splits)])
    kept = (segments[1] < segments[3]).nonzero()[:, 0]
    order = kept[entry[kept].argsort(stable=True)]
    return segments[:, order], entry[order]


@lru_cache(maxsize=16)
def make_plan(pieces: tuple[int, ...], group: int, window: int, device: torch.device) -> Plan:
    """The plan of a step, made once and shared by all layers with this group and window; pieces: their fields, flat."""
    width = len(Piece._fields)
    whole = tuple(Piece(*pieces[i : i + width]) for i in range(0, len(pieces), width))
    return Plan(whole, group, window, device)
