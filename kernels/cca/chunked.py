"""Attention to cores and near tokens in linear memory, forward and backward, on any device.

Tokens are read by blocks of 160 queries (`kernels.cca.plan`), for each query of a block reads as many
tokens too many, of which the edges are masked. So many keys for so few queries are where flash kernels for CPUs lose
half their speed: scores lie in buffers for a few heads, which stay in the cache. Cores are read by a thousand queries
together, through torch's flash kernel, which is as fast as any for so large blocks. The two are merged by their
log-sum-exp.

    forward   o, lse                     saved: q, k, v, cores, o, lse
    backward  p = exp(s - lse) again, then the products

Scores of tokens are in base 2, their queries being scaled by log2(e): exp2 keeps its speed where it underflows, which
exp on CPU does not (by 100 times). In the backward a column of ones beside the keys and values, and one of -lse and
-sum(do o) beside the queries and their gradients, make the matrix products subtract what passes of their own would.
Everything is computed in fp32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from farspan.kernels.blocks import attention_block, attention_block_backward
from farspan.kernels.cca.pieces import Piece
from farspan.kernels.cca.plan import TokenBlock, core_blocks, token_blocks
from farspan.kernels.workspace import LOG2E, Workspace, with_column

# Scores that a block holds at once, and the heads that it holds them of at most: few calls count for more than what
# fits in the cache.
SCORES = 4 * 1024 * 1024
HEADS_AT_ONCE = 8
# exp2 of scores within this bound neither overflows nor vanishes, so that their maximum need not be subtracted.
BOUND = 60.0


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
    o = q.new_empty(1, *q.transpose(0, 1).shape)
    out, lse = o[0].transpose(0, 1), torch.full(q.shape[:2], -math.inf, dtype=q.dtype, device=q.device)
    if parts == "cores":
        o.zero_()
    else:
        work, bounded = Workspace(q), _bounded(q, k, scale * LOG2E)
        for block in token_blocks(pieces, group, window, len(q) // len(k), q):
            for heads in _heads(block, len(q), len(k)):
                _attend(work, block, heads, q, k, v, scale * LOG2E, bounded, out, lse)
    if parts != "raw":
        for block in core_blocks(pieces, group, window, q):
            keys = (x[None, :, block.cores] for x in (core_k, core_v))
            part, own = attention_block(q[None, :, block.queries], *keys, scale, block.mask)
            _merge(out[:, block.queries], lse[:, block.queries], part[0], own[0] + core_bias)
    return o.to(dtype), lse.masked_fill_(lse == -math.inf, math.inf)


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
    q, k, v, core_k, core_v = _by_head(q, k, v, core_k, core_v)
    do, o = (x[0].transpose(0, 1).to(lse.dtype) for x in (do, o))
    dq = torch.zeros_like(q) if parts == "cores" else torch.empty_like(q)
    dcore_k, dcore_v = torch.zeros_like(core_k), torch.zeros_like(core_v)
    dk, dv = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in (k, v))
    if parts != "cores":
        work, ones = Workspace(q), (with_column(k, 1.0), with_column(v, 1.0))
        for block in token_blocks(pieces, group, window, len(q) // len(k), q):
            for heads in _heads(block, len(q), len(k)):
                _attend_block_backward(work, block, heads, do, q, *ones, o, lse, scale, dq, dk, dv)
    if parts != "raw":
        for block in core_blocks(pieces, group, window, q):
            own_do, own_q, own_o = (x[None, :, block.queries] for x in (do, q, o))
            keys = (x[None, :, block.cores] for x in (core_k, core_v))
            own_lse = lse[None, :, block.queries] - core_bias
            shares = attention_block_backward(own_do, own_q, *keys, own_o, own_lse, scale, block.mask)
            rows = block.queries, block.cores, block.cores
            for gradient, read, (share,) in zip((dq, dcore_k, dcore_v), rows, shares, strict=True):
                gradient[:, read].add_(share)
    # A matrix is transposed faster than what has three dimensions.
    dk, dv = (x.flatten(0, 1).T.contiguous().view(-1, *x.shape[:2]) for x in (dk, dv))
    by_row = dq.transpose(0, 1), dk, dv, dcore_k.transpose(0, 1), dcore_v.transpose(0, 1)
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


def _heads(block: TokenBlock, heads: int, key_heads: int) -> Iterator[slice]:
    """Some query heads at a time, with all that share their key heads."""
    share = heads // key_heads
    scores = (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
    most = min(HEADS_AT_ONCE, max(1, SCORES // scores))
    step = share * max(1, most // share)
    return (slice(head, min(head + step, heads)) for head in range(0, heads, step))


def _of(x: torch.Tensor, heads: slice, count: int) -> torch.Tensor:
    """Of keys or values [Hk, n, C], those that `heads` of `count` query heads read."""
    share = count // len(x)
    return x[heads.start // share : -(-heads.stop // share)]


def _per_key_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[H', m, C] -> [heads, H' / heads * m, C]: one row of matrices for each head of keys."""
    return x.view(heads, -1, x.shape[-1])


def _scores(work: Workspace, block: TokenBlock, queries: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k' of queries [H', m, C] and k [Hk', n, C], as [Hk', H' / Hk' * m, n]; -inf where hidden."""
    buffer = work.get("scores", *queries.shape[:2], k.shape[1])
    scores = _per_key_head(buffer, len(k))
    torch.bmm(_per_key_head(queries, len(k)), k.mT, out=scores)
    for columns, mask in block.edges:
        buffer[..., columns].add_(mask)
    return scores


def _bounded(q: torch.Tensor, k: torch.Tensor, scale: float) -> bool:
    """Whether the norms of queries and keys keep all scores within BOUND; asked on CPU only, for it waits for them."""
    if not q.is_cpu or not q.numel():
        return False
    longest_q, longest_k = (torch.linalg.vector_norm(x, dim=-1).amax() for x in (q, k))
    return bool(longest_q * longest_k * abs(scale) < BOUND)


def _attend(work: Workspace, block: TokenBlock, heads: slice, q, k, v, scale: float, bounded: bool, o, lse) -> None:
    """Writes o [H, T, D] and lse [H, T] for the block's queries and some heads."""
    rows = heads, block.queries
    k, v = (_of(x, heads, len(q))[:, block.keys] for x in (k, v))
    queries = torch.mul(q[rows], scale, out=work.get("queries", *q[rows].shape))
    p = _scores(work, block, queries, k)
    largest = 0.0
    if not bounded:
        largest = p.amax(-1, keepdim=True)
        p.sub_(largest)
    total = p.exp2_().sum(-1, keepdim=True)
    torch.div(torch.bmm(p, v).view(queries.shape), total.view(*queries.shape[:2], 1), out=o[rows])
    lse[rows] = total.log2_().add_(largest).div_(LOG2E).view(queries.shape[:2])


def _merge(o: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, own: torch.Tensor) -> None:
    """Makes of o [H, m, D] and lse [H, m] what they are with the keys of `part` and its log-sum-exp `own` added."""
    both = torch.logaddexp(lse, own)
    o.mul_((lse - both).exp_()[..., None]).addcmul_(part, (own - both).exp_()[..., None])
    lse.copy_(both)


def _attend_block_backward(
    work: Workspace, block: TokenBlock, heads: slice, do, q, k, v, o, lse, scale: float, dq, dk, dv
) -> None:
    """Writes dq [H, T, D] of the block's queries, and adds its share to dk and dv [Hk, D, N]: products that yield many
    keys are faster than those that yield few channels. k and v have a column of ones.
    """
    rows = heads, block.queries
    own_q, own_do, own_o, own_lse = (x[rows] for x in (q, do, o, lse))
    queries, gradients = (work.get(name, *own_lse.shape, q.shape[-1] + 1) for name in ("queries", "do"))
    torch.mul(own_q, scale * LOG2E, out=queries[..., :-1])
    torch.mul(own_lse, -LOG2E, out=queries[..., -1])
    gradients[..., :-1] = own_do
    torch.sum(own_do * own_o, -1, out=gradients[..., -1]).neg_()
    k, v = (_of(x, heads, len(q))[:, block.keys] for x in (k, v))
    dk, dv = (_of(x, heads, len(q))[..., block.keys] for x in (dk, dv))
    p = _scores(work, block, queries, k).exp2_()
    queries, gradients = (_per_key_head(x, len(k)) for x in (queries, gradients))
    share = work.get("share", *dv.shape)
    dv.add_(torch.bmm(gradients[..., :-1].mT, p, out=share))
    ds = torch.bmm(gradients, v.mT, out=work.get("ds", *p.shape)).mul_(p)
    dk.add_(torch.bmm(queries[..., :-1].mT, ds, out=share), alpha=1 / LOG2E)
    torch.mul(torch.bmm(ds, k[..., :-1]).view(own_q.shape), scale, out=dq[rows])
