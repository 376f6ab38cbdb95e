"""The core of every group, by the significance of its tokens: forward and backward written out, in linear memory.

A few thousand tokens at a time. Groups may lie anywhere; on CPU those that follow each other are read in place. The
weights are recomputed in the backward, which is cheaper than to keep one number per token and head:

    w = softmax_r(scale q_e k_r)    core_k = sum_r w_r p_r    core_v = sum_r w_r v_r        p: the keys that are pooled
    dw_r = dcore_k p_r + dcore_v v_r        ds_r = w_r (dw_r - sum_r' w_r' dw_r')
    dp_r = w_r dcore_k    dv_r = w_r dcore_v    dk_r = scale ds_r q_e    dq_e = scale sum_r ds_r k_r
"""

from __future__ import annotations

import torch

TOKENS_AT_ONCE = 2048


def pool_chunked(
    q_end: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled_keys: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    core_heads: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result as `kernels.cca.pool_groups`."""
    if core_heads == "kv":
        wide = torch.promote_types(q_end.dtype, torch.float32)
        q_end = q_end.unflatten(2, (k.shape[2], -1)).mean(3, dtype=wide)
    return _pool_forward(q_end, k, v, pooled_keys, starts, group, scale)


@torch.library.custom_op("farspan::cca_pool_forward", mutates_args=())
def _pool_forward(
    evaluator: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """evaluator: [1, M, Hc, D], any float dtype; pooled: k itself when None.

    Returns core_k, core_v [1, M, Hc, D] in the dtype of k and v.
    """
    core_k, core_v = (torch.empty(evaluator.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for groups, _, e, keys, values, sources in _blocks(evaluator, k, v, pooled, starts, group):
        weights = _weights(e, keys, scale)
        core_k[0, groups] = (weights @ sources).flatten(1, 2).to(k.dtype)
        core_v[0, groups] = (weights @ values).flatten(1, 2).to(v.dtype)
    return core_k, core_v


@_pool_forward.register_fake
def _(evaluator, k, v, pooled, starts, group, scale):
    return k.new_empty(evaluator.shape), v.new_empty(evaluator.shape)


@torch.library.custom_op("farspan::cca_pool_backward", mutates_args=())
def _pool_backward(
    dcore_k: torch.Tensor,
    dcore_v: torch.Tensor,
    evaluator: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled: torch.Tensor | None,
    starts: torch.Tensor,
    group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    devaluator = torch.empty(evaluator.shape, dtype=evaluator.dtype, device=k.device)
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dpooled = k.new_empty(0) if pooled is None else torch.zeros_like(k, memory_format=torch.contiguous_format)
    for groups, rows, e, keys, values, sources in _blocks(evaluator, k, v, pooled, starts, group):
        weights = _weights(e, keys, scale)
        a, b = (x[0, groups].to(e.dtype).unflatten(1, e.shape[1:3]) for x in (dcore_k, dcore_v))
        dw = a @ sources.mT + b @ values.mT
        ds = scale * weights * (dw - (weights * dw).sum(-1, keepdim=True))
        devaluator[0, groups] = (ds @ keys).flatten(1, 2).to(evaluator.dtype)
        if pooled is None:  # keys weigh and are pooled: both shares in one product
            parts = (dk, torch.cat((ds, weights), dim=2).mT @ torch.cat((e, a), dim=2)), (dv, weights.mT @ b)
        else:
            parts = (dk, ds.mT @ e), (dpooled, weights.mT @ a), (dv, weights.mT @ b)
        for gradient, part in parts:
            if isinstance(rows, slice):
                gradient[0, rows].unflatten(0, (-1, group)).copy_(part.transpose(1, 2))
            else:
                gradient[0].index_copy_(0, rows, part.transpose(1, 2).flatten(0, 1).to(gradient.dtype))
    return devaluator, dk, dv, dpooled


@_pool_backward.register_fake
def _(dcore_k, dcore_v, evaluator, k, v, pooled, starts, group, scale):
    dpooled = k.new_empty(0) if pooled is None else k.new_empty(k.shape)
    return *(x.new_empty(x.shape) for x in (evaluator, k, v)), dpooled


def _save(ctx, inputs, output):
    *tensors, ctx.group, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dcore_k, dcore_v):
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    *gradients, dpooled = _pool_backward(dcore_k, dcore_v, *saved, ctx.group, ctx.scale)
    return *gradients, None if saved[3] is None else dpooled, None, None, None


_pool_forward.register_autograd(_backward, setup_context=_save)


def _blocks(evaluator, k, v, pooled, starts, group: int):
    """Some groups at a time: which, the rows of their tokens, evaluators [m, Hk, R, D], and keys, values and keys to
    pool [m, Hk, group, D], in fp32 or wider.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    step = max(1, TOKENS_AT_ONCE // group)
    for first in range(0, len(starts), step):
        groups = slice(first, first + step)
        rows = _rows(starts[groups], group)

        def by_group(x, rows=rows):
            x = x[0, rows] if isinstance(rows, slice) else x[0].index_select(0, rows)
            return x.unflatten(0, (-1, group)).transpose(1, 2).to(wide).contiguous()

        keys, values = by_group(k), by_group(v)
        sources = keys if pooled is None else by_group(pooled)
        yield groups, rows, evaluator[0, groups].to(wide).unflatten(1, (k.shape[2], -1)), keys, values, sources


def _rows(starts: torch.Tensor, group: int) -> slice | torch.Tensor:
    """Of the tokens of some groups, int64; a slice where groups follow each other, if that is known without waiting."""
    if starts.is_cpu and bool((starts.diff() == group).all()):
        return slice(int(starts[0]), int(starts[0]) + group * len(starts))
    return (starts[:, None] + torch.arange(group, device=starts.device)).flatten()


def _weights(evaluator: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """[m, Hk, R, group]: how much of each of its group's tokens a core takes."""
    return (scale * evaluator @ keys.mT).softmax(dim=-1)
