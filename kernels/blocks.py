"""Attention of one block of queries on one block of keys, with its log-sum-exp, forward and backward.

The piece that blockwise operators are built from: torch's flash kernels, on CPU, and on CUDA for half precision without
a mask; elsewhere a handful of matrix products with the backward written out: p = exp(s - lse), ds = p (do v' - sum(do
o)), dq = scale ds k, dk = scale ds' q, dv = p' do. Given the o and lse of a larger softmax of which this block is a
part, the backward gives exactly this block's share of the gradients.
"""

import torch


def attention_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [b, H, m, D]; k, v: [b, Hk, n, D]; mask: additive [m, n] in q's dtype, or None; causal: row i sees keys 0..i.

    Returns o [b, H, m, D] and lse [b, H, m] (fp32, float64 for float64).
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    if _takes_flash(q, mask):
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        sizes = (q.shape[2], k.shape[2])
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            *inputs, None, None, *sizes, 0.0, causal, False, scale=scale
        )
        return o.transpose(1, 2), lse
    scores = _scores(q, k, scale, mask, causal)
    lse = scores.logsumexp(dim=-1)
    p = (scores - lse[..., None]).exp()
    return torch.einsum("bkgmn,bknd->bkgmd", p, v.to(p.dtype)).reshape(q.shape).to(q.dtype), lse.flatten(1, 2)


def attention_block_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients dq [b, H, m, D] and dk, dv [b, Hk, n, D]; o and lse may be those of a softmax over more keys."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    if _takes_flash(q, mask):
        inputs = (x.transpose(1, 2).contiguous() for x in (do, q, k, v, o))
        sizes = (q.shape[2], k.shape[2])
        random = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # no dropout
        gradients = torch.ops.aten._flash_attention_backward(
            *inputs, lse.contiguous(), None, None, *sizes, 0.0, causal, *random, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in gradients)
    scores = _scores(q, k, scale, mask, causal)
    groups, dtype = scores.shape[1:3], scores.dtype
    p = (scores - lse.unflatten(1, groups)[..., None]).exp()
    do, o, q = (x.to(dtype).unflatten(1, groups) for x in (do, o, q))
    dp = torch.einsum("bkgmd,bknd->bkgmn", do, v.to(dtype))
    ds = p * (dp - (do * o).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bkgmn,bknd->bkgmd", ds, k.to(dtype)).flatten(1, 2)
    return dq, torch.einsum("bkgmn,bkgmd->bknd", ds, q), torch.einsum("bkgmn,bkgmd->bknd", p, do)


def hidden_mask(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask of a boolean one: -inf where hidden, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _takes_flash(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch's flash attention for CUDA takes the block; fewer key heads than query heads are fine."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and mask is None and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _scores(q, k, scale, mask, causal):
    """[b, Hk, H / Hk, m, n] in the accumulation dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgmd,bknd->bkgmn", grouped, k.to(dtype)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores if mask is None else scores + mask.to(dtype)
