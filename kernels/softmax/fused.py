"""Causal softmax and window attention on torch's variable-length flash attention (CUDA, half precision).

Peak speed for these two is torch's business: one kernel call for a packed row, backward included. fp32 tensors, which
flash attention does not take, go to the chunked form.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Arguments and result as `kernels.softmax.softmax_attention`; q, k, v fp16 or bf16 on CUDA."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
    cu_keys = cu_seqlens
    if any(prefixes):
        cu_keys = torch.tensor([0, *accumulate(totals)], dtype=torch.int32).to(q.device, non_blocking=True)
    reach = -1 if window is None else window - 1
    return varlen_attn(
        q[0], k[0], v[0], cu_seqlens, cu_keys, max(lengths), max(totals), scale=scale, window_size=(reach, 0)
    )[None]


def takes(x: torch.Tensor) -> bool:
    """Whether flash attention can take tensors like x."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.shape[-1] <= 256
