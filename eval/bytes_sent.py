"""What a rank sends to others in one layer on one document, by formula: one function for each way to share out tokens.

n: tokens of a rank, P: ranks, H and Hk: query and key heads, d: channels of a head, L: chunk, w: window, e: bytes of an
element, f: those of a gradient that is summed over ranks, in fp32 or wider. CCA has Hc heads of cores, groups g and a
window s. Bytes of one rank, in even shares:

                   forward                           backward
    Ulysses        e d n (2 H + 2 H~) (P - 1) / P    the same            H~ = max(Hk, P), key heads with their copies
    gathered keys  e 2 Hk d n (P - 1)                the same, and gradients: f 2 Hk d n (P - 1)
    ring           e 2 Hk d n (P - 1)                the same, and gradients: f 2 Hk d n P
    halo           e 2 Hk d (w - 1)                  the same            once for each segment that has one before it
    summaries      e 2 H d (n / L) (P - 1)           f 2 H d (n / L) (P - 1)
    RCMHA          as softmax, and a halo of K - 1 rows of e (H + 2 Hk) d, K: tokens of its convolutions
    cores          e 2 Hc d (n / g) (P - 1)          f 2 Hc d (n / g) (P - 1)   and a halo of s to s + g - 1 tokens
    earlier keys   e Hk d n (P - 1)                  the same            contiguous, the mean of the ranks
    routing        Ulysses e d n (3 H + Hl) (P - 1) / P, the same; gathered e 2 Hr d n (P - 1), f 2 Hr d n (P - 1),
                   and a halo for Hl local heads, Hr routing heads
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from farspan.kernels.cca import prefix_needed
from farspan.layers.mixer import MixerOptions
from farspan.layers.routing_shard import HeadDeal
from farspan.parallel.heads import HeadPlan, plan_heads
from farspan.parallel.layout import Layout, Segment, make_layout


@dataclass(frozen=True)
class Sent:
    """Bytes, in the forward and in the backward pass."""

    forward: int
    backward: int

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Sharing:
    """A document of `tokens` tokens shared out over ring x Ulysses ranks; they divide it. See `ContextParallel`."""

    tokens: int
    layout: str
    ring: int
    ulysses: int
    attention: str


def bytes_sent(mixer: str, options: MixerOptions, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    """What `rank` sends in a layer of `mixer`, one of FORMULAS."""
    return FORMULAS[mixer](options, sharing, dtype, rank)


def said(mixer: str, sharing: Sharing) -> str:
    """The forward formula in letters, of the bytes for each token of a rank; empty for one rank."""
    if sharing.ring * sharing.ulysses == 1:
        return ""
    edges = "(P-1)" if sharing.layout == "contiguous" else "(2P-2)"
    if mixer == "routing":
        within, between = "ed(3H+Hl)(P-1)/P", f"2edHr(P-1) + 2edHl(w-1){edges}/N"
        if min(sharing.ring, sharing.ulysses) > 1:
            return "ulysses + gather"
        return within if sharing.ulysses > 1 else between
    if mixer not in ("softmax", "softplus", "rcmha"):
        window = f"2edHk(w-1){edges}/N"
        return {"window": window, "rat": "2edH(P-1)/L", "cca": f"2edHc(P-1)/g + 2edHk s{edges}/N"}[mixer]
    between = "earlier keys" if mixer == "softplus" else sharing.attention
    if min(sharing.ring, sharing.ulysses) > 1:
        return f"ulysses + {between}"
    if sharing.ulysses > 1:
        return "ed(2H+2H~)(P-1)/P"
    return "edHk(P-1)" if mixer == "softplus" else "2edHk(P-1)"


def ulysses(tokens: int, plan: HeadPlan, head_dim: int, dtype: torch.dtype, rank: int) -> Sent:
    """q, k, v of n tokens to the heads of the others and their outputs back; gradients the other way round.

    rank: of the Ulysses axis. A rank that has more heads than another one sends more outputs, and less of the rest.
    """
    queries = [len(own) for own in plan.queries]
    inputs = [len(own) + 2 * len(read) for own, read in zip(plan.queries, plan.keys, strict=True)]
    others = len(queries) - 1
    forward = sum(inputs) - inputs[rank] + others * queries[rank]
    backward = sum(queries) - queries[rank] + others * inputs[rank]
    return Sent(*(dtype.itemsize * head_dim * tokens * heads for heads in (forward, backward)))


def gathered_keys(tokens: int, key_heads: int, head_dim: int, dtype: torch.dtype, ranks: int) -> Sent:
    """k, v to all others, forward and again backward; then each gets the gradients of its own."""
    elements = 2 * key_heads * head_dim * tokens * (ranks - 1)
    return Sent(dtype.itemsize * elements, (dtype.itemsize + _summed(dtype)) * elements)


def ring(tokens: int, key_heads: int, head_dim: int, dtype: torch.dtype, ranks: int) -> Sent:
    """k, v over P - 1 hops, forward and again backward, where the gradients make P hops to come home."""
    elements = 2 * key_heads * head_dim * tokens
    keys = dtype.itemsize * elements * (ranks - 1)
    return Sent(keys, keys + _summed(dtype) * elements * ranks)


def halo(
    layout: Layout, reach: Callable[[int], int], key_heads: int, head_dim: int, dtype: torch.dtype, rank: int
) -> Sent:
    """k, v of the tokens before every segment to the rank that has it, over several ranks where segments are shorter;
    their gradients back. reach: how many, for a segment that starts at a token of the one document.
    """
    row = dtype.itemsize * 2 * key_heads * head_dim
    others = [other for other in range(layout.ranks) if other != rank]
    sent = sum(_halo_rows(layout, reach, other, rank) for other in others)
    received = sum(_halo_rows(layout, reach, rank, other) for other in others)
    return Sent(row * sent, row * received)


def summaries(tokens: int, chunk: int, heads: int, head_dim: int, dtype: torch.dtype, ranks: int) -> Sent:
    """A key and a value for each chunk to all others; each gets the gradients of its own."""
    elements = 2 * heads * head_dim * -(-tokens // chunk) * (ranks - 1)
    return Sent(dtype.itemsize * elements, _summed(dtype) * elements)


def _softmax(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    """Ulysses inside a slot of the ring, then the keys of the rank's heads and of all tokens of its slot."""
    plan = plan_heads(options.heads, options.kv_heads, sharing.ulysses)
    inside = rank % sharing.ulysses
    slot = sharing.tokens // sharing.ring
    between = ring if sharing.attention == "ring" else gathered_keys
    sent = Sent(0, 0)
    if sharing.ulysses > 1:
        sent += ulysses(slot // sharing.ulysses, plan, options.head_dim, dtype, inside)
    if sharing.ring > 1:
        sent += between(slot, _key_heads(plan, inside), options.head_dim, dtype, sharing.ring)
    return sent


def _window(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    layout = make_layout(sharing.layout, sharing.tokens, sharing.ring, sharing.ulysses)

    def reach(start: int) -> int:
        return min(options.window - 1, start)

    return halo(layout, reach, options.kv_heads, options.head_dim, dtype, rank)


def _rat(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    ranks = sharing.ring * sharing.ulysses
    return summaries(sharing.tokens // ranks, options.chunk, options.heads, options.head_dim, dtype, ranks)


def _cca(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    """The cores like RAT's summaries, and the tokens before each segment that it sees one by one."""
    ranks = sharing.ring * sharing.ulysses
    layout = make_layout(sharing.layout, sharing.tokens, sharing.ring, sharing.ulysses)
    core_heads = options.heads if options.core_heads == "q" and options.pool == "significance" else options.kv_heads
    cores = summaries(sharing.tokens // ranks, options.group, core_heads, options.head_dim, dtype, ranks)

    def reach(start: int) -> int:
        return prefix_needed(start, options.group, options.window)

    return cores + halo(layout, reach, options.kv_heads, options.head_dim, dtype, rank)


def _rcmha(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    """The rows before each segment that the convolutions read; then as softmax, with a window as window."""
    layout = make_layout(sharing.layout, sharing.tokens, sharing.ring, sharing.ulysses)

    def reach(start: int) -> int:
        return min(options.kernel - 1, start)

    rows = halo(layout, reach, options.heads + 2 * options.kv_heads, options.head_dim, dtype, rank)
    rows = Sent(rows.forward // 2, rows.backward // 2)  # a halo has keys and values, this one row
    attention = _softmax if options.window is None else _window
    return rows + attention(options, sharing, dtype, rank)


def _softplus(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    """Ulysses inside a slot of the ring, then the keys of the rank's heads and of the tokens before its segments."""
    plan = plan_heads(options.heads, options.kv_heads, sharing.ulysses)
    inside = rank % sharing.ulysses
    sent = Sent(0, 0)
    if sharing.ulysses > 1:
        sent += ulysses(sharing.tokens // sharing.ring // sharing.ulysses, plan, options.head_dim, dtype, inside)
    if sharing.ring > 1:
        layout = make_layout(sharing.layout, sharing.tokens, sharing.ring, 1)

        def reach(start: int) -> int:
            return start if options.window is None else min(options.window - 1, start)

        sent += halo(layout, reach, _key_heads(plan, inside), options.head_dim, dtype, rank // sharing.ulysses)
    return sent


def _routing(options, sharing: Sharing, dtype: torch.dtype, rank: int) -> Sent:
    """Ulysses inside a slot of the ring; then queries (which are the keys) and values of the rank's routing heads, from
    everyone to everyone, and the tokens before its segments for its local heads. In training one number, for the loss.
    """
    ranks = sharing.ring * sharing.ulysses
    deal = HeadDeal.of(options.local_heads, options.routing_heads, sharing.ulysses)
    inside, slot = rank % sharing.ulysses, sharing.tokens // sharing.ring
    local, routing = deal.local(inside), len(deal.routing(inside))
    sent = Sent(torch.promote_types(dtype, torch.float32).itemsize * (ranks - 1) * (options.commitment > 0), 0)
    if sharing.ulysses > 1:
        outputs = [len(own) for own in deal.heads]
        inputs = [2 * len(own) + deal.local(other) for other, own in enumerate(deal.heads)]
        row = dtype.itemsize * options.head_dim * (slot // sharing.ulysses)
        others = sharing.ulysses - 1
        forward = sum(inputs) - inputs[inside] + others * outputs[inside]
        sent += Sent(row * forward, row * (sum(outputs) - outputs[inside] + others * inputs[inside]))
    if sharing.ring > 1:
        layout = make_layout(sharing.layout, sharing.tokens, sharing.ring, 1)

        def reach(start: int) -> int:
            return min(options.local_window - 1, start)

        elements = 2 * routing * options.head_dim * slot * (sharing.ring - 1)
        sent += Sent(dtype.itemsize * elements, _summed(dtype) * elements)
        sent += halo(layout, reach, local, options.head_dim, dtype, rank // sharing.ulysses)
    return sent


FORMULAS = {
    "softmax": _softmax,
    "window": _window,
    "rat": _rat,
    "cca": _cca,
    "softplus": _softplus,
    "routing": _routing,
    "rcmha": _rcmha,
}


def _summed(dtype: torch.dtype) -> int:
    """Bytes of an element of a gradient that is summed over ranks."""
    return torch.promote_types(dtype, torch.float32).itemsize


def _key_heads(plan: HeadPlan, rank: int) -> int:
    """Key heads that a rank has after the exchange: those its queries read, a copy for each query if unevenly."""
    own, used, reads = len(plan.queries[rank]), len(plan.keys[rank]), plan.reads[rank]
    evenly = reads == tuple(head * used // own for head in range(own)) and own % used == 0
    return used if evenly else own


def _halo_rows(layout: Layout, reach: Callable[[int], int], to: int, source: int) -> int:
    """Tokens before the segments of `to` that `source` has."""
    wanted = (Segment(s.start - reach(s.start), reach(s.start)) for s in layout.segments[to])
    return sum(_overlap(halo, segment) for halo in wanted for segment in layout.segments[source])


def _overlap(a: Segment, b: Segment) -> int:
    return max(0, min(a.start + a.length, b.start + b.length) - max(a.start, b.start))
