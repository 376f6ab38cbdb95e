"""Backward kernels of the memory of two layers; equations in `mlp_backward` and `network`. The forward kernels
`prepare` and `mlp_scan` run again before them.

M3  answer    a program owns a tile and head: the queries, which need nothing of later tiles. It stores dQ, the
              gradients of Z~ of both layers, and the queries' part of the gradients of X and D of the keys.
M4  scan      a program owns a document and head, and walks over its tiles from the last to the first: dW and dS stay
              where they are carried, fp32 in memory, as the state in M1. It completes the gradients of X and D and
              takes them through the inner gradient, the second order with them, to keys and values.

Both go over the hidden units several times, so that a pass holds few things at once.

The backward kernels of `fused_coefficients` take what both leave of the coefficients' gradients to the gates. No two
programs write to one place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.titans.fused_coefficients import SIZES, VECTORS, tile_of
from farspan.kernels.titans.fused_linear_forward import load_tokens, store_tokens
from farspan.kernels.titans.fused_mlp_forward import (
    activate,
    ask,
    load_norm,
    normalise,
    project,
)


@triton.jit(do_not_specialize=SIZES)
def mlp_answer_backward_kernel(
    dy, q, k, norm, table, shares, mixed, states_in, states_out, hidden_deltas, deltas,
    dq, dk, asked, dhidden, dout, dinputs, dhidden_deltas, ddeltas, vectors, dmixed, dnorm,
    tiles, q_stride, k_stride, dy_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr,
    WIDE: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M3. dq: [T, H, D]. For M4, of the keys or queries of a tile: dk, ddeltas: fp32 [tiles, H, SLOTS, D]; dout (of Z~
    of the second layer): [tiles, H, SLOTS, D]; asked (X~), dhidden (of Z~ of the first), dinputs (of X),
    dhidden_deltas: [tiles, H, SLOTS, HIDDEN]. vectors: see `gates_backward_kernel`; dmixed: fp32 [tiles, H, SLOTS,
    SLOTS]; dnorm: fp32 [tiles, H, 2, D].
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot, channel, unit = tl.arange(0, SLOTS), tl.arange(0, PADDED), tl.arange(0, WIDE)
    dtype: tl.constexpr = q.dtype.element_ty
    SIZE: tl.constexpr = PADDED * HIDDEN
    own = (tile * HEADS + head).to(tl.int64)
    first_at = own * (2 * SIZE) + channel[:, None] * HIDDEN + unit[None, :]
    second_at = own * (2 * SIZE) + unit[:, None] * PADDED + channel[None, :]
    hidden_at = own * (SLOTS * HIDDEN) + slot[:, None] * HIDDEN + unit[None, :]
    rows_at = own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :]
    real = (channel < DIM)[None, :]
    query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    d = load_tokens(dy, start, count, head, dy_stride, DIM, PADDED, SLOTS)
    share = shares + own * (VECTORS * SLOTS) + slot
    A = tl.load(share)[:, None]
    f = tl.load(share + SLOTS)[:, None]
    square = own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    P = (tl.load(mixed + square) * tl.dot(query, tl.trans(key), input_precision=PRECISION)).to(dtype)
    scores, out = ask(
        query, key, P, states_in, states_out, hidden_deltas, own, A, f,
        PADDED, HIDDEN, SLOTS, WIDE, GELU, PRECISION,
    )  # fmt: skip

    mix = tl.load(mixed + square)
    outer = (mix * scores).to(dtype)
    rows = tl.load(deltas + rows_at)
    if NORM:
        out -= tl.dot(outer, rows, input_precision=PRECISION)
        gain, _bias = load_norm(norm, head, HEADS, DIM, PADDED)
        x_hat, r = normalise(out, real, DIM)
        d = d.to(tl.float32)
        to = dnorm + own * (2 * PADDED) + channel
        tl.store(to, tl.sum(d * x_hat, axis=0))
        tl.store(to + PADDED, tl.sum(d, axis=0))
        d = (r * project(gain * d, x_hat, real, DIM)).to(dtype)
    tl.store(dout + rows_at, d)
    tl.store(ddeltas + rows_at, -tl.dot(tl.trans(outer), d, input_precision=PRECISION))
    dscores = -tl.dot(d, tl.trans(rows), input_precision=PRECISION)
    tl.store(dmixed + square, dscores * scores)
    dscores = (dscores * mix).to(dtype)

    by_A = (A * query.to(tl.float32)).to(dtype)
    by_f = (f * query.to(tl.float32)).to(dtype)
    dA = tl.zeros([SLOTS], tl.float32)
    df = tl.zeros([SLOTS], tl.float32)
    for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
        at_in = block + first_at
        at_out = block * PADDED + second_at
        at = hidden_at + block
        delta = tl.load(hidden_deltas + at)
        W = tl.load(states_in + at_in)
        S = tl.load(states_in + SIZE + at_in)
        x, slope = activate(tl.dot(key, W, input_precision=PRECISION), GELU)
        x = x.to(dtype)
        z = (
            tl.dot(by_A, W, input_precision=PRECISION)
            + tl.dot(by_f, S, input_precision=PRECISION)
            - tl.dot(P, delta, input_precision=PRECISION)
        )
        own_asked, slope = activate(z, GELU)
        tl.store(asked + at, own_asked)
        W_out = tl.load(states_out + at_out)
        by = tl.dot(d, tl.trans(W_out), input_precision=PRECISION)
        dA += tl.sum(by * own_asked, axis=1)
        dz = A * by
        W_out = tl.load(states_out + SIZE + at_out)
        by = tl.dot(d, tl.trans(W_out), input_precision=PRECISION)
        df += tl.sum(by * own_asked, axis=1)
        dz = (dz + f * by + tl.dot(dscores, x, input_precision=PRECISION)) * slope
        tl.store(dinputs + at, tl.dot(tl.trans(dscores), own_asked.to(dtype), input_precision=PRECISION))
        tl.store(dhidden + at, dz)
    tl.debug_barrier()
    dP = tl.zeros([SLOTS, SLOTS], tl.float32)
    dquery = tl.zeros([SLOTS, PADDED], tl.float32)
    for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
        at_in = block + first_at
        at = hidden_at + block
        dz = tl.load(dhidden + at)
        tl.store(dhidden_deltas + at, -tl.dot(tl.trans(P), dz, input_precision=PRECISION))
        dP -= tl.dot(dz, tl.trans(tl.load(hidden_deltas + at)), input_precision=PRECISION)
        by = tl.dot(dz, tl.trans(tl.load(states_in + at_in)), input_precision=PRECISION)
        dA += tl.sum(by * query, axis=1)
        dquery += A * by
        by = tl.dot(dz, tl.trans(tl.load(states_in + SIZE + at_in)), input_precision=PRECISION)
        df += tl.sum(by * query, axis=1)
        dquery += f * by

    # loaded again: nothing of these has to stay through the loop
    tl.debug_barrier()
    query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
    key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
    qk = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    dmix = tl.load(dmixed + square) + dP * qk
    tl.debug_barrier()
    tl.store(dmixed + square, dmix)
    dqk = (dP * tl.load(mixed + square)).to(dtype)
    dquery += tl.dot(dqk, key, input_precision=PRECISION)
    if NORM:
        dquery += load_tokens(dy, start, count, head, dy_stride, DIM, PADDED, SLOTS).to(tl.float32)
    store_tokens(dq, dquery, start, count, head, HEADS, DIM, PADDED, SLOTS)
    tl.store(dk + rows_at, tl.dot(tl.trans(dqk), query, input_precision=PRECISION))
    tl.store(vectors + own * (VECTORS * SLOTS) + slot, dA)
    tl.store(vectors + own * (VECTORS * SLOTS) + SLOTS + slot, df)


@triton.jit
def curvature(z, GELU: tl.constexpr):
    """The second derivative of the activation."""
    if GELU:
        return tl.exp(-0.5 * z * z) * 0.3989422804014327 * (2.0 - z * z)
    s = 1.0 / (1.0 + tl.exp(-z))
    return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


@triton.jit(do_not_specialize=SIZES)
def mlp_scan_backward_kernel(
    q, k, v, norm, table, sequences, shares, ends, states_in, states_out, hidden_deltas, deltas,
    asked, dhidden, dout, dinputs, dhidden_deltas, ddeltas, dkeys, dcarry_in, dcarry_out, dk, dv,
    vectors, scalars, dnorm, tiles, documents, q_stride, k_stride, v_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, SLOTS: tl.constexpr,
    WIDE: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M4. dcarry_in, dcarry_out: as `carry_in` and `carry_out`, changed in place; dk, dv: [T, H, D]; dkeys: what M3
    found of dk; dnorm: fp32 [tiles, H, 2, D], added to; dhidden_deltas is completed, dinputs overwritten.
    """
    head = tl.program_id(0) % HEADS
    document = tl.program_id(0) // HEADS
    first = tl.load(sequences + document)
    count_tiles = tl.load(sequences + documents + document)
    slot, channel, unit = tl.arange(0, SLOTS), tl.arange(0, PADDED), tl.arange(0, WIDE)
    dtype: tl.constexpr = k.dtype.element_ty
    SIZE: tl.constexpr = PADDED * HIDDEN
    carried = (document * HEADS + head).to(tl.int64) * (2 * SIZE)
    real = (channel < DIM)[None, :]
    first_at = channel[:, None] * HIDDEN + unit[None, :]
    second_at = unit[:, None] * PADDED + channel[None, :]
    for step in tl.range(0, count_tiles, num_stages=1):
        tile = first + count_tiles - 1 - step
        start, count, _end = tile_of(table, tiles, tile)
        own = tile * HEADS + head
        state = own * (2 * SIZE)
        hidden_at = own * (SLOTS * HIDDEN) + slot[:, None] * HIDDEN + unit[None, :]
        rows_at = own * (SLOTS * PADDED) + slot[:, None] * PADDED + channel[None, :]
        key = load_tokens(k, start, count, head, k_stride, DIM, PADDED, SLOTS)
        share = shares + own * (VECTORS * SLOTS) + slot
        gamma = tl.load(share + 4 * SLOTS)[:, None]
        nu = tl.load(share + 5 * SLOTS)[:, None]
        delta = tl.load(deltas + rows_at)
        ddelta = tl.load(ddeltas + rows_at)
        written = (gamma * key.to(tl.float32)).to(dtype)
        momentum_written = (nu * key.to(tl.float32)).to(dtype)
        raw = tl.zeros([SLOTS, PADDED], tl.float32)
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            at_out = block * PADDED + second_at
            at = hidden_at + block
            W = tl.load(states_in + state + at_in)
            x, slope = activate(tl.dot(key, W, input_precision=PRECISION), GELU)
            d = tl.load(dhidden_deltas + at).to(tl.float32)
            W = tl.load(dcarry_in + carried + at_in).to(dtype)
            d -= tl.dot(written, W, input_precision=PRECISION)
            W = tl.load(dcarry_in + carried + SIZE + at_in).to(dtype)
            d -= tl.dot(momentum_written, W, input_precision=PRECISION)
            tl.debug_barrier()  # another thread may store what this one has loaded, here and below
            tl.store(dhidden_deltas + at, d)
            W = tl.load(states_out + state + at_out)
            ddelta += tl.dot((d * slope).to(dtype), W, input_precision=PRECISION)
            if NORM:
                raw += tl.dot(x.to(dtype), W, input_precision=PRECISION)
            W = tl.load(dcarry_out + carried + at_out).to(dtype)
            ddelta -= tl.dot((gamma * x).to(dtype), W, input_precision=PRECISION)
            W = tl.load(dcarry_out + carried + SIZE + at_out).to(dtype)
            ddelta -= tl.dot((nu * x).to(dtype), W, input_precision=PRECISION)
        tl.debug_barrier()

        dkey = tl.load(dkeys + rows_at)
        if NORM:
            gain, bias = load_norm(norm, head, HEADS, DIM, PADDED)
            x_hat, r = normalise(raw, real, DIM)
            value = load_tokens(v, start, count, head, v_stride, DIM, PADDED, SLOTS)
            e = tl.where(real, key.to(tl.float32) + gain * x_hat + bias - value.to(tl.float32), 0.0)
            h = gain * e
            dh = r * project(ddelta, x_hat, real, DIM)
            de = gain * dh
            from_h = (tl.sum(h * x_hat, axis=1) / DIM)[:, None]
            from_delta = (tl.sum(ddelta * x_hat, axis=1) / DIM)[:, None]
            dx_hat = gain * de - r * (ddelta * from_h + h * from_delta)
            dr = tl.sum(ddelta * project(h, x_hat, real, DIM), axis=1)[:, None]
            dz_out = r * project(dx_hat, x_hat, real, DIM) - x_hat * (dr * r * r / DIM)
            to = dnorm + own * (2 * PADDED) + channel
            dgain = tl.load(to) + tl.sum(dh * e + de * x_hat, axis=0)
            dbias = tl.load(to + PADDED) + tl.sum(de, axis=0)
            tl.debug_barrier()
            tl.store(to, dgain)
            tl.store(to + PADDED, dbias)
            dkey += de
            dvalue = -de
        else:
            dz_out = ddelta
            dvalue = -ddelta
        store_tokens(dv, dvalue, start, count, head, HEADS, DIM, PADDED, SLOTS)
        dz_out = dz_out.to(dtype)

        A = tl.load(ends + own * 3)
        f = tl.load(ends + own * 3 + 1)
        H = tl.load(ends + own * 3 + 2)
        dgamma = tl.zeros([SLOTS], tl.float32)
        dnu = tl.zeros([SLOTS], tl.float32)
        dA, df, dH = 0.0, 0.0, 0.0
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            at_out = block * PADDED + second_at
            at = hidden_at + block
            W = tl.load(states_in + state + at_in)
            z = tl.dot(key, W, input_precision=PRECISION)
            x, slope = activate(z, GELU)
            W = tl.load(states_out + state + at_out)
            passed = tl.dot(delta, tl.trans(W), input_precision=PRECISION)
            dz = tl.load(dhidden_deltas + at).to(tl.float32) * passed * curvature(z, GELU)
            dx = tl.load(dinputs + at).to(tl.float32)
            dx += tl.dot(dz_out, tl.trans(W), input_precision=PRECISION)
            W = tl.load(dcarry_out + carried + at_out).to(dtype)
            by = tl.dot(delta, tl.trans(W), input_precision=PRECISION)
            dgamma -= tl.sum(by * x, axis=1)
            dx -= gamma * by
            W = tl.load(dcarry_out + carried + SIZE + at_out).to(dtype)
            by = tl.dot(delta, tl.trans(W), input_precision=PRECISION)
            dnu -= tl.sum(by * x, axis=1)
            dx -= nu * by
            tl.debug_barrier()
            tl.store(dinputs + at, dz + dx * slope)
        tl.debug_barrier()
        d_out = tl.load(dout + rows_at).to(tl.float32)
        A_read = tl.load(share)[:, None]
        f_read = tl.load(share + SLOTS)[:, None]
        A_out = (A_read * d_out).to(dtype)
        f_out = (f_read * d_out).to(dtype)
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            at_out = block * PADDED + second_at
            at = hidden_at + block
            W = tl.load(states_in + state + at_in)
            x, slope = activate(tl.dot(key, W, input_precision=PRECISION), GELU)
            d = (tl.load(dhidden_deltas + at).to(tl.float32) * slope).to(dtype)
            W_out = tl.load(states_out + state + at_out).to(tl.float32)
            S_out = tl.load(states_out + state + SIZE + at_out).to(tl.float32)
            dW = tl.load(dcarry_out + carried + at_out)
            dS = tl.load(dcarry_out + carried + SIZE + at_out)
            dA += tl.sum(dW * W_out)
            df += tl.sum(dW * S_out)
            dH += tl.sum(dS * S_out)
            own_asked = tl.trans(tl.load(asked + at))
            tl.debug_barrier()
            dS = f * dW + H * dS + tl.dot(own_asked, f_out, input_precision=PRECISION)
            tl.store(dcarry_out + carried + SIZE + at_out, dS)
            dW = A * dW + tl.dot(own_asked, A_out, input_precision=PRECISION)
            dW += tl.dot(tl.trans(d), delta, input_precision=PRECISION)
            dW += tl.dot(tl.trans(x.to(dtype)), dz_out, input_precision=PRECISION)
            tl.store(dcarry_out + carried + at_out, dW)
        query = load_tokens(q, start, count, head, q_stride, DIM, PADDED, SLOTS)
        for block in tl.range(0, HIDDEN, WIDE, num_stages=1):
            at_in = block + first_at
            at = hidden_at + block
            W = tl.load(states_in + state + at_in)
            dz = tl.load(dinputs + at)
            dkey += tl.dot(dz, tl.trans(W), input_precision=PRECISION)
            hidden = tl.load(hidden_deltas + at)
            S = tl.load(states_in + state + SIZE + at_in).to(tl.float32)
            dW = tl.load(dcarry_in + carried + at_in)
            dS = tl.load(dcarry_in + carried + SIZE + at_in)
            by = tl.dot(hidden, tl.trans(dW.to(dtype)), input_precision=PRECISION)
            dgamma -= tl.sum(by * key, axis=1)
            dkey -= gamma * by
            by = tl.dot(hidden, tl.trans(dS.to(dtype)), input_precision=PRECISION)
            dnu -= tl.sum(by * key, axis=1)
            dkey -= nu * by
            dA += tl.sum(dW * W.to(tl.float32))
            df += tl.sum(dW * S)
            dH += tl.sum(dS * S)
            d = tl.load(dhidden + at).to(tl.float32)
            queries = tl.trans(query)
            dS = f * dW + H * dS + tl.dot(queries, (f_read * d).to(dtype), input_precision=PRECISION)
            dW = (
                A * dW
                + tl.dot(queries, (A_read * d).to(dtype), input_precision=PRECISION)
                + tl.dot(tl.trans(key), dz, input_precision=PRECISION)
            )
            tl.debug_barrier()
            tl.store(dcarry_in + carried + at_in, dW)
            tl.store(dcarry_in + carried + SIZE + at_in, dS)
        store_tokens(dk, dkey, start, count, head, HEADS, DIM, PADDED, SLOTS)
        tl.store(vectors + own * (VECTORS * SLOTS) + 4 * SLOTS + slot, dgamma)
        tl.store(vectors + own * (VECTORS * SLOTS) + 5 * SLOTS + slot, dnu)
        tl.store(scalars + own * 3, dA)
        tl.store(scalars + own * 3 + 1, df)
        tl.store(scalars + own * 3 + 2, dH)
        tl.debug_barrier()
