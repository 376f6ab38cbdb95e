"""Memory as a context (MAC): segments whose attention also sees what the memory answers, and is then written to it.

    h = read(x; memory at the end of the segment before)        y_s = attention of row s over P, h_1 .. h_s, x_1 .. x_s
    m = memory(y), written row after row, each row reading the memory as it then is                    out = join(y, m)

As printed (arXiv 2501.00663, equations 21 to 25) it is not causal: h_j depends on token j and every row sees all of h,
and all rows read the memory that the whole segment has written. Here h is masked like x, and the read is the running
one; then no token sees a later one, and segments still reach later ones through the memory.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from farspan.kernels.softmax import write_slots
from farspan.kernels.titans.state import Gates, Memory
from farspan.layers.attention import Projections
from farspan.layers.mixer import State
from farspan.layers.rotary import rope_tables, rotate
from farspan.layers.sequence import Sequence
from farspan.layers.short_convolution import ShortConvolution
from farspan.layers.state import where_new
from farspan.layers.titans_join import Join
from farspan.layers.titans_memory import NeuralMemory, unit
from farspan.layers.titans_options import TitansOptions
from farspan.layers.titans_pieces import Pair, Rope, Row, Turn, turns
from farspan.layers.titans_state import Shapes, entries, may_be, memory_state


class MemoryAsContext(nn.Module):
    """The parts of MAC around its memory.

    A document stands at a dict of entries, batch first, its `carry`: the memory's (`memory_shapes`), `tail` of the
    convolutions that write, `frozen0` ..., the weights at the end of the last segment, and with `keep` the open
    segment's keys and values: `key`, `value`, [documents, H, P + 2 segment, D], in order P, h, x.
    """

    def __init__(self, options: TitansOptions) -> None:
        super().__init__()
        self.options = options
        channels = options.heads * options.head_dim
        self.projections = Projections(options.attention, options.rope)
        self.read_query = nn.Linear(options.width, channels, bias=options.bias)
        self.read_convolution = ShortConvolution(channels, options.conv)
        self.context_norm = nn.RMSNorm(options.width, eps=options.eps)
        self.write_norm = nn.RMSNorm(options.width, eps=options.eps)
        self.join = Join(options)

    def reset_parameters(self) -> None:
        self.read_convolution.reset_parameters()
        self.join.reset_parameters()

    def shapes(self) -> Shapes:
        """Of one document's entries beside the memory's own: frozen weights in fp32, the others in half precision."""
        options = self.options
        shapes: Shapes = {
            f"frozen{layer}": (options.heads, *pair)
            for layer, pair in enumerate(zip(options.sizes, options.sizes[1:], strict=False))
        }
        slots = options.persistent + 2 * options.segment
        shapes |= {name: (options.heads, slots, options.head_dim) for name in ("key", "value")}
        if options.h_query == "prev":
            ring = (options.heads, options.segment, options.head_dim)
            shapes |= {"asked": ring, "opened": ring}
        return shapes

    def row(
        self,
        memory: NeuralMemory,
        x: torch.Tensor,
        mixed: torch.Tensor,
        rope: Rope,
        persistent: torch.Tensor | None,
    ) -> Row:
        """x: [1, T, width]; mixed: [1, T, C], the read queries after their convolution; persistent: [P, width]."""
        asked = unit(F.silu(mixed).unflatten(-1, (self.options.heads, -1)))
        linears = (self.projections.query, self.projections.key, self.projections.value)
        q, k, v = (linear(x).unflatten(-1, (-1, self.options.head_dim)) for linear in linears)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        kept = None if persistent is None else self._keys_values(persistent.to(x.dtype), None)
        return Row(x[0], asked[0], memory.opened(x)[0], q[0], k[0], v[0], rope, kept)

    def run(
        self,
        memory: NeuralMemory,
        initial: Memory,
        row: Row,
        lengths: tuple[int, ...],
        offsets: tuple[int, ...],
        carry: State,
        keep: bool,
    ) -> tuple[torch.Tensor, State, Gates]:
        """Documents of `lengths`, of which `offsets` tokens came earlier and left `carry`.

        keep: the open segment goes on later. Returns out [1, T, width], the carry after these tokens, and the gates of
        all tokens in any order.
        """
        outputs, gates, finals = [], [], {}
        in_turn = list(turns(lengths, offsets, self.options.segment, row.x.device))
        order = None if len(lengths) == 1 else torch.cat([turn.rows for turn in in_turn])
        for turn, part in zip(in_turn, row.split(order, [sum(turn.lengths) for turn in in_turn]), strict=True):
            output, carry, own = self._segment(memory, initial, part, turn, carry, keep)
            outputs.append(output)
            gates.append(own)
            goes_on = [
                number
                for number, (document, start) in enumerate(zip(turn.documents, turn.starts, strict=True))
                if start + turn.lengths[number] < sum(lengths[: document + 1])
            ]
            for number, document in enumerate(turn.documents):
                if number not in goes_on:
                    finals[document] = {name: self.full(name, x[number : number + 1]) for name, x in carry.items()}
            if goes_on and len(goes_on) < len(turn.documents):
                index = torch.tensor(goes_on, device=row.x.device)
                carry = {name: x.index_select(0, index) for name, x in carry.items()}
        out = torch.cat(outputs)
        if order is not None:
            out = out.index_select(0, order.argsort())
        carry = {name: torch.cat([finals[document][name] for document in range(len(lengths))]) for name in carry}
        return out[None], carry, Gates(*(torch.cat(side, dim=1) for side in zip(*gates, strict=True)))

    def _segment(
        self, memory: NeuralMemory, initial: Memory, row: Row, turn: Turn, carry: State, keep: bool
    ) -> tuple[torch.Tensor, State, Gates]:
        """row: of the turn's tokens alone. Returns out [n, width], the carry after them, and their gates."""
        options = self.options
        before = memory_state(carry, options)
        frozen = self._frozen(turn, before.weights, carry)
        x, asked, opened, q, k, v, rope, _ = row
        after: State = {f"frozen{layer}": weight for layer, weight in enumerate(frozen)}
        if options.h_query == "current":
            h = turn.unpad(memory.ask(turn.pad(asked), frozen, initial))
            context = self._context(memory, h, opened, rope)
            cache = self._placed(turn, row, carry, context, (k, v))
        else:
            for name, new in (("asked", asked), ("opened", opened)):
                after[name] = self._slots(turn, carry.get(name), new)
            cache = self._placed_after(memory, initial, turn, row, carry, frozen, (k, v))
        y = self._attend(turn.pad(q), *cache, self._mask(turn))
        if keep:
            after |= dict(zip(("key", "value"), cache, strict=True))
        y = self.projections.merge(turn.unpad(y)[None])
        m, written, tails, gates = self._write(memory, initial, x[None], y, turn, before, carry["tail"])
        after |= {"tail": tails, **entries(written, options)}
        return self.join(y, m)[0], after, gates

    def _write(self, memory, initial, x, y, turn, before, tails):
        """The memory written with y (or x) and asked by y: m [1, n, width], its state and tails after, its gates."""
        asked = self.write_norm(y)
        source = asked if self.options.mac_update_source == "output" else x
        inputs, tails = memory.inputs(memory.project(asked, source), source, tails, turn.lengths)
        m, state = memory.run(
            inputs, initial, turn.lengths, offsets=turn.phases, initial_state=before, return_state=True
        )
        return memory.merge(m, memory.opened(asked)), state, tails, inputs.gates

    def step(
        self, memory: NeuralMemory, initial: Memory, row: Row, state: State, positions: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        """One token of every row, at `positions` [B], from states whose new documents have begun already.

        Returns out [1, B, width] and the entries after it; the caches in the state are written in place unless
        gradients are recorded. On CUDA nothing here waits for the positions.
        """
        options, rows = self.options, torch.arange(len(positions), device=positions.device)
        phase, count = positions % options.segment, options.persistent
        before = memory_state(state, options)
        begins = phase == 0
        frozen = tuple(state[f"frozen{layer}"] for layer in range(options.depth))
        if may_be(begins):
            frozen = tuple(where_new(begins, now, then) for now, then in zip(before.weights, frozen, strict=True))
        after: State = {f"frozen{layer}": weight for layer, weight in enumerate(frozen)}
        caches = [state["key"], state["value"]]
        if options.h_query == "current":
            h = memory.ask(row.asked[:, None], frozen, initial)[:, 0]
            context = self._context(memory, h, row.opened, row.rope)
            caches = [write_slots(cache, rows, count + phase, new) for cache, new in zip(caches, context, strict=True)]
        else:
            if may_be(begins):
                context = self._previous(memory, initial, state, frozen)
                block = slice(count, count + options.segment)
                caches = [
                    torch.cat([x[:, :, :count], where_new(begins, new, x[:, :, block]), x[:, :, block.stop :]], dim=2)
                    for x, new in zip(caches, context, strict=True)
                ]
            for name, new in (("asked", row.asked), ("opened", row.opened)):
                after[name] = write_slots(state[name], rows, phase, new)
        own = count + options.segment + phase
        caches = [write_slots(cache, rows, own, new) for cache, new in zip(caches, (row.k, row.v), strict=True)]
        after |= dict(zip(("key", "value"), caches, strict=True))
        slots = torch.arange(options.segment, device=phase.device)
        seen = slots <= phase[:, None]
        h_seen = seen if options.h_query == "current" else (positions >= options.segment)[:, None].expand_as(seen)
        mask = torch.cat([seen.new_ones(len(seen), count), h_seen, seen], dim=1)[:, None, None]
        y = self.projections.merge(self._attend(row.q[:, None], *caches, mask).transpose(0, 1))
        asked = self.write_norm(y)
        source = asked if options.mac_update_source == "output" else row.x[None]
        inputs, after["tail"] = memory.inputs(
            memory.project(asked, source), source, state["tail"], (1,) * len(positions)
        )
        m, written = memory.step(inputs, initial, before, positions)
        return self.join(y, memory.merge(m, memory.opened(asked))), after | entries(written, options)

    def _frozen(self, turn: Turn, weights, carry: State) -> tuple[torch.Tensor, ...]:
        """The memory at the end of the segment before each one: its weights where a segment begins."""
        if not any(turn.phases):
            return weights
        kept = tuple(carry[f"frozen{layer}"] for layer in range(len(weights)))
        if all(turn.phases):
            return kept
        begins = turn.index[:, 0] == 0
        return tuple(where_new(begins, now, then) for now, then in zip(weights, kept, strict=True))

    def _context(self, memory: NeuralMemory, h: torch.Tensor, opened: torch.Tensor, rope: Rope) -> Pair:
        """Keys and values [..., H, D] of what the memory answered, h and its gate [..., H, D]."""
        return self._keys_values(self.context_norm(memory.merge(h, opened)), rope)

    def _keys_values(self, x: torch.Tensor, rope: Rope) -> Pair:
        """Of x [..., width]."""
        linears = self.projections.key, self.projections.value
        k, v = (linear(x).unflatten(-1, (-1, self.options.head_dim)) for linear in linears)
        return (k if rope is None else rotate(k, rope)), v

    def _placed(self, turn: Turn, row: Row, carry: State, context: Pair, own: Pair) -> Pair:
        """Keys and values [documents, H, P + 2 slots, D] that the turn's tokens see some of: P, h, x."""
        cache, count, size = [], self.options.persistent, self.options.segment
        for name, side in (("key", 0), ("value", 1)):
            parts = []
            for first, new in ((count, context[side]), (count + size, own[side])):
                old = carry[name][:, :, first : first + size] if any(turn.phases) else None
                parts.append(self._slots(turn, old, new))
            cache.append(torch.cat([*self._persistent(turn, row, side), *parts], dim=2))
        return tuple(cache)

    def _placed_after(self, memory, initial, turn, row, carry, frozen, own) -> Pair:
        """The same where h was asked by the segment before."""
        count, size = self.options.persistent, self.options.segment
        context = (row.k.new_zeros(len(turn.documents), *row.k.shape[1:2], size, row.k.shape[2]),) * 2
        if any(turn.later):
            context = self._previous(memory, initial, carry, frozen)
        if any(turn.phases):
            begins = turn.index[:, 0] == 0
            block = slice(count, count + size)
            context = [
                where_new(begins, new, carry[name][:, :, block])
                for name, new in zip(("key", "value"), context, strict=True)
            ]
        cache = []
        for name, side in (("key", 0), ("value", 1)):
            old = carry[name][:, :, count + size :] if any(turn.phases) else None
            new = self._slots(turn, old, own[side])
            cache.append(torch.cat([*self._persistent(turn, row, side), context[side], new], dim=2))
        return tuple(cache)

    def _previous(self, memory: NeuralMemory, initial: Memory, carry: State, frozen) -> Pair:
        """Keys and values [documents, H, segment, D] of what the tokens kept in the carry ask of the frozen memory."""
        asked, opened = (carry[name].transpose(1, 2) for name in ("asked", "opened"))
        h = memory.ask(asked, frozen, initial)
        rope = self.segment_rope(asked.device, asked.dtype)
        return tuple(x.transpose(1, 2) for x in self._context(memory, h, opened, rope))

    def segment_rope(self, device: torch.device, dtype: torch.dtype) -> Rope:
        """cos and sin of every index of a segment."""
        if self.options.rope is None:
            return None
        whole = Sequence.rows(1, self.options.segment, device)
        return rope_tables(whole, self.options.rope, self.options.head_dim, dtype)

    def _slots(self, turn: Turn, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """new [n, H, D] at the slots of their segments: [documents, H, slots, D]; old: what is there already."""
        if not any(turn.phases):
            if len(set(turn.lengths)) == 1:
                return turn.pad(new).transpose(1, 2)
            old = new.new_zeros(len(turn.documents), new.shape[1], turn.reach, new.shape[2])
        rows, slots = turn.slots
        place = (rows[:, None], torch.arange(new.shape[1], device=new.device), slots[:, None])
        return old[:, :, : turn.reach].to(new.dtype).index_put(place, new)

    def _persistent(self, turn: Turn, row: Row, side: int) -> list[torch.Tensor]:
        if row.persistent is None:
            return []
        rows = row.persistent[side].transpose(0, 1)
        return [rows.expand(len(turn.documents), *rows.shape)]

    def full(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """An entry with room for a whole segment, zeros where no token is yet."""
        count, size = self.options.persistent, self.options.segment
        if name in ("asked", "opened"):
            return F.pad(x, (0, 0, 0, size - x.shape[2]))
        if name not in ("key", "value"):
            return x
        slots = size if self.options.h_query == "prev" else (x.shape[2] - count) // 2
        first, *parts = x.split((count, slots, x.shape[2] - count - slots), dim=2)
        return torch.cat([first, *(F.pad(part, (0, 0, 0, size - part.shape[2])) for part in parts)], dim=2)

    def _mask(self, turn: Turn) -> torch.Tensor:
        """bool [documents or 1, 1, longest, P + 2 slots], true where a token sees a key."""
        index = turn.index[:1] if len(set(turn.phases)) == 1 and self.options.h_query == "current" else turn.index
        seen = torch.arange(turn.reach, device=index.device) <= index[..., None]
        h_seen = seen
        if self.options.h_query == "prev":
            later = torch.tensor(turn.later, device=index.device)
            h_seen = later[:, None, None].expand(*seen.shape[:2], self.options.segment)
        always = seen.new_ones(*seen.shape[:2], self.options.persistent)
        return torch.cat([always, h_seen, seen], dim=-1)[:, None]

    def _attend(self, q, keys, values, mask) -> torch.Tensor:
        """q: [documents, m, H, D]; keys, values: [documents, H, slots, D]. Returns [documents, m, H, D]."""
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)
