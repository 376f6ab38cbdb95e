"""What CCA keeps of the tokens before: the cores of complete groups, and a ring of the last keys and values.

A query at position t sees the cores 0 .. c(t) - 1 and the window .. window + group - 1 tokens after them. A group is
pooled as soon as its last token comes, while its keys are all in the ring, so no queries are kept; its core waits in
the cache until it is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from farspan.kernels.cca import Piece, cores_seen, prefix_needed
from farspan.kernels.packing import with_prefixes
from farspan.kernels.softmax import write_slots
from farspan.layers.mixer import State
from farspan.layers.sequence import Sequence
from farspan.layers.softmax import reserve, slots_for
from farspan.layers.window import ring_slots

Pair = tuple[torch.Tensor, torch.Tensor]


class Continuation(NamedTuple):
    """How rows of tokens go on from a state.

    pieces: each document's tokens with those of the ring before them, and all its cores.
    starts, ends: int64 [M], of the groups that these tokens complete, the first tokens' rows among keys with their
    prefixes, and the last ones' rows among the new tokens.
    counts: how many cores of each document were complete before, and how many are after.
    """

    pieces: tuple[Piece, ...]
    starts: torch.Tensor
    ends: torch.Tensor
    counts: tuple[tuple[int, int], ...]


class CoreCache:
    """Makes, checks, reads and writes the states of a layer with these options (`layers.cca.CcaOptions`)."""

    def __init__(self, options) -> None:
        self._options = options
        self._group, self._window, self._ring = options.group, options.window, options.window + options.group - 1
        choices = (options.pool, options.core_rope, options.core_heads)
        self._layout = (self._group, self._window, *(_code(choice) for choice in choices))

    def new(self, batch: int, capacity: int, device: torch.device | str, dtype: torch.dtype) -> State:
        options = self._options
        ring = (batch, options.kv_heads, self._ring, options.head_dim)
        cores = (batch, options.cores_have, self._slots(capacity), options.head_dim)
        return {
            "key": torch.zeros(ring, dtype=dtype, device=device),
            "value": torch.zeros(ring, dtype=dtype, device=device),
            "core_key": torch.zeros(cores, dtype=dtype, device=device),
            "core_value": torch.zeros(cores, dtype=dtype, device=device),
            "layout": torch.tensor([self._layout] * batch).reshape(batch, len(self._layout)),
            "position": torch.zeros(batch, dtype=torch.int64),
        }

    def bytes(self, length: int, itemsize: int) -> int:
        """Of one row of a state that has seen `length` tokens."""
        options = self._options
        entries = options.cores_have * self._slots(length) + options.kv_heads * self._ring
        return 2 * entries * options.head_dim * itemsize + 8 * len(self._layout) + 8

    def check(self, state: State) -> None:
        """Raise ValueError for a state that a layer with other options made."""
        layout = state.get("layout")
        found = [] if layout is None else layout.tolist()
        if layout is None or any(tuple(row) != self._layout for row in found):
            group, window = found[0][:2] if found else ("none", "none")
            options = self._options
            raise ValueError(
                f"the state was made with group={group}, window={window} or another pool, core_rope or core_heads, the "
                f"layer has group={options.group}, window={options.window}, pool={options.pool}, "
                f"core_rope={options.core_rope}, core_heads={options.core_heads}; make a new state"
            )

    def _slots(self, length: int) -> int:
        """Slots for the cores of `length` tokens, that of an unfinished group among them."""
        return slots_for(-(-length // self._group))

    # Several tokens of each row

    def plan(self, sequence: Sequence) -> Continuation:
        group, pieces, starts, ends, counts, query, key, core = self._group, [], [], [], [], 0, 0, 0
        for offset, length, total in zip(sequence.offsets, sequence.lengths, sequence.totals, strict=True):
            prefix = prefix_needed(offset, group, self._window)
            firsts = group * torch.arange(offset // group, total // group)
            pieces.append(Piece(length, offset, prefix, key, core))
            starts.append(firsts + key + prefix - offset)
            ends.append(firsts + group - 1 + query - offset)
            counts.append((offset // group, total // group))
            query, key, core = query + length, key + prefix + length, core + total // group
        starts, ends = (torch.cat(rows).to(sequence.positions.device) for rows in (starts, ends))
        return Continuation(tuple(pieces), starts, ends, tuple(counts))

    def with_prefixes(self, state: State, k: torch.Tensor, v: torch.Tensor, plan: Continuation) -> Pair:
        """New keys and values [1, T, Hk, D] with those of the ring that they see in front of each row's own."""
        before = []
        for row, piece in enumerate(plan.pieces):
            slots = torch.arange(piece.offset - piece.prefix, piece.offset, device=k.device) % self._ring
            before.append(tuple(state[name][row, :, slots].transpose(0, 1) for name in ("key", "value")))
        return with_prefixes(k, v, tuple(piece.length for piece in plan.pieces), tuple(before))[:2]

    def with_cores(self, state: State, core_k: torch.Tensor, core_v: torch.Tensor, plan: Continuation) -> Pair:
        """All cores of every row, [1, sum of counts, Hc, D]: those of the state before the new ones [1, M, Hc, D]."""
        sides = []
        for name, new in (("core_key", core_k), ("core_value", core_v)):
            parts = new[0].split([after - before for before, after in plan.counts])
            known = (state[name][row, :, :before].transpose(0, 1) for row, (before, _) in enumerate(plan.counts))
            sides.append(torch.cat([x.to(new.dtype) for pair in zip(known, parts, strict=True) for x in pair])[None])
        return tuple(sides)

    def write(self, state: State, k, v, core_k, core_v, sequence: Sequence, plan: Continuation) -> None:
        """The last tokens into the ring, and new cores [1, M, Hc, D] after those that the rows have."""
        last, _, _ = self._ring_slots(sequence)
        keys, values = (k[0], v[0]) if last is None else (k[0, last], v[0, last])
        self.fill(state, keys, values, core_k[0], core_v[0], sequence, plan.counts)

    def fill(self, state: State, keys, values, core_k, core_v, sequence: Sequence, counts=None) -> None:
        """Keys and values [kept, Hk, D] of the last tokens of every document, and the cores [M, Hc, D] that it adds.

        counts: as of a continuation; of documents that begin with these tokens when None.
        """
        _, rows, slots = self._ring_slots(sequence)
        counts = [(0, total // self._group) for total in sequence.totals] if counts is None else counts
        pairs = [(row, slot) for row, (before, after) in enumerate(counts) for slot in range(before, after)]
        core_rows, core_slots = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).to(keys.device).unbind(1)
        for name, new in (("key", keys), ("value", values)):
            state[name] = write_slots(state[name], rows, slots, new)
        for name, new in (("core_key", core_k), ("core_value", core_v)):
            state[name] = write_slots(self._reserved(state, name, sequence), core_rows, core_slots, new)

    def _ring_slots(self, sequence: Sequence) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        return sequence.table(("ring", self._ring), lambda: ring_slots(sequence, self._ring))

    def _reserved(self, state: State, name: str, sequence: Sequence) -> torch.Tensor:
        return reserve(state[name], -(-max(sequence.totals) // self._group))

    # One token of each row, at positions that only the device knows

    def write_token(self, state: State, k: torch.Tensor, v: torch.Tensor, sequence: Sequence) -> None:
        """k, v: [1, B, Hk, D]."""
        _, rows, slots = self._ring_slots(sequence)
        for name, new in (("key", k), ("value", v)):
            state[name] = write_slots(state[name], rows, slots, new[0])

    def last_groups(self, state: State, positions: torch.Tensor) -> Pair:
        """Keys and values [1, B * group, Hk, D] of the group that each row is in; any finite ones after its last."""
        first = positions - positions % self._group
        slots = (first[:, None] + torch.arange(self._group, device=positions.device)) % self._ring
        rows = torch.arange(len(slots), device=positions.device)[:, None]
        return tuple(state[name].transpose(1, 2)[rows, slots].flatten(0, 1)[None] for name in ("key", "value"))

    def write_core(self, state: State, core_k: torch.Tensor, core_v: torch.Tensor, sequence: Sequence) -> None:
        """core_k, core_v: [1, B, Hc, D], of the groups that the rows are in."""
        rows, slots = sequence.document_of_token, sequence.positions // self._group
        for name, new in (("core_key", core_k), ("core_value", core_v)):
            state[name] = write_slots(self._reserved(state, name, sequence), rows, slots, new[0])

    def read(self, state: State, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The ring's keys and values, and those slots of the cores' that any row may see."""
        reach = slots_for(cores_seen(max(sequence.totals) - 1, self._group, self._window))
        cores = (state[name][:, :, :reach] for name in ("core_key", "core_value"))
        return state["key"], state["value"], *cores


def _code(choice: str) -> int:
    """A number for an option's value: its first letters."""
    return int.from_bytes(choice.encode()[:7], "big")
