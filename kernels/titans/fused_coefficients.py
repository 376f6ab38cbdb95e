"""The scalar coefficients of a tile inside a kernel, and the gradients of the gates from theirs.

Letters as in `coefficients`. What a token of the tile meets is given by its reach n: the number of the tile's writes
that are in its memory (t + 1 for "post", t for "pre", the last refresh for inner gradients, `end` for the tile's end):
    A = exp(c_n)        Da[i] = exp(c_n - c_i) for i < n        G = Da De        f = Da H
with c the running sums of log a, taken in float64 and split in two fp32 numbers: neighbours of a long tile are
differences of large numbers. Slots without a token have log a = log eta = theta = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("tiles", "documents", "tokens", "parts")

# What `shares` keeps of a tile, in this order: A and f as the queries meet them, A and f as the inner gradients do,
# gamma and nu.
VECTORS = tl.constexpr(6)


@triton.jit
def tile_of(table, tiles, tile):
    """First token (int64), tokens, and tokens before the last refresh of a tile."""
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    end = tl.load(table + 2 * tiles + tile).to(tl.int32)
    return start, count, end


@triton.jit
def load_gate(gate, start, count, head, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """fp32 [SLOTS] of a gate [T, H]."""
    slot = tl.arange(0, SLOTS)
    return tl.load(gate + (start + slot) * HEADS + head, mask=slot < count, other=0.0)


@triton.jit
def split_sums(x):
    """Running sums of x as two fp32 numbers."""
    sums = tl.cumsum(x.to(tl.float64), axis=0)
    high = sums.to(tl.float32)
    return high, (sums - high.to(tl.float64)).to(tl.float32)


@triton.jit
def read_reach(PRE: tl.constexpr, SLOTS: tl.constexpr):
    slot = tl.arange(0, SLOTS)
    return slot if PRE else slot + 1


@triton.jit
def refresh_reach(refresh, SLOTS: tl.constexpr):
    return tl.arange(0, SLOTS) // refresh * refresh


@triton.jit
def responses(high, low, reach, SLOTS: tl.constexpr):
    """A [SLOTS] and Da [SLOTS, SLOTS] at the reach of every slot."""
    slot = tl.arange(0, SLOTS)
    chosen = slot[None, :] == reach[:, None] - 1
    to_high = tl.sum(tl.where(chosen, high[None, :], 0.0), axis=1)
    to_low = tl.sum(tl.where(chosen, low[None, :], 0.0), axis=1)
    difference = (to_high[:, None] - high[None, :]) + (to_low[:, None] - low[None, :])
    return tl.exp(to_high + to_low), tl.where(slot[None, :] < reach[:, None], tl.exp(tl.minimum(difference, 0.0)), 0.0)


@triton.jit
def end_responses(high, low, end, SLOTS: tl.constexpr):
    """A (a number) and Da [SLOTS] at the tile's end."""
    slot = tl.arange(0, SLOTS)
    to_high = tl.sum(tl.where(slot == end - 1, high, 0.0), axis=0)
    to_low = tl.sum(tl.where(slot == end - 1, low, 0.0), axis=0)
    difference = (to_high - high) + (to_low - low)
    return tl.exp(to_high + to_low), tl.where(slot < end, tl.exp(tl.minimum(difference, 0.0)), 0.0)


@triton.jit
def momenta(log_momentum, SLOTS: tl.constexpr):
    """H [SLOTS] and De [SLOTS, SLOTS]."""
    high, low = split_sums(log_momentum)
    slot = tl.arange(0, SLOTS)
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    De = tl.where(slot[None, :] <= slot[:, None], tl.exp(tl.minimum(difference, 0.0)), 0.0)
    return tl.exp(high + low), De


@triton.jit
def row(matrix, index, SLOTS: tl.constexpr):
    """One row of [SLOTS, SLOTS]; zeros where there is no such row."""
    return tl.sum(tl.where(tl.arange(0, SLOTS)[:, None] == index, matrix, 0.0), axis=0)


@triton.jit
def before(d, reach, SLOTS: tl.constexpr):
    """The gradient of x from d, that of the sums of x below each reach."""
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.where(slot[None, :] < reach[:, None], d[:, None], 0.0), axis=0)


@triton.jit
def onwards(d, SLOTS: tl.constexpr):
    """The gradient of x from d, that of the running sums of x."""
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.where(slot[None, :] <= slot[:, None], d[:, None], 0.0), axis=0)


@triton.jit
def vector_gradients(dA, df, A, Da, H, reach, SLOTS: tl.constexpr):
    """The gradients of log a and of the running sums of log eta [SLOTS] that come through A and f = Da H."""
    X = df[:, None] * Da * H[None, :]
    passed = tl.sum(X, axis=0)
    dlog_decay = before(dA * A + tl.sum(X, axis=1), reach, SLOTS) - onwards(passed, SLOTS)
    return dlog_decay, passed


@triton.jit(do_not_specialize=SIZES)
def coefficients_kernel(
    log_decay, log_momentum, rate, table, shares, ends, mixed, refreshed, tiles, refresh,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, PRE: tl.constexpr, SOLVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The coefficients of a tile and head, all fp32.

    shares: [tiles, H, 6, SLOTS]: A and f as the queries meet them, A and f as the inner gradients do, gamma and nu;
    ends: [tiles, H, 3]: A, f and H at the end; mixed, refreshed: [tiles, H, SLOTS, SLOTS], G diag(theta) as the queries
    meet it and as the inner gradients do. Those of the inner gradients only with SOLVE.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, end = tile_of(table, tiles, tile)
    slot = tl.arange(0, SLOTS)
    high, low = split_sums(load_gate(log_decay, start, count, head, HEADS, SLOTS))
    H, De = momenta(load_gate(log_momentum, start, count, head, HEADS, SLOTS), SLOTS)
    theta = load_gate(rate, start, count, head, HEADS, SLOTS)
    own = (tile * HEADS + head).to(tl.int64)
    shares += own * (VECTORS * SLOTS) + slot
    A_end, Da_end = end_responses(high, low, end, SLOTS)
    tl.store(shares + 4 * SLOTS, theta * tl.sum(Da_end[:, None] * De, axis=0))
    tl.store(shares + 5 * SLOTS, theta * row(De, end - 1, SLOTS))
    ends += own * 3
    tl.store(ends, A_end)
    tl.store(ends + 1, tl.sum(Da_end * H, axis=0))
    tl.store(ends + 2, tl.where(end > 0, tl.sum(tl.where(slot == end - 1, H, 0.0), axis=0), 1.0))
    at = own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :]
    A, Da = responses(high, low, read_reach(PRE, SLOTS), SLOTS)
    tl.store(shares, A)
    tl.store(shares + SLOTS, tl.sum(Da * H[None, :], axis=1))
    tl.store(mixed + at, tl.dot(Da, De, input_precision=PRECISION) * theta[None, :])
    if SOLVE:
        A, Da = responses(high, low, refresh_reach(refresh, SLOTS), SLOTS)
        tl.store(shares + 2 * SLOTS, A)
        tl.store(shares + 3 * SLOTS, tl.sum(Da * H[None, :], axis=1))
        tl.store(refreshed + at, tl.dot(Da, De, input_precision=PRECISION) * theta[None, :])


@triton.jit(do_not_specialize=SIZES)
def decay_backward_kernel(
    log_decay, log_momentum, rate, table, dmixed, partial, tiles, refresh,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, PRE: tl.constexpr, REFRESHED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From dmixed, the gradient of `mixed`, to that of log a: the first part of `partial` in `gates_backward_kernel`.

    REFRESHED: of `refreshed` instead, added to what is there.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot = tl.arange(0, SLOTS)
    own = (tile * HEADS + head).to(tl.int64)
    d = tl.load(dmixed + own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :])
    d *= load_gate(rate, start, count, head, HEADS, SLOTS)[None, :]
    _, De = momenta(load_gate(log_momentum, start, count, head, HEADS, SLOTS), SLOTS)
    X = tl.dot(d, tl.trans(De), input_precision=PRECISION)
    high, low = split_sums(load_gate(log_decay, start, count, head, HEADS, SLOTS))
    reach = refresh_reach(refresh, SLOTS) if REFRESHED else read_reach(PRE, SLOTS)
    _, Da = responses(high, low, reach, SLOTS)
    X *= Da
    ddecay = before(tl.sum(X, axis=1), reach, SLOTS) - onwards(tl.sum(X, axis=0), SLOTS)
    partial += own * (3 * SLOTS) + slot
    if REFRESHED:
        ddecay += tl.load(partial)
        tl.debug_barrier()  # another thread may store what this one has loaded
    tl.store(partial, ddecay)


@triton.jit(do_not_specialize=SIZES)
def momentum_backward_kernel(
    log_decay, log_momentum, rate, table, dmixed, partial, tiles, refresh,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, PRE: tl.constexpr, REFRESHED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Likewise to the running sums of log eta and to theta: the second and third part."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, _ = tile_of(table, tiles, tile)
    slot = tl.arange(0, SLOTS)
    own = (tile * HEADS + head).to(tl.int64)
    high, low = split_sums(load_gate(log_decay, start, count, head, HEADS, SLOTS))
    reach = refresh_reach(refresh, SLOTS) if REFRESHED else read_reach(PRE, SLOTS)
    _, Da = responses(high, low, reach, SLOTS)
    d = tl.load(dmixed + own * (SLOTS * SLOTS) + slot[:, None] * SLOTS + slot[None, :])
    X = tl.dot(tl.trans(Da), d, input_precision=PRECISION)
    _, De = momenta(load_gate(log_momentum, start, count, head, HEADS, SLOTS), SLOTS)
    X *= De
    drate = tl.sum(X, axis=0)
    theta = load_gate(rate, start, count, head, HEADS, SLOTS)
    dsums = tl.sum(X * theta[None, :], axis=1) - drate * theta
    partial += own * (3 * SLOTS) + slot
    if REFRESHED:
        dsums += tl.load(partial + SLOTS)
        drate += tl.load(partial + 2 * SLOTS)
        tl.debug_barrier()
    tl.store(partial + SLOTS, dsums)
    tl.store(partial + 2 * SLOTS, drate)


@triton.jit(do_not_specialize=SIZES)
def gates_backward_kernel(
    log_decay, log_momentum, rate, table, vectors, scalars, partial, dlog_decay, dlog_momentum, drate,
    tiles, parts, refresh,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, PRE: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """The gates' gradients [T, H] of a tile and head.

    vectors: fp32 [parts, tiles, H, 6, SLOTS], gradients of what `shares` keeps (the third and fourth only with SOLVE);
    scalars: [parts, tiles, H, 3], of A, f and H at the end; both are summed over the parts. partial: [tiles, H, 3,
    SLOTS], gradients of log a, of the running sums of log eta and of theta that are known already.
    """
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start, count, end = tile_of(table, tiles, tile)
    slot = tl.arange(0, SLOTS)
    high, low = split_sums(load_gate(log_decay, start, count, head, HEADS, SLOTS))
    H, De = momenta(load_gate(log_momentum, start, count, head, HEADS, SLOTS), SLOTS)
    theta = load_gate(rate, start, count, head, HEADS, SLOTS)
    own = (tile * HEADS + head).to(tl.int64)
    partial += own * (3 * SLOTS)
    ddecay = tl.load(partial + slot)
    dsums = tl.load(partial + SLOTS + slot)
    dtheta = tl.load(partial + 2 * SLOTS + slot)

    reach = read_reach(PRE, SLOTS)
    A, Da = responses(high, low, reach, SLOTS)
    dA = _total(vectors, own, 0, tiles, parts, HEADS, SLOTS)
    df = _total(vectors, own, 1, tiles, parts, HEADS, SLOTS)
    more, more_sums = vector_gradients(dA, df, A, Da, H, reach, SLOTS)
    ddecay += more
    dsums += more_sums
    if SOLVE:
        reach = refresh_reach(refresh, SLOTS)
        A, Da = responses(high, low, reach, SLOTS)
        dA = _total(vectors, own, 2, tiles, parts, HEADS, SLOTS)
        df = _total(vectors, own, 3, tiles, parts, HEADS, SLOTS)
        more, more_sums = vector_gradients(dA, df, A, Da, H, reach, SLOTS)
        ddecay += more
        dsums += more_sums

    dgamma = _total(vectors, own, 4, tiles, parts, HEADS, SLOTS)
    dnu = _total(vectors, own, 5, tiles, parts, HEADS, SLOTS)
    dA_end, df_end, dH_end = 0.0, 0.0, 0.0
    for part in range(parts):
        at = scalars + (part * tiles.to(tl.int64) * HEADS + own) * 3
        dA_end += tl.load(at)
        df_end += tl.load(at + 1)
        dH_end += tl.load(at + 2)
    A_end, Da_end = end_responses(high, low, end, SLOTS)
    G_end = tl.sum(Da_end[:, None] * De, axis=0)
    De_end = row(De, end - 1, SLOTS)
    dtheta += dgamma * G_end + dnu * De_end
    X = Da_end * (tl.sum(De * (dgamma * theta)[None, :], axis=1) + df_end * H)
    ddecay += tl.where(slot < end, tl.sum(X, axis=0) + dA_end * A_end, 0.0) - onwards(X, SLOTS)
    X = Da_end[:, None] * De * (dgamma * theta)[None, :]
    X += tl.where(slot[:, None] == end - 1, De * (dnu * theta)[None, :], 0.0)
    dsums += tl.sum(X, axis=1) - tl.sum(X, axis=0)
    dsums += H * (Da_end * df_end + tl.where(slot == end - 1, dH_end, 0.0))

    at = (start + slot) * HEADS + head
    tl.store(dlog_decay + at, ddecay, mask=slot < count)
    tl.store(dlog_momentum + at, onwards(dsums, SLOTS), mask=slot < count)
    tl.store(drate + at, dtheta, mask=slot < count)


@triton.jit
def _total(vectors, own, which: tl.constexpr, tiles, parts, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """One of the vectors, summed over the parts."""
    total = tl.zeros([SLOTS], tl.float32)
    for part in range(parts):
        at = (part * tiles.to(tl.int64) * HEADS + own) * (VECTORS * SLOTS) + which * SLOTS
        total += tl.load(vectors + at + tl.arange(0, SLOTS))
    return total
