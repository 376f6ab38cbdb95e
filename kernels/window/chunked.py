"""Causal sliding-window attention in linear memory, forward and backward, on any device.

The queries of a document are cut into blocks of `block`. A block sees the `block + window - 1` keys that end with its
own last token, always under the same banded mask; those key ranges overlap, so they are read through one strided view
and never copied. The first queries, whose windows start before the document (or before its prefix), form one block of
their own, sized so that the rest divides evenly.

    forward   o, lse per block                      saved: q, k, v, o, lse
    backward  dq, dk, dv per block; the overlapping key gradients are added up a few blocks at a time

The attention of a block, and its backward, is `kernels.blocks`.
"""

import math

import torch

from farspan.kernels.blocks import attention_block, attention_block_backward, hidden_mask

BLOCKS_AT_ONCE = 16


def window_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    window: int,
    scale: float,
    block: int | None = None,
) -> torch.Tensor:
    """Arguments and result as `kernels.window.window_attention`, with the keys of the prefixes already in k and v.

    block: queries per block; a quarter of the window by default, which computes 1.25 times the visible scores.
    """
    block = block or max(64, math.ceil(window / 4))
    return _window_forward(q, k, v, list(lengths), list(prefixes), window, scale, block)[0]


@torch.library.custom_op("farspan::window_forward", mutates_args=())
def _window_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    window: int,
    scale: float,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, D] and lse [T, H] (fp32, float64 for float64)."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[1:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys, mask in _blocks(q, lengths, prefixes, window, block):
        part, part_lse = attention_block(queries.of(q), keys.of(k), keys.of(v), scale, mask)
        queries.of(o).copy_(part)
        queries.of(lse[None, ..., None]).copy_(part_lse[..., None])
    return o, lse


@_window_forward.register_fake
def _(q, k, v, lengths, prefixes, window, scale, block):
    lse = q.new_empty(q.shape[1:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("farspan::window_backward", mutates_args=())
def _window_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    window: int,
    scale: float,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    do = do.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    for queries, keys, mask in _blocks(q, lengths, prefixes, window, block):
        saved = (queries.of(o), queries.of(lse[None, ..., None])[..., 0])
        block_inputs = (queries.of(q), keys.of(k), keys.of(v), *saved)
        gradients = attention_block_backward(queries.of(do), *block_inputs, scale, mask)
        queries.of(dq).copy_(gradients[0])
        keys.add_to(dk, gradients[1])
        keys.add_to(dv, gradients[2])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_window_backward.register_fake
def _(do, q, k, v, o, lse, lengths, prefixes, window, scale, block):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    q, k, v, o, lse = ctx.saved_tensors
    return *_window_backward(do, q, k, v, o, lse, *ctx.constants), None, None, None, None, None


_window_forward.register_autograd(_backward, setup_context=_save)


class _Rows:
    """`count` runs of `length` rows of a packed [1, N, H, D] tensor; run i starts at row `start + i * stride`."""

    def __init__(self, start: int, stride: int, length: int, count: int) -> None:
        self.start, self.stride, self.length, self.count = start, stride, length, count

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View [count, H, length, D] of x; runs may overlap."""
        row, head, channel = x.stride()[1:]
        shape = (self.count, x.shape[2], self.length, x.shape[3])
        strides = (self.stride * row, head, row, channel)
        return x.as_strided(shape, strides, x.storage_offset() + self.start * row)

    def add_to(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [count, H, length, D] to the rows of x; runs that overlap add up."""
        values = values.transpose(1, 2).to(x.dtype)
        for run in range(self.count):
            first = self.start + run * self.stride
            x[0, first : first + self.length] += values[run]


def _blocks(q: torch.Tensor, lengths: list[int], prefixes: list[int], window: int, block: int):
    """(query rows, key rows, additive mask or None) of every group of blocks, document by document."""
    banded = _mask(block, window - 1, window, q)
    query, key = 0, 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        head = min(length, max(0, window - 1 - prefix))
        head = min(length, head + (length - head) % block)
        if head:
            mask = _mask(head, prefix, window, q)
            yield _Rows(query, 0, head, 1), _Rows(key, 0, prefix + head, 1), mask
        count = (length - head) // block
        for first in range(0, count, BLOCKS_AT_ONCE):
            group = min(BLOCKS_AT_ONCE, count - first)
            start = head + first * block
            yield (
                _Rows(query + start, block, block, group),
                _Rows(key + prefix + start - (window - 1), block, block + window - 1, group),
                banded,
            )
        query, key = query + length, key + prefix + length


def _mask(length: int, prefix: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """[length, prefix + length], 0 where visible and -inf where not."""
    query = torch.arange(prefix, prefix + length, device=like.device)[:, None]
    key = torch.arange(prefix + length, device=like.device)
    return hidden_mask((key > query) | (key <= query - window), like.dtype)
