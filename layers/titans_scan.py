"""The linear Titans memory scanned over the ranks of a ring, without one waiting for the other.

What a segment makes of the state that enters it, X = [W; S], is affine: T X + E. Value channels do not mix, so T is
what it makes of the columns of the identity when all values are zero. Every rank finds E and T of its segments, all
exchange them and work out what enters their own, and the memory then runs over all segments at once: the work of four
passes over a rank's tokens, and no rank waits for another one's.
"""

from __future__ import annotations

import torch

from farspan.kernels.titans.state import Gates, Memory, MemoryState
from farspan.layers.titans_memory import MemoryInputs, NeuralMemory, Start
from farspan.layers.titans_relay import Reaching, pieces_of_segments
from farspan.layers.titans_state import at_refresh
from farspan.parallel import Shard
from farspan.parallel.layout import Piece
from farspan.parallel.scan import affine_scan


def scan_memory(
    layer: NeuralMemory, inputs: MemoryInputs, memory: Memory, start: Start, shard: Shard
) -> tuple[torch.Tensor, MemoryState]:
    """inputs: of this rank's tokens. Returns y [1, n, H, D] and the states at the ends of this rank's pieces.

    Only where a segment lies inside one document that began before it does it pass anything on of what enters.
    """
    segments = pieces_of_segments(shard)
    passes = [len(pieces) == 1 and pieces[0].offset > 0 for pieces in segments]
    begun = torch.cat([start.weights[0], start.momentum[0]], dim=-2)  # [1, H, 2 D, D]
    nothing = torch.zeros_like(begun)
    ends = _ends(
        layer,
        *(inputs, memory, [pieces[-1] for pieces in segments]),
        torch.cat([nothing if through else begun for through in passes]),
    )
    gain = begun.new_zeros(len(segments), *begun.shape[1:3], begun.shape[2])
    through = [pieces[0] for pieces, one in zip(segments, passes, strict=True) if one]
    if through:
        index = torch.tensor(passes, device=gain.device).nonzero()[:, 0]
        gain = gain.index_copy(0, index, _transition(layer, inputs, through))
    entered = affine_scan(gain, ends, shard.layout, shard.axis, matrix=True)
    pieces = [piece for segment in segments for piece in segment]
    states = []
    for own, segment in zip(entered, segments, strict=True):
        states += [own[None] if piece.offset else begun for piece in segment]
    y, after = _run(layer, inputs, memory, pieces, torch.cat(states))
    return Reaching.apply(y, entered), after


def _run(
    layer: NeuralMemory, inputs: MemoryInputs, memory: Memory, pieces: list[Piece], state: torch.Tensor, **others
) -> tuple[torch.Tensor, MemoryState]:
    """The memory over pieces, from states [pieces, H, 2 D, D]."""
    weights, momentum = state.chunk(2, dim=-2)
    lengths, offsets = (tuple(getattr(p, name) for p in pieces) for name in ("length", "offset"))
    begun = at_refresh((weights,), (momentum,), layer.options)
    return layer.run(
        *(_taken(inputs, pieces), memory, lengths),
        **{"offsets": offsets, "initial_state": begun, "return_state": True, **others},
    )


def _ends(layer, inputs, memory, pieces, state, **others) -> torch.Tensor:
    _, after = _run(layer, inputs, memory, pieces, state, **others)
    return torch.cat([after.weights[0], after.momentum[0]], dim=-2)


def _transition(layer: NeuralMemory, inputs: MemoryInputs, pieces: list[Piece]) -> torch.Tensor:
    """T [pieces, H, 2 D, 2 D]: the memory's heads twice, from W = 1, S = 0 and from W = 0, S = 1, without values."""
    keys, gates = torch.cat([inputs.k, inputs.k], dim=2), (torch.cat([gate, gate], dim=2) for gate in inputs.gates)
    twice = MemoryInputs(keys, keys, torch.zeros_like(keys), Gates(*gates))  # what the queries read is not used
    heads, size = inputs.k.shape[2:]
    dtype = torch.promote_types(inputs.k.dtype, torch.float32)
    one = torch.eye(2 * size, dtype=dtype, device=inputs.k.device).unflatten(1, (2, size)).transpose(0, 1)
    state = one[:, None].expand(2, heads, 2 * size, size).flatten(0, 1)  # [2 H, 2 D, D]
    memory = Memory((state.new_zeros(2 * heads, size, size),))
    ends = _ends(layer, twice, memory, pieces, state.expand(len(pieces), *state.shape), decay_to="zero")
    return torch.cat(ends.chunk(2, dim=1), dim=-1)


def _taken(inputs: MemoryInputs, pieces: list[Piece]) -> MemoryInputs:
    """The tokens of the pieces."""
    first, last = pieces[0], pieces[-1]
    if sum(piece.length for piece in pieces) == last.local + last.length - first.local:
        return inputs.rows(slice(first.local, last.local + last.length))
    parts = [inputs.rows(slice(piece.local, piece.local + piece.length)) for piece in pieces]
    tensors = zip(*((*part[:3], *part.gates) for part in parts), strict=True)
    q, k, v, *gates = (torch.cat(side, dim=1) for side in tensors)
    return MemoryInputs(q, k, v, Gates(*gates))
