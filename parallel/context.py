"""Context parallelism as a caller chooses it, and the shard of one packed row that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from farspan.parallel.comm import agree, gather
from farspan.parallel.layout import LAYOUTS, Layout, Piece, make_layout, multiple, padding, place_documents
from farspan.parallel.mesh import Axis, Mesh

ATTENTIONS = ("gather", "ring")


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The tokens of each row shared out over the mesh's context axis.

    layout: "contiguous", or "zigzag", which balances full attention over long documents on a ring.
    attention: how the queries of full attention meet the keys of other ring ranks: "gather" or "ring".
    Raises ValueError for unknown names.
    """

    mesh: Mesh
    layout: str = "contiguous"
    attention: str = "gather"

    def __post_init__(self) -> None:
        for name, value, valid in (("layout", self.layout, LAYOUTS), ("attention", self.attention, ATTENTIONS)):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(valid)}")

    @property
    def ring(self) -> int:
        return self.mesh.ring.size

    @property
    def ulysses(self) -> int:
        return self.mesh.ulysses.size

    @property
    def size(self) -> int:
        """Ranks that share a row."""
        return self.mesh.context.size

    def shard(self, lengths: Sequence[int], grid: int = 1) -> Shard:
        """This rank's part of a row of documents of `lengths` tokens. Every rank of the context axis calls it.

        The row is padded so that it divides, and a document that an edge of a shard cuts is moved to a multiple of
        `grid` tokens, so that no chunk of `grid` tokens is cut: no length has to be a multiple of anything.
        Raises ValueError where the ranks have different rows.
        """
        lengths = tuple(lengths)
        agree((*lengths, -1, grid, self.ring, LAYOUTS.index(self.layout)), "the batch", self.mesh.context)
        step = multiple(self.layout, self.ring, self.ulysses, grid)
        tokens = -(-sum(lengths) // step) * step
        while True:
            layout = make_layout(self.layout, tokens, self.ring, self.ulysses)
            starts, end = place_documents(lengths, layout.edges, grid)
            if end <= tokens:
                return Shard(self, layout, self.mesh.context, lengths, starts)
            tokens += step


@dataclass(frozen=True, eq=False)
class Shard:
    """What one rank of `axis` holds of a packed row: documents of `lengths`, at `starts` of the padded row.

    Padding is documents of its own, without labels; nobody else sees it.
    """

    context: ContextParallel
    layout: Layout
    axis: Axis
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    @cached_property
    def documents(self) -> tuple[tuple[int, int], ...]:
        """(first token, tokens) of every document of the padded row in order, padding included."""
        real = zip(self.starts, self.lengths, strict=True)
        return tuple(sorted([*real, *padding(self.starts, self.lengths, self.layout)]))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of documents that this rank holds, numbered as in `documents`."""
        return self.pieces_of(self.axis.rank)

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """The pieces of documents that a rank of the axis holds."""
        return self.layout.pieces(rank, tuple(length for _, length in self.documents))

    @cached_property
    def _source(self) -> torch.Tensor:
        """int64 [tokens]: for each token of the padded row its place in the row as it was given, -1 for padding."""
        source = torch.full((self.layout.tokens,), -1)
        first = 0
        for start, length in zip(self.starts, self.lengths, strict=True):
            source[start : start + length] = torch.arange(first, first + length)
            first += length
        return source

    def take(self, x: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """This rank's tokens [1, local, ...] of the row as it was given, x [1, tokens, ...]; `fill` at padding."""
        own = self._source[self.layout.own(self.axis.rank)].to(x.device)
        taken = x.index_select(1, own.clamp(min=0))
        return taken.masked_fill((own < 0).view(1, -1, *[1] * (x.ndim - 2)), fill)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Inverts `take`: x [1, local, ...] of every rank to the row as it was given, [1, tokens, ...], on all ranks.

        Differentiable; the gradients that the ranks bring are added up.
        """
        gathered = gather(x[0], self.axis).flatten(0, 1)
        places = self.layout.place[(self._source >= 0).nonzero()[:, 0]].to(x.device)
        return gathered.index_select(0, places)[None]

    @cached_property
    def ring(self) -> Shard:
        """The same row seen by the ring: each slot holds what its Ulysses ranks hold together, one after the other."""
        layout = make_layout(self.context.layout, self.layout.tokens, self.context.ring)
        return Shard(self.context, layout, self.context.mesh.ring, self.lengths, self.starts)
