"""Backward kernels of relative attention; weights are computed again from the inputs and lse.

With w = exp(s - lse) and D = sum(do o), which the host has formed:    ds = scale w (do v - D)
    da = ds k       dk = ds' a       dv = w' do
    sinusoids   dp = ds rows         table   dp_i = sum_j ds_ij r_(i-j)     dr_delta = sum_i ds_(i, i-delta) p_i

B1  queries     a program owns M rows of one query head and runs over the keys that they see: da, dp. Of a table, ds
                is brought back into its blocks by the gather that skews them (it is its own inverse), in a launch of
                its own: both sums at once do not fit the registers.
B2  keys        a program owns N keys of one key head and runs over the rows that see them, of all query heads that
                share it: dk and dv, complete. Its scores are [N, M].
B3  distances   of a table: a program owns N distances of one query head and some of the tiles of rows. Column n is
                distance d0 + n, its key i0 + m - d0 - n, so keys lie in M / N + 1 blocks from i0 - d0 - N + 1 on, and
                products with them are skewed as those with distances are in the other kernels. What the
                programs of one block of distances found is added up on the host.

Every sum runs in a fixed order; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.relative.fused_forward import (
    LOG2E,
    SIZES,
    by_distance,
    key_ranges,
    load_beta,
    load_distances,
    load_rows,
    load_tile,
    of_head,
    skew,
    unskewed,
    visible,
)
from farspan.kernels.softplus.fused_forward import load_keys


@triton.jit(do_not_specialize=SIZES)
def queries_backward_kernel(
    a, p, k, v, positions, beta, do, lse, delta, da, dp, table, tiles, tokens, distances, window, factor, scale,
    a_stride, p_stride, k_stride, v_stride, do_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SINUSOID: tl.constexpr, WINDOWED: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    """B1. da: [T, H, D]; dp: [T, H, R]. CONTENT: whether da is wanted; of a table the other call finds dp."""
    head = tl.program_id(0) % HEADS
    group = head // (HEADS // GROUPS)
    start, count, base, key_start, keys, key_position = load_tile(table, tl.program_id(0) // HEADS, tiles)
    slot, channel, rank = tl.arange(0, M), tl.arange(0, PADDED), tl.arange(0, WIDE)
    inside = slot < count
    content = load_rows(a + start * a_stride + head * DIM, slot, inside, a_stride, DIM, PADDED)
    asked = load_rows(p + start * p_stride + head * RANK, slot, inside, p_stride, RANK, WIDE)
    grad = load_rows(do + start * do_stride + head * DIM, slot, inside, do_stride, DIM, PADDED)
    row = head.to(tl.int64) * tokens + start
    centre = tl.load(delta + row + slot, mask=inside, other=0.0)
    level = tl.load(lse + row + slot, mask=inside, other=float("inf")) * LOG2E
    k += key_start * k_stride + group * DIM
    v += key_start * v_stride + group * DIM
    positions, beta = of_head(positions, beta, head, key_position, distances, RANK, SINUSOID)
    first, left, whole, last, end = key_ranges(base, count, keys, window, N, WINDOWED)

    dcontent, dasked = tl.zeros([M, PADDED], tl.float32), tl.zeros([M, WIDE], tl.float32)
    far, farther = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    if not SINUSOID:
        far = by_distance(asked, positions, beta, base - first + 1, distances, RANK, WIDE, N)
        if M > N:
            farther = by_distance(asked, positions, beta, base - first + 1 + N, distances, RANK, WIDE, N)
    if WINDOWED:
        dcontent, dasked, far, farther = queries_backward_blocks(
            dcontent, dasked, far, farther, content, asked, grad, centre, level, base, k, v, positions, beta,
            first, left, end, distances, window, factor, k_stride, v_stride,
            DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, True, WINDOWED, CONTENT,
        )  # fmt: skip
    dcontent, dasked, far, farther = queries_backward_blocks(
        dcontent, dasked, far, farther, content, asked, grad, centre, level, base, k, v, positions, beta,
        left, whole, end, distances, window, factor, k_stride, v_stride,
        DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, False, WINDOWED, CONTENT,
    )  # fmt: skip
    dcontent, dasked, far, farther = queries_backward_blocks(
        dcontent, dasked, far, farther, content, asked, grad, centre, level, base, k, v, positions, beta,
        last, end, end, distances, window, factor, k_stride, v_stride,
        DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, True, WINDOWED, CONTENT,
    )  # fmt: skip
    if CONTENT:
        mask = inside[:, None] & (channel < DIM)[None, :]
        da += (start * HEADS + head) * DIM
        tl.store(da + slot[:, None] * (HEADS * DIM) + channel[None, :], dcontent * scale, mask=mask)
    if SINUSOID or not CONTENT:
        mask = inside[:, None] & (rank < RANK)[None, :]
        dp += (start * HEADS + head) * RANK
        tl.store(dp + slot[:, None] * (HEADS * RANK) + rank[None, :], dasked * scale, mask=mask)


@triton.jit
def queries_backward_blocks(
    dcontent, dasked, far, farther, content, asked, grad, centre, level, base, k, v, positions, beta, begin, end, stop,
    distances, window, factor, k_stride, v_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SINUSOID: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    """Over keys begin .. end; sums before their scale."""
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_keys(k, n, stop, k_stride, DIM, PADDED, N, MASKED)
        z = tl.dot(content, tl.trans(keys), input_precision="ieee")
        if SINUSOID:
            rows = load_keys(positions, n, stop, RANK, RANK, WIDE, N, MASKED)
            z = tl.dot(asked, tl.trans(rows), z, input_precision="ieee")
        else:
            near = by_distance(asked, positions, beta, base - n - N + 1, distances, RANK, WIDE, N)
            z += skew(near, far, farther, M, N)
            if M > N:
                farther = far
            far = near
        weights = tl.exp2(z * factor - level[:, None])
        if MASKED:
            weights = tl.where(visible(base + tl.arange(0, M)[:, None], n, stop, window, N, WINDOWED), weights, 0.0)
        values = load_keys(v, n, stop, v_stride, DIM, PADDED, N, MASKED)
        ds = weights * (tl.dot(grad, tl.trans(values), input_precision="ieee") - centre[:, None])
        if CONTENT:
            dcontent = tl.dot(ds.to(keys.dtype), keys, dcontent, input_precision="ieee")
        if SINUSOID:
            dasked = tl.dot(ds.to(rows.dtype), rows, dasked, input_precision="ieee")
        elif not CONTENT:
            row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
            halves = tl.gather(ds, (row - column - 1) & (N - 1), 1)
            for block in tl.range(0, M // N + 1, num_stages=1):  # unrolled, it would not fit the registers
                rows = load_distances(positions, base - n - N + 1 + block * N, distances, RANK, WIDE, N)
                part = unskewed(halves, block, M, N).to(rows.dtype)
                dasked = tl.dot(part, rows, dasked, input_precision="ieee")
    return dcontent, dasked, far, farther


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    a, p, k, v, positions, beta, do, lse, delta, dk, dv, table, tiles, tokens, distances, window, factor, scale,
    a_stride, p_stride, k_stride, v_stride, do_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SINUSOID: tl.constexpr, WINDOWED: tl.constexpr,
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
    key_position = tl.load(table + 6 * tiles + tile)
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    inside = slot < count
    k += key_start * k_stride + group * DIM
    v += key_start * v_stride + group * DIM
    keys = load_rows(k, slot, inside, k_stride, DIM, PADDED)
    values = load_rows(v, slot, inside, v_stride, DIM, PADDED)
    dkeys, dvalues = tl.zeros([N, PADDED], tl.float32), tl.zeros([N, PADDED], tl.float32)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        near, bias = of_head(positions, beta, head, key_position, distances, RANK, SINUSOID)
        row = head.to(tl.int64) * tokens + start
        dkeys, dvalues = keys_backward_blocks(
            dkeys, dvalues, keys, values, inside, a + start * a_stride + head * DIM,
            p + start * p_stride + head * RANK, do + start * do_stride + head * DIM, lse + row, delta + row,
            near, bias, index, position, length, distances, window, factor, a_stride, p_stride, do_stride,
            DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, WINDOWED,
        )  # fmt: skip
    own = (key_start * GROUPS + group) * DIM
    local = slot[:, None] * (GROUPS * DIM) + channel[None, :]
    mask = inside[:, None] & (channel < DIM)[None, :]
    tl.store(dk + own + local, dkeys * scale, mask=mask)
    tl.store(dv + own + local, dvalues, mask=mask)


@triton.jit
def keys_backward_blocks(
    dkeys, dvalues, keys, values, own, a, p, do, lse, delta, positions, beta, index, position, length,
    distances, window, factor, a_stride, p_stride, do_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, SINUSOID: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Add what the `length` rows of one head, the first at `position`, give to the tile of keys from `index` on."""
    slot = tl.arange(0, N)
    if SINUSOID:
        rows = load_rows(positions + index * RANK, slot, own, RANK, RANK, WIDE)
    for m in tl.range(0, length, M, num_stages=STAGES):
        local = tl.arange(0, M)
        inside = m + local < length
        first = tl.cast(m, tl.int64)
        content = load_rows(a + first * a_stride, local, inside, a_stride, DIM, PADDED)
        asked = load_rows(p + first * p_stride, local, inside, p_stride, RANK, WIDE)
        grad = load_rows(do + first * do_stride, local, inside, do_stride, DIM, PADDED)
        level = tl.load(lse + m + local, mask=inside, other=float("inf")) * LOG2E
        centre = tl.load(delta + m + local, mask=inside, other=0.0)
        z = tl.dot(keys, tl.trans(content), input_precision="ieee")
        if SINUSOID:
            z = tl.dot(rows, tl.trans(asked), z, input_precision="ieee")
        else:
            distance = position + m - index
            near = by_distance(asked, positions, beta, distance - N + 1, distances, RANK, WIDE, N)
            far = by_distance(asked, positions, beta, distance + 1, distances, RANK, WIDE, N)
            farther = far
            if M > N:
                farther = by_distance(asked, positions, beta, distance + 1 + N, distances, RANK, WIDE, N)
            z += tl.trans(
                skew(near, far, farther, M, N)
            )  # a gather along the first axis takes a hundred times the stack
        weights = tl.exp2(z * factor - level[None, :])
        at, key = (position + m + local)[None, :], (index + slot)[:, None]
        hidden = (key > at) | (inside == 0)[None, :]
        if WINDOWED:
            hidden |= key <= at - window
        weights = tl.where(hidden, 0.0, weights)
        dvalues = tl.dot(weights.to(grad.dtype), grad, dvalues, input_precision="ieee")
        ds = weights * (tl.dot(values, tl.trans(grad), input_precision="ieee") - centre[None, :])
        dkeys = tl.dot(ds.to(content.dtype), content, dkeys, input_precision="ieee")
    return dkeys, dvalues


@triton.jit(do_not_specialize=(*SIZES, "splits", "rows"))
def distances_backward_kernel(
    a, p, k, v, positions, beta, do, lse, delta, dr, dbeta, table, tiles, tokens, distances, window, factor, scale,
    splits, rows, a_stride, p_stride, k_stride, v_stride, do_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SINUSOID: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """B3. dr: fp32 [splits, H, rows, R]; dbeta: fp32 [splits, H, rows]; rows: distances, in whole blocks of N."""
    head = tl.program_id(0) % HEADS
    split = tl.program_id(0) // HEADS % splits
    first = tl.program_id(0) // HEADS // splits * N
    group = head // (HEADS // GROUPS)
    positions, beta = of_head(positions, beta, head, 0, distances, RANK, False)
    far = load_distances(positions, first, distances, RANK, WIDE, N)
    bias = load_beta(beta, first, distances, N)
    slot, column = tl.arange(0, M), tl.arange(0, N)
    drows, dbias = tl.zeros([N, WIDE], tl.float32), tl.zeros([N], tl.float32)
    share = tl.cdiv(tiles, splits)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        start, count, base, key_start, keys, _ = load_tile(table, tile, tiles)
        meets = (base + count > first) & (base - first - N + 1 < keys)
        if WINDOWED:
            meets &= first < window
        if meets:
            inside = slot < count
            content = load_rows(a + start * a_stride + head * DIM, slot, inside, a_stride, DIM, PADDED)
            asked = load_rows(p + start * p_stride + head * RANK, slot, inside, p_stride, RANK, WIDE)
            row = head.to(tl.int64) * tokens + start
            level = tl.load(lse + row + slot, mask=inside, other=float("inf")) * LOG2E
            centre = tl.load(delta + row + slot, mask=inside, other=0.0)
            near_key = base - first - N + 1
            k_head, v_head = k + key_start * k_stride + group * DIM, v + key_start * v_stride + group * DIM
            z = skewed_keys(content, k_head, near_key, keys, k_stride, DIM, PADDED, M, N)
            z += tl.dot(asked, tl.trans(far), input_precision="ieee") + bias[None, :]
            weights = tl.exp2(z * factor - level[:, None])
            grad = load_rows(do + start * do_stride + head * DIM, slot, inside, do_stride, DIM, PADDED)
            dw = skewed_keys(grad, v_head, near_key, keys, v_stride, DIM, PADDED, M, N) - centre[:, None]
            key = base - first + slot[:, None] - column[None, :]
            valid = (key >= 0) & (key < keys) & inside[:, None] & (first + column >= 0)[None, :]
            if WINDOWED:
                valid &= (first + column < window)[None, :]
            ds = tl.where(valid, weights * dw, 0.0)
            drows = tl.dot(tl.trans(ds).to(asked.dtype), asked, drows, input_precision="ieee")
            dbias += tl.sum(ds, axis=0)
    rank = tl.arange(0, WIDE)
    where = (split * HEADS + head).to(tl.int64) * rows + first
    local = column[:, None] * RANK + rank[None, :]
    tl.store(dr + where * RANK + local, drows * scale, mask=(rank < RANK)[None, :])
    tl.store(dbeta + where + column, dbias * scale)


@triton.jit
def skewed_keys(
    rows, base, first, keys, stride, DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Products of rows [M, PADDED] with the keys or values from `first` on, by distance [M, N]."""
    near = key_products(rows, base, first, keys, stride, DIM, PADDED, N)
    far = key_products(rows, base, first + N, keys, stride, DIM, PADDED, N)
    farther = far
    if M > N:
        farther = key_products(rows, base, first + 2 * N, keys, stride, DIM, PADDED, N)
    return skew(near, far, farther, M, N)


@triton.jit
def key_products(rows, base, first, keys, stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr):
    slot = first + tl.arange(0, N)
    block = base + tl.cast(first, tl.int64) * stride
    own = load_rows(block, tl.arange(0, N), (slot >= 0) & (slot < keys), stride, DIM, PADDED)
    return tl.dot(rows, tl.trans(own), input_precision="ieee")
