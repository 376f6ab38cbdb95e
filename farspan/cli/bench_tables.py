"""The tables of `farspan bench`: what a benchmark found, as it is printed and written."""

from collections.abc import Iterator
from typing import Any


def kernels_table(result: dict[str, Any]) -> Any:
    """What `bench_kernels` found, as a rich table grouped by length."""
    published = any(row.get("published_ratio") for row in result["rows"])
    extra = ("published",) if published else ()
    table = _table("tokens", "layer", "ms", "x softmax", *extra, "tokens/s", "TFLOP/s", "memory", "error", "eager", "")
    previous = None
    for row in result["rows"]:
        if previous not in (None, row["length"]):
            table.add_section()
        cells = [f"{row['length']:,}" if previous != row["length"] else "", row["name"]]
        previous = row["length"]
        if "seconds" in row:
            cells += [f"{1e3 * row['median_seconds']:,.1f}", _times(row["ratio"])]
            cells += [_times(row["published_ratio"])] if published else []
            flops = row["tflops_per_second"]
            cells += [f"{row['tokens_per_second']:,.0f}", "" if flops is None else f"{flops:.3g}"]
            cells += [f"{row['peak_bytes'] / 1e6:,.0f} MB"]
        else:
            cells += ["wrong", *[""] * (4 + len(extra))]
        _add_checked(table, cells, row["check"])
    return table


def decode_table(result: dict[str, Any]) -> Any:
    """What `bench_decode` found, as a rich table."""
    published = any(row.get("published_ratio") for row in result["rows"])
    extra = ("published",) if published else ()
    table = _table("layer", "ms/step", "x softmax", *extra, "tokens/s", "state", "GB/s", "error", "eager", "")
    for row in result["rows"]:
        cells = [row["name"]]
        if "seconds" in row:
            cells += [f"{1e3 * row['median_seconds']:,.3g}", _times(row["ratio"])]
            cells += [_times(row["published_ratio"])] if published else []
            cells += [f"{row['tokens_per_second']:,.0f}", f"{row['state_bytes'] / 1e6:,.1f} MB"]
            cells += [f"{row['state_bytes'] / row['median_seconds'] / 1e9:,.3g}"]
        else:
            cells += ["wrong", *[""] * (4 + len(extra))]
        _add_checked(table, cells, row["check"])
    return table


def train_table(result: dict[str, Any]) -> Any:
    """What `bench_train` found, as a rich table."""
    table = _table("", "tokens/s", "peak memory")
    for name, speed in result["median_tokens_per_second"].items():
        table.add_row(name, f"{speed:,.0f}", f"{result['peak_bytes'][name] / 1e6:,.0f} MB")
    ours, peer = result["peak_bytes"].values()
    table.add_row("median ratio", f"{result['median_ratio']:.3f}", f"{ours / peer:.3f}", style="bold")
    return table


def compile_table(reports: list[Any]) -> Any:
    """What became of every Triton kernel, as a rich table."""
    columns = ("kernel", "head dim", "warps", "registers", "spilled", "shared memory", "matrix", "faults")
    table = _table("operator", *columns)
    for report in reports:
        cells = (report.head_dim, report.num_warps, report.registers, report.spilled, f"{report.shared:,}")
        faults = "; ".join(report.faults)
        style = "red" if faults else None
        table.add_row(report.operator, report.kernel, *map(str, cells), report.matrix, faults, style=style)
    return table


def parallel_table(result: dict[str, Any]) -> Any:
    """What `bench_parallel` found, as a rich table grouped by mixer and number of ranks."""
    columns = ("ms", "speed-up", "MB sent", "B/token", "formula", "memory", "x ranks")
    table = _table("layer", "ranks", *columns, "error", "eager", "")
    previous = None
    for row in result["rows"]:
        if previous not in (None, row["mixer"]):
            table.add_section()
        cells = [row["mixer"] if row["ranks"] == 1 else f"{row['mixer']} {row['method']}", str(row["ranks"])]
        previous = row["mixer"]
        if "seconds" in row:
            cells += [f"{1e3 * row['median_seconds']:,.1f}", _times(row["speedup"])]
            cells += [_both_ways({way: sum(sent) / row["ranks"] / 1e6 for way, sent in row["sent"].items()}, ",.3g")]
            cells += [_both_ways(row["sent_per_token"], ",.0f"), row["said"]]
            cells += [f"{max(row['peak_bytes']) / 1e6:,.0f} MB", _times(row["memory_times_ranks"], "")]
        else:
            cells += ["wrong", *[""] * (len(columns) - 1)]
        _add_checked(table, cells, row["check"])
    table.caption, table.caption_justify, table.caption_style = "\n".join(_told(result)), "left", "dim"
    return table


def _both_ways(sent: dict[str, float], form: str) -> str:
    return f"{sent['forward']:{form}} / {sent['backward']:{form}}" if any(sent.values()) else "0"


def _told(result: dict[str, Any]) -> Iterator[str]:
    """Lines under the table of `bench parallel`: what the columns mean, and what the numbers do not say."""
    yield ""
    yield "sent: forward / backward; MB by a rank (the mean), B for each of its tokens; formula: of B, forward"
    yield "memory: of two decoder blocks, forward and backward, on the rank that holds most; x ranks: times the ranks,"
    yield "over that of one rank"
    for ranks, ratio in result["ring_over_rat"].items():
        yield f"on {ranks} ranks, forward, RAT sends {ratio:.3g} times less than ring attention"
    crowded = [str(ranks) for ranks in result["ranks"] if ranks > result["cores"]]
    if crowded and result["protocol"]["device"] == "cpu":
        cores, share = ("1 core", "it") if result["cores"] == 1 else (f"{result['cores']} cores", "them")
        yield f"{cores}: the times of {' and '.join(crowded)} ranks, which share {share}, are no speed-up"


def _table(*titles: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    words = ("layer", "formula", "operator", "kernel", "matrix", "faults", "")
    for title in titles:
        table.add_column(title, justify="left" if title in words else "right")
    return table


def _add_checked(table: Any, cells: list[str], check: dict[str, Any]) -> None:
    """A row with the errors of its check at the end; red, with the name of the tensor that is wrong, if it failed."""
    errors = [f"{check[name]:.1e}" for name in ("error", "eager_error")]
    if check["passed"]:
        table.add_row(*cells, *errors)
    else:
        table.add_row(*cells, *errors, check["tensor"], style="red")


def _times(ratio: float | None, unit: str = "x") -> str:
    return "" if ratio is None else f"{ratio:.3g}{unit}"
