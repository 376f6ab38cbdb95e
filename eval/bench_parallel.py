"""A mixer layer on one document that several ranks share: time, bytes that they send, memory of a rank, and whether it
computes the right thing.

Every number of ranks has its own pool of processes, all of one thread on a CPU; a pool waits while another works.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from farspan.eval.bytes_sent import Sharing, bytes_sent, said
from farspan.eval.parallel_sides import ALONE, LIMIT, Protocol, Side, check, sides, timed, weigh
from farspan.eval.report import COLORS, described
from farspan.eval.timing import alternate, median_ratio
from farspan.parallel.pool import Pool


@contextmanager
def pools(protocol: Protocol) -> Iterator[dict[int, Pool]]:
    """The processes, by number of ranks. Enter it before anything starts a thread: on a CPU they are forked."""
    cuda = protocol.device.type == "cuda"
    with ExitStack() as stack:
        yield {
            ranks: stack.enter_context(closing(Pool(ranks, "spawn" if cuda else "fork", LIMIT, cuda=cuda)))
            for ranks in protocol.ranks
        }


def bench_parallel(
    protocol: Protocol, processes: dict[int, Pool], rounds: int, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Seconds (of the slowest rank), bytes that each rank sends, counted and by formula, and peak bytes of each rank.

    A side that fails its check (see `judge`), or sends other bytes than its formula says, gets a row without numbers
    and with `passed` false. processes: of `pools`. In each round every side runs once. `progress` is called with a line
    of text `steps(protocol, rounds)` times.
    """
    length = protocol.checked_tokens
    rows: dict[Side, dict[str, Any]] = {}
    for side in sides(protocol):
        progress(f"{side.name}: check")
        result = processes[side.ranks].run(check, side, protocol, length)[0]
        rows[side] = {**asdict(side), "ranks": side.ranks, "checked_tokens": length, "check": asdict(result)}
    for side, row in rows.items():
        progress(f"{side.name}: bytes and memory")
        if row["check"]["passed"]:
            row |= _weighed(side, protocol, processes[side.ranks], row["check"])
    right = {side: row for side, row in rows.items() if row["check"]["passed"]}

    def told() -> Iterator[int]:
        for round_ in range(rounds):
            progress(f"round {round_ + 1} of {rounds}")
            yield round_

    works = {side.name: partial(_slowest, processes[side.ranks], side, protocol) for side in right}
    seconds = alternate(works, told(), lambda work: work())
    for side, row in right.items():
        own, alone = seconds[side.name], Side(side.mixer, ALONE)
        row |= {"seconds": own, "median_seconds": statistics.median(own), "speedup": None, "memory_times_ranks": None}
        if alone in right:
            row["speedup"] = median_ratio(seconds[alone.name], own)
            row["memory_times_ranks"] = max(row["peak_bytes"]) * side.ranks / max(right[alone]["peak_bytes"])
    return {
        "protocol": described(protocol),
        "rounds": rounds,
        "ranks": list(protocol.ranks),
        "threads": 1 if protocol.device.type == "cpu" else torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "ring_over_rat": _ring_over_rat(right),
        "rows": list(rows.values()),
    }


def steps(protocol: Protocol, rounds: int) -> int:
    """How often `bench_parallel` calls its `progress`."""
    return 2 * len(sides(protocol)) + rounds


def _weighed(side: Side, protocol: Protocol, pool: Pool, check: dict[str, Any]) -> dict[str, Any]:
    """Bytes sent, counted and by formula, and peak bytes, by rank; `check` fails where the two differ."""
    counted, peaks = zip(*pool.run(weigh, side, protocol), strict=True)
    sharing = Sharing(protocol.tokens, protocol.layout, side.ring, side.ulysses, side.attention)
    options = protocol.options(side.mixer)
    formula = [bytes_sent(side.mixer, options, sharing, protocol.dtype, rank) for rank in range(side.ranks)]
    found = {
        "sent": _by_pass(counted),
        "formula": _by_pass(formula),
        "said": said(side.mixer, sharing),
        "sent_per_token": {name: sum(of) / protocol.tokens for name, of in _by_pass(counted).items()},
    }
    if list(counted) != formula:
        return found | {"check": {**check, "passed": False, "tensor": "bytes sent"}}
    return found | {"peak_bytes": list(peaks)}


def _by_pass(sent: Any) -> dict[str, list[int]]:
    return {name: [getattr(own, name) for own in sent] for name in ("forward", "backward")}


def _slowest(pool: Pool, side: Side, protocol: Protocol) -> float:
    return max(pool.run(timed, side, protocol))


def _ring_over_rat(right: dict[Side, dict[str, Any]]) -> dict[str, float]:
    """By number of ranks: how many times as much ring attention sends as RAT, forward."""
    sent = {(side.method, side.ranks): row["sent_per_token"]["forward"] for side, row in right.items()}
    both = [ranks for method, ranks in sent if method == "ring" and ("summaries", ranks) in sent]
    return {str(ranks): sent["ring", ranks] / sent["summaries", ranks] for ranks in both}


def picture(result: dict[str, Any]) -> Any:
    """Time and memory of a rank over the number of ranks, and bytes sent per token: a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = [row for row in result["rows"] if "seconds" in row]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    time, memory, sent = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    colors = _draw_lines(time, memory, rows)
    for alone in (row for row in rows if row["method"] == ALONE):
        ideal = [max(alone["peak_bytes"]) / 1e6 / ranks for ranks in result["ranks"]]
        memory.plot(result["ranks"], ideal, ":", color="#a0a0a0", linewidth=1.2, zorder=0)
    cores = f" on {result['cores']} cores" if result["protocol"]["device"] == "cpu" else ""
    time.set_title(f"time of a call{cores}, ms", loc="left", fontweight="bold")
    memory.set_title("peak memory of a rank, MB", loc="left", fontweight="bold")
    for axes in (time, memory):
        axes.set(xscale="log", yscale="log", xlabel="ranks")
        axes.set_xticks(result["ranks"], list(map(str, result["ranks"])))
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(axis="y", color="#e6e6e6")
    memory.set_xlabel("ranks (dotted: 1 / ranks of what one holds)")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS), frameon=False)
    most = max(result["ranks"])
    _draw_sent(sent, [row for row in rows if row["ranks"] == most], colors)
    sent.set_title(f"bytes sent per token on {most} ranks", loc="left", fontweight="bold")
    for axes in (time, memory, sent):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_lines(time: Any, memory: Any, rows: list[dict[str, Any]]) -> dict[str, str]:
    """A line for each way to share a mixer, from where it is alone; returns their colors."""
    shared = [row for row in rows if row["method"] != ALONE] or rows
    names = list(dict.fromkeys(_label(row) for row in shared))
    colors = dict(zip(names, COLORS[1:], strict=False))
    for name, color in colors.items():
        mixer = name.split()[0]
        own = [row for row in rows if _label(row) == name or (row["mixer"], row["method"]) == (mixer, ALONE)]
        at = [row["ranks"] for row in own]
        time.plot(at, [1e3 * row["median_seconds"] for row in own], "o-", color=color, label=name)
        memory.plot(at, [max(row["peak_bytes"]) / 1e6 for row in own], "o-", color=color, label=name)
    return colors


def _draw_sent(axes: Any, rows: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """A bar for each row: forward, and paler the backward pass."""
    names = [_label(row) for row in rows]
    forward, backward = ([row["sent_per_token"][way] for row in rows] for way in ("forward", "backward"))
    own = [colors.get(name, COLORS[0]) for name in names]
    axes.barh(names, forward, color=own)
    bars = axes.barh(names, backward, left=forward, color=own, alpha=0.45)
    told = [f"{a:,.0f} + {b:,.0f}" for a, b in zip(forward, backward, strict=True)]
    axes.bar_label(bars, told, padding=4, fontsize="small")
    axes.set(xlabel="forward + backward (pale)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.margins(x=0.25)
    axes.invert_yaxis()


def _label(row: dict[str, Any]) -> str:
    """The way to share, without the numbers of ranks in it."""
    return f"{row['mixer']} {row['method'].split(',')[0]}"
