"""Forward kernel of relative attention, and what all its kernels share.

A program owns M rows of one span and one query head, and runs over the tiles of N keys that they see, with the online
softmax of flash attention. What positions add to a tile's scores is

    sinusoids   one more product, with the rows of one table at the positions of the tile's keys; no head has its own
    table       the tile has M + N - 1 distances. With i0, j0 its first row and key, they lie in blocks of N:
                    block_b[m, c] = p_m r_(i0-j0-N+1+bN+c) + beta                     b = 0 .. M / N
                    score[m, n] += block_q[m, s] where n >= m mod N, else block_(q+1)[m, s]
                with s = (m - n - 1) mod N, q = m / N. s permutes each row and is its own inverse. The blocks of the
                next tile of keys are one further: one product with N distances for each tile. M is N or 2N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.softplus.fused_forward import load_keys, seen

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("tiles", "tokens", "distances", "window")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    a, p, k, v, positions, beta, o, lse, table, tiles, tokens, distances, window, factor,
    a_stride, p_stride, k_stride, v_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    RANK: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SINUSOID: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """o: [T, H, D]; lse: fp32 [H, T]. factor: of the scores, times log2(e)."""
    head = tl.program_id(0) % HEADS
    group = head // (HEADS // GROUPS)
    start, count, base, key_start, keys, key_position = load_tile(table, tl.program_id(0) // HEADS, tiles)
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    inside = slot < count
    content = load_rows(a + start * a_stride + head * DIM, slot, inside, a_stride, DIM, PADDED)
    asked = load_rows(p + start * p_stride + head * RANK, slot, inside, p_stride, RANK, WIDE)
    k += key_start * k_stride + group * DIM
    v += key_start * v_stride + group * DIM
    positions, beta = of_head(positions, beta, head, key_position, distances, RANK, SINUSOID)
    first, left, whole, last, end = key_ranges(base, count, keys, window, N, WINDOWED)

    acc = tl.zeros([M, PADDED], tl.float32)
    total, largest = tl.zeros([M], tl.float32), tl.full([M], float("-inf"), tl.float32)
    far, farther = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    if not SINUSOID:
        far = by_distance(asked, positions, beta, base - first + 1, distances, RANK, WIDE, N)
        if M > N:
            farther = by_distance(asked, positions, beta, base - first + 1 + N, distances, RANK, WIDE, N)
    if WINDOWED:
        acc, total, largest, far, farther = forward_blocks(
            acc, total, largest, far, farther, content, asked, base, k, v, positions, beta, first, left, end,
            distances, window, factor, k_stride, v_stride,
            DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, True, WINDOWED,
        )  # fmt: skip
    acc, total, largest, far, farther = forward_blocks(
        acc, total, largest, far, farther, content, asked, base, k, v, positions, beta, left, whole, end,
        distances, window, factor, k_stride, v_stride, DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, False, WINDOWED,
    )  # fmt: skip
    acc, total, largest, far, farther = forward_blocks(
        acc, total, largest, far, farther, content, asked, base, k, v, positions, beta, last, end, end,
        distances, window, factor, k_stride, v_stride, DIM, PADDED, RANK, WIDE, M, N, STAGES, SINUSOID, True, WINDOWED,
    )  # fmt: skip

    total = tl.where(total == 0, 1.0, total)  # rows that are not there
    mask = inside[:, None] & (channel < DIM)[None, :]
    o += (start * HEADS + head) * DIM
    tl.store(o + slot[:, None] * (HEADS * DIM) + channel[None, :], acc / total[:, None], mask=mask)
    tl.store(lse + head.to(tl.int64) * tokens + start + slot, (largest + tl.log2(total)) / LOG2E, mask=inside)


@triton.jit
def forward_blocks(
    acc, total, largest, far, farther, content, asked, base, k, v, positions, beta, begin, end, stop, distances, window,
    factor, k_stride, v_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SINUSOID: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Over keys begin .. end. far, farther: of a table, the blocks from `base - begin + 1` on."""
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
        z *= factor
        if MASKED:
            z = tl.where(visible(base + tl.arange(0, M)[:, None], n, stop, window, N, WINDOWED), z, float("-inf"))
        higher = tl.maximum(largest, tl.max(z, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key of the row was seen yet
        rescale = tl.exp2(largest - shift)
        weights = tl.exp2(z - shift[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        values = load_keys(v, n, stop, v_stride, DIM, PADDED, N, MASKED)
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
        largest = higher
    return acc, total, largest, far, farther


@triton.jit
def load_tile(table, tile, tiles):
    """Fields of a tile of `fused_plan.query_table`; addresses in int64, what counts within a document in int32."""
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    base = tl.load(table + 2 * tiles + tile).to(tl.int32)
    key_start = tl.load(table + 3 * tiles + tile)
    keys = tl.load(table + 4 * tiles + tile).to(tl.int32)
    key_position = tl.load(table + 5 * tiles + tile)
    return start, count, base, key_start, keys, key_position


@triton.jit
def load_rows(base, slot, inside, stride, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows [M, PADDED] of one head, 0 outside."""
    channel = tl.arange(0, PADDED)
    mask = inside[:, None]
    if DIM < PADDED:
        mask &= (channel < DIM)[None, :]
    return tl.load(base + (slot[:, None] * stride + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def of_head(positions, beta, head, key_position, distances, RANK: tl.constexpr, SINUSOID: tl.constexpr):
    """The tables as this head, and the keys of this span, read them."""
    if SINUSOID:
        return positions + key_position * RANK, beta
    first = head.to(tl.int64) * distances
    return positions + first * RANK, beta + first


@triton.jit
def key_ranges(base, count, keys, window, N: tl.constexpr, WINDOWED: tl.constexpr):
    """Edges of a tile of `count` rows: keys first .. left lie across the window's edge of some row, left .. whole are
    seen by all rows, last .. end lie across the diagonal or the last key. All but `end` are whole tiles of N from
    `first`.
    """
    first, left, end = 0, 0, tl.minimum(keys, base + count)
    if WINDOWED:
        first = tl.minimum(tl.maximum(base - window + 1, 0), end)
        left = first + tl.cdiv(tl.maximum(tl.minimum(base + count - window, end) - first, 0), N) * N
    whole = first + tl.maximum(tl.minimum(base + 1, keys) - first, 0) // N * N
    return first, left, whole, tl.maximum(left, whole), end


@triton.jit
def visible(at, n, stop, window, N: tl.constexpr, WINDOWED: tl.constexpr):
    """Which of the keys n .. n + N, [1, N], rows at distance `at` [M, 1] from key 0 see."""
    index = (n + tl.arange(0, N))[None, :]
    return seen(at, index, window, WINDOWED) & (index < stop)


@triton.jit
def load_distances(positions, first, distances, RANK: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr):
    """Rows of the table for distances first .. first + N, [N, WIDE]; below 0, where nothing is seen, any row."""
    index = tl.minimum(tl.maximum(first + tl.arange(0, N), 0), distances - 1)
    channel = tl.arange(0, WIDE)
    if RANK == WIDE:
        return tl.load(positions + (index[:, None] * RANK + channel[None, :]))
    return tl.load(positions + (index[:, None] * RANK + channel[None, :]), mask=(channel < RANK)[None, :], other=0.0)


@triton.jit
def load_beta(beta, first, distances, N: tl.constexpr):
    return tl.load(beta + tl.minimum(tl.maximum(first + tl.arange(0, N), 0), distances - 1))


@triton.jit
def by_distance(asked, positions, beta, first, distances, RANK: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr):
    """Products [M, N] with the distances first .. first + N, their beta included."""
    rows = load_distances(positions, first, distances, RANK, WIDE, N)
    products = tl.dot(asked, tl.trans(rows), input_precision="ieee")
    return products + load_beta(beta, first, distances, N)[None, :]


@triton.jit
def skew(first, second, third, M: tl.constexpr, N: tl.constexpr):
    """[M, N] by key from blocks by distance, of which the third is for M = 2N."""
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    if M == N:
        blocks = tl.where(column >= row, first, second)
    else:
        blocks = tl.where(row < N, tl.where(column >= row, first, second), tl.where(column >= row - N, second, third))
    return tl.gather(blocks, (row - column - 1) & (N - 1), 1)


@triton.jit
def unskewed(halves, block, M: tl.constexpr, N: tl.constexpr):
    """Of what `skew`'s gather brought back, the part of one block, 0 elsewhere."""
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    later = (column < row % N).to(tl.int32)
    return tl.where(row // N + later == block, halves, 0.0)
