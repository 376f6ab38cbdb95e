"""A few processes that form a job, kept for many calls: distributed functions without a launcher.

For tests and benchmarks. A call runs one function on every process, and returns what each returned; an error in any is
raised here with its traceback, and the pool is closed, as its groups may be out of step.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from farspan.parallel import watch


class Pool:
    """`ranks` processes with a process group: gloo, and NCCL beside it on CUDA, where process i uses device i.

    method: how they start. "fork" is fast and sees all that this process has imported; "spawn" is needed with CUDA.
    timeout: seconds of a call, and of any collective in it. threads: of torch in each process.
    """

    def __init__(
        self, ranks: int, method: str = "fork", timeout: float = 60.0, threads: int = 1, cuda: bool = False
    ) -> None:
        context, port = multiprocessing.get_context(method), free_port()
        self.ranks, self._timeout = ranks, timeout
        pipes = [context.Pipe() for _ in range(ranks)]
        self._pipes = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_work, args=(rank, ranks, port, theirs, timeout, threads, cuda), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returned on each process.

        The function is named, not sent: a module that the processes can import (or had when they were forked) holds it.
        Raises RuntimeError where a process failed, died or took longer than the timeout.
        """
        call = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        deadline, results, errors = time.monotonic() + self._timeout, [], {}
        for rank, (pipe, process) in enumerate(zip(self._pipes, self.processes, strict=True)):
            ready = wait([pipe, process.sentinel], max(0.0, deadline - time.monotonic()))
            if not ready:
                errors[rank] = f"did not answer within {self._timeout:g} s"
                continue
            try:
                # Where it died, the pipe may still be held open by processes that were forked later.
                failed, value = pickle.loads(pipe.recv_bytes() if pipe in ready or pipe.poll() else b"")
            except (EOFError, OSError):
                process.join()
                errors[rank] = f"died (exit code {process.exitcode})"
                continue
            results.append(value)
            if failed:
                errors[rank] = value
        if errors:
            self.close()
            told = "\n".join(f"--- rank {rank}: {error}" for rank, error in errors.items())
            raise RuntimeError(f"{getattr(function, '__name__', function)} failed on ranks {list(errors)}\n{told}")
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def is_open(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _work(rank: int, ranks: int, port: int, pipe: Any, timeout: float, threads: int, cuda: bool) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    watch.start()
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the pool was closed
            os._exit(0)
        try:
            answer = pickle.dumps((False, function(*arguments)))
        except Exception:
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)
