"""Attention to cores and near tokens in linear memory, forward and backward, on any device.

The queries of a piece are cut into blocks of about a hundred (`kernels.cca.plan`). A block sees some tokens, of which
only the edges are masked, and cores, of which only the last are: so many keys for so few queries are where flash
kernels for CPUs lose half their speed. Its scores lie in buffers for a few heads, one for tokens and one for cores,
which have their softmax in common. Cores that a thousand queries see together go to torch's flash kernel, which is as
fast as any for so large blocks; what it gives is merged with the rest by their log-sum-exp.

    forward   o, lse                     saved: q, k, v, cores, o, lse
    backward  p = exp(s - lse) again, then the products

Scores are in base 2, their queries being scaled by log2(e): exp2 keeps its speed where it underflows, which exp on CPU
does not (by 100 times). In the backward a column of ones beside the keys and values, and one of -lse and -sum(do o)
beside the queries and their gradients, make the matrix products subtract what passes of their own would. Everything is
computed in fp32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from farspan.kernels.blocks import attention_block, attention_block_backward
from farspan.kernels.cca.pieces import Piece
from farspan.kernels.cca.plan import Block, Keys, blocks, far_blocks
from farspan.kernels.workspace import LOG2E, Workspace, with_column

# Scores that a block holds at once, and the heads that it holds them of at most: few calls count for more than what
# fits in the cache.
SCORES = 4 * 1024 * 1024
HEADS_AT_ONCE = 8


def core_attention_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    pieces: tuple[Piece, ...],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> torch.Tensor:
    """Arguments and result as `kernels.cca.core_attention`."""
    numbers = [number for piece in pieces for number in piece]
    return _attend_forward(q, k, v, core_k, core_v, numbers, group, window, core_bias, scale, parts)[0]


@torch.library.custom_op("farspan::cca_forward", mutates_args=())
def _attend_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    pieces: list[int],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, D] and lse [H, T] (fp32, float64 for float64; inf for a query that sees nothing)."""
    dtype = q.dtype
    q, k, v, core_k, core_v = _by_head(q, k, v, core_k, core_v)
    o = q.new_zeros(1, *q.transpose(0, 1).shape)
    out, lse = o[0].transpose(0, 1), torch.full(q.shape[:2], math.inf, dtype=q.dtype, device=q.device)
    work = Workspace(q)
    for block in blocks(pieces, group, window, parts, len(q) // len(k), q):
        for heads in _heads(block, len(q), len(k)):
            _attend(work, block, heads, q, k, v, core_k, core_v, scale * LOG2E, core_bias * LOG2E, out, lse)
    for far in far_blocks(pieces, group, window, parts, len(q) // len(k)):
        far_q, far_k, far_v = q[None, :, far.queries], core_k[None, :, far.cores], core_v[None, :, far.cores]
        part, own = attention_block(far_q, far_k, far_v, scale)
        _merge(out[:, far.queries], lse[:, far.queries], part[0], own[0] + core_bias)
    return o.to(dtype), lse


@_attend_forward.register_fake
def _(q, k, v, core_k, core_v, pieces, group, window, core_bias, scale, parts):
    lse = q.new_empty((q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("farspan::cca_backward", mutates_args=())
def _attend_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    pieces: list[int],
    group: int,
    window: int,
    core_bias: float,
    scale: float,
    parts: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = q.dtype
    q, k, v, core_k, core_v = inputs = _by_head(q, k, v, core_k, core_v)
    do, o = (x[0].transpose(0, 1).to(lse.dtype) for x in (do, o))
    dq = torch.zeros_like(q)
    dk, dv, dcore_k, dcore_v = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in inputs[1:])
    of_tokens, of_cores = (
        (with_column(k, 1.0), with_column(v, 1.0), dk, dv),
        (with_column(core_k, 1.0), with_column(core_v, 1.0), dcore_k, dcore_v),
    )
    work = Workspace(q)
    for block in blocks(pieces, group, window, parts, len(q) // len(k), q):
        for heads in _heads(block, len(q), len(k)):
            _attend_block_backward(work, block, heads, do, q, o, lse, of_tokens, of_cores, scale, core_bias * LOG2E, dq)
    far_dk, far_dv = torch.zeros_like(core_k), torch.zeros_like(core_v)
    for far in far_blocks(pieces, group, window, parts, len(q) // len(k)):
        far_do, far_q, far_o = (x[None, :, far.queries] for x in (do, q, o))
        far_k, far_v = (x[None, :, far.cores] for x in (core_k, core_v))
        shares = attention_block_backward(
            far_do, far_q, far_k, far_v, far_o, lse[None, :, far.queries] - core_bias, scale
        )
        for gradient, rows, (share,) in zip(
            (dq, far_dk, far_dv), (far.queries, far.cores, far.cores), shares, strict=True
        ):
            gradient[:, rows].add_(share)
    # A matrix is transposed faster than what has three dimensions.
    dk, dv, dcore_k, dcore_v = (
        x.flatten(0, 1).T.contiguous().view(-1, *x.shape[:2]) for x in (dk, dv, dcore_k, dcore_v)
    )
    by_row = dq.transpose(0, 1), dk, dv, dcore_k.add_(far_dk.transpose(0, 1)), dcore_v.add_(far_dv.transpose(0, 1))
    return tuple(x[None].to(dtype).contiguous() for x in by_row)


@_attend_backward.register_fake
def _(do, q, k, v, core_k, core_v, o, lse, pieces, group, window, core_bias, scale, parts):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, core_k, core_v))


def _save(ctx, inputs, output):
    *tensors, pieces, group, window, core_bias, scale, parts = inputs
    ctx.constants = pieces, group, window, core_bias, scale, parts
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    gradients = _attend_backward(do, *ctx.saved_tensors, *ctx.constants)
    return *gradients, None, None, None, None, None, None


_attend_forward.register_autograd(_backward, setup_context=_save)


def _by_head(q, k, v, core_k, core_v) -> tuple[torch.Tensor, ...]:
    """[heads, rows, D] in the accumulation dtype: views, but for the cores, which are read most, and half precision."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, core_k, core_v = (x[0].transpose(0, 1).to(wide) for x in (q, k, v, core_k, core_v))
    return q, k, v, core_k.contiguous(), core_v.contiguous()


def _heads(block: Block, heads: int, key_heads: int) -> Iterator[slice]:
    """Some query heads at a time, with all that share their key heads."""
    share = heads // key_heads
    keys = max(x.count for x in (block.tokens, block.cores) if x is not None)
    most = min(HEADS_AT_ONCE, max(1, SCORES // ((block.queries.stop - block.queries.start) * keys)))
    step = share * max(1, most // share)
    return (slice(head, min(head + step, heads)) for head in range(0, heads, step))


def _of(x: torch.Tensor, heads: slice, count: int) -> torch.Tensor:
    """Of keys or values [Hx, n, C], those that `heads` of `count` query heads read."""
    share = count // len(x)
    return x[heads.start // share : -(-heads.stop // share)]


def _per_key_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[H', m, C] -> [heads, H' / heads * m, C]: one row of matrices for each head of keys."""
    return x.view(heads, -1, x.shape[-1])


def _scores(buffer: torch.Tensor, keys: Keys, queries: torch.Tensor, k: torch.Tensor, bias: float) -> torch.Tensor:
    """Writes q k' + bias of queries [H', m, C] and k [Hx', n, C] into buffer [H', m, n], -inf where hidden."""
    torch.bmm(_per_key_head(queries, len(k)), k[:, keys.rows].mT, out=_per_key_head(buffer, len(k)))
    if bias:
        buffer.add_(bias)
    for columns, mask in keys.edges:
        buffer[..., columns].add_(mask)
    return buffer


def _attend(work: Workspace, block: Block, heads: slice, q, k, v, core_k, core_v, scale, bias, o, lse) -> None:
    """Writes o [H, T, D] and lse [H, T] for the block's queries and some heads."""
    rows = heads, block.queries
    queries = torch.mul(q[rows], scale, out=work.get("queries", *q[rows].shape))
    parts = []
    for name, keys, read, values, added in (
        ("tokens", block.tokens, k, v, 0.0),
        ("cores", block.cores, core_k, core_v, bias),
    ):
        if keys is not None:
            read, values = (_of(x, heads, len(q)) for x in (read, values))
            buffer = work.get(name, *queries.shape[:2], keys.count)
            parts.append((_scores(buffer, keys, queries, read, added), values[:, keys.rows]))
    largest = parts[0][0].amax(-1, keepdim=True)
    for scores, _ in parts[1:]:
        largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
    total, out = 0.0, None
    for scores, values in parts:
        p = scores.sub_(largest).exp2_()
        total = p.sum(-1, keepdim=True) + total
        p = _per_key_head(p, len(values))
        part = torch.bmm(p, values).view(queries.shape)
        out = part if out is None else out.add_(part)
    torch.div(out, total, out=o[rows])
    lse[rows] = largest.add_(total.log2_()).div_(LOG2E)[..., 0]


def _merge(o: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, own: torch.Tensor) -> None:
    """Makes of o [H, m, D] and lse [H, m] what they are with the keys of `part` and its log-sum-exp `own` added."""
    both = torch.logaddexp(lse, own)
    o.mul_((lse - both).exp_()[..., None]).addcmul_(part, (own - both).exp_()[..., None])
    lse.copy_(both)


def _attend_block_backward(
    work: Workspace, block: Block, heads: slice, do, q, o, lse, of_tokens, of_cores, scale: float, bias: float, dq
) -> None:
    """Adds the block's share to the gradients. of_tokens, of_cores: keys and values with a column of ones, and their
    gradients [Hk, D, N], for products that yield many keys are faster than those that yield few channels.
    """
    rows = heads, block.queries
    own_q, own_do, own_o, own_lse = (x[rows] for x in (q, do, o, lse))
    queries, gradients = (work.get(name, *own_lse.shape, q.shape[-1] + 1) for name in ("queries", "do"))
    torch.mul(own_q, scale * LOG2E, out=queries[..., :-1])
    torch.mul(own_lse, -LOG2E, out=queries[..., -1])
    gradients[..., :-1] = own_do
    torch.sum(own_do * own_o, -1, out=gradients[..., -1]).neg_()
    for name, keys, side, added in (("tokens", block.tokens, of_tokens, 0.0), ("cores", block.cores, of_cores, bias)):
        if keys is None:
            continue
        k, v, dk, dv = (_of(x, heads, len(q)) for x in side)
        shape, read = (*queries.shape[:2], keys.count), keys.rows
        p = _per_key_head(_scores(work.get(name, *shape), keys, queries, k, added).exp2_(), len(k))
        grouped_do, grouped_q = _per_key_head(gradients, len(k)), _per_key_head(queries, len(k))
        share = work.get("share", len(k), dv.shape[1], keys.count)
        dv[..., read].add_(torch.bmm(grouped_do[..., :-1].mT, p, out=share))
        ds = work.get("ds", *p.shape)
        torch.bmm(grouped_do, v[:, read].mT, out=ds).mul_(p)
        dk[..., read].add_(torch.bmm(grouped_q[..., :-1].mT, ds, out=share), alpha=1 / LOG2E)
        dq[rows].add_(torch.bmm(ds, k[:, read, :-1]).view(dq[rows].shape), alpha=scale)
