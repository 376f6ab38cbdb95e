"""Backward kernels of softplus attention; scores and weights are computed again from q, k and two numbers per row.

With u = g max(f - theta, 0), P = u^p, D = sum(do o), and N keys seen, h couples every key that a row sees to the mean
that is its threshold:

    dy = p g u^(p-1) (do v - D)    G = sum dy    h = G / N where theta is the mean, else 0
    dz = sigmoid(z) (dy - h)       dV = P' do    dq = c dz k    dk = dz' (c q)

B1  queries   a program owns M rows of one query head and runs over the keys that they see. h is known only at the end,
              so two sums are kept, dq = c (sum sigmoid dy k - h sum sigmoid k). It stores dq, D and h.
B2  keys      a program owns N keys of one key head and runs over the rows that see them, of all query heads that share
              it: dk and dv, complete.

LSSA has p = 1, no threshold and so no h: one sum in B1. Every sum runs in a fixed order; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.softplus.fused_forward import SIZES, key_ranges, load_keys, load_tile, row_scale, seen
from farspan.kernels.softplus.fused_scores import excess, sigmoid, slopes, softplus


@triton.jit(do_not_specialize=SIZES)
def queries_backward_kernel(
    q, k, v, o, do, rows, dq, held, table, tiles, tokens, q_stride, k_stride, v_stride, do_stride,
    scale, power, free_rows, window,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EXPONENT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """B1. dq: [T, H, D]; held: fp32 [2, H, T], D and h."""
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
    own = slot[:, None] * (HEADS * DIM) + channel[None, :]
    offset = (start * HEADS + head) * DIM
    size = tokens.to(tl.int64) * HEADS
    row = head.to(tl.int64) * tokens + start
    q += start * q_stride + head * DIM
    do += start * do_stride + head * DIM
    k += key_start * k_stride + group * DIM
    v += key_start * v_stride + group * DIM
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    grad = tl.load(do + slot[:, None] * do_stride + channel[None, :], mask=mask, other=0.0)
    output = tl.load(o + offset + own, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad.to(tl.float32) * output, axis=1)
    g = tl.load(rows + row + slot, mask=inside, other=0.0)
    theta, factor = tl.zeros([M], tl.float32), g
    if EXPONENT != 0:
        theta = tl.load(rows + size + row + slot, mask=inside, other=0.0)
        factor = dy_factor(g, power)

    sums, plain = tl.zeros([M, PADDED], tl.float32), tl.zeros([M, PADDED], tl.float32)
    gathered = tl.zeros([M], tl.float32)
    if WINDOWED:
        sums, plain, gathered = queries_backward_blocks(
            sums, plain, gathered, queries, grad, delta, c, theta, g, at, k, v, first, left, end,
            k_stride, v_stride, power, window, DIM, PADDED, N, STAGES, EXPONENT, True, WINDOWED,
        )  # fmt: skip
    sums, plain, gathered = queries_backward_blocks(
        sums, plain, gathered, queries, grad, delta, c, theta, g, at, k, v, left, whole, end,
        k_stride, v_stride, power, window, DIM, PADDED, N, STAGES, EXPONENT, False, WINDOWED,
    )  # fmt: skip
    sums, plain, gathered = queries_backward_blocks(
        sums, plain, gathered, queries, grad, delta, c, theta, g, at, k, v, last, end, end,
        k_stride, v_stride, power, window, DIM, PADDED, N, STAGES, EXPONENT, True, WINDOWED,
    )  # fmt: skip

    result = sums * factor[:, None]
    tl.store(held + row + slot, delta, mask=inside)
    if EXPONENT != 0:
        shifted = (counts > free_rows) & (g >= 0)
        h = tl.where(shifted, gathered * factor / counts, 0.0)
        result -= plain * h[:, None]
        tl.store(held + size + row + slot, h, mask=inside)
    tl.store(dq + offset + own, result * c[:, None], mask=mask)


@triton.jit
def dy_factor(g, power):
    """p g, of dead rows g."""
    return tl.where(g < 0, 1.0, power) * tl.abs(g)


@triton.jit
def queries_backward_blocks(
    sums, plain, gathered, q, grad, delta, c, theta, g, at, k, v, begin, end, stop,
    k_stride, v_stride, power, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EXPONENT: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Over keys begin .. end, with dy as it is before its row's factor: sum sigmoid dy k, sum sigmoid k, sum dy."""
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_keys(k, n, stop, k_stride, DIM, PADDED, N, MASKED)
        values = load_keys(v, n, stop, v_stride, DIM, PADDED, N, MASKED)
        z = tl.dot(q, tl.trans(keys), input_precision="ieee") * c[:, None]
        f, small = softplus(z)
        slope = sigmoid(z, small)
        if MASKED:
            visible = seen(at[:, None], (n + tl.arange(0, N))[None, :], window, WINDOWED)
            f = tl.where(visible, f, 0.0)
            slope = tl.where(visible, slope, 0.0)
        dy = tl.dot(grad, tl.trans(values), input_precision="ieee") - delta[:, None]
        if EXPONENT != 0:
            dy *= slopes(excess(f, theta[:, None], g[:, None]), g[:, None], power, EXPONENT)
            gathered += tl.sum(dy, axis=1)
            plain = tl.dot(slope.to(keys.dtype), keys, plain, input_precision="ieee")
        sums = tl.dot((slope * dy).to(keys.dtype), keys, sums, input_precision="ieee")
    return sums, plain, gathered


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, v, do, rows, held, dk, dv, table, tiles, tokens, q_stride, k_stride, v_stride, do_stride,
    scale, power, window,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, EXPONENT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """B2. dk, dv: [keys, Hk, D]."""
    group = tl.program_id(0) % GROUPS
    tile = tl.program_id(0) // GROUPS
    key_start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    index = tl.load(table + 2 * tiles + tile).to(tl.int32)
    start = tl.load(table + 3 * tiles + tile)
    length = tl.load(table + 4 * tiles + tile).to(tl.int32)
    position = tl.load(table + 5 * tiles + tile).to(tl.int32)
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    mask = (slot < count)[:, None] & (channel < DIM)[None, :]
    k += key_start * k_stride + group * DIM
    v += key_start * v_stride + group * DIM
    keys = tl.load(k + slot[:, None] * k_stride + channel[None, :], mask=mask, other=0.0)
    values = tl.load(v + slot[:, None] * v_stride + channel[None, :], mask=mask, other=0.0)

    # Of the rows 0 .. length that see a key of the tile, 0 .. left lie across the diagonal, left .. whole see every
    # key, whole .. length lie across the window's edge.
    left = tl.minimum(tl.cdiv(tl.maximum(index + count - 1 - position, 0), M) * M, tl.cdiv(length, M) * M)
    whole = tl.cdiv(length, M) * M
    if WINDOWED:
        whole = tl.minimum(left + tl.maximum(index + window - position - left, 0) // M * M, whole)
    size = tokens.to(tl.int64) * HEADS
    dkeys, dvalues = tl.zeros([N, PADDED], tl.float32), tl.zeros([N, PADDED], tl.float32)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        # from here on in rows relative to `start`: int32
        row = head.to(tl.int64) * tokens + start
        queries = q + start * q_stride + head * DIM
        grads = do + start * do_stride + head * DIM
        dkeys, dvalues = keys_backward_blocks(
            dkeys, dvalues, keys, values, queries, grads, rows + row, held + row, size, index, position, 0, left,
            length, q_stride, do_stride, scale, power, window, DIM, PADDED, M, N, STAGES, EXPONENT, True, WINDOWED,
        )  # fmt: skip
        dkeys, dvalues = keys_backward_blocks(
            dkeys, dvalues, keys, values, queries, grads, rows + row, held + row, size, index, position, left, whole,
            length, q_stride, do_stride, scale, power, window, DIM, PADDED, M, N, STAGES, EXPONENT, False, WINDOWED,
        )  # fmt: skip
        if WINDOWED:
            dkeys, dvalues = keys_backward_blocks(
                dkeys, dvalues, keys, values, queries, grads, rows + row, held + row, size, index, position, whole,
                length, length, q_stride, do_stride, scale, power, window,
                DIM, PADDED, M, N, STAGES, EXPONENT, True, WINDOWED,
            )  # fmt: skip
    own = (key_start * GROUPS + group) * DIM
    local = slot[:, None] * (GROUPS * DIM) + channel[None, :]
    tl.store(dk + own + local, dkeys, mask=mask)
    tl.store(dv + own + local, dvalues, mask=mask)


@triton.jit
def keys_backward_blocks(
    dkeys, dvalues, keys, values, q, do, rows, held, size, index, position, begin, end, length,
    q_stride, do_stride, scale, power, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    EXPONENT: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Add what rows begin .. end of one head give to a tile of keys. Scores are [N, M], so that weights and dz are the
    left operand of their products as they come. Rows from `length` on have g and h of 0: they give nothing.
    """
    for m in tl.range(begin, end, M, num_stages=STAGES):
        local, channel = tl.arange(0, M), tl.arange(0, PADDED)
        slot = m + local
        inside = slot < length
        mask = inside[:, None] & (channel < DIM)[None, :]
        block = q + tl.cast(m, tl.int64) * q_stride
        queries = tl.load(block + (local[:, None] * q_stride + channel[None, :]), mask=mask, other=0.0)
        block = do + tl.cast(m, tl.int64) * do_stride
        grad = tl.load(block + (local[:, None] * do_stride + channel[None, :]), mask=mask, other=0.0)
        g = tl.load(rows + slot, mask=inside, other=0.0)
        delta = tl.load(held + slot, mask=inside, other=0.0)
        at = position + slot
        _, c = row_scale(at, scale, window, WINDOWED)
        z = tl.dot(keys, tl.trans(queries), input_precision="ieee") * c[None, :]
        f, small = softplus(z)
        slope = sigmoid(z, small)
        if MASKED:
            visible = seen(at[None, :], (index + tl.arange(0, N))[:, None], window, WINDOWED)
            f = tl.where(visible, f, 0.0)
            slope = tl.where(visible, slope, 0.0)
        if EXPONENT != 0:
            theta = tl.load(rows + size + slot, mask=inside, other=0.0)
            h = tl.load(held + size + slot, mask=inside, other=0.0)
            u = excess(f, theta[None, :], g[None, :])
            steep = slopes(u, g[None, :], power, EXPONENT)
            p = u * steep
        else:
            p = f * g[None, :]
        dvalues = tl.dot(p.to(grad.dtype), grad, dvalues, input_precision="ieee")
        dy = tl.dot(values, tl.trans(grad), input_precision="ieee") - delta[None, :]
        if EXPONENT != 0:
            dz = slope * (dy * steep * (dy_factor(g, power) * c)[None, :] - (h * c)[None, :])
        else:
            dz = slope * dy * (g * c)[None, :]
        dkeys = tl.dot(dz.to(queries.dtype), queries, dkeys, input_precision="ieee")
    return dkeys, dvalues
