"""The chunked Titans memory beside a loop over tokens that autograd differentiates: the time of forward and backward.

    python benchmarks/titans_loop.py --output benchmarks/results/DEVICE-DATE/titans-loop

with the Python that farspan is installed in. The loop is the definition, a segment of tokens at a time under activation
checkpointing, without which it keeps a memory for every token (5.6 GB at 1024 tokens). Both take the time of their
length, so that the ratio at 1024 tokens is that at any. The first round warms up and does not count.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize
from torch.utils.checkpoint import checkpoint

from farspan.cli.allocator import keep_freed_memory
from farspan.eval.report import write_json
from farspan.eval.timing import alternate, median_ratio, stopwatch
from farspan.kernels.titans import Gates, Memory, MemoryState, titans_memory

SEGMENT = 64


def main() -> None:
    keep_freed_memory()  # as the command line does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {SEGMENT}")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--refresh", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.tokens % SEGMENT or SEGMENT % options.refresh:
        parser.error(f"--tokens must be a multiple of {SEGMENT}, and --refresh divide it")
    tensors, dy = inputs(options)
    works = {
        "chunked": lambda: torch.autograd.backward(chunked(tensors, options.refresh), dy),
        "loop": lambda: torch.autograd.backward(loop(tensors, options.refresh), dy),
    }
    seconds = alternate(works, range(options.rounds + 1), stopwatch(dy.device))
    seconds = {name: times[1:] for name, times in seconds.items()}
    ratio = median_ratio(seconds["loop"], seconds["chunked"])
    shape = {name: value for name, value in vars(options).items() if name != "output"}
    write_json(options.output / "titans_loop.json", {**shape, "seconds": seconds, "ratio": ratio})
    chunk, token = (statistics.median(times) for times in seconds.values())
    print(f"{options.tokens:,} tokens: chunked {chunk:.3g} s, loop {token:.3g} s, {ratio:.3g} times as fast")


def inputs(options: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v, the gates, the weights of the layers and the norm's gain and bias; and the gradient of the result."""
    heads, dim = options.heads, options.head_dim
    q, k, v, dy = (torch.randn(1, options.tokens, heads, dim) for _ in range(4))
    decay, momentum, rate = torch.randn(3, 1, options.tokens, heads)
    widths = [dim, *[options.expansion * dim] * (options.depth - 1), dim]
    weights = [torch.randn(heads, a, b) * a**-0.5 for a, b in pairwise(widths)]
    gates = [logsigmoid(decay + 4), logsigmoid(momentum), 0.1 * rate.sigmoid()]
    affine = [torch.ones(heads, dim), torch.zeros(heads, dim)]
    leaves = [normalize(q, dim=-1), normalize(k, dim=-1), v, *gates, *weights, *affine]
    return [x.requires_grad_() for x in leaves], dy


def chunked(tensors: list[torch.Tensor], refresh: int) -> torch.Tensor:
    q, k, v, gates, memory = parts(tensors)
    return titans_memory(q, k, v, gates, memory, (q.shape[1],), refresh, decay_to="init", backend="chunked")[0]


def loop(tensors: list[torch.Tensor], refresh: int) -> torch.Tensor:
    """The same by the definition, under checkpoints that see tensors only."""
    outputs, state, layout = [], [], []

    def segment(start: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given, before = tensors[:count], tensors[count:]
        q, k, v, gates, memory = parts(list(given))
        rest = iter(before)
        y, after = titans_memory(
            *(q, k, v, gates, memory, (SEGMENT,), refresh),
            initial_state=MemoryState(*(take(rest, n) for n in layout)) if before else None,
            offsets=(start,),
            decay_to="init",
            return_state=True,
            backend="reference",
        )
        layout[:] = [len(part) if isinstance(part, tuple) else 0 for part in after]
        return y, *(x for part in after for x in (part if isinstance(part, tuple) else (part,)))

    count = len(tensors)
    for start in range(0, tensors[0].shape[1], SEGMENT):
        own = [x[:, start : start + SEGMENT] if place < 6 else x for place, x in enumerate(tensors)]
        y, *state = checkpoint(segment, start, *own, *state, use_reentrant=True)
        outputs.append(y)
    return torch.cat(outputs, 1)


def parts(tensors: list[torch.Tensor]) -> tuple[Any, ...]:
    q, k, v, *rest = tensors
    return q, k, v, Gates(*rest[:3]), Memory(tuple(rest[3:-2]), tuple(rest[-2:]))


def take(tensors: Any, count: int) -> Any:
    """The next tensor, or a tuple of the next `count`."""
    return tuple(next(tensors) for _ in range(count)) if count else next(tensors)


if __name__ == "__main__":
    main()
