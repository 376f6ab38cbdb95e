"""How packed documents map to the programs of the fused kernels of local linear attention: host tables, once per step.

The kernels see no document boundaries, only tables: which queries (or keys) a program owns, and which keys they see (or
which queries see them). No tile crosses a document, so no length has to be a multiple of anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

# Programs that keep a device busy: four for each of the 132 multiprocessors of an H100 or H200. A constant, so that
# sums are split alike, and results the same, on every device.
PROGRAMS = 528


@dataclass(frozen=True, eq=False)
class Plan:
    """Tables for documents of `lengths` tokens with `prefixes` keys before them; a token sees `window` keys, or all."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    window: int | None
    device: torch.device

    @cached_property
    def _documents(self) -> dict[str, torch.Tensor]:
        """Per document: tokens, keys before them, keys in all, first token and first key."""
        length, prefix = torch.tensor(self.lengths), torch.tensor(self.prefixes)
        total = prefix + length
        start, key = length.cumsum(0) - length, total.cumsum(0) - total
        return {"length": length, "prefix": prefix, "total": total, "start": start, "key": key}

    @lru_cache(maxsize=8)  # noqa: B019 (plans live in a small cache themselves)
    def query_table(self, block: int) -> torch.Tensor:
        """int64 [4, tiles]: first token, tokens, position of the first in its document, first key of the document.

        The tiles that see most come first: they take longest.
        """
        d = self._documents
        document, tile = _tiles(d["length"], block)
        first = tile * block
        position, count = d["prefix"][document] + first, (d["length"][document] - first).clamp(max=block)
        table = torch.stack([d["start"][document] + first, count, position, d["key"][document]])
        work = position if self.window is None else position.clamp(max=self.window)
        return table[:, work.argsort(descending=True, stable=True)].contiguous().to(self.device)

    @lru_cache(maxsize=8)  # noqa: B019
    def key_table(self, block: int) -> torch.Tensor:
        """int64 [6, entries]: first key, keys, index of the first in its document, first token that sees any of them,
        its position, end of the tokens that do.
        """
        d = self._documents
        document, tile = _tiles(d["total"], block)
        index = tile * block
        count, prefix = (d["total"][document] - index).clamp(max=block), d["prefix"][document]
        position, end = torch.maximum(index, prefix), d["total"][document]
        if self.window is not None:
            end = torch.minimum(end, index + count - 1 + self.window)
        shift = d["start"][document] - prefix  # token = position + shift
        end = torch.maximum(end, position)
        fields = [d["key"][document] + index, count, index, position + shift, position, end + shift]
        order = (end - position).argsort(descending=True, stable=True)
        return torch.stack(fields)[:, order].contiguous().to(self.device)

    @staticmethod
    def share(programs: int, groups: int) -> int:
        """Of the `groups` query heads of a key head, how many one of at least `programs` programs takes."""
        splits = min(groups, -(-PROGRAMS // 2 // max(1, programs)))
        return -(-groups // splits)


def _tiles(lengths: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The document of every tile, and its number in it."""
    counts = -(-lengths // block)
    document = torch.arange(len(counts)).repeat_interleave(counts)
    return document, torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]


@lru_cache(maxsize=16)
def make_plan(lengths: tuple[int, ...], prefixes: tuple[int, ...], window: int | None, device: torch.device) -> Plan:
    """The plan of a step, made once and shared by all layers with this window."""
    return Plan(lengths, prefixes, window, device)
