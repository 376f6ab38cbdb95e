"""What a run tells while it trains: the log line, its record, the progress bar, and one log per rank."""

import logging
import resource
import shutil
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from farspan.lm.console import console
from farspan.lm.train.engine import StepResult

# Dense bf16 peak, FLOP/s, by a part of the device's name; the makers' data sheets, without sparsity.
PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10G": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Meter:
    """Turns step results into records: rates since the last one, time left by the median of the last 50 steps."""

    def __init__(self, model: Any, sequence_length: int, tokens_per_device: int, device: torch.device):
        self._tokens = tokens_per_device
        self._device = device
        self._peak = peak_flops(device)
        self._flops = [model.flops_per_token(sequence_length, causal=causal) for causal in (True, False)]
        self._durations: deque[float] = deque(maxlen=50)
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Call after time that is not training (validation, samples, checkpoints)."""
        self._began = time.perf_counter()

    def record(
        self, step: int, total: int, rate: float, result: StepResult, waited: float, skipped: int
    ) -> dict[str, Any]:
        """The record of a step, in the order of the log line. step: steps done; waited: seconds waiting for its
        data.
        """
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        self._durations.append(seconds)
        per_second = self._tokens / seconds
        causal, full = (None if self._peak is None else per_second * flops / self._peak for flops in self._flops)
        return {
            "kind": "train",
            "step": step,
            "percent": 100 * step / total,
            "loss": result.loss,
            "loss_max": result.loss_max,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": per_second,
            "mfu_causal": causal,
            "mfu_full": full,
            "memory_gib": peak_memory(self._device) / 2**30,
            "data_wait": waited / seconds,
            "skipped": skipped,
            "seconds_left": (total - step) * statistics.median(self._durations),
        }


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the device, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def log_line(record: dict[str, Any], total: int) -> str:
    """One aligned line of a record of `Meter`."""
    share = [("-" if value is None else f"{value:.1%}") for value in (record["mfu_causal"], record["mfu_full"])]
    return (
        f"step {record['step']:>{len(str(total))}} {record['percent']:5.1f}%  loss {record['loss']:.4f} "
        f"(max {record['loss_max']:.4f})  norm {record['grad_norm']:.3g}  lr {record['learning_rate']:.2e}  "
        f"{count(record['tokens_per_second'])} tokens/s  mfu {share[0]} {share[1]}  "
        f"mem {record['memory_gib']:.2f} GiB  data {record['data_wait']:.1%}  "
        f"skipped {record['skipped']}  left {duration(record['seconds_left'])}"
    )


def print_summary(run: Path, summary: dict[str, Any]) -> None:
    """The end of a run, and what to try next."""
    loss, baseline = summary["validation_loss"], summary["bigram_loss"]
    verdict = "below" if loss < baseline else "NOT below"
    program = "farspan" if shutil.which("farspan") else sys.argv[0]  # as it was called, where it is on no path
    lines = [
        f"trained {summary['steps']} steps, {count(summary['tokens'])} tokens, {summary['skipped']} steps skipped",
        f"validation loss {loss:.4f} nats per token, {verdict} the {baseline:.4f} of a bigram model of the same tokens",
    ]
    if summary["sample"] is not None:
        lines += ["", "a sample:", *(f"  {line}" for line in summary["sample"].splitlines()), ""]
    lines += [
        f"loss curve: {run / 'loss.png'}",
        "next:",
        f'  {program} generate {run} "def "',
        f"  {program} chat {run}",
        f"  {program} export {run} exported",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def count(number: float) -> str:
    """Three significant digits with a unit: 1.31M, 12.1k."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Reporter:
    """Lines to the terminal (main rank) and to `logs/rank-N.log` (all); a progress bar where there is a terminal."""

    def __init__(self, run: Path, rank: int, total_steps: int, step: int):
        self._main = rank == 0
        self._log = logging.Logger(f"rank-{rank}")
        handler = logging.FileHandler(run / "logs" / f"rank-{rank}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._log.addHandler(handler)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not (self._main and console.is_terminal),
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=step, status="")
        self._progress.start()

    def say(self, text: str) -> None:
        self._log.info(text)
        if self._main:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, record: dict[str, Any]) -> None:
        status = (
            f"{count(record['tokens_per_second'])} tokens/s  loss {record['loss']:.3f}  "
            f"left {duration(record['seconds_left'])}"
        )
        self.progress(record["step"], status)

    def progress(self, step: int, status: str) -> None:
        """The bar alone."""
        self._progress.update(self._task, completed=step, status=status)

    def close(self) -> None:
        self._progress.stop()
        for handler in self._log.handlers:
            handler.close()
