"""Kernels that pool groups of tokens into cores, forward and backward.

With the g tokens r of a group, its evaluator q and the gradients A, B of its core's key and value (x: what is pooled):

    w = softmax(scale q k_r)        core_k = sum w_r x_r        core_v = sum w_r v_r
    dw = A x_r + B v_r              delta = sum w_r dw_r        ds = w (dw - delta)
    dv_r = w_r B    dx_r = w_r A    dk_r = scale ds_r q         dq = scale sum ds_r k_r

P   pool      a program owns N groups and one head of cores, and runs over R tokens of each at a time (all of them where
              g <= R) with an online softmax. The weights are not stored.
P1  queries   the same again with dq, the log-sum-exp of the scores, and delta.
P2  rows      a program owns R tokens of each of N groups and one head of keys, and sums over the heads of cores that
              share it. Every token is in one group at most, so no two programs meet.

Everything is bound by memory: no matrix units, all arithmetic in fp32. Addresses are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.cca.fused_forward import LOG2E, LOWEST, SIZES


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(
    q, k, v, x, starts, core_k, core_v, groups, group, scale, q_stride, k_stride, v_stride, x_stride,
    CORE_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """P. core_k, core_v: [M, Hc, D]. POOLED: x are the keys to pool, else k is (and x is not read)."""
    head = tl.program_id(0) % CORE_HEADS
    index = (tl.program_id(0) // CORE_HEADS).to(tl.int64) * N + tl.arange(0, N)
    lane = head // (CORE_HEADS // KEY_HEADS) * DIM
    channel = tl.arange(0, PADDED)
    mask = (index < groups)[:, None] & (channel < DIM)[None, :]
    start = tl.load(starts + index, mask=index < groups, other=0)
    at = index[:, None] * q_stride + head * DIM + channel[None, :]
    query = tl.load(q + at, mask=mask, other=0.0).to(tl.float32) * (scale * LOG2E)

    most = tl.full([N], LOWEST, tl.float32)
    weight = tl.zeros([N], tl.float32)
    acc_k = tl.zeros([N, PADDED], tl.float32)
    acc_v = tl.zeros([N, PADDED], tl.float32)
    for first in range(0, group, R):
        row, inside, exists = group_rows(start, index < groups, first, group, DIM, PADDED, R)
        keys = load_group(k + lane, row, k_stride, exists, PADDED)
        scores = tl.where(inside, tl.sum(query[:, None, :] * keys, axis=2), float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        values = load_group(v + lane, row, v_stride, exists, PADDED)
        pooled = load_group(x + lane, row, x_stride, exists, PADDED) if POOLED else keys
        acc_k = acc_k * shrink[:, None] + tl.sum(p[:, :, None] * pooled, axis=1)
        acc_v = acc_v * shrink[:, None] + tl.sum(p[:, :, None] * values, axis=1)
        most = higher
    weight = tl.where(index < groups, weight, 1.0)
    at = (index[:, None] * CORE_HEADS + head) * DIM + channel[None, :]
    tl.store(core_k + at, acc_k / weight[:, None], mask=mask)
    tl.store(core_v + at, acc_v / weight[:, None], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def pool_queries_backward_kernel(
    q, k, v, x, starts, dcore_k, dcore_v, dq, lse, delta,
    groups, group, scale, q_stride, k_stride, v_stride, x_stride, dcore_k_stride, dcore_v_stride,
    CORE_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """P1. dq: [M, Hc, D]; lse (in units of log2) and delta: fp32 [M, Hc]."""
    head = tl.program_id(0) % CORE_HEADS
    index = (tl.program_id(0) // CORE_HEADS).to(tl.int64) * N + tl.arange(0, N)
    lane = head // (CORE_HEADS // KEY_HEADS) * DIM
    channel = tl.arange(0, PADDED)
    mask = (index < groups)[:, None] & (channel < DIM)[None, :]
    start = tl.load(starts + index, mask=index < groups, other=0)
    at = index[:, None]
    own = head * DIM + channel[None, :]
    query = tl.load(q + at * q_stride + own, mask=mask, other=0.0).to(tl.float32) * (scale * LOG2E)
    grad_k = tl.load(dcore_k + at * dcore_k_stride + own, mask=mask, other=0.0).to(tl.float32)
    grad_v = tl.load(dcore_v + at * dcore_v_stride + own, mask=mask, other=0.0).to(tl.float32)

    # sums of w, w dw, w k and w dw k
    most = tl.full([N], LOWEST, tl.float32)
    weight = tl.zeros([N], tl.float32)
    weight_dw = tl.zeros([N], tl.float32)
    mean = tl.zeros([N, PADDED], tl.float32)
    mean_dw = tl.zeros([N, PADDED], tl.float32)
    for first in range(0, group, R):
        row, inside, exists = group_rows(start, index < groups, first, group, DIM, PADDED, R)
        keys = load_group(k + lane, row, k_stride, exists, PADDED)
        scores = tl.where(inside, tl.sum(query[:, None, :] * keys, axis=2), float("-inf"))
        values = load_group(v + lane, row, v_stride, exists, PADDED)
        pooled = load_group(x + lane, row, x_stride, exists, PADDED) if POOLED else keys
        dw = tl.sum(grad_k[:, None, :] * pooled + grad_v[:, None, :] * values, axis=2)
        higher = tl.maximum(most, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        weight_dw = weight_dw * shrink + tl.sum(p * dw, axis=1)
        mean = mean * shrink[:, None] + tl.sum(p[:, :, None] * keys, axis=1)
        mean_dw = mean_dw * shrink[:, None] + tl.sum((p * dw)[:, :, None] * keys, axis=1)
        most = higher
    weight = tl.where(index < groups, weight, 1.0)
    rows_delta = weight_dw / weight
    result = scale * (mean_dw - rows_delta[:, None] * mean) / weight[:, None]
    tl.store(dq + at * (CORE_HEADS * DIM) + own, result, mask=mask)
    tl.store(lse + index * CORE_HEADS + head, most + tl.log2(weight), mask=index < groups)
    tl.store(delta + index * CORE_HEADS + head, rows_delta, mask=index < groups)


@triton.jit(do_not_specialize=SIZES)
def pool_rows_backward_kernel(
    q, k, v, x, starts, dcore_k, dcore_v, lse, delta, dk, dv, dx,
    groups, group, scale, q_stride, k_stride, v_stride, x_stride, dcore_k_stride, dcore_v_stride,
    CORE_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """P2. dk, dv, dx: [rows, Hk, D]; without POOLED dk is the sum of both and dx is not written."""
    key_head = tl.program_id(0) % KEY_HEADS
    blocks = tl.cdiv(group, R)
    first = tl.program_id(0) // KEY_HEADS % blocks * R
    index = (tl.program_id(0) // (KEY_HEADS * blocks)).to(tl.int64) * N + tl.arange(0, N)
    lane = key_head * DIM
    channel = tl.arange(0, PADDED)
    mask = (index < groups)[:, None] & (channel < DIM)[None, :]
    start = tl.load(starts + index, mask=index < groups, other=0)
    row, _, exists = group_rows(start, index < groups, first, group, DIM, PADDED, R)
    keys = load_group(k + lane, row, k_stride, exists, PADDED)
    values = load_group(v + lane, row, v_stride, exists, PADDED)
    pooled = load_group(x + lane, row, x_stride, exists, PADDED) if POOLED else keys
    acc_k = tl.zeros([N, R, PADDED], tl.float32)
    acc_v = tl.zeros([N, R, PADDED], tl.float32)
    acc_x = tl.zeros([N, R, PADDED], tl.float32)
    for member in range(CORE_HEADS // KEY_HEADS):
        head = key_head * (CORE_HEADS // KEY_HEADS) + member
        at = index[:, None]
        own = head * DIM + channel[None, :]
        query = tl.load(q + at * q_stride + own, mask=mask, other=0.0).to(tl.float32) * scale
        grad_k = tl.load(dcore_k + at * dcore_k_stride + own, mask=mask, other=0.0).to(tl.float32)
        grad_v = tl.load(dcore_v + at * dcore_v_stride + own, mask=mask, other=0.0).to(tl.float32)
        rows_lse = tl.load(lse + index * CORE_HEADS + head, mask=index < groups, other=float("inf"))
        rows_delta = tl.load(delta + index * CORE_HEADS + head, mask=index < groups, other=0.0)
        w = tl.exp2(tl.sum(query[:, None, :] * keys, axis=2) * LOG2E - rows_lse[:, None])
        dw = tl.sum(grad_k[:, None, :] * pooled + grad_v[:, None, :] * values, axis=2)
        ds = w * (dw - rows_delta[:, None])
        acc_k += ds[:, :, None] * query[:, None, :]
        acc_v += w[:, :, None] * grad_v[:, None, :]
        if POOLED:
            acc_x += w[:, :, None] * grad_k[:, None, :]
        else:
            acc_k += w[:, :, None] * grad_k[:, None, :]
    at = row[:, :, None] * (KEY_HEADS * DIM) + lane + channel[None, None, :]
    tl.store(dk + at, acc_k, mask=exists)
    tl.store(dv + at, acc_v, mask=exists)
    if POOLED:
        tl.store(dx + at, acc_x, mask=exists)


@triton.jit
def group_rows(start, real, first, group, DIM: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr):
    """Rows of the tokens first .. first + R of each group, int64 [N, R]; which exist; which of their channels do."""
    token = first + tl.arange(0, R)
    inside = real[:, None] & (token < group)[None, :]
    row = start[:, None] + token[None, :]
    return row, inside, inside[:, :, None] & (tl.arange(0, PADDED) < DIM)[None, None, :]


@triton.jit
def load_group(base, row, stride, exists, PADDED: tl.constexpr):
    """The rows of one head in fp32, [N, R, PADDED]; zero where there are none."""
    at = row[:, :, None] * stride + tl.arange(0, PADDED)[None, None, :]
    return tl.load(base + at, mask=exists, other=0.0).to(tl.float32)
