"""What the clusters of routing heads hold of the tokens before, and attention to it: one class for each membership.

A state has for every row, head and cluster `window` keys (rotated) and values, and how many tokens came: of nearest-
centroid membership a ring, slot = number of the token in its cluster mod window; of streaming membership the best
tokens so far, with their scores and positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from farspan.kernels.interval import Intervals, interval_attention, interval_step
from farspan.layers.mixer import State
from farspan.layers.routing_lists import Row, member_lists, nearest_lists, ring_sources
from farspan.layers.routing_membership import Held, Membership, balanced, hold, streaming
from farspan.layers.routing_options import LEAKY, RoutingOptions
from farspan.layers.sequence import Sequence

Metrics = dict[str, torch.Tensor]


def groups(options: RoutingOptions) -> NearestGroups:
    """What holds the clusters of a layer with these options."""
    return (NearestGroups if options.membership == "nearest" else BestGroups)(options)


class NearestGroups:
    """Nearest-centroid membership; the base of the other one."""

    def __init__(self, options: RoutingOptions) -> None:
        self.options = options

    def new(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        options = self.options
        shape = batch, options.routing_heads, options.clusters, options.window
        held = {
            name: torch.zeros(*shape, options.head_dim, dtype=dtype, device=device)
            for name in ("group_key", "group_value")
        }
        return held | {"count": torch.zeros(shape[:3], dtype=torch.int64, device=device)}

    def bytes(self, dtype: torch.dtype) -> int:
        """Of one row of a state."""
        options = self.options
        slots = 2 * options.window * options.head_dim * dtype.itemsize
        return options.routing_heads * options.clusters * (slots + 8)

    def attend(
        self, q, k, v, scores: torch.Tensor, row: Row, sequence: Sequence, state: State | None
    ) -> tuple[torch.Tensor, Metrics]:
        """q: [1, n, H, D], rotated, the tokens `row.own`; k, v: [1, T, H, D], of all tokens of the whole `sequence`;
        scores: [T, H, C]. Returns o [1, n, H, D] and metrics; brings the state up to date.
        """
        options, assigned = self.options, self._assigned(scores)
        if state is not None and not sequence.fresh:
            row = replace(row, counts=state["count"])
            keys, values = (_after(state[name], x) for name, x in (("group_key", k), ("group_value", v)))
        else:
            keys, values = k, v
        lists = nearest_lists(assigned, row, options.clusters, options.window, options.hides_self)
        o = interval_attention(q, keys, values, lists, backend=options.backend)
        if state is not None:
            self._refill(state, keys, values, *ring_sources(assigned, row, options.clusters, options.window))
        return o, {}

    def lists(self, scores: torch.Tensor, row: Row) -> Intervals:
        """Which tokens of whole documents see which; scores: [T, H, C]."""
        options = self.options
        return nearest_lists(self._assigned(scores), row, options.clusters, options.window, options.hides_self)

    def fill(self, k, v, scores: torch.Tensor, row: Row, sequence: Sequence, state: State) -> None:
        """The whole documents of a row into a new state."""
        options = self.options
        sources = ring_sources(self._assigned(scores), row, options.clusters, options.window)
        self._refill(state, k, v, *sources)

    def step(self, q, k, v, scores: torch.Tensor, sequence: Sequence, state: State) -> torch.Tensor:
        """One token of every row. q, k, v: [B, H, D], rotated; scores: [B, H, C]. Returns [B, H, D]."""
        window, chosen = self.options.window, self._assigned(scores)
        count = state["count"].gather(-1, chosen)
        slot = torch.arange(window, device=q.device)
        own = count % window
        place = (*_batch_heads(q, 3), chosen, own)
        for name, new in (("group_key", k), ("group_value", v)):
            state[name] = _put(state[name], place, new[:, :, None].expand(*chosen.shape, -1))
        keys, values = (state[name][place[:3]] for name in ("group_key", "group_value"))
        seen = slot < (count + 1)[..., None]
        if self.options.hides_self:
            seen &= (slot != own[..., None]) | (count == 0)[..., None]
        state["count"].scatter_(-1, chosen, count + 1)
        return interval_step(q, keys, values, seen)

    def _assigned(self, scores: torch.Tensor) -> torch.Tensor:
        if self.options.choices == 1:
            return scores.argmax(-1, keepdim=True)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.options.choices]

    def _refill(self, state: State, keys, values, sources: torch.Tensor, counts: torch.Tensor) -> None:
        """sources: [documents, H, C, window], rows of keys and values. Places where nothing is stay zero."""
        written = (torch.arange(self.options.window, device=counts.device) < counts[..., None])[..., None]
        for name, x in (("group_key", keys), ("group_value", values)):
            rows = x.reshape(-1, x.shape[-1])[sources].to(state[name].dtype)
            state[name] = _replaced(state[name], torch.where(written, rows, 0))
        state["count"].copy_(counts)


class BestGroups(NearestGroups):
    """Streaming membership, and the balanced one, which has no state of its own: it goes on by the streaming rule."""

    def new(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        state = super().new(batch, device, dtype)
        shape = state["group_key"].shape[:4]
        wide = torch.promote_types(dtype, torch.float32)
        return state | {
            "score": torch.zeros(shape, dtype=wide, device=device),
            "entered": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def bytes(self, dtype: torch.dtype) -> int:
        options = self.options
        item = torch.promote_types(dtype, torch.float32).itemsize + 8
        return super().bytes(dtype) + options.routing_heads * options.clusters * options.window * item

    def attend(
        self, q, k, v, scores: torch.Tensor, row: Row, sequence: Sequence, state: State | None
    ) -> tuple[torch.Tensor, Metrics]:
        options, held = self.options, self._held(state, sequence)
        parts = self._memberships(scores, sequence, held, state is not None)
        keys, values = k, v
        if held is not None:
            keys, values = (_after(state[name], x) for name, x in (("group_key", k), ("group_value", v)))
            row = _after_held(sequence, options.window)
        membership, rows = _side_by_side(parts, held, sequence, scores.shape[1:])
        lists = member_lists(membership, rows, row, options.window, options.hides_self)
        o = interval_attention(q, keys, values, lists, backend=options.backend)
        if state is not None:
            self._keep(state, keys, values, scores, sequence, parts, held, rows)
        times = torch.cat([part.enters.sum(1) for part in parts], dim=-1)
        metrics = {"routing_unrouted": (times == 0).float().mean(), "routing_several": (times > 1).float().mean()}
        if options.membership == LEAKY:
            metrics["routing_leaky"] = torch.ones((), device=q.device)
        return o, metrics

    def fill(self, k, v, scores: torch.Tensor, row: Row, sequence: Sequence, state: State) -> None:
        parts = self._memberships(scores, sequence, None, True)
        _, rows = _side_by_side(parts, None, sequence, scores.shape[1:])
        self._keep(state, k, v, scores, sequence, parts, None, rows)

    def step(self, q, k, v, scores: torch.Tensor, sequence: Sequence, state: State) -> torch.Tensor:
        window, count = self.options.window, state["count"]
        slot = torch.arange(window, device=q.device)
        # the one to drive out: of the lowest scores, the last that came
        score = state["score"].masked_fill(slot >= count[..., None], float("inf"))
        lowest = score.amin(-1, keepdim=True)
        victim = state["entered"].masked_fill(score > lowest, -1).argmax(-1)
        full = count == window
        enters = ~full | (scores > lowest[..., 0])
        own = torch.where(full, victim, count)
        place = (*_batch_heads(q, 3), torch.arange(scores.shape[-1], device=q.device), own)
        position = sequence.positions[:, None, None].expand(scores.shape)
        for name, new in (("group_key", k[:, :, None]), ("group_value", v[:, :, None])):
            old = state[name][place]
            state[name] = _put(state[name], place, torch.where(enters[..., None], new.to(old.dtype), old))
        for name, new in (("score", scores), ("entered", position)):
            state[name].index_put_(place, torch.where(enters, new.to(state[name].dtype), state[name][place]))
        count += (enters & ~full).long()
        seen = (slot < count[..., None]) & enters[..., None]
        if self.options.hides_self:
            seen &= (slot != own[..., None]) | (count == 1)[..., None]
        return interval_step(q, state["group_key"], state["group_value"], seen)

    def _held(self, state: State | None, sequence: Sequence) -> list[Held] | None:
        """For each document what the state holds, if anything came before."""
        if state is None or sequence.fresh:
            return None
        taken = torch.arange(self.options.window, device=state["count"].device) < state["count"][..., None]
        scores = state["score"].masked_fill(~taken, float("-inf"))
        return [Held(*parts) for parts in zip(scores, state["entered"], strict=True)]

    def _memberships(self, scores, sequence: Sequence, held: list[Held] | None, going_on: bool) -> list[Membership]:
        documents = [part.permute(1, 2, 0) for part in scores.split(sequence.lengths)]
        if self.options.membership == LEAKY and not going_on:
            return [balanced(document, self.options.window) for document in documents]
        before = held or [None] * len(documents)
        pairs = zip(documents, before, strict=True)
        return [streaming(document, self.options.window, one) for document, one in pairs]

    def _keep(self, state: State, keys, values, scores, sequence: Sequence, parts, held, rows) -> None:
        """The best tokens of every document into the state. rows: [H, C, keys], rows of keys and values."""
        window = self.options.window
        before = 0 if held is None else window
        positions = sequence.positions.split(sequence.lengths)
        kept, start = [], 0
        for i, (document, part) in enumerate(zip(scores.split(sequence.lengths), parts, strict=True)):
            document = document.permute(1, 2, 0)
            entered = positions[i].expand(document.shape)
            source, taken = hold(document, part, window, None if held is None else held[i])
            if held is not None:
                document, entered = torch.cat([held[i].scores, document], -1), torch.cat([held[i].entered, entered], -1)
            own = rows[..., start : start + before + sequence.lengths[i]]
            kept.append((*(x.gather(-1, source) for x in (own, document, entered)), taken))
            start += before + sequence.lengths[i]
        sources, score, entered, taken = (torch.stack(parts) for parts in zip(*kept, strict=True))
        state["score"].copy_(score.masked_fill(~taken, 0.0))
        state["entered"].copy_(entered.masked_fill(~taken, 0))
        self._refill(state, keys, values, sources, taken.sum(-1))


def _after(held: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a state holds, [B, H, C, w, D], and behind it x [1, T, H, D], as rows [1, N, 1, D]."""
    return torch.cat([held.reshape(-1, x.shape[-1]).to(x.dtype), x.reshape(-1, x.shape[-1])])[None, :, None]


def _after_held(sequence: Sequence, window: int) -> Row:
    """The row of keys in which `window` places for what is held precede the tokens of each document."""
    lengths = torch.tensor(sequence.lengths)
    document = torch.arange(len(lengths)).repeat_interleave(lengths + window)
    first = (lengths + window).cumsum(0) - lengths
    number = torch.arange(sequence.tokens) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    own = first.repeat_interleave(lengths) + number
    device = sequence.positions.device
    return Row(document.to(device), len(lengths), window + max(sequence.lengths), own.to(device))


def _side_by_side(
    parts: list[Membership], held: list[Held] | None, sequence: Sequence, shape: torch.Size
) -> tuple[Membership, torch.Tensor]:
    """The documents' memberships as one, over the row of keys, and the row of k of each, [H, C, keys]. shape: H, C."""
    (heads, clusters), device = shape, sequence.positions.device
    window = 0 if held is None else held[0].scores.shape[-1]
    slots = torch.arange(len(parts) * heads * clusters * window, device=device).view(
        len(parts), heads, clusters, window
    )
    tokens = torch.arange(sequence.tokens * heads, device=device).view(-1, heads).t() + slots.numel()
    end = sequence.tokens + len(parts) * window
    enters, leaves, rows, start, token = [], [], [], 0, 0
    for i, (part, length) in enumerate(zip(parts, sequence.lengths, strict=True)):
        times = [part.leaves]
        if held is not None:
            enters.append(held[i].scores.isfinite())
            rows.append(slots[i])
            times.insert(0, part.leaves_held)
        enters.append(part.enters)
        rows.append(tokens[:, None, token : token + length].expand(-1, clusters, -1))
        leaves += [torch.where(time == length, end, time + start + window) for time in times]
        start, token = start + window + length, token + length
    return Membership(torch.cat(enters, -1), torch.cat(leaves, -1)), torch.cat(rows, -1)


def _batch_heads(q: torch.Tensor, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of rows and heads of q [B, H, D], to index the first two of `dimensions` dimensions with."""
    batch, heads = (torch.arange(size, device=q.device) for size in q.shape[:2])
    return batch.view(-1, *[1] * (dimensions - 1)), heads.view(-1, *[1] * (dimensions - 2))


def _put(cache: torch.Tensor, place: tuple[torch.Tensor, ...], new: torch.Tensor) -> torch.Tensor:
    """`cache` with cache[place] = new; in place, unless gradients are recorded."""
    new = new.to(cache.dtype)
    if torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad):
        return cache.index_put(place, new)
    return cache.index_put_(place, new)


def _replaced(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`new` in the place of `cache`: in its memory, unless gradients are recorded."""
    if torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad):
        return new
    return cache.copy_(new)
