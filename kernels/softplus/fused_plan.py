"""How packed documents map to the programs of the fused softplus kernels: host tables, built once per step.

The kernels see no document boundaries, only tables: which rows or keys a program owns, and where what it reads begins.
A tile never crosses a document, so no length has to be a multiple of anything.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from farspan.kernels.launch import expand


@lru_cache(maxsize=32)
def query_table(
    lengths: tuple[int, ...], prefixes: tuple[int, ...], window: int | None, block: int, device: torch.device
) -> torch.Tensor:
    """int64 [4, tiles]: first token, tokens, position of the first one in its document, first key of the document.

    The tiles that see most come first: they take longest.
    """
    length, prefix, start, key = _documents(lengths, prefixes)
    document, tile = expand(-(-length // block))
    first = tile * block
    count = (length[document] - first).clamp(max=block)
    position = prefix[document] + first
    table = torch.stack([start[document] + first, count, position, key[document]])
    work = position + count if window is None else (position + count).clamp(max=window)
    return _longest_first(table, work).to(device)


@lru_cache(maxsize=32)
def key_table(
    lengths: tuple[int, ...], prefixes: tuple[int, ...], window: int | None, block: int, device: torch.device
) -> torch.Tensor:
    """int64 [6, tiles]: first key, keys, index of the first one in its document, first token that sees one of them, how
    many tokens do from there, position of that first one. Prefix keys outside every token's window have none.
    """
    length, prefix, start, key = _documents(lengths, prefixes)
    total = prefix + length
    document, tile = expand(-(-total // block))
    index = tile * block
    count = (total[document] - index).clamp(max=block)
    position = torch.maximum(index, prefix[document])
    end = total[document]
    if window is not None:
        end = torch.minimum(end, index + count - 1 + window)
    seeing = (end - position).clamp(min=0)
    first = start[document] + position - prefix[document]
    table = torch.stack([key[document] + index, count, index, first, seeing, position])
    return _longest_first(table, seeing).to(device)


def _documents(lengths: tuple[int, ...], prefixes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Per document: tokens, keys before them, first token, first key."""
    length, prefix = torch.tensor(lengths), torch.tensor(prefixes)
    total = length + prefix
    return length, prefix, length.cumsum(0) - length, total.cumsum(0) - total


def _longest_first(table: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    return table[:, work.argsort(descending=True, stable=True)].contiguous()
