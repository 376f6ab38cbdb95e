"""One decoding step of a mixer at a long context, beside its peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farspan.eval.bench_kernels import pair
from farspan.eval.gate import EXACT, Check, judge
from farspan.eval.peers import Side, checked, sides
from farspan.eval.report import COLORS, described
from farspan.eval.timing import Work, alternate, median_ratio, stopwatch
from farspan.layers import Mixer, Sequence
from farspan.layers.mixer import State

# The check: rows, tokens that are there before, and steps after them; several chunks of the default 16.
CHECK_ROWS, CHECK_BEFORE, CHECK_STEPS = 2, 37, 43
WARM_STEPS = 3
# Times as fast as attention at batch 512, by context: arXiv 2507.04416, chunk 16, width 2048, 16 heads, GH200.
PUBLISHED = {"rat": {4096: 9.0, 8192: 10.8, 16384: 10.8}}
PUBLISHED_SHAPE = (2048, 16, 512)


@dataclass(frozen=True)
class Decoding:
    """A batch of rows that have all seen almost `context` tokens; the last of the `steps` brings them there."""

    width: int
    heads: int
    batch: int
    context: int
    steps: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"batch {self.batch} and steps {self.steps} must be at least 1")
        if self.context < self.steps + WARM_STEPS:
            raise ValueError(
                f"a context of {self.context} tokens has no room for {self.steps} steps and {WARM_STEPS} to warm up; "
                "use a longer context or fewer steps"
            )


@torch.no_grad()
def bench_decode(
    mixers: list[str], decoding: Decoding, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Seconds of a step, bytes of state, and speed relative to softmax, of each mixer.

    The states hold random values and have room for the whole context, so that nothing grows in a timed step. On CUDA
    a step is replayed as a CUDA graph where it can be captured. A side that fails its check gets a row with its errors
    and without numbers. `progress` is called with a line of text `steps + 1` times.
    """
    progress("checks")
    found = [side for side in sides(mixers, decoding.width, decoding.heads, decoding.device) if side.decodes]
    checks, left_out = checked(found, lambda side: check(side, decoding))
    right = [side for side in found if side.name in checks and checks[side.name].passed]
    steppers = {side.name: _Stepper(pair(side)[0], decoding) for side in right}
    works = {name: stepper.work() for name, stepper in steppers.items()}
    for work in works.values():
        for _ in range(WARM_STEPS):
            work()

    def told() -> Iterator[int]:
        for step in range(decoding.steps):
            progress(f"step {step + 1} of {decoding.steps}")
            yield step

    seconds = alternate(works, told(), stopwatch(decoding.device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = min((side.name for side in right if side.baseline), key=medians.get, default=None)
    rows = []
    for name, result in checks.items():
        row = {"name": name, "check": asdict(result)}
        if name in medians:
            stepper, median = steppers[name], medians[name]
            row |= {
                "seconds": seconds[name],
                "median_seconds": median,
                "tokens_per_second": decoding.batch / median,
                "state_bytes": stepper.state_bytes(),
                "graph": stepper.graph is not None,
                "baseline": baseline,
                "ratio": None if baseline is None else median_ratio(seconds[baseline], seconds[name]),
                "published_ratio": _published(name, decoding),
            }
        rows.append(row)
    return {"decoding": described(decoding), "left_out": left_out, "rows": rows}


@torch.no_grad()
def check(side: Side, decoding: Decoding) -> Check:
    """Steps after a short prefix against the definition's one pass over all tokens, in the same and a wider dtype."""
    mixer, reference = pair(side)
    x = torch.randn(CHECK_ROWS, CHECK_BEFORE + CHECK_STEPS, decoding.width).to(decoding.device, decoding.dtype)
    mixer = mixer.to(decoding.device, decoding.dtype)
    state = mixer.new_state(CHECK_ROWS)
    mixer(x[:, :CHECK_BEFORE], state=state)
    steps = [mixer(token, state=state).output for token in x[:, CHECK_BEFORE:].split(1, dim=1)]

    def define(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        output = reference.to(decoding.device, dtype)(x.to(dtype)).output
        return {"output": output[:, CHECK_BEFORE:]}

    return judge({"output": torch.cat(steps, dim=1)}, define(decoding.dtype), define(EXACT[decoding.dtype]))


class _Stepper:
    """A mixer with a state near the end of the context, and the work that takes it one token further."""

    def __init__(self, mixer: Mixer, decoding: Decoding) -> None:
        place = {"device": decoding.device, "dtype": decoding.dtype}
        self.mixer, self.decoding = mixer.to(**place), decoding
        self.x = torch.randn(decoding.batch, 1, decoding.width, **place)
        self.state = filled_state(mixer, self.x, decoding.context)
        self.graph: torch.cuda.CUDAGraph | None = None

    def work(self) -> Work:
        self.state["position"].fill_(self.decoding.context - self.decoding.steps - WARM_STEPS)
        if self.decoding.device.type == "cuda":
            self.graph = self._capture()
        return self._step if self.graph is None else self.graph.replay

    def state_bytes(self) -> int:
        """Bytes of the state, the position aside; RuntimeError if it is not what the mixer says, as when it grew."""
        held = sum(value.nbytes for value in self.state.values())
        stated = self.decoding.batch * self.mixer.state_bytes(self.decoding.context)
        if held != stated:
            raise RuntimeError(f"{self.mixer.name}: the state holds {held} bytes after the steps, {stated} were stated")
        return held - self.state["position"].nbytes

    def _step(self) -> None:
        self.mixer(self.x, state=self.state)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The step at the last position of the context; None where something in it waits for the device."""
        position = self.decoding.context - 1
        sequence = Sequence.rows(self.decoding.batch, 1, self.decoding.device, (position,) * self.decoding.batch)
        row = self.x.view(1, self.decoding.batch, self.decoding.width)

        def step() -> None:
            self.state["position"] = torch.full((self.decoding.batch,), position)
            self.mixer(row, sequence, self.state)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph


def filled_state(mixer: Mixer, x: torch.Tensor, context: int) -> State:
    """A state of random values with room for `context` tokens, without decoding them.

    x: [batch, 1, width]: the token of one step at the last position, after which the values do not matter.
    """
    state = mixer.new_state(x.shape[0], capacity=context)
    state["position"].fill_(context - 1)
    mixer(x, state=state)
    for value in state.values():
        if value.is_floating_point():
            value.normal_()
    return state


def _published(name: str, decoding: Decoding) -> float | None:
    comparable = decoding.device.type == "cuda" and (decoding.width, decoding.heads, decoding.batch) == PUBLISHED_SHAPE
    return PUBLISHED.get(name, {}).get(decoding.context) if comparable else None


def picture(result: dict[str, Any]) -> Any:
    """Time of a step and bytes of state, a bar per side: a matplotlib figure.

    Bars are medians; the dots are the single steps (those beyond 1.5 times the largest median are cut off).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    rows = [row for row in result["rows"] if "seconds" in row]
    places, colors = range(len(rows)), COLORS[: len(rows)]
    medians = [1e3 * row["median_seconds"] for row in rows]
    time.bar(places, medians, color=colors, alpha=0.75)
    for place, row in zip(places, rows, strict=True):
        time.scatter([place] * len(row["seconds"]), [1e3 * value for value in row["seconds"]], s=5, color="#303030")
    time.set_ylim(0, 1.5 * max(medians, default=1))
    ratios = ["" if row["ratio"] is None else f"{row['ratio']:.3g}x" for row in rows]
    time.set_xticks(places, [f"{row['name']}\n{ratio}" for row, ratio in zip(rows, ratios, strict=True)])
    bars = memory.bar(places, [row["state_bytes"] / 1e6 for row in rows], color=colors, alpha=0.75)
    memory.bar_label(bars, fmt="{:,.0f}", padding=3)
    memory.margins(y=0.1)
    memory.set_xticks(places, [row["name"] for row in rows])
    decoding = result["decoding"]
    time.set_title(f"a step of {decoding['batch']} rows, ms (below: x softmax)", loc="left", fontweight="bold")
    memory.set_title(f"state at {decoding['context']:,} tokens, MB", loc="left", fontweight="bold")
    for axes in (time, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
