"""What the Titans memory needs of other ranks: the state that enters a segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from farspan.parallel import Shard
from farspan.parallel.layout import Piece
from farspan.parallel.scan import relay


def relay_pieces(
    run: Callable[[Sequence[Piece], tuple[torch.Tensor, ...], slice], tuple[torch.Tensor, tuple[torch.Tensor, ...]]],
    x: torch.Tensor,
    first: tuple[torch.Tensor, ...],
    shard: Shard,
) -> torch.Tensor:
    """What `run(pieces, state, rows)` returns for the pieces of each of this rank's segments, [1, n, ...], in order.

    run takes the state that enters the segment, to be used where its first piece goes on with a document, and returns
    the output of the segment's rows and the state after it. x, first: as `parallel.scan.relay` takes them.
    """
    segments = pieces_of_segments(shard)

    def step(index: int, state: tuple[torch.Tensor, ...]):
        pieces = segments[index]
        rows = slice(pieces[0].local, pieces[-1].local + pieces[-1].length)
        output, after = run(pieces, state, rows)
        return (output if pieces[0].offset else Reaching.apply(output, *state)), after

    return torch.cat(relay(step, x, first, shard.layout, shard.axis), dim=1)


def pieces_of_segments(shard: Shard) -> list[list[Piece]]:
    """The pieces of documents in each of this rank's segments, at least one each."""
    found, end = [], 0
    for segment in shard.layout.segments[shard.axis.rank]:
        start, end = end, end + segment.length
        found.append([piece for piece in shard.pieces if start <= piece.local < end])
    return found


class Reaching(torch.autograd.Function):
    """The output as it is, with the state among what it depends on: a state that no document goes on with still has
    to be reached by the backward pass, which answers the rank that sent it.
    """

    @staticmethod
    def forward(ctx, output, *state):
        ctx.like = [torch.empty_like(x, device="meta") for x in state]
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(x, device=gradient.device) for x in ctx.like)
