"""Forward kernels of the memory of two layers, one refresh per tile; equations in `mlp` and `network`.

M1  scan      a program owns a document and head, and walks over its tiles. The state (W, S of both layers) does not fit
              into one multiprocessor at every width: it stays where it is carried, fp32 in memory (in practice the L2
              cache), and passes through in blocks of WIDE hidden units: for the errors at the output, then for those
              inside and the write of the second layer, then for the write of the first. It stores the state that each
              tile begins with, in the inputs' dtype, and both layers' D.
M2  answer    a program owns a tile and head: the queries, hidden block by hidden block, through a memory that no
              token's weights are built for.

The coefficients come from `prepare` of the linear memory. Everything but the operands of products is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.titans.fused_coefficients import SIZES, VECTORS, tile_of
from farspan.kernels.titans.fused_linear_forward import load_tokens, store_tokens

EPS = tl.constexpr(1e-6)  # of kernels.titans.state


@triton.jit
def activate(z, GELU: tl.constexpr):
    """The activation of z and its derivative."""
    if GELU:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    s = 1.0 / (1.0 + tl.exp(-z))
    return z * s, s * (1.0 + z * (1.0 - s))


@triton.jit
def normalise(z, real, DIM: tl.constexpr):
    """x_hat, zero where there is no channel, and r [SLOTS, 1]."""
    centred = tl.where(real, z - (tl.sum(tl.where(real, z, 0.0), axis=1) / DIM)[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, axis=1) / DIM + EPS)[:, None]
    return centred * r, r


@triton.jit
def project(h, x_hat, real, DIM: tl.constexpr):
    """P(h) of `network`, for h that is zero where there is no channel."""
    mean = (tl.sum(h, axis=1) / DIM)[:, None]
    along = (tl.sum(h * x_hat, axis=1) / DIM)[:, None]
    return tl.where(real, h - mean - x_hat * along, 0.0)


@triton.jit
def load_norm(norm, head, HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Gain and bias [1, PADDED] of fp32 [2, H, D]."""
    channel = tl.arange(0, PADDED)
    at = norm + head * DIM + channel
    gain = tl.load(at, mask=channel < DIM, other=0.0)
    return gain[None, :], tl.load(at + HEADS * DIM, mask=channel < DIM, other=0.0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def mlp_scan_kernel(
    k, v, norm, table, sequences, shares, ends, carry_in, carry_out, states_in, states_out, hidden_deltas, deltas,
    tiles, documents, k_stride, v_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr,
    WIDE: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M1. carry_in: fp32 [documents, H, 2, D, HIDDEN], carry_out: [documents, H, 2, HIDDEN, D], changed in place.

    states_in, states_out: as these, per tile; hidden_deltas: [tiles, H, SLOTS, HIDDEN]; deltas: [tiles, H, SLOTS, D].
    norm: fp32 [2, H, D], gain and bias (not read without NORM).
    """
    head = tl.program_id(0) % HEADS
    document = tl.program_id(0) // HEADS
    first = tl.load(sequences + document)
    last = first + tl.load(sequences + documents + document)
    slot, channel, unit = tl.arange(0, SLOTS), tl.arange(0, PADDED), tl.arange(0, WIDE)
    SIZE: tl.constexpr = PADDED * HIDDEN
    carried = (document * HEADS + head).to(tl.int64) * (2 * SIZE)
    real = (channel < DIM)[None, :]
    first_at = channel[:, None] * HIDDEN + unit[None, :]
    second_at = unit[:, None] * PADDED + channel[None, :]
    for tile in tl.range(first, last, num_stages=1):
        start, count, _end = tile_of(table, tiles, tile)
        own = tile * HEADS + head
        key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
        value = load_tokens(v, start, count, head, v_stride, DIM, PADDED, SLOTS).to(tl.float32)
        hidden_at = own * (SLOTS * HIDDEN) + slot[:, None] * HIDDEN + unit[None, :]
        raw = tl.zeros([SLOTS, PADDED], tl.float32)
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            at_out = block * PADDED + second_at
            W = tl.load(carry_in + carried + at_in).to(key.dtype)
            x, slope = activate(tl.dot(key, W, input_precision=PRECISION), GELU)
            W = tl.load(carry_out + carried + at_out).to(key.dtype)
            raw += tl.dot(x.to(key.dtype), W, input_precision=PRECISION)
        if NORM:
            gain, bias = load_norm(norm, head, HEADS, DIM, PADDED)
            x_hat, r = normalise(raw, real, DIM)
            delta = r * project(gain * (key.to(tl.float32) + gain * x_hat + bias - value), x_hat, real, DIM)
        else:
            delta = raw - value
        tl.store(deltas + own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :], delta)

        share = shares + own * (VECTORS * SLOTS) + slot
        gamma = tl.load(share + 4 * SLOTS)[:, None]
        nu = tl.load(share + 5 * SLOTS)[:, None]
        A = tl.load(ends + own * 3)
        f = tl.load(ends + own * 3 + 1)
        H = tl.load(ends + own * 3 + 2)
        written = (gamma * delta).to(key.dtype)
        momentum_written = (nu * delta).to(key.dtype)
        delta = delta.to(key.dtype)
        to = own * (2 * SIZE)
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            at_out = block * PADDED + second_at
            W = tl.load(carry_in + carried + at_in).to(key.dtype)
            x, slope = activate(tl.dot(key, W, input_precision=PRECISION), GELU)
            W = tl.load(carry_out + carried + at_out)
            S = tl.load(carry_out + carried + SIZE + at_out)
            hidden = tl.dot(delta, tl.trans(W.to(key.dtype)), input_precision=PRECISION) * slope
            tl.store(hidden_deltas + hidden_at + block, hidden)
            tl.debug_barrier()  # another thread may store what this one has loaded, here and below
            tl.store(states_out + to + at_out, W)
            tl.store(states_out + to + SIZE + at_out, S)
            x = tl.trans(x.to(key.dtype))
            W = A * W + f * S - tl.dot(x, written, input_precision=PRECISION)
            tl.store(carry_out + carried + at_out, W)
            S = H * S - tl.dot(x, momentum_written, input_precision=PRECISION)
            tl.store(carry_out + carried + SIZE + at_out, S)
        tl.debug_barrier()
        keys = tl.trans(key)
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            W = tl.load(carry_in + carried + at_in)
            S = tl.load(carry_in + carried + SIZE + at_in)
            hidden = tl.load(hidden_deltas + hidden_at + block).to(tl.float32)
            tl.debug_barrier()
            tl.store(states_in + to + at_in, W)
            tl.store(states_in + to + SIZE + at_in, S)
            W = A * W + f * S - tl.dot(keys, (gamma * hidden).to(key.dtype), input_precision=PRECISION)
            tl.store(carry_in + carried + at_in, W)
            S = H * S - tl.dot(keys, (nu * hidden).to(key.dtype), input_precision=PRECISION)
            tl.store(carry_in + carried + SIZE + at_in, S)
        tl.debug_barrier()


@triton.jit
def ask(
    query, key, P, states_in, states_out, hidden_deltas, own, A, f,
    PADDED: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For P = G o Q K': the scores X~ X' of the hidden layer [SLOTS, SLOTS], and of the second layer
    diag(A) X~ W + diag(f) X~ S [SLOTS, D].
    """
    dtype: tl.constexpr = query.dtype
    channel, unit, slot = tl.arange(0, PADDED), tl.arange(0, WIDE), tl.arange(0, SLOTS)
    SIZE: tl.constexpr = PADDED * HIDDEN
    first_at = own * (2 * SIZE) + channel[:, None] * HIDDEN + unit[None, :]
    second_at = own * (2 * SIZE) + unit[:, None] * PADDED + channel[None, :]
    hidden_at = own * (SLOTS * HIDDEN) + slot[:, None] * HIDDEN + unit[None, :]
    by_A = (A * query.to(tl.float32)).to(dtype)
    by_f = (f * query.to(tl.float32)).to(dtype)
    scores = tl.zeros([SLOTS, SLOTS], tl.float32)
    out = tl.zeros([SLOTS, PADDED], tl.float32)
    for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
        at_in = block + first_at
        at_out = block * PADDED + second_at
        at = hidden_at + block
        W = tl.load(states_in + at_in)
        S = tl.load(states_in + SIZE + at_in)
        x, _slope = activate(tl.dot(key, W, input_precision=PRECISION), GELU)
        z = tl.dot(by_A, W, input_precision=PRECISION) + tl.dot(by_f, S, input_precision=PRECISION)
        z -= tl.dot(P, tl.load(hidden_deltas + at), input_precision=PRECISION)
        asked, _slope = activate(z, GELU)
        scores += tl.dot(asked.to(dtype), tl.trans(x.to(dtype)), input_precision=PRECISION)
        W = tl.load(states_out + at_out)
        S = tl.load(states_out + SIZE + at_out)
        out += tl.dot((A * asked).to(dtype), W, input_precision=PRECISION) + tl.dot(
            (f * asked).to(dtype), S, input_precision=PRECISION
        )
    return scores, out


@triton.jit(do_not_specialize=SIZES)
def mlp_answer_kernel(
    q, k, norm, table, shares, mixed, states_in, states_out, hidden_deltas, deltas, y,
    tiles, q_stride, k_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr,
    WIDE: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M2. y: [T, H, D]."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel = tl.arange(0, SLOTS), tl.arange(0, PADDED)
    own = (tile * HEADS + head).to(tl.int64)
    query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    share = shares + own * (VECTORS * SLOTS) + slot
    A = tl.load(share)[:, None]
    f = tl.load(share + SLOTS)[:, None]
    mixed += own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    P = (tl.load(mixed) * tl.dot(query, tl.trans(key), input_precision=PRECISION)).to(query.dtype)
    scores, z = ask(
        query, key, P, states_in, states_out, hidden_deltas, own, A, f,
        PADDED, HIDDEN, SLOTS, WIDE, GELU, PRECISION,
    )  # fmt: skip
    delta = tl.load(deltas + own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :])
    z -= tl.dot((tl.load(mixed) * scores).to(key.dtype), delta, input_precision=PRECISION)
    if NORM:
        gain, bias = load_norm(norm, head, HEADS, DIM, PADDED)
        x_hat, _r = normalise(z, (channel < DIM)[None, :], DIM)
        z = query.to(tl.float32) + gain * x_hat + bias
    store_tokens(y, z, start, count, head, HEADS, DIM, PADDED, SLOTS)
