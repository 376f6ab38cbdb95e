"""Forward kernel of softplus attention.

A program owns M rows of one document and one query head, and runs over the tiles of N keys that they see, hidden keys
being masked only in tiles at the ends.

    LSSA    one pass:  f = softplus(c q k)    S += sum f    acc += f v              o = acc / S
    LSSAR   pass 1:    f                      S += sum f    largest f               theta, rho of every row
            pass 2:    f again                u = max(f - theta, 0) / rho
                                              T += sum u^p  acc += u^p v            o = acc / T

No maximum is tracked along the way and nothing is rescaled: f is bounded, u is at most 1. Stored beside o, in fp32:
theta and g = T^(-1/p) / rho, with which every weight is (g max(f - theta, 0))^p (LSSA: g = 1 / S, no theta).

The row factor c multiplies the fp32 product of q and k; rounded into q it would cost 9 bits of every score.
A tile without a key above theta would need no v, but such tiles are too rare to pay for a branch that ends the
pipelining of the loads: a third of random keys are above the mean, so a tile of 64 has some.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.softplus.fused_scores import excess, raised, reciprocal, softplus, thresholds, weights

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("tiles", "tokens", "free_rows", "window")


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    q, k, v, o, rows, table, tiles, tokens, q_stride, k_stride, v_stride, scale, power, free_rows, window,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    EXPONENT: tl.constexpr, WINDOWED: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """o: [T, H, D]; rows: fp32 [2, H, T], g (below 0 in dead rows, with a power of 1) and theta; LSSA [1, H, T].

    EXPONENT: 0 for LSSA, p where it is an integer, else -1. ZERO: dead rows give 0.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    group = head // (HEADS // GROUPS)
    start, count, position, key_start = load_tile(table, tile, tiles)
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    inside = slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    at = position + slot
    counts, c = row_scale(at, scale, window, WINDOWED)
    first, left, whole, last, end = key_ranges(position, count, window, N, WINDOWED)

    # scalar int64 for the tile, int32 within it
    q += start * q_stride + head * DIM
    k += key_start * k_stride + group * DIM
    v += key_start * v_stride + group * DIM
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    acc = tl.zeros([M, PADDED], tl.float32)
    theta, inverse = tl.zeros([M], tl.float32), tl.full([M], 1.0, tl.float32)
    if EXPONENT != 0:
        total, largest = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        if WINDOWED:
            total, largest = score_blocks(
                total, largest, queries, c, at, k, first, left, end, k_stride, window,
                DIM, PADDED, N, STAGES, True, WINDOWED,
            )  # fmt: skip
        total, largest = score_blocks(
            total, largest, queries, c, at, k, left, whole, end, k_stride, window,
            DIM, PADDED, N, STAGES, False, WINDOWED,
        )  # fmt: skip
        total, largest = score_blocks(
            total, largest, queries, c, at, k, last, end, end, k_stride, window,
            DIM, PADDED, N, STAGES, True, WINDOWED,
        )  # fmt: skip
        theta, inverse = thresholds(total, largest, counts, free_rows)

    sums = tl.zeros([M], tl.float32)
    if WINDOWED:
        acc, sums = value_blocks(
            acc, sums, queries, c, theta, inverse, at, k, v, first, left, end, k_stride, v_stride, power, window,
            DIM, PADDED, N, STAGES, EXPONENT, True, WINDOWED,
        )  # fmt: skip
    acc, sums = value_blocks(
        acc, sums, queries, c, theta, inverse, at, k, v, left, whole, end, k_stride, v_stride, power, window,
        DIM, PADDED, N, STAGES, EXPONENT, False, WINDOWED,
    )  # fmt: skip
    acc, sums = value_blocks(
        acc, sums, queries, c, theta, inverse, at, k, v, last, end, end, k_stride, v_stride, power, window,
        DIM, PADDED, N, STAGES, EXPONENT, True, WINDOWED,
    )  # fmt: skip

    sums_inverse = reciprocal(sums)
    if ZERO:
        sums_inverse = tl.where(inverse < 0, 0.0, sums_inverse)
    o += (start * HEADS + head) * DIM
    tl.store(o + slot[:, None] * (HEADS * DIM) + channel[None, :], acc * sums_inverse[:, None], mask=mask)
    rows += head.to(tl.int64) * tokens + start
    if EXPONENT == 0:
        tl.store(rows + slot, sums_inverse, mask=inside)
    else:
        root = tl.where(inverse < 0, sums_inverse, raised(sums_inverse, 1.0 / power, -1))
        tl.store(rows + slot, inverse * root, mask=inside)
        tl.store(rows + tokens.to(tl.int64) * HEADS + slot, theta, mask=inside)


@triton.jit
def score_blocks(
    total, largest, q, c, at, k, begin, end, stop, k_stride, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Pass 1 over keys begin .. end: sum and maximum of f."""
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_keys(k, n, stop, k_stride, DIM, PADDED, N, MASKED)
        f, _ = softplus(tl.dot(q, tl.trans(keys), input_precision="ieee") * c[:, None])
        if MASKED:
            f = tl.where(seen(at[:, None], (n + tl.arange(0, N))[None, :], window, WINDOWED), f, 0.0)
        total += tl.sum(f, axis=1)
        largest = tl.maximum(largest, tl.max(f, axis=1))
    return total, largest


@triton.jit
def value_blocks(
    acc, sums, q, c, theta, inverse, at, k, v, begin, end, stop, k_stride, v_stride, power, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EXPONENT: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Pass 2 (the only one of LSSA) over keys begin .. end: the weights, their sums and their values."""
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_keys(k, n, stop, k_stride, DIM, PADDED, N, MASKED)
        f, _ = softplus(tl.dot(q, tl.trans(keys), input_precision="ieee") * c[:, None])
        if MASKED:
            f = tl.where(seen(at[:, None], (n + tl.arange(0, N))[None, :], window, WINDOWED), f, 0.0)
        if EXPONENT != 0:
            f = weights(excess(f, theta[:, None], inverse[:, None]), inverse[:, None], power, EXPONENT)
        values = load_keys(v, n, stop, v_stride, DIM, PADDED, N, MASKED)
        sums += tl.sum(f, axis=1)
        acc = tl.dot(f.to(values.dtype), values, acc, input_precision="ieee")
    return acc, sums


@triton.jit
def load_tile(table, tile, tiles):
    """Fields of a tile of `fused_plan.query_table`; addresses in int64, what counts within a document in int32."""
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    position = tl.load(table + 2 * tiles + tile).to(tl.int32)
    key_start = tl.load(table + 3 * tiles + tile)
    return start, count, position, key_start


@triton.jit
def row_scale(at, scale, window, WINDOWED: tl.constexpr):
    """N, the keys that rows at positions `at` see, in fp32, and c = scale * ln N."""
    counts = at + 1
    if WINDOWED:
        counts = tl.minimum(counts, window)
    counts = counts.to(tl.float32)
    return counts, tl.log(counts) * scale


@triton.jit
def key_ranges(position, count, window, N: tl.constexpr, WINDOWED: tl.constexpr):
    """Edges of a tile of `count` rows: keys first .. left lie across the window's edge of some row, left .. whole are
    seen by all rows, last .. end lie across the diagonal. All but `end` are whole tiles of N from `first`.
    """
    first, left, end = 0, 0, position + count
    if WINDOWED:
        first = tl.maximum(position - window + 1, 0)
        left = first + tl.cdiv(tl.maximum(end - window - first, 0), N) * N
    whole = first + (position + 1 - first) // N * N
    return first, left, whole, tl.maximum(left, whole), end


@triton.jit
def seen(at, index, window, WINDOWED: tl.constexpr):
    """Whether the row at position `at` sees key `index` of its document."""
    visible = index <= at
    if WINDOWED:
        visible &= index > at - window
    return visible


@triton.jit
def load_keys(
    base, n, stop, stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Keys or values n .. n + N of one head, [N, PADDED]; 0 from `stop` on (MASKED).

    The offsets within the block are the same int32 for every n: they cost no registers in a loop.
    """
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    pointers = base + tl.cast(n, tl.int64) * stride + (slot[:, None] * stride + channel[None, :])
    if MASKED:
        return tl.load(pointers, mask=(n + slot < stop)[:, None] & (channel < DIM)[None, :], other=0.0)
    if DIM == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(channel < DIM)[None, :], other=0.0)
