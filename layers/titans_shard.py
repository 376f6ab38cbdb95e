"""The Titans memory on a shard of a row.

Ulysses ranks exchange tokens for heads: the heads of a memory do not mix. Between ring slots a linear memory is
scanned, and any memory relayed in the order of the row; both are exact. The grid of refreshes is not cut by a shard, so
what travels is weights and momentum alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from farspan.kernels.titans.state import Gates, Memory, MemoryState
from farspan.layers.mixer import State
from farspan.layers.sequence import Sequence as Tokens
from farspan.layers.titans_mac import MemoryAsContext
from farspan.layers.titans_memory import MemoryInputs, NeuralMemory, Start
from farspan.layers.titans_options import TitansOptions
from farspan.layers.titans_pieces import Row
from farspan.layers.titans_relay import Reaching, relay_pieces
from farspan.layers.titans_scan import scan_memory
from farspan.layers.titans_state import at_refresh, begin, entries, memory_state
from farspan.parallel import Shard
from farspan.parallel.comm import gather
from farspan.parallel.heads import own_heads, plan_heads, to_heads, to_tokens
from farspan.parallel.layout import Piece

# Ring ranks from which a scan is no slower than a relay: it takes the work of four segments, a relay that of all.
SCAN_FROM = 4


def memory_on_shard(
    layer: NeuralMemory, inputs: MemoryInputs, memory: Memory, start: Start, sequence: Tokens
) -> tuple[torch.Tensor, State]:
    """The memory over the whole row, of which these are this rank's tokens.

    inputs: of this rank's tokens, all heads. Returns y [1, n, H, D] of these, and by name the states at the ends of
    the pieces that this rank's ring slot holds, of this rank's heads.
    """
    options, ulysses = layer.options, sequence.shard.context.mesh.ulysses
    plan = plan_heads(options.heads, options.heads, ulysses.size)
    q, k, v, gates = inputs
    if ulysses.size > 1:
        q, k, v = to_heads(torch.cat([q, k, v], dim=-1), plan.queries, ulysses).chunk(3, dim=-1)
        gates = Gates(*to_heads(torch.stack(gates, dim=-1), plan.queries, ulysses).unbind(-1))

        def mine(x: torch.Tensor) -> torch.Tensor:
            return own_heads(x, plan, ulysses)

        norm = None if memory.norm is None else tuple(map(mine, memory.norm))
        memory = Memory(tuple(map(mine, memory.weights)), norm)
        weights, momentum = (tuple(mine(x[0])[None] for x in side) for side in start[:2])
        start = start._replace(weights=weights, momentum=momentum)
    own = MemoryInputs(q, k, v, gates)
    slot = sequence.slot.shard
    if options.depth == 1 and options.norm == "none" and slot.axis.size >= SCAN_FROM:
        y, finals = scan_memory(layer, own, memory, start, slot)
    else:
        y, finals = _relay_memory(layer, own, memory, start, slot)
    return to_tokens(y, plan.queries, ulysses), entries(finals, options)


def _relay_memory(
    layer: NeuralMemory, inputs: MemoryInputs, memory: Memory, start: Start, shard: Shard
) -> tuple[torch.Tensor, MemoryState]:
    """y [1, n, H, D] and the states at the ends of this rank's pieces, one segment of the row after the other."""
    options, finals = layer.options, []

    def run(pieces: Sequence[Piece], carried: tuple[torch.Tensor, ...], rows: slice):
        lengths, offsets = (tuple(getattr(p, name) for p in pieces) for name in ("length", "offset"))
        entered = begin(start, len(pieces), options)
        if pieces[0].offset:
            middle = len(carried) // 2
            weights, momentum = (
                tuple(torch.cat([x, y[1:]]) for x, y in zip(side, new, strict=True))
                for side, new in ((carried[:middle], entered.weights), (carried[middle:], entered.momentum))
            )
            entered = at_refresh(weights, momentum, options)
        y, after = layer.run(
            inputs.rows(rows), memory, lengths, offsets=offsets, initial_state=entered, return_state=True
        )
        finals.append(after)
        return y, tuple(x[-1:] for x in (*after.weights, *after.momentum))

    first = tuple(torch.zeros_like(x) for x in (*start.weights, *start.momentum))
    y = relay_pieces(run, inputs.q, first, shard)
    named = [entries(state, options) for state in finals]
    return y, memory_state({name: torch.cat([x[name] for x in named]) for name in named[0]}, options)


def mac_on_shard(
    part: MemoryAsContext, memory: NeuralMemory, initial: Memory, row: Row, start: Start, sequence: Tokens, keep: bool
) -> tuple[torch.Tensor, State, Gates]:
    """MAC over the whole row, of which `row` is this rank's: what is written depends on what was read, so segments
    come one after the other, over all ranks of the context. Returns out [1, n, width], the carry [pieces, ...] at the
    ends of this rank's pieces, and the gates of its tokens.
    """
    options, carries, gates = part.options, [], []
    begun = {**entries(begin(start, 1, options), options), "tail": start.tail}
    if options.h_query == "prev":
        shape = (1, options.heads, options.segment, options.head_dim)
        begun |= {name: row.x.new_zeros(shape) for name in ("asked", "opened")}
    travelling = [name for name in begun if name[:7] in ("weights", "momentu", "tail", "asked", "opened")]

    def run(pieces: Sequence[Piece], carried: tuple[torch.Tensor, ...], rows: slice):
        own = row.rows(rows)
        carry = {name: x.expand(len(pieces), *x.shape[1:]) for name, x in begun.items()}
        if pieces[0].offset:
            arrived = zip(travelling, carried, strict=True)
            carry |= {name: torch.cat([x, carry[name][1:]]) for name, x in arrived}
        lengths, offsets = (tuple(getattr(p, name) for p in pieces) for name in ("length", "offset"))
        out, after, found = part.run(memory, initial, own, lengths, offsets, carry, keep)
        carries.append(after)
        gates.append(found)
        return out, tuple(part.full(name, after[name][-1:]) for name in travelling)

    first = tuple(torch.zeros_like(begun[name]) for name in travelling)
    out = relay_pieces(run, row.q[None], first, sequence.shard)
    out = Reaching.apply(out, row.asked)  # asked by nobody where no segment follows; its halo was fetched all the same
    whole = {name: torch.cat([carry[name] for carry in carries]) for name in carries[0]}
    return out, whole, Gates(*(torch.cat(side, dim=1) for side in zip(*gates, strict=True)))


def final_states(finals: State, sequence: Tokens, options: TitansOptions, by_heads: bool) -> State:
    """What the documents of the whole row end with, on every rank, from the entries [pieces, ...] of each rank.

    by_heads: the entries [pieces, own heads, ...] are those of this rank's ring slot, for this rank's heads; else they
    are those of the rank's own pieces.
    """
    shard = sequence.slot.shard if by_heads else sequence.shard
    ulysses = shard.context.mesh.ulysses if by_heads else None
    context = sequence.shard.axis
    by_rank = [shard.pieces_of(rank) for rank in range(shard.axis.size)]
    most = max(map(len, by_rank))
    found = {}
    for rank, pieces in enumerate(by_rank):
        found |= {piece.start + piece.length: (rank, number) for number, piece in enumerate(pieces)}
    places = [found[start + n] for start, n in zip(shard.starts, shard.lengths, strict=True)]
    heads = plan_heads(options.heads, options.heads, ulysses.size).queries if by_heads else None
    whole = {}
    for name, x in finals.items():
        padded = x.new_zeros(most, max(map(len, heads)) if by_heads else x.shape[1], *x.shape[2:])
        padded[: x.shape[0], : x.shape[1]] = x
        everyone = gather(padded, context)  # [ranks, pieces, heads, ...]
        if not by_heads:
            whole[name] = torch.stack([everyone[place] for place in places])
            continue
        whole[name] = torch.stack(
            [
                torch.cat([everyone[rank * ulysses.size + u, number, : len(own)] for u, own in enumerate(heads)])
                for rank, number in places
            ]
        )
    return whole
