"""The sides of `farspan bench parallel`: a mixer layer on one document that ring x Ulysses ranks share.

`check`, `weigh` and `timed` run on every rank of a side, in the processes of a pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from farspan.eval import peers
from farspan.eval.bench_kernels import Layer, pair
from farspan.eval.bytes_sent import FORMULAS, Sent
from farspan.eval.gate import EXACT, Check, judge
from farspan.eval.memory import peak_bytes
from farspan.eval.timing import Work, stopwatch
from farspan.layers import Mixer, Sequence, build
from farspan.layers.mixer import parse_options
from farspan.layers.mlp import MLP
from farspan.parallel import ContextParallel, Mesh, Shard
from farspan.parallel.comm import all_gather
from farspan.parallel.layout import LAYOUTS, multiple
from farspan.parallel.traffic import count_traffic

# The definition holds whole score matrices; longer documents are checked at about this length (window's default is
# 1025, so that a halo comes from several ranks).
CHECKED_TOKENS = {"cpu": 1536, "cuda": 4096}
# Seconds of one call on all ranks, and that one may wait for another: softmax on a long document takes minutes.
LIMIT = 3600.0
ALONE = "one rank"


@dataclass(frozen=True)
class Protocol:
    """What a call is: a layer of each mixer on one document of `tokens` tokens, forward and backward, on each number of
    ranks. layout: of the tokens over the ranks. Raises ValueError for what cannot be shared out.
    """

    mixers: tuple[str, ...]
    width: int
    heads: int
    tokens: int
    ranks: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks {self.ranks} must be 1 or more")
        if not self.mixers:
            raise ValueError(f"no mixer is named; valid: {', '.join(FORMULAS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is not one of {', '.join(LAYOUTS)}")
        for name in self.mixers:
            self.options(name)
            if name not in FORMULAS:
                raise ValueError(f"mixer {name} has no formula for what it sends; valid: {', '.join(FORMULAS)}")
        most = max(self.ranks)
        if {"softmax", "softplus", "routing", "rcmha"} & set(self.mixers) and most > self.heads:
            raise ValueError(f"{self.heads} heads are fewer than {most} ranks, as Ulysses needs; use more heads")
        if self.device.type == "cuda" and most > torch.cuda.device_count():
            raise ValueError(f"{most} ranks need as many CUDA devices, there are {torch.cuda.device_count()}")
        if self.tokens < 1 or self.tokens % self.unit:
            raise ValueError(
                f"{self.tokens} tokens do not divide over {', '.join(map(str, self.ranks))} ranks in a {self.layout} "
                f"layout; use a multiple of {self.unit}"
            )

    def options(self, mixer: str) -> Any:
        return parse_options(mixer, {"width": self.width, "heads": self.heads})

    @property
    def unit(self) -> int:
        """Tokens that every side divides without padding, in whole chunks."""
        return math.lcm(*(side.unit(self) for side in sides(self)))

    @property
    def checked_tokens(self) -> int:
        most = min(self.tokens, CHECKED_TOKENS[self.device.type])
        return max(self.unit, most - most % self.unit)


@dataclass(frozen=True)
class Side:
    """A mixer and the way in which ring x Ulysses ranks share its tokens."""

    mixer: str
    method: str
    ring: int = 1
    ulysses: int = 1
    attention: str = "gather"

    @property
    def ranks(self) -> int:
        return self.ring * self.ulysses

    @property
    def name(self) -> str:
        return f"{self.mixer} {self.method}, {self.ranks} rank{'s' * (self.ranks > 1)}"

    def build(self, protocol: Protocol, **options: Any) -> Mixer:
        return build(self.mixer, width=protocol.width, heads=protocol.heads, **options)

    def grid(self, protocol: Protocol) -> int:
        """Tokens that no edge of a shard cuts, from a document's start: RAT's chunk."""
        with torch.device("meta"):
            return self.build(protocol).grid

    def unit(self, protocol: Protocol) -> int:
        """Tokens of a document that its ranks divide without padding, in whole chunks."""
        return multiple(protocol.layout, self.ring, self.ulysses, self.grid(protocol))


def sides(protocol: Protocol) -> list[Side]:
    """The rows of the benchmark, by mixer, then by number of ranks."""
    return [side for mixer in protocol.mixers for ranks in protocol.ranks for side in _methods(mixer, ranks)]


def _methods(mixer: str, ranks: int) -> list[Side]:
    if ranks == 1:
        return [Side(mixer, ALONE)]
    alone = {"window": "halo", "rat": "summaries", "cca": "cores"}
    if mixer in alone:
        return [Side(mixer, alone[mixer], ring=ranks)]
    found = [Side(mixer, "ulysses", ulysses=ranks), Side(mixer, "gather", ring=ranks)]
    if mixer in ("softmax", "rcmha"):
        found.append(Side(mixer, "ring", ring=ranks, attention="ring"))
    if ranks % 2 == 0 and ranks > 2:
        half = ranks // 2
        found.append(Side(mixer, f"2-D, 2 x {half}", 2, half))
    return found


def check(side: Side, protocol: Protocol, length: int) -> Check | None:
    """On rank 0: output and gradients of a side, put together from all ranks, against the definition on one rank in the
    same and a wider dtype. None on the others.
    """
    mixer, _, x, dy = _material(side.mixer, protocol, length)
    sequence = _sequence(side, protocol, length)
    shard = sequence.shard
    own = (x, dy) if shard is None else (shard.take(x), shard.take(dy))
    found = _results(mixer.to(protocol.device, protocol.dtype), *own, sequence, protocol.dtype)
    if shard is not None:
        found = {name: _joined(name, tensor, shard) for name, tensor in found.items()}
    return None if dist.get_rank() else judge(found, *_defined(side.mixer, protocol, length))


def weigh(side: Side, protocol: Protocol) -> tuple[Sent, int]:
    """What this rank sends in a forward and backward pass of the layer, and the peak bytes that it holds in one of two
    decoder blocks, whose activations are what has to fall as 1 / ranks.
    """
    layer, wanted, dy, sequence = _prepared(side, protocol)
    with count_traffic() as forward:
        y = layer(wanted[0], sequence)
    with count_traffic() as backward:
        torch.autograd.grad(y, wanted, dy)
    del y
    blocks = Blocks(layer, protocol.width).to(protocol.device, protocol.dtype)
    own = [wanted[0], *blocks.parameters()]
    peak = peak_bytes(lambda: torch.autograd.grad(blocks(own[0], sequence), own, dy))
    return Sent(forward.total, backward.total), peak


class Blocks(nn.Module):
    """Two decoder blocks that share the layer's weights, each with a feed-forward part of its own."""

    def __init__(self, layer: Layer, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.feeds = nn.ModuleList(MLP(width, 4 * width, gated=False) for _ in range(2))

    def forward(self, x: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        for norm, feed in zip(self.norms, self.feeds, strict=True):
            x = self.layer(x, sequence)
            x = x + feed(norm(x))
        return x


def timed(side: Side, protocol: Protocol) -> float:
    """Seconds of a forward and backward pass on this rank, from when all were ready."""
    layer, wanted, dy, sequence = _prepared(side, protocol)
    work: Work = lambda: torch.autograd.grad(layer(wanted[0], sequence), wanted, dy)  # noqa: E731
    dist.all_reduce(torch.zeros(1))  # on the host: a barrier
    return stopwatch(protocol.device)(work)


@cache  # the tables of the step's sequence are made once, as in a stack of layers
def _prepared(side: Side, protocol: Protocol) -> tuple[Layer, list[torch.Tensor], torch.Tensor, Sequence]:
    mixer = _material(side.mixer, protocol, 1)[0]
    layer = Layer(mixer, protocol.width).to(protocol.device, protocol.dtype)
    sequence = _sequence(side, protocol, protocol.tokens)
    x, dy = _inputs(protocol, sequence.tokens)
    with torch.no_grad():
        layer(x, sequence)
    return layer, [x, *layer.parameters()], dy, sequence


@lru_cache(maxsize=1)
def _inputs(protocol: Protocol, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = {"device": protocol.device, "dtype": protocol.dtype}
    x, dy = (torch.randn(1, tokens, protocol.width, **place) for _ in range(2))
    return x.requires_grad_(), dy


def _sequence(side: Side, protocol: Protocol, tokens: int) -> Sequence:
    if side.ranks == 1:
        return Sequence.rows(1, tokens, protocol.device)
    context = ContextParallel(_mesh(side.ring, side.ulysses), protocol.layout, side.attention)
    shard = context.shard((tokens,), side.grid(protocol))
    assert shard.layout.tokens == tokens, "a padded row would send more"
    return Sequence.sharded(shard, protocol.device)


@cache
def _mesh(ring: int, ulysses: int) -> Mesh:
    return Mesh.create(1, ring, ulysses, LIMIT)


def _material(mixer: str, protocol: Protocol, length: int) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """A mixer and its definition with the same weights, and x and the gradient of the output [1, length, width]: the
    same on all ranks.
    """
    side = Side(mixer, ALONE)
    both = peers.Side(mixer, lambda: side.build(protocol), lambda: side.build(protocol, backend="reference"))
    mixers = pair(both)  # sets the seed
    x, dy = (torch.randn(1, length, protocol.width).to(protocol.device, protocol.dtype) for _ in range(2))
    return *mixers, x, dy


@lru_cache(maxsize=1)
def _defined(mixer: str, protocol: Protocol, length: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the definition computes on one rank, in the dtype of the protocol and in a wider one."""
    _, reference, x, dy = _material(mixer, protocol, length)
    sequence = Sequence.rows(1, length, protocol.device)
    dtypes = (protocol.dtype, EXACT[protocol.dtype])
    return tuple(_results(reference.to(protocol.device, d), x, dy, sequence, d) for d in dtypes)


def _results(
    module: nn.Module, x: torch.Tensor, dy: torch.Tensor, sequence: Sequence, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    x = x.to(dtype).requires_grad_()
    output = module(x, sequence).output
    named = {"input": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(output, list(named.values()), dy.to(dtype))
    return {"output": output.detach()} | {f"gradient of {n}": g for n, g in zip(named, gradients, strict=True)}


def _joined(name: str, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The row of which this rank has a part, or the sum of what the ranks found for a parameter."""
    if name in ("output", "gradient of input"):
        return shard.whole(tensor)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return all_gather(tensor.to(wide), shard.axis).sum(0).to(tensor.dtype)
