"""From the forms in which transformers, trl and farspan describe a batch to one packed row, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from farspan.layers.sequence import Sequence
from farspan.parallel import ContextParallel


@dataclass(frozen=True)
class Packing:
    """A batch [B, T] as one packed row, or this rank's shard of it.

    sequence: the documents of the row, or of the shard. index: int64 [tokens], where in the flattened batch each token
    came from, or None where every place holds a token. rows: of the cache, that have tokens here, or None for all.
    """

    batch: int
    time: int
    sequence: Sequence
    index: torch.Tensor | None
    rows: list[int] | None

    def sharded(self, context: ContextParallel, grid: int) -> Packing:
        """The same batch with its row shared out; every rank of the context calls it with the same batch."""
        shard = context.shard(self.sequence.lengths, grid)
        return replace(self, sequence=Sequence.sharded(shard, self.sequence.positions.device))

    @property
    def documents(self) -> Sequence:
        """The documents of the whole row."""
        return self.sequence if self.sequence.shard is None else self.sequence.whole

    def row(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> the whole row [1, row, ...]."""
        flat = x.flatten(0, 1)
        return (flat if self.index is None else flat[self.index])[None]

    def pack(self, x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """[B, T, ...] -> [1, tokens, ...]: the row, or this rank's tokens of it with `fill` where it is padded."""
        return self.own(self.row(x), fill)

    def own(self, row: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """[1, row, ...] -> [1, tokens, ...]."""
        shard = self.sequence.shard
        return row if shard is None else shard.take(row, fill)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[1, tokens, ...] -> [B, T, ...], zeros at padding; from all ranks, on all ranks."""
        shard = self.sequence.shard
        x = (x if shard is None else shard.whole(x))[0]
        if self.index is not None:
            x = x.new_zeros(self.batch * self.time, *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, (self.batch, self.time))


def pack_batch(
    batch: int,
    time: int,
    device: torch.device,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    offsets: tuple[int, ...] | None = None,
    columns: int = 0,
) -> Packing:
    """Find the documents of a batch.

    attention_mask: [B, columns + T] (or [B, T]), 0 at padding on either side or both. position_ids: [B, T] or [1, T];
    a document begins wherever they do not go on by one. cu_seqlens: int32 [documents + 1] of a packed batch of one row.
    offsets: tokens of every row that a cache holds already, None without a cache; `columns`: those it has seen.
    Raises ValueError where these contradict each other.
    """
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens describes one packed row, the batch has {batch}; flatten it to [1, tokens]")
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("cu_seqlens with padding in attention_mask: leave the padding out of a packed row")
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != time:
            ends = f"{int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
            raise ValueError(f"cu_seqlens runs from {ends}, the row has {time} tokens")
        return _packing(batch, time, device, cu_seqlens.diff().tolist(), None, offsets)

    mask = _own_columns(attention_mask, batch, time, columns)
    index = None if mask is None or bool(mask.all()) else mask.flatten().nonzero()[:, 0]
    counts = [time] * batch if index is None else mask.sum(1).tolist()
    if position_ids is not None and time > 1:
        restarts = _restarts(position_ids.expand(batch, time).flatten(), counts, index, offsets)
        if restarts is not None:
            counts = restarts
    return _packing(batch, time, device, counts, index, offsets)


def _packing(
    batch: int,
    time: int,
    device: torch.device,
    counts: list[int],
    index: torch.Tensor | None,
    offsets: tuple[int, ...] | None,
) -> Packing:
    """The packing of documents of `counts` tokens, those without any left out."""
    if offsets is not None and len(offsets) != len(counts):
        raise ValueError(f"the cache has {len(offsets)} rows, the batch {len(counts)} documents")
    filled = [document for document, count in enumerate(counts) if count]
    if not filled:
        raise ValueError("the batch has no token that is not padding")
    lengths = [counts[document] for document in filled]
    if offsets is not None:
        offsets = tuple(offsets[document] for document in filled)
    rows = None if len(filled) == len(counts) else filled
    return Packing(batch, time, Sequence.packed(lengths, device, offsets), index, rows)


def _own_columns(mask: torch.Tensor | None, batch: int, time: int, columns: int) -> torch.Tensor | None:
    """bool [B, T]: the part of the mask that speaks of this call's tokens."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"attention_mask is {list(mask.shape)}; give [batch, time] with 0 at padding")
    if mask.shape[0] != batch or mask.shape[1] not in (time, columns + time):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, the input [{batch}, {time}] after {columns} cached columns"
        )
    return mask[:, -time:].bool()


def _restarts(
    positions: torch.Tensor, counts: list[int], index: torch.Tensor | None, offsets: tuple[int, ...] | None
) -> list[int] | None:
    """Tokens of every document that `positions` [B * T] mark out, or None where each row is one document."""
    if index is not None:
        positions = positions[index]
    filled = [(count, row) for row, count in enumerate(counts) if count]
    row_starts = [0, *accumulate(count for count, _ in filled)][:-1]
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[1:] = positions[1:] != positions[:-1] + 1
    begins[row_starts] = True
    starts = begins.nonzero()[:, 0]
    first = positions[starts].tolist()
    expected = [0] * len(first) if offsets is None else [offsets[row] for _, row in filled]
    if first != expected:
        raise ValueError(f"position_ids begin at {first[:8]}, the documents at {expected[:8]}")
    if len(first) == len(filled):
        return None
    return torch.cat([starts, starts.new_tensor([len(positions)])]).diff().tolist()
