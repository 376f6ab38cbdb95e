"""SIGTERM and Ctrl-C: save what is not saved, then leave with exit code 0."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch


class StopRequested(SystemExit):
    """Raised out of whatever runs, by the signal itself, where nothing would be lost; left alone it ends with exit code
    0.
    """

    def __init__(self) -> None:
        super().__init__(0)


class Stop:
    """The request to stop, from the moment it is made.

    At first the signal leaves at once, out of imports, compilation or the dry batch: there is nothing to save. Within
    `held()` it only sets `requested`, for the loop to look at between collectives, except within `interruptible()`, for
    waiting. A second signal ends the process.
    """

    def __init__(self) -> None:
        self.requested = False
        self._raises = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @contextmanager
    def held(self) -> Iterator[None]:
        """From here on there is work that a stop must save."""
        self._raises = False
        try:
            yield
        finally:
            self._raises = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within `held()`: a wait that StopRequested may break off; no collective belongs in it."""
        self._raises = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._raises = False

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it together, and learn the same."""
        if torch.distributed.get_world_size() == 1:
            return self.requested
        flag = torch.tensor([int(self.requested)])  # on the host: gloo carries it, no device is waited for
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        if self._raises:
            raise StopRequested
