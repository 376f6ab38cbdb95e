"""Two kernels on a packed row; documents, pieces and windows are one table, the first key that each token sees.

rows     a program owns M rows of one head and runs over the keys from the first that one of them sees to the diagonal,
         with the online softmax and two moments beside its sum: of p (t - s), and of p max(W - (t - s), 0), for which
         only the tiles at the ends are looked at. Stored: lse, e / l, W - w / l. Blocks without a row of a response are
         skipped; other rows that are none get an lse of inf, for which every weight is 0.
columns  a program owns N keys of one head and runs over the queries lo to hi tokens later: the column sums of
         exp(s - lse), masked. No atomics: nobody else writes these keys.

Everything in fp32 but the inputs of the products; scores in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("tokens", "low", "high", "waad_window")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    q, k, first, response, scales, lse, distance, waad, tokens, q_stride, k_stride, waad_window, softcap,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """q: [T, H, D]; k: [T, Hk, D]; first: int32 [T]; response: int8 [T]; scales: fp32 [H], of the scores.

    lse, distance, waad: fp32 [H, T].
    """
    head = tl.program_id(0) % HEADS
    start = (tl.program_id(0) // HEADS) * M
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    at = start + slot
    inside = at < tokens
    counts = tl.load(response + at, mask=inside, other=0) > 0
    low = tl.load(first + at, mask=inside, other=0x7FFFFFFF)
    begin = tl.load(first + start)
    latest = tl.load(first + tl.minimum(start + M, tokens) - 1)
    end = tl.minimum(start + M, tokens)
    if tl.max(counts.to(tl.int32), axis=0) == 0:
        end = begin
    left = begin + tl.cdiv(tl.maximum(latest - begin, 0), N) * N  # from here on every row sees the keys
    whole = begin + tl.maximum(start - waad_window + 1 - begin, 0) // N * N  # up to here all of them are W away or more
    left = tl.minimum(left, begin + tl.cdiv(tl.maximum(end - begin, 0), N) * N)

    q += tl.cast(start, tl.int64) * q_stride + head * DIM
    k += (head // (HEADS // GROUPS)) * DIM
    queries = tl.load(
        q + slot[:, None] * q_stride + channel[None, :], mask=inside[:, None] & (channel < DIM)[None, :], other=0.0
    )
    scale = tl.load(scales + head)
    largest = tl.full([M], float("-inf"), tl.float32)
    total, moment, near = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    largest, total, moment, near = row_blocks(
        largest, total, moment, near, queries, at, low, k, begin, left, end, k_stride, scale, waad_window, softcap,
        DIM, PADDED, N, STAGES, CAPPED, True,
    )  # fmt: skip
    largest, total, moment, near = row_blocks(
        largest, total, moment, near, queries, at, low, k, left, whole, end, k_stride, scale, waad_window, softcap,
        DIM, PADDED, N, STAGES, CAPPED, False,
    )  # fmt: skip
    largest, total, moment, near = row_blocks(
        largest, total, moment, near, queries, at, low, k, tl.maximum(left, whole), end, end, k_stride, scale,
        waad_window, softcap, DIM, PADDED, N, STAGES, CAPPED, True,
    )  # fmt: skip

    place = tl.cast(head, tl.int64) * tokens + at
    sums = tl.where(counts, total, 1.0)
    window = tl.cast(waad_window, tl.float32)
    tl.store(lse + place, tl.where(counts, (largest + tl.log2(sums)) / LOG2E, float("inf")), mask=inside)
    tl.store(distance + place, tl.where(counts, moment / sums, 0.0), mask=inside)
    tl.store(waad + place, tl.where(counts, window - near / sums, 0.0), mask=inside)


@triton.jit
def row_blocks(
    largest, total, moment, near, q, at, low, k, begin, end, stop, k_stride, scale, waad_window, softcap,
    DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end. Without MASKED every row sees all of them, W or more away, and `near` stays."""
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    for n in tl.range(begin, end, N, num_stages=STAGES):
        index = n + slot
        pointers = k + tl.cast(n, tl.int64) * k_stride + (slot[:, None] * k_stride + channel[None, :])
        keys = tl.load(pointers, mask=(index < stop)[:, None] & (channel < DIM)[None, :], other=0.0)
        x = scores(q, keys, scale, softcap, CAPPED)
        back = at[:, None] - index[None, :]
        if MASKED:
            x = tl.where((back >= 0) & (index[None, :] >= low[:, None]), x, float("-inf"))
        top = tl.maximum(largest, tl.max(x, axis=1))
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(x - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, axis=1)
        moment = moment * shrink + tl.sum(p * back.to(tl.float32), axis=1)
        near = near * shrink
        if MASKED:
            near += tl.sum(p * tl.maximum(waad_window - back, 0).to(tl.float32), axis=1)
        largest = top
    return largest, total, moment, near


@triton.jit
def scores(q, keys, scale, softcap, CAPPED: tl.constexpr):
    """Scores [M, N] of the layer, times log2(e)."""
    x = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if CAPPED:  # tanh(y) = 1 - 2 / (exp(2 y) + 1), which no y overflows
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E) / softcap) + 1.0))
    return x * LOG2E


@triton.jit(do_not_specialize=SIZES)
def columns_kernel(
    q, k, first, response, scales, lse, sums, tokens, q_stride, k_stride, low, high, softcap,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """As `rows_kernel`; sums: fp32 [H, T], of the weights of the rows low .. high tokens after each key."""
    head = tl.program_id(0) % HEADS
    start = (tl.program_id(0) // HEADS) * N
    slot, channel, row = tl.arange(0, N), tl.arange(0, PADDED), tl.arange(0, M)
    index = start + slot
    inside = index < tokens
    q += head * DIM
    k += tl.cast(start, tl.int64) * k_stride + (head // (HEADS // GROUPS)) * DIM
    keys = tl.load(
        k + slot[:, None] * k_stride + channel[None, :], mask=inside[:, None] & (channel < DIM)[None, :], other=0.0
    )
    scale = tl.load(scales + head)
    lse += tl.cast(head, tl.int64) * tokens
    acc = tl.zeros([N], tl.float32)
    for m in tl.range(start + low, tl.minimum(start + N + high, tokens), M, num_stages=STAGES):
        at = m + row
        there = at < tokens
        pointers = q + tl.cast(m, tl.int64) * q_stride + (row[:, None] * q_stride + channel[None, :])
        queries = tl.load(pointers, mask=there[:, None] & (channel < DIM)[None, :], other=0.0)
        own = tl.load(lse + at, mask=there, other=float("inf")) * LOG2E
        limit = tl.load(first + at, mask=there, other=0x7FFFFFFF)
        back = at[:, None] - index[None, :]
        seen = (back >= low) & (back <= high) & (index[None, :] >= limit[:, None])
        p = tl.exp2(scores(queries, keys, scale, softcap, CAPPED) - own[:, None])
        acc += tl.sum(tl.where(seen, p, 0.0), axis=0)
    tl.store(sums + tl.cast(head, tl.int64) * tokens + index, acc, mask=inside)
