"""Forward kernels of local linear attention.

F1  solve    a program owns M queries of one document and one head at a time. Over the keys once: online softmax, lse,
             kbar = sum p k. Then A x = kbar - q (fused_solve.py), over the keys in every iteration. It stores x, lse,
             kbar x, and what the log wants: iterations and residual. A fixed number of programs takes all tiles in
             turn, so that the workspaces stay in the cache.
F2  output   a program owns a tile of M queries of one head, and stores o = sum p (1 - (k x - kbar x)) v, and sum of
             |weights|.

A query that sees one key alone has A = ridge and no line to fit: x only multiplies k - kbar = 0. Its x is set to 0, so
that o is v and no gradient but that of v is more than rounding.

q, k, v are read in place with any token stride. Addresses are int64; everything but matrix operands is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.local_linear.fused_solve import (
    LINES,
    LOG2E,
    LSE,
    MEAN,
    NORM,
    RESIDUAL,
    SIZES,
    SOLUTION,
    SQUARE,
    STRIP,
    USED,
    VECTORS,
    ZERO,
    add_dot,
    exact_dot,
    halves,
    keep,
    keep_line,
    keep_strip,
    line,
    load_rows,
    scores_of,
    seen,
    solve,
    strip,
    weights,
)


@triton.jit(do_not_specialize=SIZES)
def solve_kernel(
    q, k, ridge, scale, half, x, lse, found, space, table,
    tiles, tokens, rows, window, tolerance, iterations, ridge_stride, q_stride, k_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, DIAGONAL: tl.constexpr, ABSOLUTE: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """F1. q: [T, H, D]; k: [S, Hk, D]; half: fp32 [Hk, S] (RBF); x: fp32 [T, H, D]; lse: fp32 [T, H].

    found: fp32 [5, T, H], iterations, residual, what F2 stores, and what it reads: kbar x, and lse in log2, as
    multiplying lse again would not give it back exactly. space: fp32 [programs, a workspace].
    """
    space += tl.program_id(0).to(tl.int64) * ((VECTORS * PADDED + LINES) * M)
    keep_line(space, ZERO, tl.zeros([M], tl.float32), M, PADDED)
    tl.debug_barrier()
    slot = tl.arange(0, M)
    for item in range(tl.program_id(0), tiles * HEADS, tl.num_programs(0)):
        head, tile = item % HEADS, item // HEADS
        start = tl.load(table + tile)
        count = tl.load(table + tiles + tile).to(tl.int32)
        position = tl.load(table + 2 * tiles + tile).to(tl.int32)
        key_start = tl.load(table + 3 * tiles + tile)
        key_head = head // (HEADS // KEY_HEADS)
        inside = slot < count
        query = position + slot
        begin, whole, end = reach(position, count, window, N, WINDOWED)

        # scalar int64 for the tile, int32 within it
        own_q = q + start * q_stride + head * DIM
        own_k = k + key_start * k_stride + key_head * DIM
        own_half = half + key_head.to(tl.int64) * rows + key_start
        queries = load_rows(own_q, 0, count, q_stride, DIM, PADDED, M, True)
        log2_scale = tl.load(scale + head) * LOG2E
        most, total, mean = statistics(
            queries, own_k, own_half, query, begin, end, window, log2_scale, k_stride,
            DIM, PADDED, M, N, STAGES, WINDOWED, RBF, SPLIT,
        )  # fmt: skip
        total = tl.where(inside, total, 1.0)  # every token sees itself: what has no weight is no query
        keep(space, MEAN, mean / total[:, None], M, PADDED)
        keep_line(space, LSE, tl.where(inside, most + tl.log2(total), 0.0), M, PADDED)
        tl.debug_barrier()
        fitted = inside & (query > 0) & (window != 1)
        for first in range(0, PADDED, STRIP):
            channel = first + tl.arange(0, STRIP)
            own_mask = fitted[:, None] & (channel < DIM)[None, :]
            own = tl.load(own_q + (slot[:, None] * q_stride + channel[None, :]), mask=own_mask, other=0.0)
            delta = strip(space, MEAN, first, M, PADDED) - own.to(tl.float32)
            keep_strip(space, RESIDUAL, first, tl.where(own_mask, delta, 0.0), M, PADDED)
        tl.debug_barrier()
        solve(
            space, ridge, ridge_stride, start, head, count, queries, own_k, own_half, query, begin, whole, end, window,
            log2_scale, tolerance, iterations, k_stride, HEADS,
            DIM, PADDED, M, N, STAGES, WINDOWED, DIAGONAL, ABSOLUTE, RBF, SPLIT,
        )  # fmt: skip

        row = start * HEADS + head
        size = tl.cast(tokens, tl.int64) * HEADS
        at = row + slot * HEADS
        norm = line(space, NORM, M, PADDED)
        along = tl.zeros([M], tl.float32)
        for first in range(0, PADDED, STRIP):
            channel = first + tl.arange(0, STRIP)
            solution = strip(space, SOLUTION, first, M, PADDED) * norm[:, None]
            along += tl.sum(solution * strip(space, MEAN, first, M, PADDED), axis=1)
            own_mask = inside[:, None] & (channel < DIM)[None, :]
            tl.store(x + row * DIM + (slot[:, None] * (HEADS * DIM) + channel[None, :]), solution, mask=own_mask)
        tl.store(found + 3 * size + at, along, mask=inside)
        tl.store(found + at, line(space, USED, M, PADDED), mask=inside)
        tl.store(found + size + at, tl.sqrt(line(space, SQUARE, M, PADDED)), mask=inside)
        tl.store(found + 4 * size + at, line(space, LSE, M, PADDED), mask=inside)
        tl.store(lse + at, line(space, LSE, M, PADDED) / LOG2E, mask=inside)
        tl.debug_barrier()  # the workspace is the next tile's


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q, k, v, scale, half, x, found, o, table,
    tiles, tokens, rows, window, q_stride, k_stride, v_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """F2. v: [S, Hk, Dv]; o: [T, H, Dv]; the rest as in F1."""
    head, tile = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    position = tl.load(table + 2 * tiles + tile).to(tl.int32)
    key_start = tl.load(table + 3 * tiles + tile)
    key_head = head // (HEADS // KEY_HEADS)
    slot, channel, value = tl.arange(0, M), tl.arange(0, PADDED), tl.arange(0, VALUE_PADDED)
    inside = slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    query = position + slot
    begin, _, end = reach(position, count, window, N, WINDOWED)

    q += start * q_stride + head * DIM
    k += key_start * k_stride + key_head * DIM
    v += key_start * v_stride + key_head * VALUE_DIM
    half += key_head.to(tl.int64) * rows + key_start
    row = start * HEADS + head
    size = tl.cast(tokens, tl.int64) * HEADS
    at = row + slot * HEADS
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    solution = tl.load(x + row * DIM + (slot[:, None] * (HEADS * DIM) + channel[None, :]), mask=mask, other=0.0)
    high, low = halves(solution, SPLIT)
    along = tl.load(found + 3 * size + at, mask=inside, other=0.0)
    own_lse = tl.load(found + 4 * size + at, mask=inside, other=0.0)
    log2_scale = tl.load(scale + head) * LOG2E

    out = tl.zeros([M, VALUE_PADDED], tl.float32)
    spread = tl.zeros([M], tl.float32)
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, True)
        p = weights(queries, keys, own_lse, half, query, n, end, window, log2_scale, N, WINDOWED, RBF, True)
        pu = p * (1.0 + along[:, None] - exact_dot(high, low, tl.trans(keys), SPLIT))
        spread += tl.sum(tl.abs(pu), axis=1)
        values = load_rows(v, n, end, v_stride, VALUE_DIM, VALUE_PADDED, N, True)
        out = tl.dot(pu.to(values.dtype), values, out, input_precision="ieee")
    o += row * VALUE_DIM + (slot[:, None] * (HEADS * VALUE_DIM) + value[None, :])
    tl.store(o, out, mask=inside[:, None] & (value < VALUE_DIM)[None, :])
    tl.store(found + 2 * size + at, spread, mask=inside)


@triton.jit
def reach(position, count, window, N: tl.constexpr, WINDOWED: tl.constexpr):
    """Keys begin .. end that some query of a tile sees; those before `whole` need no mask (all do with a window)."""
    end = position + count
    if WINDOWED:
        begin = tl.maximum(position - window + 1, 0)
        whole = begin
    else:
        begin, whole = position * 0, (position + 1) // N * N
    return begin, whole, end


@triton.jit
def statistics(
    queries, k, half, query, begin, end, window, log2_scale, k_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile over keys begin .. end in units of log2, and the sum of the keys under it.

    All blocks are masked: this is one pass, the solver makes many.
    """
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mean = tl.zeros([M, PADDED], tl.float32)
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, True)
        scores = scores_of(queries, keys, half, n, end, log2_scale, N, RBF, True)
        scores = tl.where(seen(query, n, window, N, WINDOWED), scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
        w = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(w, axis=1)
        mean = add_dot(mean * shrink[:, None], w, keys, SPLIT)
        most = higher
    return most, total, mean
