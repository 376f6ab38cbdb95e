"""Backward kernels of core attention, from the inputs, o and lse alone.

    p = exp(s - lse)    ds = p (do v' - delta)    dq = scale ds k    dk = scale ds' q    dv = p' do

with one lse and delta = sum(do o) for keys and cores together.

B1  queries   a program owns a tile of queries of one head, as in the forward pass, and stores delta and dq.
B2  columns   a program owns a block of rows of keys (or of cores) of one of their heads, and runs over all queries
              that see any of it, of every piece that reads these rows and of every query head that shares them: dk,
              dv. Core j is seen from position g (j + 1) + s - 1 on, key r from r to g (r // g + 1) + s - 2. Where
              blocks are few, the queries are split among programs and the parts added in a fixed order.

A row that nothing sees gets zeros from B2. Sums run in a fixed order; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.cca.fused_forward import LOG2E, SIZES, core_blocks, key_blocks, load_rows, visible


@triton.jit(do_not_specialize=SIZES)
def queries_backward_kernel(
    q, k, v, core_k, core_v, o, do, lse, delta, dq, table,
    tiles, tokens, group, window, keys_seen, cores_seen, scale, bias,
    q_stride, k_stride, v_stride, core_k_stride, core_v_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, CORE_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """B1. do, dq: [T, H, D]; delta: fp32 [H, T]."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    position = tl.load(table + 2 * tiles + tile).to(tl.int32)
    k += tl.load(table + 3 * tiles + tile) * k_stride + head // (HEADS // KEY_HEADS) * DIM
    v += tl.load(table + 3 * tiles + tile) * v_stride + head // (HEADS // KEY_HEADS) * DIM
    core_k += tl.load(table + 4 * tiles + tile) * core_k_stride + head // (HEADS // CORE_HEADS) * DIM
    core_v += tl.load(table + 4 * tiles + tile) * core_v_stride + head // (HEADS // CORE_HEADS) * DIM
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    inside = slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    query = position + slot
    cores = tl.maximum(query + 1 - window, 0) // group

    # scalar int64 for the tile, int32 within it
    own = slot[:, None] * (HEADS * DIM) + channel[None, :]
    o += (start * HEADS + head) * DIM
    do += (start * HEADS + head) * DIM
    grad = tl.load(do + own, mask=mask, other=0.0)
    output = tl.load(o + own, mask=mask, other=0.0)
    rows_delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), axis=1)
    at = head.to(tl.int64) * tokens + start
    tl.store(delta + at + slot, rows_delta, mask=inside)
    rows_lse = tl.load(lse + at + slot, mask=inside, other=float("inf")) * LOG2E
    q += start * q_stride + head * DIM
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    acc = tl.zeros([M, PADDED], tl.float32)
    log2_scale = scale * LOG2E

    first, end, left, whole, all_blocks = key_blocks(position, count, group, window, N)
    whole *= keys_seen
    acc = queries_backward_blocks(
        acc, queries, grad, rows_lse, rows_delta, k, v, cores * group, query + 1, first + left * N, whole, 0, 0, end,
        log2_scale, k_stride, v_stride, DIM, PADDED, N, STAGES, False, False,
    )  # fmt: skip
    acc = queries_backward_blocks(
        acc, queries, grad, rows_lse, rows_delta, k, v, cores * group, query + 1, first, all_blocks * keys_seen - whole,
        left, whole, end, log2_scale, k_stride, v_stride, DIM, PADDED, N, STAGES, True, False,
    )  # fmt: skip
    rows_lse -= bias * LOG2E  # the bias of the cores' scores
    end, whole, all_blocks = core_blocks(position, count, group, window, N)
    acc = queries_backward_blocks(
        acc, queries, grad, rows_lse, rows_delta, core_k, core_v, cores, cores, 0, whole * cores_seen, 0, 0, end,
        log2_scale, core_k_stride, core_v_stride, DIM, PADDED, N, STAGES, False, True,
    )  # fmt: skip
    acc = queries_backward_blocks(
        acc, queries, grad, rows_lse, rows_delta, core_k, core_v, cores, cores, whole * N,
        (all_blocks - whole) * cores_seen, 0, 0, end, log2_scale, core_k_stride, core_v_stride,
        DIM, PADDED, N, STAGES, True, True,
    )  # fmt: skip
    dq += (start * HEADS + head) * DIM
    tl.store(dq + own, acc * scale, mask=mask)


@triton.jit
def queries_backward_blocks(
    acc, queries, grad, rows_lse, rows_delta, k, v, low, high, first, blocks, gap, jump, end, log2_scale,
    k_stride, v_stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """Add what blocks of keys (or cores) give to a tile of queries; arguments as in attend_blocks."""
    for block in tl.range(0, blocks, num_stages=STAGES):
        n = first + block * N
        if MASKED:
            n += tl.where(block < gap, 0, jump * N)
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, MASKED)
        values = load_rows(v, n, end, v_stride, DIM, PADDED, N, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * log2_scale
        p = tl.exp2(scores - rows_lse[:, None])
        if MASKED:
            p = tl.where(visible(n, low, high, N, CORES), p, 0.0)
        dp = tl.dot(grad, tl.trans(values), input_precision="tf32x3")
        ds = p * (dp - rows_delta[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=SIZES)
def columns_backward_kernel(
    q, k, v, do, lse, delta, dk, dv, table, segments, entries, pairs, rows, tokens, group, window, scale, bias,
    k_stride, v_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """B2. k, v: keys and values (CORES: of cores) with KEY_HEADS heads; dk, dv: [splits, rows, KEY_HEADS, D].

    q, do: contiguous, so that their addresses take no registers. bias: of the scores, 0 for keys that are no cores.
    """
    key_head = tl.program_id(0) % KEY_HEADS
    entry = tl.program_id(0) // KEY_HEADS
    row = tl.load(table + entry)
    count = tl.load(table + entries + entry).to(tl.int32)
    first_segment = tl.load(table + 2 * entries + entry).to(tl.int32)
    end_segment = tl.load(table + 3 * entries + entry).to(tl.int32)
    split = tl.load(table + 4 * entries + entry)
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)

    keys = load_rows(k + row * k_stride + key_head * DIM, 0, count, k_stride, DIM, PADDED, N, True)
    values = load_rows(v + row * v_stride + key_head * DIM, 0, count, v_stride, DIM, PADDED, N, True)
    acc_k = tl.zeros([N, PADDED], tl.float32)
    acc_v = tl.zeros([N, PADDED], tl.float32)
    # heads and segments in one loop: a nest of three leaves too few registers for the scalars of each
    for item in range(first_segment * (HEADS // KEY_HEADS), end_segment * (HEADS // KEY_HEADS)):
        segment = item // (HEADS // KEY_HEADS)
        head = key_head * (HEADS // KEY_HEADS) + item % (HEADS // KEY_HEADS)
        index = tl.load(segments + segment).to(tl.int32) + slot
        begin = tl.load(segments + pairs + segment)
        position = tl.load(segments + 2 * pairs + segment).to(tl.int32)
        # from here on in queries relative to `begin`, int32: which ones see each row
        if CORES:
            low = group * (index + 1) + window - 1 - position
            high = tl.full([N], 2**31 - 1, tl.int32)
        else:
            low = index - position
            high = group * (index // group + 1) + window - 1 - position
        end = (tl.load(segments + 3 * pairs + segment) - begin).to(tl.int32)
        left = tl.load(segments + 4 * pairs + segment).to(tl.int32)
        whole = tl.load(segments + 5 * pairs + segment).to(tl.int32)
        own = (begin * HEADS + head) * DIM
        at = head.to(tl.int64) * tokens + begin
        acc_k, acc_v = columns_backward_blocks(
            acc_k, acc_v, keys, values, q + own, do + own, lse + at, delta + at, low, high, left * M, whole, 0, 0, end,
            scale * LOG2E, bias * LOG2E, HEADS, DIM, PADDED, M, STAGES, False,
        )  # fmt: skip
        acc_k, acc_v = columns_backward_blocks(
            acc_k, acc_v, keys, values, q + own, do + own, lse + at, delta + at, low, high, 0, tl.cdiv(end, M) - whole,
            left, whole, end, scale * LOG2E, bias * LOG2E, HEADS, DIM, PADDED, M, STAGES, True,
        )  # fmt: skip
    at = (split * rows + row + slot)[:, None] * (KEY_HEADS * DIM) + key_head * DIM + channel[None, :]
    mask = (slot < count)[:, None] & (channel < DIM)[None, :]
    tl.store(dk + at, acc_k * scale, mask=mask)
    tl.store(dv + at, acc_v, mask=mask)


@triton.jit
def columns_backward_blocks(
    acc_k, acc_v, keys, values, q, do, lse, delta, low, high, first, blocks, gap, jump, end,
    log2_scale, log2_bias, HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what `blocks` tiles of queries from `first` on give to a block of keys (or cores); scores are [N, M].

    MASKED: after `gap` tiles the next `jump` ones are left out; queries from `end` on do not exist, and row i is seen
    by low[i] .. high[i] - 1. Bounds of rows and not of queries: a thread has many queries here, and few rows.
    """
    for block in tl.range(0, blocks, num_stages=STAGES):
        m = first + block * M
        if MASKED:
            m += tl.where(block < gap, 0, jump * M)
        queries = load_rows(q, m, end, HEADS * DIM, DIM, PADDED, M, MASKED)
        grad = load_rows(do, m, end, HEADS * DIM, DIM, PADDED, M, MASKED)
        slot = m + tl.arange(0, M)
        scores = tl.dot(keys, tl.trans(queries), input_precision="tf32x3") * log2_scale
        rows_lse = tl.load(lse + slot, mask=slot < end, other=float("inf")) * LOG2E - log2_bias
        p = tl.exp2(scores - rows_lse[None, :])
        if MASKED:
            p = tl.where((slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None]), p, 0.0)
        acc_v = tl.dot(p.to(grad.dtype), grad, acc_v, input_precision="tf32x3")
        dp = tl.dot(values, tl.trans(grad), input_precision="tf32x3")
        rows_delta = tl.load(delta + slot, mask=slot < end, other=0.0)
        ds = p * (dp - rows_delta[None, :])
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision="tf32x3")
    return acc_k, acc_v
