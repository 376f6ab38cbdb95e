"""Starting a run: in this process, in N workers of this machine, or as a worker that somebody else started.

N workers are started by torch's elastic agent. It forwards SIGTERM, watches the workers every 0.2 s, and ends the
others within 30 s when one dies (SIGTERM, then SIGKILL). Each worker leaves a note of how it ended, from which the one
exit code is made.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from farspan.parallel.watch import RankLost

_NOTES = "FARSPAN_NOTES"  # the folder of the workers' notes, for workers started by `launch`


class LaunchFailed(RuntimeError):
    """A worker died; exit code 1."""


def default_processes(rows: int, context: int = 1) -> int:
    """As many CUDA devices as replicas of `context` ranks divide the rows of a step; one replica on CPU."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 1
    return context * max(n for n in range(1, max(1, devices // context) + 1) if rows % n == 0)


def check_processes(processes: int) -> None:
    """ValueError if this machine cannot run so many."""
    if processes < 1:
        raise ValueError(f"--nproc {processes} is not a number of processes; use 1 or more")
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f"--nproc {processes} is more than the {torch.cuda.device_count()} CUDA devices; use at most that"
        )


def is_worker() -> bool:
    """Whether a launcher (ours, torchrun, a cluster's) has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def is_launched() -> bool:
    """Whether `launch` has started this process; it has checked what can be checked before."""
    return _NOTES in os.environ


def local_processes() -> int:
    """How many workers share this machine with this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))


def prepare_process(processes: int) -> None:
    """Sets what torch.distributed and DeepSpeed read. `processes`: how many share this machine's cores."""
    share_cores(processes)
    if not is_worker():  # or DeepSpeed looks for MPI
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ.update({key: str(value) for key, value in alone.items()})


def share_cores(processes: int) -> None:
    """On CPU, the threads of one of `processes` on this machine."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def run_worker(work: Callable[[], None], logs: Path) -> None:
    """Runs `work` as one of several workers: output of all but rank 0 goes to its log, the ending into its note.

    Exit codes: 0 done, or stopped and saved; 2 an error of the user, in one line; 1 anything else.
    """
    rank = int(os.environ.get("RANK", 0))
    logs.mkdir(parents=True, exist_ok=True)
    with open(logs / f"rank-{rank}.log", "a") as log:
        if rank:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            work()
        except (ValueError, OSError) as error:
            traceback.print_exc(file=log)
            _note(rank, 2, " ".join(str(error).split()))
            if is_launched():  # the launcher prints the line, once for all ranks
                raise SystemExit(2) from None
            raise
        except RankLost as error:  # the launcher, or the command line, prints the one line
            traceback.print_exc(file=log)
            _note(rank, 1, str(error))
            if is_launched():
                raise SystemExit(1) from None
            raise
        except SystemExit as left:
            _note(rank, left.code if isinstance(left.code, int) else 1, "")
            raise
        except Exception as error:
            traceback.print_exc(file=log)
            _note(rank, 1, f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
    _note(rank, 0, "")


def launch(arguments: Sequence[str], processes: int, logs: Path) -> None:
    """Runs `farspan *arguments` in `processes` workers on this machine and waits for them.

    logs: where the workers' logs are, for the message. Raises ValueError with the workers' own line for an error of the
    user, LaunchFailed where a worker died, SystemExit(0) after a request to stop that all workers obeyed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the one line is ours
    with tempfile.TemporaryDirectory(prefix="farspan-") as notes:
        os.environ[_NOTES] = notes
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="farspan",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=notes),
        )
        stopped, failure = False, None
        try:
            elastic_launch(config, _console_script())(*arguments)
        except SignalException:
            stopped = True
        except ChildFailedError as error:
            failure = error
        found = {note["rank"]: note for note in map(_read_note, Path(notes).glob("note-*.json"))}
    left_well = len(found) == processes and all(note["code"] == 0 for note in found.values())
    if stopped and left_well:
        raise SystemExit(0)
    if failure is None and not stopped:
        return
    for note in found.values():
        if note["code"] == 2:
            raise ValueError(note["message"])
    raise LaunchFailed(_what_happened(failure, found, logs))


def _what_happened(failure, found: dict[int, dict], logs: Path) -> str:
    """One line on the first worker that died, not on those that died of its death."""
    if failure is None:
        return f"stopped by a signal before all workers had saved; the last whole checkpoint is intact, see {logs}"
    rank, first = failure.get_first_failure()
    how = (
        f"of signal {signal.Signals(-first.exitcode).name}"
        if first.exitcode < 0
        else f"with exit code {first.exitcode}"
    )
    reason = found.get(rank, {}).get("message", "")
    why = f": {reason}" if reason else ""
    return f"rank {rank} died {how}{why}; the others were stopped, see {logs}; continue with --resume"


def _note(rank: int, code: int, message: str) -> None:
    if is_launched():
        path = Path(os.environ[_NOTES]) / f"note-{rank}.json"
        path.write_text(json.dumps({"rank": rank, "code": code, "message": message}))


def _read_note(path: Path) -> dict:
    return json.loads(path.read_text())


def _console_script() -> str:
    """The installed `farspan`, beside this interpreter: `python -m` would put the checkout's root on sys.path."""
    return str(Path(sys.executable).with_name("farspan"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
