"""Tiles of queries: runs of entries of one segment, so that what a tile computes depends on nothing but its segment."""

from __future__ import annotations

import torch


def query_tiles(starts: torch.Tensor, entries: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First entry and number of entries (0 to size) of every tile of `size`, int64 [tiles].

    starts: as in `Intervals`. As many tiles as there may ever be with so many entries in so many segments; those that
    are not needed have no entries. Nothing is read back from the device.
    """
    tiles = (starts.diff() + size - 1) // size
    ends = tiles.cumsum(0)
    number = torch.arange(most_tiles(len(starts) - 1, entries, size), device=starts.device)
    segment = torch.searchsorted(ends, number, right=True)
    inside = segment < len(tiles)
    segment = segment.clamp(max=len(tiles) - 1)
    first = starts[segment] + (number - ends[segment] + tiles[segment]) * size
    count = (starts[segment + 1] - first).clamp(max=size)
    return first.where(inside, 0), count.where(inside, 0)


def most_tiles(segments: int, entries: int, size: int) -> int:
    """How many tiles `entries` entries in `segments` segments may make."""
    return min(entries, entries // size + segments)


def inverse(first: torch.Tensor, last: torch.Tensor, until: torch.Tensor | None, keys: int) -> tuple:
    """For each key entry the query entries low .. high - 1 that see it, int64 [keys] both (high may be below low)."""
    key = torch.arange(keys, device=first.device)
    low = torch.searchsorted(last.contiguous(), key, right=True)
    high = torch.searchsorted(first.contiguous(), key, right=True)
    return low, high if until is None else torch.minimum(high, until)
