"""Backward kernels of the linear memory; equations in `linear_backward`. The forward kernels but
`answer` run again before them.

L4  local     a program owns a tile and head: dE as far as the tile's own outputs need it.
L5  scan      the tiles of a document from the last to the first, as L2: dW, dS in registers. It completes dE and stores
              the dW, dS that each tile ends with.
L6  scores    a program owns a tile and head: the gradients of Q K' and G.
L7  solve     likewise, where a tile has more than one refresh: dR and dV, the gradients of K K' and G^r.
L8  channels  a program owns a tile, a head and WIDE channels of q and k: dQ, dK, and its part of the gradients of the
              other coefficients.

Then the backward kernels of `fused_coefficients` take those of the coefficients to the gates.
No two programs write to one place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.titans.fused_coefficients import SIZES, VECTORS, tile_of
from farspan.kernels.titans.fused_linear_forward import load_tokens, store_tokens


@triton.jit(do_not_specialize=SIZES)
def local_kernel(
    dy, q, k, table, mixed, derrors,
    tiles, q_stride, k_stride, dy_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L4. derrors: fp32 [tiles, H, SLOTS, PADDED]."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    own = (tile * HEADS + head).to(tl.int64)
    query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    P = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    P *= tl.load(mixed + own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :])
    d = load_tokens(dy, start, count, head, dy_stride, DIM, PADDED, SLOTS)
    dE = -tl.dot(tl.trans(P.to(d.dtype)), d, input_precision=PRECISION)
    tl.store(derrors + own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :], dE)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    dy, q, k, keys, momentum_keys, table, sequences, shares, ends, dcarry, dstates, derrors,
    tiles, documents, q_stride, k_stride, dy_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """L5. dcarry: fp32 [documents, H, 2, D, D], changed in place; dstates: [tiles, H, 2, PADDED, PADDED] in the inputs'
    dtype; derrors: fp32 [tiles, H, SLOTS, PADDED], completed in place.
    """
    PARTS: tl.constexpr = PADDED // WIDE
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HEADS
    document = tl.program_id(0) // (PARTS * HEADS)
    first = tl.load(sequences + document)
    count_tiles = tl.load(sequences + documents + document)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    column = part * WIDE + tl.arange(0, WIDE)
    real = (channel < DIM)[:, None] & (column < DIM)[None, :]
    dcarry += (document * HEADS + head).to(tl.int64) * (2 * DIM * DIM) + channel[:, None] * DIM + column[None, :]
    dW = tl.load(dcarry, mask=real, other=0.0)
    dS = tl.load(dcarry + DIM * DIM, mask=real, other=0.0)
    at_key = slot[:, None] * PADDED + channel[None, :]
    at_value = slot[:, None] * PADDED + column[None, :]
    at_state = channel[:, None] * PADDED + column[None, :]
    for step in tl.range(0, count_tiles, num_stages=STAGES):
        tile = first + count_tiles - 1 - step
        start, count, _ = tile_of(table, tiles, tile)
        own = tile * HEADS + head
        to = dstates + own * (2 * PADDED * PADDED) + at_state
        tl.store(to, dW)
        tl.store(to + PADDED * PADDED, dS)
        key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
        query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
        mask = (slot < count)[:, None] & (column < DIM)[None, :]
        d = tl.load(
            dy + start * dy_stride + head * DIM + slot[:, None] * dy_stride + column[None, :], mask=mask, other=0.0
        )
        tile_at = own * (SLOTS * PADDED)
        share = shares + own * (VECTORS * SLOTS) + slot
        gamma = tl.load(share + 4 * SLOTS)
        nu = tl.load(share + 5 * SLOTS)
        dE = tl.load(derrors + tile_at + at_value)
        dE -= gamma[:, None] * tl.dot(key, dW.to(key.dtype), input_precision=PRECISION)
        dE -= nu[:, None] * tl.dot(key, dS.to(key.dtype), input_precision=PRECISION)
        tl.debug_barrier()  # another thread may store what this one has loaded
        tl.store(derrors + tile_at + at_value, dE)
        dE = dE.to(key.dtype)
        A = tl.load(ends + own * 3)
        f = tl.load(ends + own * 3 + 1)
        H = tl.load(ends + own * 3 + 2)
        query = tl.trans(query)
        dS = f * dW + H * dS
        dS += tl.dot(query, (tl.load(share + SLOTS)[:, None] * d).to(key.dtype), input_precision=PRECISION)
        dW = A * dW + tl.dot(query, (tl.load(share)[:, None] * d).to(key.dtype), input_precision=PRECISION)
        if SOLVE:
            dW += tl.dot(tl.trans(tl.load(keys + tile_at + at_key)), dE, input_precision=PRECISION)
            dS += tl.dot(tl.trans(tl.load(momentum_keys + tile_at + at_key)), dE, input_precision=PRECISION)
        else:
            dW += tl.dot(tl.trans(key), dE, input_precision=PRECISION)
    tl.store(dcarry, dW, mask=real)
    tl.store(dcarry + DIM * DIM, dS, mask=real)


@triton.jit(do_not_specialize=SIZES)
def scores_backward_kernel(
    dy, q, k, table, mixed, errors, derrors, dv, dqk, dmixed,
    tiles, q_stride, k_stride, dy_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, SOLVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """L6. dqk: [tiles, H, SLOTS, SLOTS] in the inputs' dtype; dmixed: fp32, likewise; dv: [T, H, D], where there is
    nothing to solve.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    own = (tile * HEADS + head).to(tl.int64)
    at = own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :]
    square = own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    if not SOLVE:
        store_tokens(dv, -tl.load(derrors + at), start, count, head, HEADS, DIM, PADDED, SLOTS)
    d = load_tokens(dy, start, count, head, dy_stride, DIM, PADDED, SLOTS)
    dP = -tl.dot(d, tl.trans(tl.load(errors + at)), input_precision=PRECISION)
    tl.store(dqk + square, dP * tl.load(mixed + square))
    query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    tl.store(dmixed + square, dP * tl.dot(query, tl.trans(key), input_precision=PRECISION))


@triton.jit(do_not_specialize=SIZES)
def solve_backward_kernel(
    k, table, refreshed, inverses, errors, derrors, dv, dkk, drefreshed,
    tiles, k_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L7. dv: [T, H, D]; dkk: [tiles, H, SLOTS, SLOTS] in the inputs' dtype, of K K', plus its transpose; drefreshed:
    fp32, likewise.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    own = (tile * HEADS + head).to(tl.int64)
    at = own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :]
    square = own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    E = tl.load(errors + at)
    dR = tl.dot(tl.trans(tl.load(inverses + square)), tl.load(derrors + at).to(E.dtype), input_precision=PRECISION)
    store_tokens(dv, -dR, start, count, head, HEADS, DIM, PADDED, SLOTS)
    dL = -tl.dot(dR.to(E.dtype), tl.trans(E), input_precision=PRECISION)
    d = dL * tl.load(refreshed + square)
    tl.store(dkk + square, d + tl.trans(d))
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    tl.store(drefreshed + square, dL * tl.dot(key, tl.trans(key), input_precision=PRECISION))


@triton.jit(do_not_specialize=SIZES)
def channels_backward_kernel(
    dy, q, k, table, shares, states, dstates, errors, dv, dqk, dkk, dq, dk, vectors, scalars,
    tiles, q_stride, k_stride, dy_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
    SOLVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """L8. dq, dk: [T, H, D]; vectors: fp32 [PADDED / WIDE, tiles, H, 6, SLOTS]; scalars: [.., tiles, H, 3]."""
    PARTS: tl.constexpr = PADDED // WIDE
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % HEADS
    tile = tl.program_id(0) // (PARTS * HEADS)
    start, count, _ = tile_of(table, tiles, tile)
    slot, column = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    channel = part * WIDE + tl.arange(0, WIDE)
    own = (tile * HEADS + head).to(tl.int64)
    mask = (slot < count)[:, None] & (channel < DIM)[None, :]
    query = tl.load(
        q + start * q_stride + head * DIM + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0
    )
    key = tl.load(k + start * k_stride + head * DIM + slot[:, None] * k_stride + channel[None, :], mask=mask, other=0.0)
    square = own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    shares += own * (VECTORS * SLOTS) + slot
    kept = part * tiles.to(tl.int64) * HEADS + own
    vectors += kept * (VECTORS * SLOTS) + slot
    scalars += kept * 3
    at_state = own * (2 * PADDED * PADDED) + channel[:, None] * PADDED + column[None, :]
    to = (start * HEADS + head) * DIM + slot[:, None] * (HEADS * DIM) + channel[None, :]

    W = tl.load(states + at_state)
    S = tl.load(states + PADDED * PADDED + at_state)
    d = load_tokens(dy, start, count, head, dy_stride, DIM, PADDED, SLOTS)
    by_W = tl.dot(d, tl.trans(W), input_precision=PRECISION)
    by_S = tl.dot(d, tl.trans(S), input_precision=PRECISION)
    tl.store(vectors, tl.sum(by_W * query, axis=1))
    tl.store(vectors + SLOTS, tl.sum(by_S * query, axis=1))
    d = tl.load(dqk + square)
    grad = (
        tl.load(shares)[:, None] * by_W
        + tl.load(shares + SLOTS)[:, None] * by_S
        + tl.dot(d, key, input_precision=PRECISION)
    )
    tl.store(dq + to, grad, mask=mask)

    grad = tl.dot(tl.trans(d), query, input_precision=PRECISION)
    d = -load_tokens(dv, start, count, head, HEADS * DIM, DIM, PADDED, SLOTS)
    by_W = tl.dot(d, tl.trans(W), input_precision=PRECISION)
    if SOLVE:
        by_S = tl.dot(d, tl.trans(S), input_precision=PRECISION)
        tl.store(vectors + 2 * SLOTS, tl.sum(by_W * key, axis=1))
        tl.store(vectors + 3 * SLOTS, tl.sum(by_S * key, axis=1))
        grad += tl.load(shares + 2 * SLOTS)[:, None] * by_W + tl.load(shares + 3 * SLOTS)[:, None] * by_S
        grad += tl.dot(tl.load(dkk + square), key, input_precision=PRECISION)
    else:
        grad += by_W

    dW = tl.load(dstates + at_state)
    dS = tl.load(dstates + PADDED * PADDED + at_state)
    tl.store(scalars, tl.sum(dW.to(tl.float32) * W.to(tl.float32)))
    tl.store(scalars + 1, tl.sum(dW.to(tl.float32) * S.to(tl.float32)))
    tl.store(scalars + 2, tl.sum(dS.to(tl.float32) * S.to(tl.float32)))
    E = tl.load(errors + own * (SLOTS * PADDED) + slot[:, None] * PADDED + column[None, :])
    by_W = tl.dot(E, tl.trans(dW), input_precision=PRECISION)
    by_S = tl.dot(E, tl.trans(dS), input_precision=PRECISION)
    tl.store(vectors + 4 * SLOTS, -tl.sum(by_W * key, axis=1))
    tl.store(vectors + 5 * SLOTS, -tl.sum(by_S * key, axis=1))
    grad -= tl.load(shares + 4 * SLOTS)[:, None] * by_W + tl.load(shares + 5 * SLOTS)[:, None] * by_S
    tl.store(dk + to, grad, mask=mask)
