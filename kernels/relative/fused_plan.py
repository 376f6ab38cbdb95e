"""How spans map to the programs of the fused kernels: host tables, built once per step.

The kernels see no document boundaries, only tables: which rows or keys a program owns, and where what it reads begins.
A tile never crosses a document, so no length has to be a multiple of anything.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from farspan.kernels.launch import expand
from farspan.kernels.relative.spans import Span


@lru_cache(maxsize=32)
def query_table(spans: tuple[Span, ...], window: int | None, block: int, device: torch.device) -> torch.Tensor:
    """int64 [6, tiles]: first token, tokens, distance of the first one from its span's first key, that key, the span's
    keys, position of the first of them. The tiles that see most come first: they take longest.
    """
    query, length, key, keys, base, key_position = _columns(spans)
    span, tile = expand(-(-length // block))
    first = tile * block
    count = (length[span] - first).clamp(max=block)
    table = torch.stack([query[span] + first, count, base[span] + first, key[span], keys[span], key_position[span]])
    work = torch.minimum(table[2] + count, keys[span])
    return _longest_first(table, work if window is None else work.clamp(max=window)).to(device)


@lru_cache(maxsize=32)
def key_table(spans: tuple[Span, ...], window: int | None, block: int, device: torch.device) -> torch.Tensor:
    """int64 [7, tiles]: first key, keys, index of the first one in its span, first token that sees one of them, how
    many tokens do from there, distance of that first one from the span's first key, position of that key. Keys that no
    token sees have none.
    """
    query, length, key, keys, base, key_position = _columns(spans)
    span, tile = expand(-(-keys // block))
    index = tile * block
    count = (keys[span] - index).clamp(max=block)
    position = torch.maximum(index, base[span])
    end = (base + length)[span]
    if window is not None:
        end = torch.minimum(end, index + count - 1 + window)
    seeing = (end - position).clamp(min=0)
    first = query[span] + position - base[span]
    table = torch.stack([key[span] + index, count, index, first, seeing, position, key_position[span]])
    return _longest_first(table, seeing).to(device)


def _columns(spans: tuple[Span, ...]) -> tuple[torch.Tensor, ...]:
    query, length, key, keys, query_position, key_position = torch.tensor(spans).view(-1, 6).unbind(1)
    return query, length, key, keys, query_position - key_position, key_position


def _longest_first(table: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    return table[:, work.argsort(descending=True, stable=True)].contiguous()
