"""Which mesh, layout and method a recipe's context parallelism gets, decided before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farspan.layers.mixer import MIXERS, MixerOptions
from farspan.parallel.heads import plan_heads
from farspan.parallel.mesh import check_sizes

Mixers = Sequence[tuple[str, MixerOptions]]

# Ranks that hold fewer heads than others wait for them: below this share of busy ranks another mesh is better.
LEAST_LOAD = 0.75


@dataclass(frozen=True)
class Parallelism:
    """data x ring x ulysses ranks; layout and attention as `parallel.ContextParallel` takes them; why, for a person."""

    data: int
    ring: int
    ulysses: int
    layout: str
    attention: str
    reason: str

    @property
    def context(self) -> int:
        """Ranks that share a row."""
        return self.ring * self.ulysses


def choose_parallelism(
    world: int,
    per_node: int,
    mixers: Mixers,
    *,
    context: int = 1,
    ring: int | None = None,
    ulysses: int | None = None,
    layout: str = "auto",
    attention: str = "auto",
) -> Parallelism:
    """The mesh of `world` ranks of which `context` share each row, and how the mixers use it.

    Full attention exchanges heads (Ulysses) among as many ranks of a node as there are heads for, which is balanced
    whatever the documents; the rest of the context is a ring, whose keys are gathered. Only a ring with full attention
    needs the zigzag layout for its balance; all others are contiguous, where every edge has one neighbour. Mixers that
    exchange no heads leave all of the context to the ring. What is given stands.

    Raises ValueError, one line, where the sizes do not multiply to `world`, or a mixer has no rule for what was chosen.
    """
    used = [(name, options) for name, options in mixers if MIXERS[name].exchanges_heads]
    if ulysses is None:
        ulysses = context // ring if ring is not None else _most_ulysses(context, per_node, used)
    ring = context // ulysses if ring is None else ring
    assert ring * ulysses == context, "the recipe has checked that they agree"
    if world % context:
        raise ValueError(
            f"parallel: ring {ring} x ulysses {ulysses} is {context} ranks, which do not divide {world} processes; "
            f"use --nproc {context}, or a multiple of it"
        )
    check_sizes(world, world // context, ring, ulysses)
    if layout == "auto":
        layout = "zigzag" if ring > 1 and used else "contiguous"
    attention = "gather" if attention == "auto" else attention
    if context > 1:
        for name, options in mixers:
            MIXERS[name].check_sharding(options, layout, ring, ulysses)
    reason = _reason(ring, ulysses, layout, attention, used)
    return Parallelism(world // context, ring, ulysses, layout, attention, reason)


def _most_ulysses(context: int, per_node: int, used: Mixers) -> int:
    """The most ranks of one node among which the mixers can deal out their heads evenly enough."""
    fitting = [ranks for ranks in range(1, context + 1) if context % ranks == 0 and per_node % ranks == 0]
    return max(ranks for ranks in fitting if ranks == 1 or _load(used, ranks) >= LEAST_LOAD)


def _load(used: Mixers, ranks: int) -> float:
    """Busy share of the ranks for the mixer with the least; 0 where one has too few heads, or none exchanges heads."""
    heads = [options.heads for _, options in used]
    return min((plan_heads(n, n, ranks).load if n >= ranks else 0.0 for n in heads), default=0.0)


def _reason(ring: int, ulysses: int, layout: str, attention: str, used: Mixers) -> str:
    if ring * ulysses == 1:
        return "no context parallelism"
    line = f"context parallel {ring * ulysses}: ring {ring} x ulysses {ulysses}, {layout} layout"
    if used and ring > 1:
        line += f", keys {'gathered' if attention == 'gather' else 'passed round'} between ring ranks"
    if used and ulysses > 1 and _load(used, ulysses) < 1:
        line += f"; heads that do not divide keep {100 * _load(used, ulysses):.0f} % of the Ulysses ranks busy"
    return line
