"""The collectives of an axis: torch's own, with sizes that were checked, gradients, and errors that name rank and
operation.

Plain forms (`all_gather`, `reduce_scatter`, `all_to_all`) are for hand-written backward passes. The differentiable ones
(`gather`, `exchange`) communicate in their backward too: whoever calls one must use its result, on every rank, so that
the backward pass reaches it everywhere. Results with no rows count: take the empty slice.

Every tensor that is sent is made contiguous first; a collective given a permuted gradient fills its buffer in the wrong
order and says nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from farspan.parallel import watch
from farspan.parallel.mesh import Axis

# torch 2.13 renamed them.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


def operation(name: str, axis: Axis) -> AbstractContextManager[None]:
    """Around a collective: where a rank is missing, its error names the operation and that rank."""
    return watch.during(f"{name} over {axis.name} {list(axis.ranks)}")


def all_gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """[ranks, *x.shape]; x has the same shape on all ranks."""
    return AsyncGather(x, axis).wait()


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x: [ranks, ...], a part for every rank. Returns the sum of the parts for this one, in fp32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if axis.size == 1:
        return x[0]
    own = x.new_empty(x.shape[1:])
    with operation("reduce-scatter", axis):
        _reduce_scatter(own.view(-1), x.contiguous().view(-1), group=axis.group)
    return own


def all_to_all(x: torch.Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> torch.Tensor:
    """x: [sum(send), ...], the rows for each rank one after the other. Returns [sum(receive), ...], the rows of each.

    send[r] here must be what rank r has as receive of this rank: both come from a plan that all ranks share.
    """
    assert len(send) == len(receive) == axis.size and sum(send) == x.shape[0], "the plan does not fit what is sent"
    if axis.size == 1:
        return x
    received = x.new_empty(sum(receive), *x.shape[1:])
    with operation("all-to-all", axis):
        dist.all_to_all_single(received, x.contiguous(), list(receive), list(send), group=axis.group)
    return received


def gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """`all_gather` with a gradient: its backward is a reduce-scatter."""
    return _Gather.apply(x, axis)


def exchange(x: torch.Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> torch.Tensor:
    """`all_to_all` with a gradient: its backward is the opposite all-to-all."""
    return _Exchange.apply(x, tuple(send), tuple(receive), axis)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis, ctx.dtype = axis, x.dtype
        return all_gather(x, axis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return reduce_scatter(gradient, ctx.axis).to(ctx.dtype), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, axis):
        ctx.plan = receive, send, axis
        return all_to_all(x, send, receive, axis)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return all_to_all(gradient, *ctx.plan), None, None, None


class AsyncGather:
    """An all-gather under way; `wait` returns [ranks, *x.shape]."""

    def __init__(self, x: torch.Tensor, axis: Axis) -> None:
        self._axis, self._sent = axis, x.contiguous()
        self._gathered, self._work = self._sent[None], None
        if axis.size > 1:
            self._gathered = x.new_empty(axis.size, *x.shape)
            flat = self._gathered.view(-1), self._sent.view(-1)
            with operation("all-gather", axis):
                self._work = _all_gather(*flat, group=axis.group, async_op=True)

    def wait(self) -> torch.Tensor:
        if self._work is not None:
            with operation("all-gather", self._axis):
                self._work.wait()
        return self._gathered


class Pass:
    """Messages under way to the next rank of a ring and from the one before; `wait` returns what came."""

    def __init__(self, x: torch.Tensor, axis: Axis, group=None, name: str = "ring pass") -> None:
        self._axis, self._name = axis, name
        self._sent, self._received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        following, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
        group = axis.group if group is None else group
        with operation(name, axis):
            self._work = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, self._sent, following, group),
                    dist.P2POp(dist.irecv, self._received, before, group),
                ]
            )

    def wait(self) -> torch.Tensor:
        with operation(self._name, self._axis):
            for work in self._work:
                work.wait()
        return self._received


def send(x: torch.Tensor, rank: int, axis: Axis) -> None:
    """x to number `rank` of the axis, which calls `receive` for it."""
    with operation(f"send to rank {axis.ranks[rank]}", axis):
        dist.send(x.contiguous(), axis.ranks[rank], group=axis.group)


def receive(into: torch.Tensor, rank: int, axis: Axis) -> torch.Tensor:
    """What number `rank` of the axis sends, written into a contiguous tensor of its shape and dtype."""
    with operation(f"receive from rank {axis.ranks[rank]}", axis):
        dist.recv(into, axis.ranks[rank], group=axis.group)
    return into


def agree(values: Sequence[int], what: str, axis: Axis) -> None:
    """ValueError, naming the ranks that differ, unless `values` are the same on every rank of the axis.

    Carried on the host: no device is waited for. Sizes of later messages may be derived from what was agreed on.
    """
    if axis.size == 1:
        return
    own = torch.tensor([len(values), _digest(values)])
    everyone = all_gather(own, axis)
    other = [rank for rank, row in zip(axis.ranks, everyone, strict=True) if not torch.equal(row, everyone[0])]
    if other:
        raise ValueError(
            f"{what} on ranks {other} is not that of rank {axis.ranks[0]}; all ranks of a context group take the same"
        )


def _digest(values: Sequence[int]) -> int:
    """63 bits of the numbers, the same in every process."""
    digest = hashlib.blake2b(repr(tuple(values)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
