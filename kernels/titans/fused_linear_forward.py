"""Forward kernels of the linear memory, in tiles of SLOTS tokens that hold whole refreshes; equations in `linear`.

L1  solve     where a tile has more than one refresh, a program owns a tile and head: T = (I + L)^-1 with T diag(A^r) K,
              T diag(f^r) K and T V. T comes from the inverses of 16 x 16 blocks on the diagonal, row by row, and three
              products.
L2  scan      a program owns a document, a head and WIDE columns of its state (W, S), fp32 in registers, and walks over
              the tiles: it stores the state that each begins with, and its errors E.
L3  answer    a program owns a tile, a head and WIDE columns of the output.

The coefficients come from `coefficients_kernel` before. Operands of products are in the inputs' dtype (those of T in
fp32), everything else is fp32. Addresses of tokens and states are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.titans.fused_coefficients import SIZES, VECTORS, tile_of


@triton.jit
def load_tokens(x, start, count, head, stride, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr):
    """[SLOTS, PADDED] of x [T, H, D], zero where there is no token or channel."""
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    mask = (slot < count)[:, None] & (channel < DIM)[None, :]
    return tl.load(x + start * stride + head * DIM + slot[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(
    x, values, start, count, head,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """values [SLOTS, PADDED] into x [T, H, D], where there are a token and channel."""
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    mask = (slot < count)[:, None] & (channel < DIM)[None, :]
    tl.store(x + (start * HEADS + head) * DIM + slot[:, None] * (HEADS * DIM) + channel[None, :], values, mask=mask)


@triton.jit
def inverse(L, SLOTS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L [SLOTS, SLOTS]."""
    BLOCKS: tl.constexpr = SLOTS // 16
    number = tl.arange(0, BLOCKS)
    here = number[:, None, None, None] == number[None, None, :, None]
    inner = tl.arange(0, 16)
    own = tl.sum(tl.where(here, tl.reshape(L, [BLOCKS, 16, BLOCKS, 16]), 0.0), axis=2)
    # row i of a block's inverse is e_i less row i of L times the rows that are known
    solved = tl.where(inner[None, :, None] == inner[None, None, :], 1.0, 0.0) + tl.zeros([BLOCKS, 16, 16], tl.float32)
    for i in range(1, 16):
        factors = tl.sum(tl.where(inner[None, :, None] == i, own, 0.0), axis=1)
        update = tl.sum(factors[:, :, None] * solved, axis=1)
        solved -= tl.where(inner[None, :, None] == i, update[:, None, :], 0.0)
    T = tl.where(here, solved[:, :, None, :], 0.0)
    T = tl.reshape(T, [SLOTS, SLOTS])
    if BLOCKS > 1:
        # with D the inverses on the diagonal and N = D L below it, N^BLOCKS = 0: (I + N)^-1 = (I - N)(I + N^2) for 4
        slot = tl.arange(0, SLOTS)
        below = (slot // 16)[:, None] > (slot // 16)[None, :]
        N = tl.dot(T, tl.where(below, L, 0.0), input_precision=PRECISION)
        T -= tl.dot(N, T, input_precision=PRECISION) if BLOCKS == 2 else tl.zeros([SLOTS, SLOTS], tl.float32)
        if BLOCKS == 4:
            T += tl.dot(tl.dot(N, N, input_precision=PRECISION), T, input_precision=PRECISION)
            T -= tl.dot(N, T, input_precision=PRECISION)
    return T


@triton.jit(do_not_specialize=SIZES)
def solve_kernel(
    k, v, table, shares, refreshed, inverses, keys, momentum_keys, values,
    tiles, k_stride, v_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L1. In the inputs' dtype: inverses, T, [tiles, H, SLOTS, SLOTS], and the products [tiles, H, SLOTS, PADDED]."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    own = (tile * HEADS + head).to(tl.int64)
    square = own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    kk = tl.dot(key, tl.trans(key), input_precision=PRECISION)
    T = inverse(tl.load(refreshed + square) * kk, SLOTS, PRECISION)
    tl.store(inverses + square, T)
    shares += own * (VECTORS * SLOTS) + slot
    at = own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :]
    A = tl.load(shares + 2 * SLOTS)
    tl.store(keys + at, tl.dot((T * A[None, :]).to(key.dtype), key, input_precision=PRECISION))
    f = tl.load(shares + 3 * SLOTS)
    tl.store(momentum_keys + at, tl.dot((T * f[None, :]).to(key.dtype), key, input_precision=PRECISION))
    value = load_tokens(v, start, count, head, v_stride, DIM, PADDED, SLOTS)
    tl.store(values + at, tl.dot(T.to(key.dtype), value, input_precision=PRECISION))


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    k, v, keys, momentum_keys, values, table, sequences, shares, ends, carry, states, errors,
    tiles, documents, k_stride, v_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L2. sequences: int64 [2, documents]: first tile and tiles; carry: fp32 [documents, H, 2, D, D], W and S, changed
    in place; in the inputs' dtype, states [tiles, H, 2, PADDED, PADDED] and errors [tiles, H, SLOTS, PADDED].
    """
    PARTS: tl.constexpr = PADDED // WIDE
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HEADS
    document = tl.program_id(0) // (PARTS * HEADS)
    first = tl.load(sequences + document)
    last = first + tl.load(sequences + documents + document)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    column = part * WIDE + tl.arange(0, WIDE)
    real = (channel < DIM)[:, None] & (column < DIM)[None, :]
    carry += (document * HEADS + head).to(tl.int64) * (2 * DIM * DIM) + channel[:, None] * DIM + column[None, :]
    W = tl.load(carry, mask=real, other=0.0)
    S = tl.load(carry + DIM * DIM, mask=real, other=0.0)
    at_key = slot[:, None] * PADDED + channel[None, :]
    at_value = slot[:, None] * PADDED + column[None, :]
    at_state = channel[:, None] * PADDED + column[None, :]
    for tile in tl.range(first, last, num_stages=STAGES):
        start, count, _ = tile_of(table, tiles, tile)
        own = tile * HEADS + head
        to = states + own * (2 * PADDED * PADDED) + at_state
        tl.store(to, W)
        tl.store(to + PADDED * PADDED, S)
        key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
        tile_at = own * (SLOTS * PADDED)
        if SOLVE:
            E = tl.dot(tl.load(keys + tile_at + at_key), W.to(key.dtype), input_precision=PRECISION)
            E += tl.dot(tl.load(momentum_keys + tile_at + at_key), S.to(key.dtype), input_precision=PRECISION)
            E -= tl.load(values + tile_at + at_value).to(tl.float32)
        else:
            mask = (slot < count)[:, None] & (column < DIM)[None, :]
            value = v + start * v_stride + head * DIM + slot[:, None] * v_stride + column[None, :]
            E = tl.dot(key, W.to(key.dtype), input_precision=PRECISION) - tl.load(value, mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(errors + tile_at + at_value, E)
        share = shares + own * (VECTORS * SLOTS) + slot
        gamma = tl.load(share + 4 * SLOTS)
        nu = tl.load(share + 5 * SLOTS)
        A = tl.load(ends + own * 3)
        f = tl.load(ends + own * 3 + 1)
        H = tl.load(ends + own * 3 + 2)
        key = tl.trans(key)
        W = A * W + f * S - tl.dot(key, (gamma[:, None] * E).to(key.dtype), input_precision=PRECISION)
        S = H * S - tl.dot(key, (nu[:, None] * E).to(key.dtype), input_precision=PRECISION)
    tl.store(carry, W, mask=real)
    tl.store(carry + DIM * DIM, S, mask=real)


@triton.jit(do_not_specialize=SIZES)
def answer_kernel(
    q, k, table, shares, mixed, states, errors, y,
    tiles, q_stride, k_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L3. y: [T, H, D]."""
    PARTS: tl.constexpr = PADDED // WIDE
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HEADS
    tile = tl.program_id(0) // (PARTS * HEADS)
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    column = part * WIDE + tl.arange(0, WIDE)
    own = (tile * HEADS + head).to(tl.int64)
    query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    P = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    P *= tl.load(mixed + own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :])
    errors += own * (SLOTS * PADDED) + slot[:, None] * PADDED + column[None, :]
    out = -tl.dot(P.to(query.dtype), tl.load(errors), input_precision=PRECISION)
    states += own * (2 * PADDED * PADDED) + channel[:, None] * PADDED + column[None, :]
    shares += own * (VECTORS * SLOTS) + slot
    out += tl.load(shares)[:, None] * tl.dot(query, tl.load(states), input_precision=PRECISION)
    out += tl.load(shares + SLOTS)[:, None] * tl.dot(
        query, tl.load(states + PADDED * PADDED), input_precision=PRECISION
    )
    mask = (slot < count)[:, None] & (column < DIM)[None, :]
    tl.store(y + (start * HEADS + head) * DIM + slot[:, None] * (HEADS * DIM) + column[None, :], out, mask=mask)
