"""Planned faults, for tests: a run dies, hangs or sees a NaN at a named point of a given step.

A plan is a list of dicts, given to `install` or, for a process about to start, as JSON in `FARSPAN_FAULTS`:

    [{"point": "after_backward", "step": 7, "do": "kill"}]
    [{"point": "mid_save", "step": 10, "do": "full", "rank": 1}, {"point": "loss", "step": 3, "do": "nan"}]

Points, in the order a step reaches them:
    "data"            before the step's batches are taken
    "step"            before the forward pass
    "after_backward"  gradients are there, the optimizer has not run
    "before_save"     a checkpoint is about to be written ("full" belongs to "mid_save", where the ranks agree on it)
    "mid_save"        this rank's files are written, the manifest is not
    "after_save"      the checkpoint has its name
    "validation"      before a validation pass
    "loss"            the loss of a step (only `poison` looks here)
Actions: "kill" (SIGKILL to itself), "terminate" (SIGTERM to itself), "full" (raises OSError, no space on device),
"hang" (sleeps `seconds`, default an hour), "exit" (leaves at once with status `status`, default 1); for the loss "nan"
or "spike" (times `factor`, default 100). `rank` (default: every rank) is the process's RANK.
"""

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

POINTS = ("data", "step", "after_backward", "before_save", "mid_save", "after_save", "validation", "loss")
_ACTIONS = ("kill", "terminate", "full", "hang", "exit")
_LOSS_ACTIONS = ("nan", "spike")
_KEYS = ("point", "step", "do", "rank", "seconds", "status", "factor")

_plan: tuple[dict[str, Any], ...] | None = None


def install(plan: list[dict[str, Any]] | None) -> None:
    """Makes `plan` the faults of this process; None removes them. ValueError for an unknown point, action or key."""
    global _plan
    for fault in plan or ():
        actions = _LOSS_ACTIONS if fault.get("point") == "loss" else _ACTIONS
        if fault.get("point") not in POINTS or fault.get("do") not in actions or "step" not in fault:
            raise ValueError(
                f"fault {fault} needs a step, a point of {', '.join(POINTS)}, and do of {', '.join(actions)}"
            )
        if unknown := set(fault) - set(_KEYS):
            raise ValueError(f"fault {fault} has unknown keys {sorted(unknown)}; known are {', '.join(_KEYS)}")
    _plan = tuple(plan) if plan else None


def reach(point: str, step: int) -> None:
    """Called by the program at a named point; does what is planned there, else nothing."""
    if _plan is None:
        return
    for fault in _planned(point, step):
        _act(fault)


def poison(step: int, loss: Any) -> Any:
    """`loss` (a tensor or float), or what the plan makes of it at this step: NaN, or `factor` times as much.

    Multiplied rather than replaced, so that the gradients are poisoned with it.
    """
    if _plan is None:
        return loss
    for fault in _planned("loss", step):
        loss = loss * (float("nan") if fault["do"] == "nan" else fault.get("factor", 100.0))
    return loss


def corrupt(path: Path, how: str = "truncate") -> None:
    """Damages a file as disks do: "truncate" cuts it to half, "flip" inverts one bit in its middle."""
    if how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "flip":
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))
    else:
        raise ValueError(f"how={how!r} is not a way to corrupt a file; use 'truncate' or 'flip'")


def _planned(point: str, step: int) -> list[dict[str, Any]]:
    if point not in POINTS:
        raise ValueError(f"{point!r} is not a fault point; they are {', '.join(POINTS)}")
    rank = int(os.environ.get("RANK", 0))
    return [f for f in _plan or () if f["point"] == point and f["step"] == step and f.get("rank", rank) == rank]


def _act(fault: dict[str, Any]) -> None:
    match fault["do"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "hang":
            time.sleep(fault.get("seconds", 3600.0))
        case "exit":
            os._exit(fault.get("status", 1))


if "FARSPAN_FAULTS" in os.environ:
    install(json.loads(os.environ["FARSPAN_FAULTS"]))
