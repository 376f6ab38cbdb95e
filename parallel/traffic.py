"""Bytes that this rank sends to others, counted where torch dispatches its collectives.

What is counted is what the algorithm has to send, whatever the backend makes of it: an all-gather sends a rank's own
part to each of the others, a reduce-scatter sends each of the others its part, an all-to-all and a message what leaves
the rank. Every collective of torch passes by here, whoever calls it, as long as no custom operator hides it inside.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.parallel.comm import agree

# Collectives that send nothing: the sender of a message counts it, and barriers carry no data.
_SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


@dataclass(frozen=True)
class Traffic:
    """sent: bytes to other ranks by operation ("all-gather", "reduce-scatter", "all-to-all", "send").

    control: bytes of the checks that all ranks have the same batch (`comm.agree`), which are not among those sent.
    """

    sent: Counter[str] = field(default_factory=Counter)
    control: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes sent, without control messages."""
        return self.sent.total()


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what this process sends inside the block, backward passes included.

    RuntimeError for a collective that has no rule here, so that nothing goes uncounted.
    """
    traffic = Traffic()
    with _Counting(traffic):
        yield traffic


class _Counting(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its whole compiler, to no end but to keep it away from the next method

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "c10d":
            self._count(operator.overloadpacket.__name__, arguments)
        return operator(*arguments, **(options or {}))

    def _count(self, operator: str, arguments: tuple[Any, ...]) -> None:
        if operator in _SILENT:
            return
        if operator not in _SENT:
            raise RuntimeError(f"count_traffic has no rule for the bytes of c10d.{operator}; add one")
        name, rule = _SENT[operator]
        kind = self._traffic.control if _called_by(agree) else self._traffic.sent
        kind[name] += rule(*arguments)


def _all_gather(gathered, own, group, *_) -> int:
    return (_group(group).size() - 1) * own.nbytes


def _reduce_scatter(own, parts, group, *_) -> int:
    return (_group(group).size() - 1) * own.nbytes


def _all_to_all(received, sent, group, receive, send, *_) -> int:
    """receive, send: rows for and from each rank; empty where all get the same."""
    group = _group(group)
    rows = send[group.rank()] if send else len(sent) // group.size()
    return sent[rows:].nbytes  # what stays here is not sent


def _send(tensors, *_) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# torch's own names of the operations, and their rules.
_SENT = {
    "_allgather_base_": ("all-gather", _all_gather),
    "_reduce_scatter_base_": ("reduce-scatter", _reduce_scatter),
    "alltoall_base_": ("all-to-all", _all_to_all),
    "send": ("send", _send),
}


def _group(group: torch.ScriptObject) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(group)


def _called_by(function: Any) -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False
