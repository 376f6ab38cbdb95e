"""The Titans memory in a mixer's state: flat names, what documents begin with, in-place updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from farspan.kernels.titans.state import MemoryState
from farspan.layers.mixer import State
from farspan.layers.state import new_rows, where_new
from farspan.layers.titans_memory import Start
from farspan.layers.titans_options import TitansOptions

Shapes = dict[str, tuple[int, ...]]


def memory_shapes(options: TitansOptions) -> Shapes:
    """Shapes of one document's entries, all in fp32 or wider; without a block (refresh 1) the weights are all."""
    heads, rows = options.heads, options.refresh - 1
    layers = list(zip(options.sizes, options.sizes[1:], strict=False))
    shapes: Shapes = {}
    for name in ("weights", "momentum"):
        shapes |= {f"{name}{layer}": (heads, *pair) for layer, pair in enumerate(layers)}
    if rows:
        shapes |= {f"keys{layer}": (heads, rows, a) for layer, (a, _) in enumerate(layers)}
        shapes |= {f"deltas{layer}": (heads, rows, b) for layer, (_, b) in enumerate(layers)}
        shapes |= {"g": (heads, rows), "n": (heads, rows)} | {name: (heads,) for name in ("A", "f", "H")}
    return shapes


def entries(memory: MemoryState, options: TitansOptions) -> State:
    """By the names of `memory_shapes`."""
    layered = ("weights", "momentum") if options.refresh == 1 else ("weights", "momentum", "keys", "deltas")
    named = {f"{name}{layer}": x for name in layered for layer, x in enumerate(getattr(memory, name))}
    if options.refresh > 1:
        named |= {name: getattr(memory, name) for name in ("g", "n", "A", "f", "H")}
    return named


def memory_state(state: Mapping[str, torch.Tensor], options: TitansOptions) -> MemoryState:
    """Inverts `entries`."""
    weights, momentum = (
        tuple(state[f"{name}{layer}"] for layer in range(options.depth)) for name in ("weights", "momentum")
    )
    if options.refresh == 1:
        return at_refresh(weights, momentum, options)
    rows = (tuple(state[f"{name}{layer}"] for layer in range(options.depth)) for name in ("keys", "deltas"))
    return MemoryState(weights, momentum, *rows, *(state[name] for name in ("g", "n", "A", "f", "H")))


def at_refresh(
    weights: tuple[torch.Tensor, ...], momentum: tuple[torch.Tensor, ...], options: TitansOptions
) -> MemoryState:
    """The state with nothing in an open block; weights, momentum: L of [documents, H, d_in, d_out]."""
    documents, heads = weights[0].shape[:2]
    zero = weights[0].new_zeros(())  # expanded, not filled: rows of nothing need no memory
    one, rows = zero + 1, (documents, heads, options.refresh - 1)
    keys, deltas = (
        tuple(zero.expand(*rows, size) for size in sizes) for sizes in (options.sizes[:-1], options.sizes[1:])
    )
    none, one = zero.expand(rows), one.expand(documents, heads)
    return MemoryState(weights, momentum, keys, deltas, none, none, one, zero.expand(documents, heads), one)


def begin(start: Start, documents: int, options: TitansOptions) -> MemoryState:
    """Of documents that have seen nothing."""
    weights, momentum = (
        tuple(x.expand(documents, *x.shape[1:]) for x in side) for side in (start.weights, start.momentum)
    )
    return at_refresh(weights, momentum, options)


def entering(state: State | None, start: Start | None, offsets: tuple[int, ...], options: TitansOptions) -> MemoryState:
    """What each document stands at before these tokens: `start` where it has seen none, else its row of the state."""
    if state is None or not any(offsets):
        return begin(start, len(offsets), options)
    known = memory_state(state, options)
    return known if all(offsets) else mixed(known, start, new_rows(offsets, known.A.device), options)


def mixed(known: MemoryState, start: Start, new: torch.Tensor, options: TitansOptions) -> MemoryState:
    """`known`, but `start` in the rows of the bool [documents] `new`."""
    initial = entries(begin(start, 1, options), options)
    return memory_state(
        {name: where_new(new, initial[name], x) for name, x in entries(known, options).items()}, options
    )


def may_be(flags: torch.Tensor) -> bool:
    """Whether any is set; on a GPU the host does not wait to know, and takes it that some are."""
    return not flags.is_cpu or bool(flags.any())


def keep_persistent(state: State, rows: tuple[torch.Tensor, torch.Tensor], new: torch.Tensor) -> None:
    """Write keys and values of the persistent rows, [P, H, D], in front of the caches of the documents `new`."""
    for name, prefix in zip(("key", "value"), rows, strict=True):
        cache, count = state[name], len(prefix)
        kept = where_new(new, prefix.transpose(0, 1)[None].to(cache.dtype), cache[:, :, :count])
        if torch.is_grad_enabled() and (kept.requires_grad or cache.requires_grad):
            state[name] = torch.cat([kept, cache[:, :, count:]], dim=2)
        else:
            cache[:, :, :count] = kept


def check_state(state: State, shapes: Shapes, documents: int) -> None:
    """ValueError unless the state has exactly these entries, for so many documents."""
    expected = {name: (documents, *shape) for name, shape in shapes.items()} | {"position": (documents,)}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            have, need = (list(x[name]) if name in x else "nothing" for x in (found, expected))
            raise ValueError(
                f"the state's {name} is {have}, this titans layer needs {need}; pass a state of the same options, "
                "from new_state"
            )
