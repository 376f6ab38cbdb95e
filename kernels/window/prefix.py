"""Sliding-window attention in which every token also sees a few keys that belong to no document.

Window and prefix are two blocks of one softmax: each is computed with its own log-sum-exp, the two are merged, and with
the merged o and log-sum-exp the backward pass of each block gives exactly its share of the gradients.
"""

from __future__ import annotations

import torch

from farspan.kernels.blocks import attention_block, attention_block_backward
from farspan.kernels.packing import PrefixState, check_packed, with_prefixes
from farspan.kernels.window.chunked import _window_backward, _window_forward


def prefix_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor],
    lengths: tuple[int, ...],
    window: int,
    *,
    scale: float | None = None,
    initial_state: PrefixState | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Each token attends to the prefix and to the last `window` tokens of its document, itself included.

    q, k, v: [1, T, H, D]; any float dtype, softmax statistics in fp32 or wider. prefix: keys and values [P, H, D], P at
    least 1, the same for all documents. lengths: tokens of each document. initial_state: per document the keys and
    values before it, `([n, H, D], [n, H, D])`, of which all but the last `window - 1` must have been dropped.
    backend: "reference" writes out all scores; anything else takes blocks, on any device.
    Returns o [1, T, H, D], differentiable in all of them. Raises ValueError where shapes disagree.
    """
    check_packed(q, k, v, lengths)
    if prefix[0].shape != prefix[1].shape or prefix[0].shape[1:] != k.shape[2:] or not len(prefix[0]):
        raise ValueError(f"prefix {[list(x.shape) for x in prefix]} must be keys and values [1 or more, H, D]")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v, before = with_prefixes(k, v, lengths, initial_state)
    prefix = tuple(x.to(k.dtype) for x in prefix)
    if backend == "reference":
        return _reference(q, k, v, *prefix, lengths, before, window, scale)
    block = max(64, -(-window // 4))
    return _forward(q, k, v, *prefix, list(lengths), list(before), window, scale, block)[0]


def _reference(q, k, v, prefix_k, prefix_v, lengths, before, window, scale) -> torch.Tensor:
    outputs, query, key = [], 0, 0
    for length, n in zip(lengths, before, strict=True):
        own = slice(key, key + n + length)
        keys, values = torch.cat([prefix_k, k[0, own]]), torch.cat([prefix_v, v[0, own]])
        index = torch.arange(n + length, device=q.device)
        seen = (index <= index[n:, None]) & (index > index[n:, None] - window)
        seen = torch.cat([seen.new_ones(length, len(prefix_k)), seen], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[0, query : query + length], keys) * scale
        p = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", p.to(values.dtype), values))
        query, key = query + length, key + n + length
    return torch.cat(outputs)[None]


@torch.library.custom_op("farspan::prefix_window_forward", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    lengths: list[int],
    before: list[int],
    window: int,
    scale: float,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, D] and lse [T, H] (fp32, float64 for float64), both of the whole softmax."""
    o, lse = _window_forward(q, k, v, lengths, before, window, scale, block)
    part, part_lse = attention_block(q.transpose(1, 2), *_head_major(prefix_k, prefix_v), scale)
    part_lse = part_lse[0].t().to(lse.dtype)
    share = torch.sigmoid(part_lse - lse)[None, ..., None]
    merged = torch.lerp(o.to(lse.dtype), part.transpose(1, 2).to(lse.dtype), share).to(q.dtype)
    return merged, torch.logaddexp(lse, part_lse)


@_forward.register_fake
def _(q, k, v, prefix_k, prefix_v, lengths, before, window, scale, block):
    lse = q.new_empty(q.shape[1:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("farspan::prefix_window_backward", mutates_args=())
def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    lengths: list[int],
    before: list[int],
    window: int,
    scale: float,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    do = do.contiguous()
    dq, dk, dv = _window_backward(do, q, k, v, o, lse, lengths, before, window, scale, block)
    rows = (x.transpose(1, 2) for x in (do, q))
    saved = o.transpose(1, 2), lse.t()[None].contiguous()
    share, *own = attention_block_backward(*rows, *_head_major(prefix_k, prefix_v), *saved, scale)
    dprefix = (x[0].transpose(0, 1).to(prefix_k.dtype).contiguous() for x in own)
    return (dq + share.transpose(1, 2).to(dq.dtype), dk, dv, *dprefix)


@_backward.register_fake
def _(do, q, k, v, prefix_k, prefix_v, o, lse, lengths, before, window, scale, block):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, prefix_k, prefix_v))


def _head_major(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.transpose(0, 1)[None] for x in rows)


def _save(ctx, inputs, output):
    *tensors, ctx.lengths, ctx.before, ctx.window, ctx.scale, ctx.block = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, do, _):
    constants = ctx.lengths, ctx.before, ctx.window, ctx.scale, ctx.block
    return *_backward(do, *ctx.saved_tensors, *constants), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
