"""Does the loss hold beyond the length that a model was trained at? Loss by position and by length on held-out text.

Every length is measured on the same segments (`farspan.eval.held_out`): the row of length L is their first L tokens.
What differs between rows is then the length, not the text.

Memory. Tensors are counted as they are allocated (`farspan.eval.memory`), states included, in the chunk that ends at L,
where a growing cache is largest; parameters are not counted. RSS is the process's highest resident set up to L, over
that before the first token. There the host's arrays count too: 4 bytes per token of result, and pages of the corpus.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from farspan.eval.held_out import Text
from farspan.eval.memory import peak_bytes
from farspan.eval.report import COLORS
from farspan.eval.streaming import check_model, state_bytes, stream_nll, windowed_nll

MODES = ("carried", "window")
BINS_PER_OCTAVE = 2
FIRST_BIN = 16


@dataclass(frozen=True)
class Protocol:
    """lengths: ascending, in tokens. segments: at most so many. mode: "carried" states, or a sliding "window" of the
    training length, moved by half of it. chunk: tokens of a forward pass of the carried mode.
    """

    lengths: tuple[int, ...]
    segments: int = 8
    mode: str = "carried"
    chunk: int = 1024

    def __post_init__(self) -> None:
        if not self.lengths or self.lengths[0] < 1 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths {self.lengths} must be 1 or more, ascending, each once")
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.segments < 1 or self.chunk < 1:
            raise ValueError(f"segments={self.segments} and chunk={self.chunk} must be at least 1")


def extrapolate(
    model: Any, name: str, text: Text, protocol: Protocol, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """What one model gives, ready for JSON: a row per length, and bins of position.

    progress: called with the number of tokens that are done since the last call; in all segments * longest length.

    A row: nats per token and its standard error over the segments (None for one segment), over all L tokens and over
    the last half of them; bits per byte; tokens; seconds and tokens/s; bytes of the states, of all tensors at their
    peak, and by which the resident set grew (None outside of Linux).
    Raises ValueError for a model that is not farspan's.
    """
    check_model(model)
    trained = model.config.max_position_embeddings
    window = {"window": trained, "stride": max(1, trained // 2)}
    nll = np.empty((len(text.segments), protocol.lengths[-1]), dtype=np.float32)
    seconds, resident, before = np.zeros(len(protocol.lengths)), [], _reset_resident()
    with _no_warning_of_length():
        for segment, out in zip(text.segments, nll, strict=True):
            marks = _Marks(progress)
            if protocol.mode == "carried":
                stream_nll(model, segment, protocol.chunk, out=out, progress=marks)
            else:
                windowed_nll(model, segment, **window, out=out, progress=marks)
            seconds += np.interp(protocol.lengths, marks.done, marks.seconds)
            resident = resident or [marks.resident_at(length) for length in protocol.lengths]
        if protocol.mode == "carried":
            memory = [_carried_memory(model, length, protocol.chunk) for length in protocol.lengths]
        else:
            memory = [_windowed_memory(model, length, **window) for length in protocol.lengths]
    rows = []
    for index, length in enumerate(protocol.lengths):
        mean, error = _mean(nll[:, :length])
        last, last_error = _mean(nll[:, length // 2 : length])
        rows.append(
            {
                "length": length,
                "times_trained": length / trained,
                "nats_per_token": mean,
                "stderr": error,
                "last_half_nats_per_token": last,
                "last_half_stderr": last_error,
                "bits_per_byte": None if not text.bytes_per_token else mean / math.log(2) / text.bytes_per_token,
                "tokens": length * len(text.segments),
                "seconds": float(seconds[index]),
                "tokens_per_second": length * len(text.segments) / float(seconds[index]),
                **memory[index],
                "rss_increase_bytes": None if before is None else resident[index] - before,
            }
        )
    return {
        "model": name,
        "mixers": [mixer.name for mixer in model.mixers()],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "training_length": trained,
        "text": {"source": text.source, "rule": text.rule, "segments": len(text.segments)},
        "rows": rows,
        "positions": position_rows(nll),
    }


def position_bins(length: int) -> list[int]:
    """Edges of bins of position: 0, 16, then two to an octave, the last one `length`."""
    edges, octave = [0], 0
    while (edge := round(FIRST_BIN * 2 ** (octave / BINS_PER_OCTAVE))) < length:
        edges.append(edge)
        octave += 1
    return [*edges, length]


def position_rows(nll: np.ndarray) -> list[dict[str, Any]]:
    """Mean loss of every bin of position. nll: [segments, length], nats."""
    edges = position_bins(nll.shape[1])
    rows = []
    for first, stop in pairwise(edges):
        mean, error = _mean(nll[:, first:stop])
        rows.append({"first": first, "stop": stop, "nats_per_token": mean, "stderr": error})
    return rows


def _mean(nll: np.ndarray) -> tuple[float, float | None]:
    """Mean, and standard error over the segments: tokens of one segment are not independent."""
    means = nll.mean(axis=1, dtype=np.float64)
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return float(means.mean()), error


class _Marks:
    """Tokens done, seconds and highest resident set after every forward pass over one segment."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress, self.start = progress, time.perf_counter()
        self.done, self.seconds, self.resident = [0], [0.0], [_resident("VmHWM")]

    def __call__(self, count: int) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.progress(count - self.done[-1])
        self.done.append(count)
        self.resident.append(_resident("VmHWM"))

    def resident_at(self, length: int) -> int | None:
        return self.resident[bisect_left(self.done, length)]


def _carried_memory(model: Any, length: int, chunk: int) -> dict[str, int]:
    """Bytes in the chunk that ends at `length`, on states that stand before it: their values do not matter."""
    count = min(chunk, length)
    cache = model.model.new_cache(1, capacity=length - count)
    for state in cache.states:
        state["position"].fill_(length - count)
    held = state_bytes(cache)
    ids = np.zeros(count + 1, dtype=np.int64)
    peak = held + peak_bytes(lambda: stream_nll(model, ids, chunk, cache=cache))
    return {"state_bytes": state_bytes(cache), "peak_tensor_bytes": peak}


def _windowed_memory(model: Any, length: int, window: int, stride: int) -> dict[str, int]:
    """Bytes of one window, whatever the length."""
    ids = np.zeros(min(window, length) + 1, dtype=np.int64)
    return {"state_bytes": 0, "peak_tensor_bytes": peak_bytes(lambda: windowed_nll(model, ids, window, stride))}


@contextmanager
def _no_warning_of_length() -> Iterator[None]:
    """The decoder warns of documents longer than it was made for; here they are what is measured."""
    logger = logging.getLogger("farspan.lm.decoder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reset_resident() -> int | None:
    """Forget the highest resident set where the kernel lets us; the one of now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    """Bytes of this process's resident set: VmRSS now, VmHWM at its highest; None outside of Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def picture(result: dict[str, Any]) -> Any:
    """Loss against position, and against length with its standard error: a matplotlib figure.

    Both x axes are logarithmic; the dashed lines are the lengths that the models were trained at.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_position, by_length = figure.subplots(1, 2, sharey=True)
    for color, model in zip(_colors(len(result["models"])), result["models"], strict=True):
        bins = model["positions"]
        middles = [(row["first"] + row["stop"]) / 2 for row in bins]
        means, errors = (np.array([row[key] or 0.0 for row in bins]) for key in ("nats_per_token", "stderr"))
        by_position.plot(middles, means, color=color, label=model["model"])
        by_position.fill_between(middles, means - errors, means + errors, color=color, alpha=0.2, linewidth=0)
        rows = model["rows"]
        lengths, values = [row["length"] for row in rows], [row["nats_per_token"] for row in rows]
        by_length.errorbar(lengths, values, [row["stderr"] or 0.0 for row in rows], color=color, marker="o", capsize=3)
        for axes in (by_position, by_length):
            axes.axvline(model["training_length"], color=color, linestyle="--", linewidth=1)
    by_position.set_title("loss at a position, nats", loc="left", fontweight="bold")
    by_length.set_title("mean loss of so many tokens, nats", loc="left", fontweight="bold")
    for axes in (by_position, by_length):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens (dashed: trained at)")
        axes.spines[["top", "right"]].set_visible(False)
    by_position.legend(frameon=False)
    return figure


def _colors(count: int) -> list[str]:
    return [COLORS[1:][i % len(COLORS[1:])] for i in range(count)]
