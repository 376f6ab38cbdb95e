"""Backward kernels of local linear attention: implicit differentiation, with one more solve per query (`chunked`).

    Gamma = g v     h = sum p (Gamma - mean Gamma) k     A y = h
    u = 1 - (k - kbar) x     D = Gamma - mean Gamma - (k - kbar) y     G = p (u D + ridge x.y)

B1  solve     a program owns M queries of one document and one head at a time, as in F1. Over the keys once: kbar, the
              mean of Gamma and h; then y. It stores x and y as matrix operands, and per query kbar x, kbar y, the mean
              of Gamma, ridge x.y and the gradient of the ridge.
B2  queries   a program owns a tile of queries of one head: dq = scale G K + y, and the parts of dscale.
B3  keys      a program owns a block of N keys of one key head, and runs over the queries that see any of it, of `share`
              of its query heads: dv = (p u)' g, dk = (scale G)' q - (p D)' x - (p u)' y. Parts of several programs are
              added in a fixed order; no atomics.

With an absolute ridge the last term of G is gone; rbf subtracts scale (sum G) k from dk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.kernels.local_linear.fused_forward import reach
from farspan.kernels.local_linear.fused_solve import (
    LEVEL,
    LINES,
    LOG2E,
    LSE,
    MEAN,
    NORM,
    PRODUCT,
    RESIDUAL,
    SIZES,
    SOLUTION,
    STRIP,
    VECTORS,
    ZERO,
    absolute_factor,
    add_dot,
    afresh,
    exact_dot,
    halves,
    keep,
    keep_line,
    keep_strip,
    line,
    load_rows,
    ridge_strip,
    solve,
    strip,
    weights,
)


@triton.jit(do_not_specialize=SIZES)
def solve_backward_kernel(
    q, k, v, do, ridge, scale, half, x, lse, pairs, scalars, space, table,
    tiles, tokens, rows, window, tolerance, iterations, ridge_stride, q_stride, k_stride, v_stride, do_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, DIAGONAL: tl.constexpr, ABSOLUTE: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """B1. do: [T, H, Dv]; x: fp32 [T, H, D]; lse: fp32 [T, H]; space: as in F1.

    pairs: [4, T, H, D], high x, high y, low x, low y, in the dtype of q; [2, T, H, D] without SPLIT. scalars: fp32
    [5, T, H]: kbar x, kbar y less the mean of Gamma, ridge x.y (0 with an absolute ridge), the gradient of the ridge,
    what B2 stores.
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

        own_q = q + start * q_stride + head * DIM
        own_k = k + key_start * k_stride + key_head * DIM
        own_v = v + key_start * v_stride + key_head * VALUE_DIM
        own_do = do + start * do_stride + head * VALUE_DIM
        own_half = half + key_head.to(tl.int64) * rows + key_start
        row = start * HEADS + head
        at = row + slot * HEADS
        queries = load_rows(own_q, 0, count, q_stride, DIM, PADDED, M, True)
        grad = load_rows(own_do, 0, count, do_stride, VALUE_DIM, VALUE_PADDED, M, True)
        log2_scale = tl.load(scale + head) * LOG2E
        keep_line(space, LSE, tl.load(lse + at, mask=inside, other=0.0) * LOG2E, M, PADDED)
        tl.debug_barrier()
        pull(
            space, grad, queries, own_k, own_v, own_half, query, begin, end, window, log2_scale, k_stride, v_stride,
            DIM, PADDED, VALUE_DIM, VALUE_PADDED, M, N, STAGES, WINDOWED, RBF, SPLIT,
        )  # fmt: skip
        tl.debug_barrier()
        level = line(space, LEVEL, M, PADDED)
        fitted = inside & (query > 0) & (window != 1)
        for first in range(0, PADDED, STRIP):
            h = strip(space, PRODUCT, first, M, PADDED) - level[:, None] * strip(space, MEAN, first, M, PADDED)
            keep_strip(space, RESIDUAL, first, tl.where(fitted[:, None], h, 0.0), M, PADDED)
        tl.debug_barrier()
        solve(
            space, ridge, ridge_stride, start, head, count, queries, own_k, own_half, query, begin, whole, end, window,
            log2_scale, tolerance, iterations, k_stride, HEADS,
            DIM, PADDED, M, N, STAGES, WINDOWED, DIAGONAL, ABSOLUTE, RBF, SPLIT,
        )  # fmt: skip

        start = tl.load(table + tile)  # again, or what follows from it is kept in registers through the solver
        row = start * HEADS + head
        at = row + slot * HEADS
        inside = slot < tl.load(table + tiles + tile).to(tl.int32)
        size = tl.cast(tokens, tl.int64) * HEADS
        norm = line(space, NORM, M, PADDED)
        along_x = tl.zeros([M], tl.float32)
        along_y = tl.zeros([M], tl.float32)
        of_ridge = tl.zeros([M], tl.float32)
        lift = tl.zeros([M], tl.float32)
        for first in range(0, PADDED, STRIP):
            channel = first + tl.arange(0, STRIP)
            mask = inside[:, None] & (channel < DIM)[None, :]
            local = row * DIM + (slot[:, None] * (HEADS * DIM) + channel[None, :])
            own_x = tl.load(x + local, mask=mask, other=0.0)
            y = strip(space, SOLUTION, first, M, PADDED) * norm[:, None]
            mean = strip(space, MEAN, first, M, PADDED)
            x_high, x_low = halves(own_x, SPLIT)
            y_high, y_low = halves(y, SPLIT)
            tl.store(pairs + local, x_high, mask=mask)
            tl.store(pairs + size * DIM + local, y_high, mask=mask)
            if SPLIT:
                tl.store(pairs + 2 * size * DIM + local, x_low, mask=mask)
                tl.store(pairs + 3 * size * DIM + local, y_low, mask=mask)
            along_x += tl.sum(own_x * mean, axis=1)
            along_y += tl.sum(y * mean, axis=1)
            of_ridge += tl.sum(own_x * y, axis=1)
            own_ridge = ridge_strip(
                space, ridge, ridge_stride, start, head, count, first, HEADS, DIM, PADDED, M, DIAGONAL, ABSOLUTE
            )  # fmt: skip
            lift += tl.sum(own_ridge * own_x * y, axis=1)
        if ABSOLUTE:
            of_ridge *= absolute_factor(line(space, LSE, M, PADDED))
            lift *= 0.0
        tl.store(scalars + at, along_x, mask=inside)
        tl.store(scalars + size + at, along_y - line(space, LEVEL, M, PADDED), mask=inside)
        tl.store(scalars + 2 * size + at, lift, mask=inside)
        tl.store(scalars + 3 * size + at, of_ridge, mask=inside)
        tl.debug_barrier()  # the workspace is the next tile's


@triton.jit
def pull(
    space, grad, queries, k, v, half, query, begin, end, window, log2_scale, k_stride, v_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Leave LEVEL sum p Gamma, MEAN sum p k and PRODUCT sum p Gamma k over keys begin .. end.

    One after the other: registers hold one sum of vectors, and no two.
    """
    lse = line(space, LSE, M, PADDED)
    mean = tl.zeros([M, PADDED], tl.float32)
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, True)
        p = weights(queries, keys, lse, half, query, n, end, window, log2_scale, N, WINDOWED, RBF, True)
        mean = add_dot(mean, p, keys, SPLIT)
    space = afresh(space, M, PADDED)
    keep(space, MEAN, mean, M, PADDED)
    level = tl.zeros([M], tl.float32)
    h = tl.zeros([M, PADDED], tl.float32)
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, True)
        p = weights(queries, keys, lse, half, query, n, end, window, log2_scale, N, WINDOWED, RBF, True)
        values = load_rows(v, n, end, v_stride, VALUE_DIM, VALUE_PADDED, N, True)
        pulled = p * tl.dot(grad, tl.trans(values), input_precision="ieee")
        level += tl.sum(pulled, axis=1)
        h = add_dot(h, pulled, keys, SPLIT)
    space = afresh(space, M, PADDED)
    keep(space, PRODUCT, h, M, PADDED)
    keep_line(space, LEVEL, level, M, PADDED)


@triton.jit(do_not_specialize=SIZES)
def queries_backward_kernel(
    q, k, v, do, scale, half, lse, pairs, scalars, dq, table,
    tiles, tokens, rows, window, q_stride, k_stride, v_stride, do_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """B2. dq: [T, H, D]; the gradient of the scale goes to scalars[4]."""
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
    do += start * do_stride + head * VALUE_DIM
    half += key_head.to(tl.int64) * rows + key_start
    row = start * HEADS + head
    size = tl.cast(tokens, tl.int64) * HEADS
    local = slot[:, None] * (HEADS * DIM) + channel[None, :]
    pairs += row * DIM
    at = row + slot * HEADS
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    of_values = inside[:, None] & (value < VALUE_DIM)[None, :]
    grad = tl.load(do + slot[:, None] * do_stride + value[None, :], mask=of_values, other=0.0)
    x_high, y_high = (
        tl.load(pairs + local, mask=mask, other=0.0),
        tl.load(pairs + size * DIM + local, mask=mask, other=0.0),
    )
    if SPLIT:
        x_low = tl.load(pairs + 2 * size * DIM + local, mask=mask, other=0.0)
        y_low = tl.load(pairs + 3 * size * DIM + local, mask=mask, other=0.0)
    else:
        x_low, y_low = x_high, y_high
    along_x = tl.load(scalars + at, mask=inside, other=0.0)
    along_d = tl.load(scalars + size + at, mask=inside, other=0.0)
    lift = tl.load(scalars + 2 * size + at, mask=inside, other=0.0)
    own_lse = tl.load(lse + at, mask=inside, other=0.0) * LOG2E
    own_scale = tl.load(scale + head)

    pulled = tl.zeros([M, PADDED], tl.float32)
    halved = tl.zeros([M], tl.float32)
    for n in tl.range(begin, end, N, num_stages=STAGES):
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, True)
        p = weights(queries, keys, own_lse, half, query, n, end, window, own_scale * LOG2E, N, WINDOWED, RBF, True)
        u = 1.0 + along_x[:, None] - exact_dot(x_high, x_low, tl.trans(keys), SPLIT)
        d = along_d[:, None] - exact_dot(y_high, y_low, tl.trans(keys), SPLIT)
        values = load_rows(v, n, end, v_stride, VALUE_DIM, VALUE_PADDED, N, True)
        d += tl.dot(grad, tl.trans(values), input_precision="ieee")
        through = p * (u * d + lift[:, None])
        pulled = add_dot(pulled, through, keys, SPLIT)
        if RBF:
            own = n + tl.arange(0, N)
            halved += tl.sum(through * tl.load(half + own, mask=own < end, other=0.0)[None, :], axis=1)
    tl.debug_barrier()  # or y and q would be kept in registers since their first use
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    y = tl.load(pairs + size * DIM + local, mask=mask, other=0.0).to(tl.float32)
    if SPLIT:
        y += tl.load(pairs + 3 * size * DIM + local, mask=mask, other=0.0).to(tl.float32)
    tl.store(dq + row * DIM + local, own_scale * pulled + y, mask=mask)
    of_scale = tl.sum(pulled * queries.to(tl.float32), axis=1) - halved
    tl.store(scalars + 4 * size + at, of_scale, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def keys_backward_kernel(
    q, k, v, do, scale, half, lse, pairs, scalars, dk, dv, table,
    entries, tokens, rows, window, share, q_stride, k_stride, v_stride, do_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """B3. dk: [splits, S, Hk, D] (KEYS); dv: [splits, S, Hk, Dv] (VALUES): both at once, or in two launches where one
    has not the registers. Split i of a key head has its query heads from i * share on.
    """
    groups: tl.constexpr = HEADS // KEY_HEADS
    splits = tl.cdiv(groups, share)
    key_head = tl.program_id(0) % KEY_HEADS
    split = tl.program_id(0) // KEY_HEADS % splits
    entry = tl.program_id(0) // (KEY_HEADS * splits)
    key_start = tl.load(table + entry)
    count = tl.load(table + entries + entry).to(tl.int32)
    index = tl.load(table + 2 * entries + entry).to(tl.int32)
    begin = tl.load(table + 3 * entries + entry)
    position = tl.load(table + 4 * entries + entry).to(tl.int32)
    stop = (tl.load(table + 5 * entries + entry) - begin).to(tl.int32)
    slot, channel, value = tl.arange(0, N), tl.arange(0, PADDED), tl.arange(0, VALUE_PADDED)

    keys = load_rows(k + key_start * k_stride + key_head * DIM, 0, count, k_stride, DIM, PADDED, N, True)
    values = load_rows(
        v + key_start * v_stride + key_head * VALUE_DIM, 0, count, v_stride, VALUE_DIM, VALUE_PADDED, N, True
    )  # fmt: skip
    if RBF:
        halved = tl.load(half + key_head.to(tl.int64) * rows + key_start + slot, mask=slot < count, other=0.0)
    else:
        halved = tl.zeros([N], tl.float32)
    acc_k = tl.zeros([N, PADDED], tl.float32)
    acc_v = tl.zeros([N, VALUE_PADDED], tl.float32)
    pulls = tl.zeros([N], tl.float32)
    for member in range(split * share, tl.minimum((split + 1) * share, groups)):
        head = key_head * groups + member
        row = begin * HEADS + head
        acc_k, acc_v, pulls = keys_backward_blocks(
            acc_k, acc_v, pulls, keys, values, halved, q + begin * q_stride + head * DIM,
            do + begin * do_stride + head * VALUE_DIM, lse + row, pairs + row * DIM, scalars + row,
            tl.cast(tokens, tl.int64) * HEADS, index, position, stop, window, tl.load(scale + head), q_stride,
            do_stride,
            HEADS, DIM, PADDED, VALUE_DIM, VALUE_PADDED, M, N, STAGES, WINDOWED, RBF, SPLIT, KEYS, VALUES,
        )  # fmt: skip
    at = (split.to(tl.int64) * rows + key_start + slot)[:, None] * KEY_HEADS + key_head
    if KEYS:
        if RBF:
            acc_k -= pulls[:, None] * keys.to(tl.float32)
        tl.store(dk + at * DIM + channel[None, :], acc_k, mask=(slot < count)[:, None] & (channel < DIM)[None, :])
    if VALUES:
        mask = (slot < count)[:, None] & (value < VALUE_DIM)[None, :]
        tl.store(dv + at * VALUE_DIM + value[None, :], acc_v, mask=mask)


@triton.jit
def keys_backward_blocks(
    acc_k, acc_v, pulls, keys, values, halved, q, do, lse, pairs, scalars, size, index, position, stop, window, scale,
    q_stride, do_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, WINDOWED: tl.constexpr, RBF: tl.constexpr,
    SPLIT: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Add what the `stop` queries from `position` on of one head give to a block of keys; scores are [N, M]."""
    for m in tl.range(0, stop, M, num_stages=STAGES):
        slot = m + tl.arange(0, M)
        inside = slot < stop
        at = slot * HEADS
        rows_lse = tl.load(lse + at, mask=inside, other=float("inf")) * LOG2E  # rows that do not exist weigh 0
        queries = load_rows(q, m, stop, q_stride, DIM, PADDED, M, True)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        if RBF:
            scores -= halved[:, None]
        p = tl.exp2(scores * (scale * LOG2E) - rows_lse[None, :])
        query, key = position + slot, index + tl.arange(0, N)
        visible = key[:, None] <= query[None, :]
        if WINDOWED:
            visible = visible & (key[:, None] > (query - window)[None, :])
        p = tl.where(visible, p, 0.0)

        x_high = load_rows(pairs, m, stop, HEADS * DIM, DIM, PADDED, M, True)
        product = tl.dot(keys, tl.trans(x_high), input_precision="ieee")
        if SPLIT:
            x_low = load_rows(pairs + 2 * size * DIM, m, stop, HEADS * DIM, DIM, PADDED, M, True)
            product = tl.dot(keys, tl.trans(x_low), product)
        pu = p * (1.0 + tl.load(scalars + at, mask=inside, other=0.0)[None, :] - product)
        grad = load_rows(do, m, stop, do_stride, VALUE_DIM, VALUE_PADDED, M, True)
        if VALUES:
            acc_v = tl.dot(pu.to(grad.dtype), grad, acc_v, input_precision="ieee")
        if KEYS:
            y_high = load_rows(pairs + size * DIM, m, stop, HEADS * DIM, DIM, PADDED, M, True)
            acc_k = tl.dot((-pu).to(y_high.dtype), y_high, acc_k, input_precision="ieee")
            product = tl.dot(keys, tl.trans(y_high), input_precision="ieee")
            if SPLIT:
                y_low = load_rows(pairs + 3 * size * DIM, m, stop, HEADS * DIM, DIM, PADDED, M, True)
                product = tl.dot(keys, tl.trans(y_low), product)
            d = tl.dot(values, tl.trans(grad), input_precision="ieee") - product
            d += tl.load(scalars + size + at, mask=inside, other=0.0)[None, :]
            acc_k = tl.dot((-p * d).to(x_high.dtype), x_high, acc_k, input_precision="ieee")
            lift = tl.load(scalars + 2 * size + at, mask=inside, other=0.0)
            through = (pu * d + p * lift[None, :]) * scale
            if RBF:
                pulls += tl.sum(through, axis=1)
            acc_k = tl.dot(through.to(queries.dtype), queries, acc_k, input_precision="ieee")
    return acc_k, acc_v, pulls
