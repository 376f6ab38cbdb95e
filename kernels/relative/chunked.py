"""Relative attention in linear memory, forward and backward, on any device.

The queries of a document are cut into blocks of rows. The scores of a block, for a few heads, lie in one buffer over
all keys that it sees. What distances add is one product with a table in which distances run backwards: row m of it
has to move m places to stand over its keys, and a view whose rows are one element shorter does that for free.

    positions[m, c] = p_m . r_(top - c)      score[m, j] += positions[m, n - 1 - m + j], an address in steps of W - 1

Backward: the same view of a buffer of zeros takes the gradients of the scores, and what it then holds, times the table,
is the gradient of the queries; its transpose times the queries that of the table, added up block after block in one
order. Keys that are further away than the table reaches take its last row: one column for all of them.

With sinusoids there is no such table: they are channels of the keys (`kernels.relative.positions`), and scores one
wider product.

    forward   o, lse                     saved: the inputs, o, lse
    backward  p = exp2(s - lse) again, then the products

Scores are in base 2, their queries being scaled by log2(e). In the backward a column of ones beside keys and values,
and one of -lse and -sum(do o) beside queries and gradients, make the products subtract what passes of their own would.
"""

from __future__ import annotations

import torch

from farspan.kernels.relative.blocks import Call
from farspan.kernels.relative.gradients import differentiate
from farspan.kernels.workspace import LOG2E, with_column


@torch.library.custom_op("farspan::relative_forward", mutates_args=())
def relative_forward(
    a: torch.Tensor,
    p: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    beta: torch.Tensor | None,
    spans: list[int],
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """a: [1, T, H, D], queries that meet keys; p: [1, T, H, R], those that meet positions; k, v: [1, S, Hk, D].
    table: [H, L, R], a vector for every distance, with beta [H, L]; or [P, R], one for every position of a key, and no
    beta. Returns o [1, T, H, D] and lse [H, T] (fp32, float64 for float64).
    """
    o = torch.zeros(a.shape, dtype=a.dtype, device=a.device)
    call = Call(a, p, k, v, table, beta, spans, window, scale)
    out, lse = o[0].transpose(0, 1), call.queries.new_zeros(a.shape[2], a.shape[1])
    for block, heads in call.blocks():
        scores = call.scores(block, heads)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp2_()
        total = weights.sum(-1, keepdim=True)
        mixed = torch.bmm(call.per_key_head(weights), call.of(call.values, heads)[:, block.keys])
        out[heads, block.rows] = mixed.view(*weights.shape[:2], -1).div_(total).to(o.dtype)
        lse[heads, block.rows] = largest.add_(total.log2_()).div_(LOG2E)[..., 0]
    return o, lse


@relative_forward.register_fake
def _(a, p, k, v, table, beta, spans, window, scale):
    lse = a.new_empty((a.shape[2], a.shape[1]), dtype=torch.promote_types(a.dtype, torch.float32))
    return a.new_empty(a.shape), lse


@torch.library.custom_op("farspan::relative_backward", mutates_args=())
def relative_backward(
    do: torch.Tensor,
    a: torch.Tensor,
    p: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    beta: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    spans: list[int],
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a, p, k, v, table and beta (of these two, empty ones for a table of positions). o and lse may be
    those of a softmax over more keys.
    """
    call = Call(a, p, k, v, table, beta, spans, window, scale, lse)
    do, o = (x[0].transpose(0, 1).to(lse.dtype) for x in (do, o))
    da = torch.empty_like(call.queries[..., : call.width])
    dp = None if call.table is None else torch.empty_like(call.asked[..., :-1])
    dk, dv = (torch.zeros(x.shape[1:], dtype=lse.dtype, device=x.device).transpose(0, 1) for x in (k, v))
    dtable = None if call.table is None else torch.zeros_like(call.table)
    for block, heads in call.blocks():
        rows = heads, block.rows
        own = call.per_key_head(with_column(do[rows], -(do[rows] * o[rows]).sum(-1)))
        weights = call.per_key_head(call.scores(block, heads).exp2_())
        queries = call.per_key_head(call.queries[rows])
        keys, values, dkeys, dvalues = (call.of(x, heads)[:, block.keys] for x in (call.keys, call.values, dk, dv))
        dvalues.baddbmm_(weights.mT, own[..., :-1])
        ds = torch.bmm(own, values.mT, out=call.work.get("gradients", *weights.shape)).mul_(weights)
        dkeys.baddbmm_(ds.mT, queries[..., : k.shape[3]], alpha=1 / LOG2E)
        da[rows] = torch.bmm(ds, keys[..., : call.width]).view(da[rows].shape)
        if dtable is not None:
            wide = call.by_distance(block, ds.view(-1, *block.shape))
            where = heads, block.table_rows
            dp[rows] = torch.bmm(wide, call.table[where][..., :-1])
            dtable[where].baddbmm_(wide.mT, call.asked[rows], alpha=1 / LOG2E)
    if dtable is None:
        da, dp = da.split((a.shape[3], p.shape[3]), dim=-1)
        dtable, dbeta = a.new_empty(0), a.new_empty(0)
    else:
        dtable, dbeta = call.fold(dtable).split((p.shape[3], 1), dim=-1)
        dtable, dbeta = dtable.to(table.dtype).contiguous(), dbeta[..., 0].to(beta.dtype).contiguous()
    by_token = ((da * scale, a), (dp * scale, p), (dk, k), (dv, v))
    return *(x.transpose(0, 1)[None].to(like.dtype).contiguous() for x, like in by_token), dtable, dbeta


@relative_backward.register_fake
def _(do, a, p, k, v, table, beta, *rest):
    learned = (
        (a.new_empty(0), a.new_empty(0)) if beta is None else (table.new_empty(table.shape), beta.new_empty(beta.shape))
    )
    return *(x.new_empty(x.shape) for x in (a, p, k, v)), *learned


differentiate(relative_forward, relative_backward)
