"""A mixer layer, forward and backward, beside its peers: time, memory, and whether it computes the right thing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from farspan.eval.gate import EXACT, Check, judge
from farspan.eval.memory import peak_bytes
from farspan.eval.peers import Side, checked, sides
from farspan.eval.report import COLORS, described
from farspan.eval.timing import Work, alternate, median_ratio, stopwatch
from farspan.layers import Mixer, Sequence

# The definition holds whole score matrices; longer documents are checked at this length (window's default is 1025).
CHECKED_TOKENS = {"cpu": 1536, "cuda": 4096}
# Times as fast as attention, by document length: arXiv 2507.04416, figure 3, chunk 16, width 2048, 16 heads, GH200.
PUBLISHED = {"rat": {4096: 0.82, 8192: 1.19, 16384: 1.78, 32768: 2.79, 65536: 4.39, 131072: 6.90}}
PUBLISHED_SHAPE = (2048, 16)
RATIO = "times as fast as softmax"


@dataclass(frozen=True)
class Protocol:
    """What a call is: documents of one length, `tokens` in all (one document when None), forward, and backward.

    compiled: whether layers run under torch.compile, all of them.
    """

    width: int
    heads: int
    lengths: tuple[int, ...]
    tokens: int | None
    dtype: torch.dtype
    device: torch.device
    backward: bool = True
    compiled: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths {self.lengths} must be 1 or more")
        for length in self.lengths:
            if self.tokens is not None and self.tokens % length:
                raise ValueError(f"{self.tokens} tokens per call are no whole number of documents of {length} tokens")


class Layer(nn.Module):
    """x + mixer(norm(x)): a mixer as it stands in a decoder."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(width, eps=1e-6), mixer

    def forward(self, x: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        return x + self.mixer(self.norm(x), sequence).output


def bench_kernels(
    mixers: list[str],
    protocol: Protocol,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
    alone: bool = False,
) -> dict[str, Any]:
    """Seconds, tokens/s, TFLOP/s and peak bytes of each layer at each length, and its speed relative to softmax.

    alone: only the named layers, so that none has a baseline.

    A side that fails its check (see `judge`) gets a row with its errors and without numbers. In each round every other
    side runs once. `progress` is called with a line of text `steps(protocol, rounds)` times.
    """
    found = [side for side in sides(mixers, protocol.width, protocol.heads, protocol.device, alone) if side.trains]
    judged: dict[int, tuple[dict[str, Check], dict[str, str]]] = {}
    left_out: dict[str, str] = {}
    rows = []
    for length in protocol.lengths:
        progress(f"{length:,} tokens: checks")
        short = min(length, CHECKED_TOKENS[protocol.device.type])
        if short not in judged:
            judged[short] = checked(found, lambda side, short=short: check(side, protocol, side.checked(short)))
        checks, absent = judged[short]
        left_out |= absent
        right = [side for side in found if side.name in checks and checks[side.name].passed]
        measured = _measure(right, protocol, length, rounds, progress)
        for side in found:
            if side.name in checks:
                row = {"name": side.name, "length": length, "checked_tokens": side.checked(short)}
                rows.append(row | {"check": asdict(checks[side.name])} | measured.get(side.name, {}))
    return {"protocol": described(protocol), "rounds": rounds, "left_out": left_out, "rows": rows}


def steps(protocol: Protocol, rounds: int) -> int:
    """How often `bench_kernels` calls its `progress`."""
    return len(protocol.lengths) * (rounds + 1)


def check(side: Side, protocol: Protocol, length: int) -> Check:
    """Output and gradients of a side, on one random document, against its definition in the same and a wider dtype."""
    mixer, reference = pair(side)
    x, dy = (torch.randn(1, length, protocol.width).to(protocol.dtype) for _ in range(2))
    sequence = Sequence.rows(1, length, protocol.device)

    def run(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        module = module.to(protocol.device, dtype)
        given, weight = (tensor.to(protocol.device, dtype) for tensor in (x, dy))
        given.requires_grad_(protocol.backward)
        with torch.set_grad_enabled(protocol.backward):
            output = module(given, sequence).output
        if not protocol.backward:
            return {"output": output}
        named = {"input": given, **dict(module.named_parameters())}
        gradients = torch.autograd.grad(output, list(named.values()), weight)
        return {"output": output.detach()} | {
            f"gradient of {name}": gradient for name, gradient in zip(named, gradients, strict=True)
        }

    fast, eager = run(mixer, protocol.dtype), run(reference, protocol.dtype)
    return judge(fast, eager, run(reference, EXACT[protocol.dtype]))


def pair(side: Side) -> tuple[nn.Module, nn.Module]:
    """A side and its definition with the same weights, random and of unit gain: with small ones, every query attends to
    all keys alike and a check would be blind.
    """
    torch.manual_seed(0)
    mixer, reference = side.build(), side.define()
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    reference.load_state_dict(mixer.state_dict())
    return mixer, reference


def _measure(
    right: list[Side], protocol: Protocol, length: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The numbers of each side at one length, by name."""
    torch.compiler.reset()  # each length is compiled as its own shape
    documents = 1 if protocol.tokens is None else protocol.tokens // length
    tokens = documents * length
    works: dict[str, Work] = {}
    memory: dict[str, int] = {}
    flops: dict[str, float | None] = {}
    for side in right:
        mixer = pair(side)[0]
        flops[side.name] = mixer.flops(length) if isinstance(mixer, Mixer) else None
        works[side.name] = _work(mixer, protocol, documents, length)
        if protocol.compiled or protocol.device.type == "cuda":
            works[side.name]()  # compiles, and fills the libraries' workspaces
        memory[side.name] = peak_bytes(works[side.name])
        works[side.name]()

    def told() -> Any:
        for round_ in range(rounds):
            progress(f"{length:,} tokens: round {round_ + 1} of {rounds}")
            yield round_

    seconds = alternate(works, told(), stopwatch(protocol.device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = min((side.name for side in right if side.baseline), key=medians.get, default=None)
    passes = 3 if protocol.backward else 1  # the backward pass multiplies twice as much as the forward
    rows = {}
    for name, median in medians.items():
        rows[name] = {
            "documents": documents,
            "seconds": seconds[name],
            "median_seconds": median,
            "tokens_per_second": tokens / median,
            "tflops_per_second": None if flops[name] is None else passes * flops[name] * tokens / median / 1e12,
            "peak_bytes": memory[name],
            "baseline": baseline,
            "ratio": None if baseline is None else median_ratio(seconds[baseline], seconds[name]),
            "published_ratio": _published(name, protocol, length),
        }
    return rows


def _published(name: str, protocol: Protocol, length: int) -> float | None:
    comparable = protocol.device.type == "cuda" and (protocol.width, protocol.heads) == PUBLISHED_SHAPE
    return PUBLISHED.get(name, {}).get(length) if comparable and protocol.backward else None


def _work(mixer: nn.Module, protocol: Protocol, documents: int, length: int) -> Work:
    """One call of the layer on random tokens: its output, or all its gradients for a random one of the output."""
    place = {"device": protocol.device, "dtype": protocol.dtype}
    layer = Layer(mixer, protocol.width).to(**place)
    x, dy = (torch.randn(1, documents * length, protocol.width, **place) for _ in range(2))
    sequence = Sequence.rows(documents, length, protocol.device)
    with torch.no_grad():
        layer(x, sequence)  # rotary tables and the like, which all layers of a step share
    run = torch.compile(layer, dynamic=False) if protocol.compiled else layer
    if not protocol.backward:
        return torch.no_grad()(lambda: run(x, sequence))
    wanted = [x.requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(run(x, sequence), wanted, dy)


def picture(result: dict[str, Any]) -> Any:
    """Time, speed relative to softmax and memory over the length, a line per side: a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    measured = [row for row in result["rows"] if "seconds" in row]
    names = list(dict.fromkeys(row["name"] for row in measured))
    lengths = sorted({row["length"] for row in measured})
    shown = {
        "time of a call, ms": lambda row: 1e3 * row["median_seconds"],
        RATIO: lambda row: row["ratio"],
        "peak memory of a call, MB": lambda row: row["peak_bytes"] / 1e6,
    }
    if all(row["ratio"] is None for row in measured):
        del shown[RATIO]
    figure = Figure(figsize=(4.4 * len(shown), 4.2), layout="constrained")
    panels = dict(zip(shown, figure.subplots(1, len(shown)), strict=True))
    for name, color in zip(names, COLORS, strict=False):
        rows = sorted((row for row in measured if row["name"] == name), key=lambda row: row["length"])
        at = [row["length"] for row in rows]
        for title, value in shown.items():
            panels[title].plot(at, [value(row) for row in rows], "o-", color=color, label=name)
        if (last := rows[-1]["ratio"]) is not None:
            place = {"va": "center", "xytext": (4, 0), "textcoords": "offset points"}
            panels[RATIO].annotate(f" {last:.3g}x", (at[-1], last), color=color, **place)
    for title, axes in panels.items():
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set(xscale="log", yscale="log", xlabel="tokens of a document")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30, ha="right")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(axis="y", color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    if RATIO in panels:
        panels[RATIO].axhline(1, color="#c0c0c0", linewidth=1, zorder=0)
    next(iter(panels.values())).legend(frameon=False)
    return figure
