"""Backward kernels of interval attention; p = exp(s - lse) is computed again.

    ds = p (do v' - delta) scale    delta = sum(do o)    dq = ds k    dk = ds' q    dv = p' do

B1  queries   a program owns a tile of M query entries and runs over their keys, as in the forward pass: dq, and delta,
              fp32 by entry, for B2.
B2  keys      a program owns N key entries and runs over the query entries low .. high - 1 that see any of them, by the
              inverse intervals: dk and dv, complete. No atomics; every sum runs in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.interval.fused_forward import LOG2E, SIZES, load_rows, load_tile


@triton.jit(do_not_specialize=SIZES)
def queries_backward_kernel(
    q, k, v, o, do, lse, dq, delta, queries, keys, first, last, until, places, table, tiles, queries_count, keys_count,
    scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    LEAVES: tl.constexpr,
):  # fmt: skip
    """B1. dq: [rows, DIM]; delta: fp32 [Nq]."""
    start, count = load_tile(table, tiles)
    if count == 0:
        return
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    entry, inside = start + slot, slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    rows = tl.load(queries + entry, mask=inside, other=0)
    place = tl.load(places + entry, mask=inside, other=0)
    data = tl.load(q + rows[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    own = place[:, None] * DIM + channel[None, :]
    grad = tl.load(do + own, mask=mask, other=0.0)
    output = tl.load(o + own, mask=mask, other=0.0).to(tl.float32)
    held = tl.sum(grad.to(tl.float32) * output, axis=1)
    norm = finite(tl.load(lse + entry, mask=inside, other=0.0))
    begin = tl.load(first + entry, mask=inside, other=0).to(tl.int32)
    end = tl.load(last + entry, mask=inside, other=0).to(tl.int32)
    low = tl.load(first + start).to(tl.int32)
    high = tl.load(last + start + count - 1).to(tl.int32)
    acc = tl.zeros([M, PADDED], tl.float32)
    for n in tl.range(low, high, N, num_stages=STAGES):
        at = n + tl.arange(0, N)
        there = at < high
        key_rows = tl.load(keys + at, mask=there, other=0)
        columns = load_rows(k, key_rows, there, DIM, PADDED)
        values = load_rows(v, key_rows, there, DIM, PADDED)
        z = tl.dot(data, tl.trans(columns), input_precision="ieee") * (scale * LOG2E)
        seen = (at[None, :] >= begin[:, None]) & (at[None, :] < end[:, None])
        if LEAVES:
            out = tl.load(until + at, mask=there, other=0).to(tl.int32)
            seen &= entry[:, None] < out[None, :]
        p = tl.exp2(tl.where(seen, z - norm[:, None] * LOG2E, float("-inf")))
        dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
        ds = p * (dp - held[:, None]) * scale
        acc = tl.dot(ds.to(columns.dtype), columns, acc, input_precision="ieee")
    tl.store(dq + own, acc, mask=mask)
    tl.store(delta + entry, held, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, v, do, lse, delta, dk, dv, queries, keys, low, high, places, key_places, queries_count, keys_count, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """B2. dk, dv: [rows, DIM]; low, high: int64 [Nk]."""
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    key = tl.program_id(0) * N + slot
    inside = key < keys_count
    mask = inside[:, None] & (channel < DIM)[None, :]
    rows = tl.load(keys + key, mask=inside, other=0)
    columns = tl.load(k + rows[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    values = tl.load(v + rows[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    begin = tl.load(low + key, mask=inside, other=queries_count).to(tl.int32)
    end = tl.load(high + key, mask=inside, other=0).to(tl.int32)
    acc_k, acc_v = tl.zeros([N, PADDED], tl.float32), tl.zeros([N, PADDED], tl.float32)
    for m in tl.range(tl.min(begin, axis=0), tl.max(end, axis=0), M, num_stages=STAGES):
        entry = m + tl.arange(0, M)
        there = entry < queries_count
        query_rows = tl.load(queries + entry, mask=there, other=0)
        place = tl.load(places + entry, mask=there, other=0)
        data = load_rows(q, query_rows, there, DIM, PADDED)
        grad = load_rows(do, place, there, DIM, PADDED)
        norm = finite(tl.load(lse + entry, mask=there, other=0.0))
        held = tl.load(delta + entry, mask=there, other=0.0)
        z = tl.dot(columns, tl.trans(data), input_precision="ieee") * (scale * LOG2E)
        seen = (entry[None, :] >= begin[:, None]) & (entry[None, :] < end[:, None])
        p = tl.exp2(tl.where(seen, z - norm[None, :] * LOG2E, float("-inf")))
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision="ieee")
        dp = tl.dot(values, tl.trans(grad), input_precision="ieee")
        ds = p * (dp - held[None, :]) * scale
        acc_k = tl.dot(ds.to(data.dtype), data, acc_k, input_precision="ieee")
    own = tl.load(key_places + key, mask=inside, other=0)[:, None] * DIM + channel[None, :]
    tl.store(dk + own, acc_k, mask=mask)
    tl.store(dv + own, acc_v, mask=mask)


@triton.jit
def finite(lse):
    """0 for the -inf of rows that see nothing."""
    return tl.where(lse == float("-inf"), 0.0, lse)
