"""Backward kernels of RAT; everything that can be computed again is.

B0  gate      elementwise: do = dy z, dz, and delta = sum(do o) = sum(dy y), so that o itself is never stored.
B1  keys      a program owns a block of summaries of one head and runs over the later queries: dkeys, dvalues. Where
              summaries are few, the queries are split among programs and the parts added in a fixed order.
B2  queries   a program owns a tile of tokens and heads of one group, and sums the gradient of their shared query.
B3  states    a program owns all heads of a group for some rows at a time. Forward over the slots: running states, the
              probability p of the self term and its ds, dq. What the way back needs goes to a scratch that a program
              uses again for its next rows, so that it can stay in cache: k~_{t-1} - k_t and v~_{t-1} - v_t, p, ds.
              Back over the slots: adjoints in registers, dv, dgate, dk.

Sums over heads and tokens run in a fixed order; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.rat.fused_forward import (
    LOG2E,
    SIZES,
    angles,
    channels,
    gates,
    heads_of,
    load_summaries,
    swapped_channels,
)


@triton.jit(do_not_specialize=SIZES)
def gate_backward_kernel(
    dy, y, z, do, dz, delta, tokens, dy_stride, z_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """B0. do, dz: [T, H, D]; delta: fp32 [H, T]. A program owns M of the T * H rows."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    token, head = row // HEADS, row % HEADS
    inside = token < tokens
    channel = tl.arange(0, PADDED)
    mask = inside[:, None] & (channel < DIM)[None, :]
    lane = (head * DIM)[:, None] + channel[None, :]
    own = row[:, None] * DIM + channel[None, :]
    grad = tl.load(dy + token[:, None] * dy_stride + lane, mask=mask, other=0.0).to(tl.float32)
    output = tl.load(y + own, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(z + token[:, None] * z_stride + lane, mask=mask, other=0.0).to(tl.float32)
    opened, closed = gates(a)
    tl.store(do + own, grad * opened, mask=mask)
    product = grad * output
    tl.store(dz + own, product * closed, mask=mask)
    tl.store(delta + head * tokens + token, tl.sum(product, axis=1), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    turned, keys, values, do, lse, delta, dkeys, dvalues, table,
    entries, summaries, tokens, chunk, scale, turned_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """B1. dkeys, dvalues: fp32 [splits, summaries, H, D]."""
    head = tl.program_id(0) % HEADS
    entry = tl.program_id(0) // HEADS
    key_start = tl.load(table + entry)
    count = tl.load(table + entries + entry).to(tl.int32)
    index = tl.load(table + 2 * entries + entry).to(tl.int32) + tl.arange(0, N)
    begin = tl.load(table + 3 * entries + entry)
    position = tl.load(table + 4 * entries + entry).to(tl.int32)
    end = tl.load(table + 5 * entries + entry)
    full = tl.load(table + 6 * entries + entry)
    split = tl.load(table + 7 * entries + entry)
    channel = tl.arange(0, PADDED)
    slot = tl.arange(0, N)

    keys += (key_start * HEADS + head) * DIM
    values += (key_start * HEADS + head) * DIM
    k = load_summaries(keys, 0, count, HEADS, DIM, PADDED, N, True)
    v = load_summaries(values, 0, count, HEADS, DIM, PADDED, N, True)
    dk = tl.zeros([N, PADDED], tl.float32)
    dv = tl.zeros([N, PADDED], tl.float32)
    # from here on in tokens relative to `begin`: int32
    turned += begin * turned_stride + (head % GROUPS) * DIM
    do += (begin * HEADS + head) * DIM
    lse += head.to(tl.int64) * tokens + begin
    delta += head.to(tl.int64) * tokens + begin
    stop = (end - begin).to(tl.int32)
    whole = tl.minimum(tl.cdiv(tl.maximum((full - begin).to(tl.int32), 0), M) * M, tl.cdiv(stop, M) * M)
    dk, dv = keys_backward_blocks(
        dk, dv, k, v, turned, do, lse, delta, index, position, 0, whole, stop, chunk, scale * LOG2E, turned_stride,
        HEADS, DIM, PADDED, M, STAGES, True,
    )  # fmt: skip
    dk, dv = keys_backward_blocks(
        dk, dv, k, v, turned, do, lse, delta, index, position, whole, stop, stop, chunk, scale * LOG2E, turned_stride,
        HEADS, DIM, PADDED, M, STAGES, False,
    )  # fmt: skip
    at = (split * summaries + key_start + slot)[:, None] * (HEADS * DIM) + head * DIM + channel[None, :]
    mask = (slot < count)[:, None] & (channel < DIM)[None, :]
    tl.store(dkeys + at, dk * scale, mask=mask)
    tl.store(dvalues + at, dv, mask=mask)


@triton.jit
def keys_backward_blocks(
    dk, dv, k, v, turned, do, lse, delta, index, position, begin, end, stop, chunk, log2_scale, turned_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries begin .. end give to a block of summaries; scores are [N, M]."""
    for m in tl.range(begin, end, M, num_stages=STAGES):
        # scalar int64 for the block, int32 within it
        local, channel = tl.arange(0, M), tl.arange(0, PADDED)
        slot = m + local
        inside = slot < stop
        mask = inside[:, None] & (channel < DIM)[None, :]
        block = turned + tl.cast(m, tl.int64) * turned_stride
        q = tl.load(block + (local[:, None] * turned_stride + channel[None, :]), mask=mask, other=0.0)
        block = do + tl.cast(m, tl.int64) * (HEADS * DIM)
        grad = tl.load(block + (local[:, None] * (HEADS * DIM) + channel[None, :]), mask=mask, other=0.0)
        rows_lse = tl.load(lse + slot, mask=inside, other=float("inf"))
        rows_delta = tl.load(delta + slot, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="tf32x3") * log2_scale
        p = tl.exp2(scores - rows_lse[None, :] * LOG2E)
        if MASKED:
            p = tl.where(index[:, None] < ((position + slot) // chunk)[None, :], p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="tf32x3")
        dp = tl.dot(v, tl.trans(grad), input_precision="tf32x3")
        ds = p * (dp - rows_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def queries_backward_kernel(
    turned, keys, values, do, lse, delta, dturned, table, tiles, tokens, chunk, scale, turned_stride, share,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """B2. dturned: fp32 [splits, T, G, D]; split i sums over heads i * share .. (i + 1) * share of each group."""
    splits = tl.cdiv(HEADS // GROUPS, share)
    group = tl.program_id(0) % GROUPS
    split = tl.program_id(0) // GROUPS % splits
    tile = tl.program_id(0) // (GROUPS * splits)
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    position = tl.load(table + 2 * tiles + tile).to(tl.int32)
    key_start = tl.load(table + 3 * tiles + tile)
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    inside = slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    visible = (position + slot) // chunk
    seen = tl.max(tl.where(inside, visible, 0), axis=0)
    whole = position // chunk // N * N

    # scalar int64 for the tile, int32 within it
    turned += start * turned_stride + group * DIM
    q = tl.load(turned + slot[:, None] * turned_stride + channel[None, :], mask=mask, other=0.0)
    dq = tl.zeros([M, PADDED], tl.float32)
    for member in range(split * share, tl.minimum((split + 1) * share, HEADS // GROUPS)):
        head = group + GROUPS * member
        at = head.to(tl.int64) * tokens + start
        rows_lse = tl.load(lse + at + slot, mask=inside, other=float("inf")) * LOG2E
        rows_delta = tl.load(delta + at + slot, mask=inside, other=0.0)
        own = do + (start * HEADS + head) * DIM
        grad = tl.load(own + slot[:, None] * (HEADS * DIM) + channel[None, :], mask=mask, other=0.0)
        own_keys = keys + (key_start * HEADS + head) * DIM
        own_values = values + (key_start * HEADS + head) * DIM
        dq = queries_backward_blocks(
            dq, q, grad, rows_lse, rows_delta, own_keys, own_values, visible, 0, whole, seen, scale * LOG2E,
            HEADS, DIM, PADDED, N, STAGES, False,
        )  # fmt: skip
        dq = queries_backward_blocks(
            dq, q, grad, rows_lse, rows_delta, own_keys, own_values, visible, whole, seen, seen, scale * LOG2E,
            HEADS, DIM, PADDED, N, STAGES, True,
        )  # fmt: skip
    dturned += ((split.to(tl.int64) * tokens + start) * GROUPS + group) * DIM
    tl.store(dturned + slot[:, None] * (GROUPS * DIM) + channel[None, :], dq * scale, mask=mask)


@triton.jit
def queries_backward_blocks(
    dq, q, grad, rows_lse, rows_delta, keys, values, visible, begin, end, seen, log2_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add what summaries begin .. end of one head give to a tile of queries."""
    for n in tl.range(begin, end, N, num_stages=STAGES):
        k = load_summaries(keys, n, seen, HEADS, DIM, PADDED, N, MASKED)
        v = load_summaries(values, n, seen, HEADS, DIM, PADDED, N, MASKED)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="tf32x3") * log2_scale - rows_lse[:, None])
        if MASKED:
            p = tl.where((n + tl.arange(0, N))[None, :] < visible[:, None], p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision="tf32x3")
        ds = p * (dp - rows_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@triton.jit(do_not_specialize=SIZES)
def states_backward_kernel(
    q, k, v, gate, bias, cos, sin, initial_key, initial_value, incoming_key, incoming_value, table,
    do, lse, delta, dturned, dkeys, dvalues, dfinal_key, dfinal_value, scratch, scalars,
    dq, dk, dv, dgate, dbias, out_key, out_value,
    rows, slots, tokens, scale, q_stride, k_stride, v_stride, gate_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr, ROTATE: tl.constexpr, PIECES: tl.constexpr,
    GRADIENTS: tl.constexpr,
):  # fmt: skip
    """B3. dq, dk: [parts of a group, T, G, D]; dbias: fp32 [programs, H, D]; scratch: [programs, slots, 2, N, SHARE,
    PADDED]; scalars: fp32 [programs, slots, 2, N, SHARE].

    out_key, out_value: fp32 [documents, H, D], the adjoints of the running states that the documents continue. Without
    GRADIENTS (first pass over pieces) they are instead [rows, H, D], the adjoints of what each row starts from
    when nothing comes in from the rows after it, and nothing else is stored.
    """
    parts = GROUPS * tl.cdiv(HEADS // GROUPS, SHARE)
    part = tl.program_id(0) % parts
    group = part % GROUPS
    worker = (tl.program_id(0) // parts).to(tl.int64)
    workers = tl.num_programs(0) // parts
    head, real_head = heads_of(part, HEADS, GROUPS, SHARE)
    channel, real = channels(DIM, PADDED)
    lane = head[:, None] * DIM + channel[None, :]
    real_lane = real_head[:, None] & real[None, :]
    shared = group * DIM + channel[None, :]
    b = tl.load(bias + lane, mask=real_lane, other=0.0).to(tl.float32)
    dbias_tile = tl.zeros([N, SHARE, PADDED], tl.float32)

    local_row = tl.arange(0, N)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    local = local_row[:, :, None] * PADDED + tl.arange(0, PADDED)[None, None, :]
    scratch += tl.program_id(0).to(tl.int64) * slots * (2 * N * SHARE * PADDED)
    scalars += tl.program_id(0).to(tl.int64) * slots * (2 * N * SHARE)

    for tile in range(worker, tl.cdiv(rows, N), workers):
        row = tile * N + tl.arange(0, N)
        inside = row < rows
        base = tl.load(table + row, mask=inside, other=0)
        first = tl.load(table + rows + row, mask=inside, other=0)
        end = tl.load(table + 2 * rows + row, mask=inside, other=0)
        index = tl.load(table + 3 * rows + row, mask=inside, other=0)
        summary = tl.load(table + 4 * rows + row, mask=inside, other=-1)
        final = tl.load(table + 5 * rows + row, mask=inside, other=-1)
        given = tl.load(table + 6 * rows + row, mask=inside, other=-1)
        each_row = tl.where(inside, row, -1)
        if ROTATE:
            cosine, sine = angles(cos, sin, index, inside, DIM, PADDED)
            swapped = swapped_channels(DIM, PADDED)

        start = each_row if PIECES else given
        at = start[:, None, None] * (HEADS * DIM) + lane[None]
        continued = (start >= 0)[:, None, None] & real_lane[None]
        key = tl.load(initial_key + at, mask=continued, other=0.0).to(tl.float32)
        value = tl.load(initial_value + at, mask=continued, other=0.0).to(tl.float32)
        for slot in tl.range(0, slots, num_stages=STAGES):
            here = (slot >= first) & (slot < end)
            token = base + slot
            lanes_here = here[:, None, None] & real_lane[None]
            heads_here = here[:, None] & real_head[None, :]
            channels_here = here[:, None] & real[None, :]
            a = tl.load(gate + token[:, None, None] * gate_stride + lane[None], mask=lanes_here, other=float("inf"))
            new_key = tl.load(k + token[:, None] * k_stride + shared, mask=channels_here, other=0.0).to(tl.float32)
            new = tl.load(v + token[:, None, None] * v_stride + lane[None], mask=lanes_here, other=0.0).to(tl.float32)
            query = tl.load(q + token[:, None] * q_stride + shared, mask=channels_here, other=0.0).to(tl.float32)
            own = token[:, None, None] * (HEADS * DIM) + lane[None]
            grad = tl.load(do + own, mask=lanes_here, other=0.0).to(tl.float32)
            scalar = head[None, :] * tokens + token[:, None]
            rows_lse = tl.load(lse + scalar, mask=heads_here, other=float("inf"))
            rows_delta = tl.load(delta + scalar, mask=heads_here, other=0.0)

            closed = 1.0 / (1.0 + tl.exp(a.to(tl.float32) + b[None]))
            key_step = key - new_key[:, None, :]
            value_step = value - new
            key -= closed * key_step
            value -= closed * value_step
            p = tl.exp(tl.sum(query[:, None, :] * key, axis=2) * scale - rows_lse)
            ds = scale * p * (tl.sum(grad * value, axis=2) - rows_delta)
            steps = scratch + slot * (2 * N * SHARE * PADDED) + local
            tl.store(steps, key_step)
            tl.store(steps + N * SHARE * PADDED, value_step)
            scores = scalars + slot * (2 * N * SHARE) + local_row
            tl.store(scores, p)
            tl.store(scores + N * SHARE, ds)
            if GRADIENTS:
                query_grad = tl.sum(ds[:, :, None] * key, axis=1)
                first_heads = channels_here & (part < GROUPS)
                at_group = token[:, None] * (GROUPS * DIM) + shared
                inter = tl.load(dturned + at_group, mask=first_heads, other=0.0)
                if ROTATE:
                    partner = dturned + token[:, None] * (GROUPS * DIM) + group * DIM + swapped[None, :]
                    inter = inter * cosine - tl.load(partner, mask=first_heads, other=0.0) * sine
                sums = dq + (part // GROUPS).to(tl.int64) * tokens * (GROUPS * DIM) + at_group
                tl.store(sums, query_grad + inter, mask=channels_here)

        # adjoints that come in at the end of the row: of its summary, of the final state, of the rows after it
        at = summary[:, None, None] * (HEADS * DIM)
        finished = (summary >= 0)[:, None, None] & real_lane[None]
        key_adjoint = tl.load(dkeys + at + lane[None], mask=finished, other=0.0)
        value_adjoint = tl.load(dvalues + at + lane[None], mask=finished, other=0.0)
        if ROTATE:
            partner = dkeys + at + (head[:, None] * DIM + swapped[None, :])[None]
            partner_adjoint = tl.load(partner, mask=finished, other=0.0)
            key_adjoint = key_adjoint * cosine[:, None, :] - partner_adjoint * sine[:, None, :]
        at = final[:, None, None] * (HEADS * DIM) + lane[None]
        finished = (final >= 0)[:, None, None] & real_lane[None]
        key_adjoint += tl.load(dfinal_key + at, mask=finished, other=0.0).to(tl.float32)
        value_adjoint += tl.load(dfinal_value + at, mask=finished, other=0.0).to(tl.float32)
        if PIECES and GRADIENTS:
            at = row[:, None, None] * (HEADS * DIM) + lane[None]
            inside_lanes = inside[:, None, None] & real_lane[None]
            key_adjoint += tl.load(incoming_key + at, mask=inside_lanes, other=0.0)
            value_adjoint += tl.load(incoming_value + at, mask=inside_lanes, other=0.0)

        tl.debug_barrier()  # the scratch is written; other threads may read it
        for step in tl.range(0, slots, num_stages=STAGES):
            slot = slots - 1 - step
            here = (slot >= first) & (slot < end)
            token = base + slot
            lanes_here = here[:, None, None] & real_lane[None]
            channels_here = here[:, None] & real[None, :]
            own = token[:, None, None] * (HEADS * DIM) + lane[None]
            a = tl.load(gate + token[:, None, None] * gate_stride + lane[None], mask=lanes_here, other=float("inf"))
            grad = tl.load(do + own, mask=lanes_here, other=0.0).to(tl.float32)
            query = tl.load(q + token[:, None] * q_stride + shared, mask=channels_here, other=0.0).to(tl.float32)
            steps = scratch + slot * (2 * N * SHARE * PADDED) + local
            key_step = tl.load(steps).to(tl.float32)
            value_step = tl.load(steps + N * SHARE * PADDED).to(tl.float32)
            scores = scalars + slot * (2 * N * SHARE) + local_row
            p = tl.load(scores)
            ds = tl.load(scores + N * SHARE)

            opened, closed = gates(a.to(tl.float32) + b[None])
            key_adjoint += ds[:, :, None] * query[:, None, :]
            value_adjoint += p[:, :, None] * grad
            if GRADIENTS:
                gate_grad = opened * closed * (key_adjoint * key_step + value_adjoint * value_step)
                dbias_tile += gate_grad
                tl.store(dgate + own, gate_grad, mask=lanes_here)
                tl.store(dv + own, closed * value_adjoint, mask=lanes_here)
                key_grad = tl.sum(closed * key_adjoint, axis=1)
                at_group = token[:, None] * (GROUPS * DIM) + shared
                sums = dk + (part // GROUPS).to(tl.int64) * tokens * (GROUPS * DIM) + at_group
                tl.store(sums, key_grad, mask=channels_here)
            key_adjoint *= opened
            value_adjoint *= opened
        tl.debug_barrier()  # the scratch is read; the next rows may overwrite it

        to = given if GRADIENTS else each_row
        at = to[:, None, None] * (HEADS * DIM) + lane[None]
        stored = (to >= 0)[:, None, None] & real_lane[None]
        tl.store(out_key + at, key_adjoint, mask=stored)
        tl.store(out_value + at, value_adjoint, mask=stored)

    if GRADIENTS:
        to = dbias + worker * (HEADS * DIM) + lane
        tl.store(to, tl.sum(dbias_tile, axis=0), mask=real_lane)
