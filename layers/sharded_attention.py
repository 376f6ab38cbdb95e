"""Full softmax attention on a shard of a row: Ulysses inside a ring slot, gathered keys or a ring between slots.

After Ulysses' exchange a rank holds the tokens of its ring slot for its own heads. What remains is the ring, and there
every rule is the same one: a piece of a document sees itself causally, and every earlier piece of its document whole.
No mask is needed for any layout or packing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from farspan.kernels.blocks import attention_block, attention_block_backward
from farspan.kernels.softmax import softmax_attention
from farspan.layers.sequence import Sequence
from farspan.parallel import Shard
from farspan.parallel.attention import gathered_attention, ring_attention
from farspan.parallel.heads import grouped_to_heads, plan_heads, to_tokens


def sharded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, backend: str = "auto"
) -> torch.Tensor:
    """Each token attends to itself and to every earlier token of its document, wherever that is.

    q: [1, n, H, D]; k, v: [1, n, Hk, D]: the tokens of this rank, as `sequence.shard` has them. Returns [1, n, H, D].
    """
    context, slot = sequence.shard.context, sequence.slot
    ulysses, ring = context.mesh.ulysses, context.mesh.ring
    plan = plan_heads(q.shape[2], k.shape[2], ulysses.size)
    q, k, v = grouped_to_heads(q, k, v, plan, ulysses)
    if ring.size == 1:
        o, _ = softmax_attention(q, k, v, slot.lengths, slot.cu_seqlens, backend=backend)
    else:
        attend = DocumentAttention(slot.shard, q.shape[-1] ** -0.5)
        if context.attention == "ring":
            o = ring_attention(q, k, v, attend, ring)
        else:
            o = gathered_attention(q, k, v, attend, slot.shard.layout, ring)
    return to_tokens(o, plan.queries, ulysses)


class Block(NamedTuple):
    """Queries and keys of one block, and where the first of each is in their document; all of it is visible, or the
    causal half where they are the same tokens.
    """

    queries: slice
    keys: slice
    query_position: int
    key_position: int

    @property
    def causal(self) -> bool:
        return self.query_position == self.key_position


class DocumentAttention:
    """What `parallel.attention` is handed: the blocks of documents that this rank's queries see."""

    def __init__(self, shard: Shard, scale: float) -> None:
        self._shard, self._scale = shard, scale

    def of(self, heads: slice) -> DocumentAttention:
        return self  # all heads are alike

    def forward(self, q, k, v, source) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        for block in document_blocks(self._shard, source):
            inputs = (_head_major(q, block.queries), _head_major(k, block.keys), _head_major(v, block.keys))
            o, lse = attention_block(*inputs, self._scale, causal=block.causal)
            yield block.queries, o.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, do, q, k, v, o, lse, source
    ) -> Iterator[tuple[slice, torch.Tensor, slice, torch.Tensor, torch.Tensor]]:
        for block in document_blocks(self._shard, source):
            saved = (_head_major(x, block.queries) for x in (o, lse))
            inputs = (_head_major(q, block.queries), _head_major(k, block.keys), _head_major(v, block.keys))
            gradients = attention_block_backward(
                _head_major(do, block.queries), *inputs, *saved, self._scale, causal=block.causal
            )
            dq, dk, dv = (x.transpose(1, 2) for x in gradients)
            yield block.queries, dq, block.keys, dk, dv


def document_blocks(shard: Shard, source: int | None) -> Iterator[Block]:
    """This rank's queries against the keys of one rank of the ring, or of the whole row in order (None)."""
    there = () if source is None else shard.pieces_of(source)
    for piece in shard.pieces:
        queries, at = slice(piece.local, piece.local + piece.length), piece.offset
        if source is None:
            if at:
                yield Block(queries, slice(piece.start - at, piece.start), at, 0)
            yield Block(queries, slice(piece.start, piece.start + piece.length), at, at)
        for other in there:
            if other.document == piece.document and other.offset <= at:
                yield Block(queries, slice(other.local, other.local + other.length), at, other.offset)


def _head_major(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """[1, n, H, ...] -> [1, H, rows, ...]."""
    return x[:, rows].transpose(1, 2)
