"""One decoding step of RAT in one Triton kernel.

A program owns one head of one row and a part of its summaries: it turns the query, and runs an online softmax over its
part. The first part also moves the running states on, starts its softmax from the self term, and stores the summary of
a chunk that ends. Parts are merged by their log-sum-exp; their number depends on capacity and batch, not on positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from farspan.kernels.rat.fused_forward import SIZES, channels, swap_halves, swapped_channels
from farspan.kernels.rat.fused_plan import PROGRAMS

# Summaries that a program reads at a time, and the fewest that are worth a program.
BLOCK, PART = 32, 128


@triton.jit(do_not_specialize=SIZES)
def step_kernel(
    q, k, v, gate, bias, cos, sin, running_key, running_value, keys, values, positions, out, lse,
    capacity, chunk, scale, splits, q_stride, k_stride, v_stride, gate_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """out: fp32 [B, H, splits, D]; lse: fp32 [B, H, splits], -inf where a part is empty."""
    split = tl.program_id(0) % splits
    head = tl.program_id(0) // splits % HEADS
    row = (tl.program_id(0) // (splits * HEADS)).to(tl.int64)
    position = tl.load(positions + row)
    index = position // chunk
    slot = position % chunk
    channel, real = channels(DIM, PADDED)
    shared = head % GROUPS * DIM
    owner = split == 0

    query = tl.load(q + row * q_stride + shared + channel, mask=real, other=0.0).to(tl.float32)
    new_key = tl.load(k + row * k_stride + shared + channel, mask=real, other=0.0).to(tl.float32)
    new = tl.load(v + row * v_stride + head * DIM + channel, mask=real, other=0.0).to(tl.float32)
    a = tl.load(gate + row * gate_stride + head * DIM + channel, mask=real, other=0.0).to(tl.float32)
    a += tl.load(bias + head * DIM + channel, mask=real, other=0.0).to(tl.float32)
    closed = 1.0 / (1.0 + tl.exp(a))
    at = (row * HEADS + head) * DIM + channel
    key = tl.load(running_key + at, mask=real & owner & (slot > 0), other=0.0)
    value = tl.load(running_value + at, mask=real & owner & (slot > 0), other=0.0)
    key -= closed * (key - new_key)
    value -= closed * (value - new)
    tl.store(running_key + at, key, mask=real & owner)
    tl.store(running_value + at, value, mask=real & owner)
    own = tl.sum(query * key, axis=0) * scale

    if ROTATE:
        within = tl.arange(0, PADDED) % (PADDED // 2)
        angle = index * (DIM // 2) + within
        cosine = tl.load(cos + angle, mask=within < DIM // 2, other=0.0)
        sine = tl.load(sin + angle, mask=within < DIM // 2, other=0.0)
        sine = tl.where(tl.arange(0, PADDED) < PADDED // 2, -sine, sine)
        partner = q + row * q_stride + shared + swapped_channels(DIM, PADDED)
        query = query * cosine + tl.load(partner, mask=real, other=0.0).to(tl.float32) * sine
        swapped = tl.reshape(swap_halves(tl.reshape(key, [1, 1, PADDED]), 1, 1, PADDED), [PADDED])
        key = key * cosine + swapped * sine
    base = (row * HEADS + head) * capacity * DIM + channel
    ends = real & owner & (slot == chunk - 1) & (index < capacity)
    tl.store(keys + base + index * DIM, key, mask=ends)
    tl.store(values + base + index * DIM, value, mask=ends)

    most = tl.where(owner, own, float("-inf"))
    weight = tl.where(owner, 1.0, 0.0)
    acc = tl.where(owner, value, 0.0)
    part = tl.cdiv(tl.cdiv(index, N), splits) * N
    for n in range(split * part, tl.minimum((split + 1) * part, index), N):
        summary = n + tl.arange(0, N)
        mask = (summary < index)[:, None] & real[None, :]
        places = base[None, :] + summary[:, None] * DIM
        scores = tl.sum(tl.load(keys + places, mask=mask, other=0.0).to(tl.float32) * query[None, :], axis=1) * scale
        scores = tl.where(summary < index, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=0))
        p = tl.exp(scores - higher)
        shrink = tl.exp(most - higher)
        weight = weight * shrink + tl.sum(p, axis=0)
        block = tl.load(values + places, mask=mask, other=0.0).to(tl.float32)
        acc = acc * shrink + tl.sum(p[:, None] * block, axis=0)
        most = higher
    at = (row * HEADS + head) * splits + split
    tl.store(out + at * DIM + channel, acc / tl.where(weight > 0, weight, 1.0), mask=real)
    tl.store(lse + at, most + tl.log(tl.where(weight > 0, weight, 1.0)))


def rat_step_fused(q, k, v, gate, gate_bias, z, positions, chunk, state, rope, scale) -> torch.Tensor:
    """y [B, 1, H, D] of arguments as `kernels.rat.step.rat_step`; the state changes in place.

    CUDA tensors (any under TRITON_INTERPRET=1), the state contiguous, else ValueError.
    """
    for x in state:
        if not x.is_contiguous():
            raise ValueError(f"a state that changes in place must be contiguous, not of strides {x.stride()}")
    cos, sin = rope or (None, None)
    o = _step(q, k, v, gate, gate_bias, cos, sin, *state, positions, chunk, scale)
    return (torch.sigmoid(z.float()) * o[:, None]).to(v.dtype)


@torch.library.custom_op("farspan::rat_step", mutates_args=("running_key", "running_value", "keys", "values"))
def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    running_key: torch.Tensor,
    running_value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    chunk: int,
    scale: float,
) -> torch.Tensor:
    """o, fp32 [B, H, D]."""
    batch, _, heads, dim = v.shape
    capacity = keys.shape[2]
    splits = max(1, min(triton.cdiv(PROGRAMS, batch * heads), capacity // PART))
    out = v.new_empty(batch, heads, splits, dim, dtype=torch.float32)
    lse = v.new_empty(batch, heads, splits, dtype=torch.float32)
    q, k, v, gate = (x.contiguous() for x in (q, k, v, gate))
    angles = (running_key, running_key) if cos is None else (cos.contiguous(), sin.contiguous())
    step_kernel[(batch * heads * splits,)](
        q, k, v, gate, gate_bias.contiguous(), *angles, running_key, running_value, keys, values, positions, out, lse,
        capacity, chunk, scale, splits, q.stride(0), k.stride(0), v.stride(0), gate.stride(0),
        **step_constants(heads, q.shape[2], dim), ROTATE=cos is not None,
    )  # fmt: skip
    if splits == 1:
        return out[:, :, 0]
    return (out * lse.softmax(-1)[..., None]).sum(2)


@_step.register_fake
def _(q, k, v, gate, gate_bias, cos, sin, running_key, running_value, keys, values, positions, chunk, scale):
    return v.new_empty(v.shape[0], *v.shape[2:], dtype=torch.float32)


def step_constants(heads: int, groups: int, dim: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(dim))
    return {"HEADS": heads, "GROUPS": groups, "DIM": dim, "PADDED": padded, "N": BLOCK, "num_warps": 4}
