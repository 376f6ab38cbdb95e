"""What the fused kernels of local linear attention share: rows, weights, exact products, and the solver.

Matrices that are products of fp32 vectors with keys keep fp32's precision in bf16 products: with SPLIT an fp32 operand
is the sum of two bf16 ones, high and low, 16 bits of mantissa, and keys are read as they are. Everything else is fp32.

solve   conjugate gradients for all rows of a tile at once, A never formed. One iteration runs over the keys:

            t = k_j r - kbar r     y += (p t) k_j     e += p t     c += p t^2
            A r = y - e kbar + ridge r     r A r = c + ridge r^2

        A row that has converged is frozen; the loop ends when all have, or at the cap.

The vectors of the solver are not needed while it runs over the keys. They would take 64 registers each of a thread's
255 at a head dim of 128, so they wait in memory, in a workspace of the program that stays in the cache. Rows of numbers
wait there too: as values they would force their layout on the products, whose sums along rows are free in their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("tiles", "entries", "tokens", "rows", "window", "iterations", "share")


# What a workspace holds in fp32: [VECTORS, M, PADDED], and then of every row [LINES, M].
RESIDUAL, DIRECTION, MEAN, SOLUTION, PRODUCT = (tl.constexpr(i) for i in range(5))
ALONG, SQUARE, TARGET, ACTIVE, USED, EXCESS, CURVATURE, RIDGED, NORM, LSE, LEVEL, ZERO = (
    tl.constexpr(i) for i in range(12)
)
VECTORS, LINES = tl.constexpr(5), tl.constexpr(12)

# Vectors are worked on in so many channels at a time, whatever the head dim.
STRIP = tl.constexpr(16)


@triton.jit
def solve(
    space, ridge, ridge_stride, start, head, count, queries, k, half, query, begin, whole, end, window, log2_scale,
    tolerance, iterations, k_stride, HEADS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, DIAGONAL: tl.constexpr, ABSOLUTE: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Solve A x = b, fp32 [M, PADDED], from x = 0, for b / |b|, so that no square overflows where b is finite.

    Before, RESIDUAL is b, MEAN the mean of the keys under the weights, LSE theirs in log2. After, SOLUTION is x / |b|,
    NORM |b|, USED the iterations of a row and SQUARE its (|b - A x| / |b|)^2. Rows that are not numbers stop at once.
    The rest: see `ridge_strip`, `weights` and `applied`.
    """
    total = tl.zeros([M], tl.float32)
    for channel in range(0, PADDED, STRIP):
        b = strip(space, RESIDUAL, channel, M, PADDED)
        total += tl.sum(b * b, axis=1)
    norm = tl.sqrt(total)
    keep_line(space, NORM, norm, M, PADDED)
    along = tl.zeros([M], tl.float32)
    ridged = tl.zeros([M], tl.float32)
    square = tl.zeros([M], tl.float32)
    for channel in range(0, PADDED, STRIP):
        residual = strip(space, RESIDUAL, channel, M, PADDED) / tl.where(norm > 0, norm, 1.0)[:, None]
        keep_strip(space, RESIDUAL, channel, residual, M, PADDED)
        keep_strip(space, DIRECTION, channel, residual, M, PADDED)
        keep_strip(space, SOLUTION, channel, tl.zeros([M, STRIP], tl.float32), M, PADDED)
        own_ridge = ridge_strip(
            space, ridge, ridge_stride, start, head, count, channel, HEADS, DIM, PADDED, M, DIAGONAL, ABSOLUTE
        )  # fmt: skip
        along += tl.sum(residual * strip(space, MEAN, channel, M, PADDED), axis=1)
        ridged += tl.sum(own_ridge * residual * residual, axis=1)
        square += tl.sum(residual * residual, axis=1)
    target = tolerance * tolerance * square
    active = square > target
    keep_line(space, ALONG, along, M, PADDED)
    keep_line(space, RIDGED, ridged, M, PADDED)
    keep_line(space, SQUARE, square, M, PADDED)
    keep_line(space, TARGET, target, M, PADDED)
    keep_line(space, ACTIVE, active.to(tl.float32), M, PADDED)
    keep_line(space, USED, tl.zeros([M], tl.float32), M, PADDED)
    step = 0
    going = tl.max(active.to(tl.int32), axis=0)
    while going > 0:
        tl.debug_barrier()
        applied(
            afresh(space, M, PADDED), queries, k, half, query, begin, whole, end, window, log2_scale, k_stride,
            DIM, PADDED, M, N, STAGES, WINDOWED, RBF, SPLIT,
        )  # fmt: skip
        tl.debug_barrier()
        going = advanced(
            afresh(space, M, PADDED), ridge, ridge_stride, start, head, count, HEADS, DIM, PADDED, M, DIAGONAL, ABSOLUTE
        )  # fmt: skip
        step += 1
        going = tl.where(step < iterations, going, 0)
    tl.debug_barrier()


@triton.jit
def advanced(
    space, ridge, ridge_stride, start, head, count,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, DIAGONAL: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """One step along DIRECTION, of which `applied` has left PRODUCT, EXCESS and CURVATURE; 0 when no row needs more."""
    curvature = line(space, CURVATURE, M, PADDED) + line(space, RIDGED, M, PADDED)
    excess = line(space, EXCESS, M, PADDED)
    square = line(space, SQUARE, M, PADDED)
    active = (line(space, ACTIVE, M, PADDED) > 0) & (curvature > 0)
    length = tl.where(active, square / tl.where(active, curvature, 1.0), 0.0)
    following = tl.zeros([M], tl.float32)
    for channel in range(0, PADDED, STRIP):
        direction = strip(space, DIRECTION, channel, M, PADDED)
        own_ridge = ridge_strip(
            space, ridge, ridge_stride, start, head, count, channel, HEADS, DIM, PADDED, M, DIAGONAL, ABSOLUTE
        )  # fmt: skip
        mean = strip(space, MEAN, channel, M, PADDED)
        product = strip(space, PRODUCT, channel, M, PADDED) + own_ridge * direction - excess[:, None] * mean
        solution = strip(space, SOLUTION, channel, M, PADDED) + length[:, None] * direction
        residual = strip(space, RESIDUAL, channel, M, PADDED) - length[:, None] * product
        keep_strip(space, SOLUTION, channel, solution, M, PADDED)
        keep_strip(space, RESIDUAL, channel, residual, M, PADDED)
        following += tl.sum(residual * residual, axis=1)
    turn = tl.where(active, following / tl.where(active, square, 1.0), 0.0)
    square = tl.where(active, following, square)
    along = tl.zeros([M], tl.float32)
    ridged = tl.zeros([M], tl.float32)
    tl.debug_barrier()
    for channel in range(0, PADDED, STRIP):
        residual = strip(space, RESIDUAL, channel, M, PADDED)
        direction = residual + turn[:, None] * strip(space, DIRECTION, channel, M, PADDED)
        keep_strip(space, DIRECTION, channel, direction, M, PADDED)
        own_ridge = ridge_strip(
            space, ridge, ridge_stride, start, head, count, channel, HEADS, DIM, PADDED, M, DIAGONAL, ABSOLUTE
        )  # fmt: skip
        along += tl.sum(direction * strip(space, MEAN, channel, M, PADDED), axis=1)
        ridged += tl.sum(own_ridge * direction * direction, axis=1)
    used = line(space, USED, M, PADDED) + active.to(tl.float32)
    active = active & (square > line(space, TARGET, M, PADDED))
    tl.debug_barrier()
    keep_line(space, ALONG, along, M, PADDED)
    keep_line(space, RIDGED, ridged, M, PADDED)
    keep_line(space, SQUARE, square, M, PADDED)
    keep_line(space, USED, used, M, PADDED)
    keep_line(space, ACTIVE, active.to(tl.float32), M, PADDED)
    return tl.max(active.to(tl.int32), axis=0)


@triton.jit
def applied(
    space, queries, k, half, query, begin, whole, end, window, log2_scale, k_stride,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Leave PRODUCT sum p t k, EXCESS sum p t and CURVATURE sum p t^2 over the keys begin .. end.

    Keys before `whole` are seen by all rows, and take no mask.
    """
    high, low = halves(kept(space, DIRECTION, M, PADDED), SPLIT)
    along, lse = line(space, ALONG, M, PADDED), line(space, LSE, M, PADDED)
    product = tl.zeros([M, PADDED], tl.float32)
    excess = tl.zeros([M], tl.float32)
    curvature = tl.zeros([M], tl.float32)
    first = begin
    if not WINDOWED and PADDED <= 64:  # a second loop takes registers that wider heads do not have
        product, excess, curvature = applied_blocks(
            product, excess, curvature, high, low, along, queries, lse, k, half, query, begin, whole, end, window,
            log2_scale, k_stride, DIM, PADDED, N, STAGES, WINDOWED, RBF, SPLIT, False,
        )  # fmt: skip
        first = whole
    product, excess, curvature = applied_blocks(
        product, excess, curvature, high, low, along, queries, lse, k, half, query, first, end, end, window,
        log2_scale, k_stride, DIM, PADDED, N, STAGES, WINDOWED, RBF, SPLIT, True,
    )  # fmt: skip
    space = afresh(space, M, PADDED)
    keep(space, PRODUCT, product, M, PADDED)
    keep_line(space, EXCESS, excess, M, PADDED)
    keep_line(space, CURVATURE, curvature, M, PADDED)


@triton.jit
def applied_blocks(
    product, excess, curvature, high, low, along, queries, lse, k, half, query, first, last, end, window,
    log2_scale, k_stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    WINDOWED: tl.constexpr, RBF: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n in tl.range(first, last, N, num_stages=STAGES):
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, MASKED)
        p = weights(queries, keys, lse, half, query, n, end, window, log2_scale, N, WINDOWED, RBF, MASKED)
        t = exact_dot(high, low, tl.trans(keys), SPLIT) - along[:, None]
        pt = p * t
        excess += tl.sum(pt, axis=1)
        curvature += tl.sum(pt * t, axis=1)
        product = add_dot(product, pt, keys, SPLIT)
    return product, excess, curvature


@triton.jit
def afresh(space, M: tl.constexpr, PADDED: tl.constexpr):
    """`space` itself, though the compiler cannot know: else it keeps hundreds of addresses in registers for later."""
    zero = tl.load(space + VECTORS * M * PADDED + ZERO * M, volatile=True).to(tl.int32)
    return space + zero * 4


@triton.jit
def keep(space, VECTOR: tl.constexpr, values, M: tl.constexpr, PADDED: tl.constexpr):
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    tl.store(space + VECTOR * M * PADDED + (slot[:, None] * PADDED + channel[None, :]), values)


@triton.jit
def kept(space, VECTOR: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr):
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    return tl.load(space + VECTOR * M * PADDED + (slot[:, None] * PADDED + channel[None, :]))


@triton.jit
def keep_strip(space, VECTOR: tl.constexpr, first, values, M: tl.constexpr, PADDED: tl.constexpr):
    slot, channel = tl.arange(0, M), tl.arange(0, STRIP)
    tl.store(space + VECTOR * M * PADDED + first + (slot[:, None] * PADDED + channel[None, :]), values)


@triton.jit
def strip(space, VECTOR: tl.constexpr, first, M: tl.constexpr, PADDED: tl.constexpr):
    """Channels first .. first + STRIP of a vector, [M, STRIP]."""
    slot, channel = tl.arange(0, M), tl.arange(0, STRIP)
    return tl.load(space + VECTOR * M * PADDED + first + (slot[:, None] * PADDED + channel[None, :]))


@triton.jit
def keep_line(space, LINE: tl.constexpr, values, M: tl.constexpr, PADDED: tl.constexpr):
    tl.store(space + VECTORS * M * PADDED + LINE * M + tl.arange(0, M), values)


@triton.jit
def line(space, LINE: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr):
    return tl.load(space + VECTORS * M * PADDED + LINE * M + tl.arange(0, M))


@triton.jit
def weights(
    queries, keys, lse, half, query, n, end, window, log2_scale, N: tl.constexpr, WINDOWED: tl.constexpr,
    RBF: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p [M, N] of the keys n .. n + N: exp2 of the score less lse, which is in units of log2; 0 of keys not seen."""
    p = tl.exp2(scores_of(queries, keys, half, n, end, log2_scale, N, RBF, MASKED) - lse[:, None])
    if MASKED:
        p = tl.where(seen(query, n, window, N, WINDOWED), p, 0.0)
    return p


@triton.jit
def scores_of(
    queries, keys, half, n, end, log2_scale, N: tl.constexpr, RBF: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """[M, N] in units of log2. half: k k / 2 of every key, for rbf."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if RBF:
        slot = n + tl.arange(0, N)
        if MASKED:
            scores -= tl.load(half + slot, mask=slot < end, other=0.0)[None, :]
        else:
            scores -= tl.load(half + slot)[None, :]
    return scores * log2_scale


@triton.jit
def seen(query, n, window, N: tl.constexpr, WINDOWED: tl.constexpr):
    """Which of the keys n .. n + N the queries at these positions see, [M, N]."""
    key = n + tl.arange(0, N)
    mask = key[None, :] <= query[:, None]
    if WINDOWED:
        mask = mask & (key[None, :] > (query - window)[:, None])
    return mask


@triton.jit
def halves(x, SPLIT: tl.constexpr):
    """fp32 x as the sum of two bf16 operands; without SPLIT it is its own operand."""
    if SPLIT:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high, low = x, x
    return high, low


@triton.jit
def exact_dot(high, low, b, SPLIT: tl.constexpr):
    """(high + low) b, with fp32's precision."""
    product = tl.dot(high, b, input_precision="ieee")
    if SPLIT:
        product = tl.dot(low, b, product)
    return product


@triton.jit
def add_dot(total, a, b, SPLIT: tl.constexpr):
    """total + a b for fp32 a, with its precision."""
    high, low = halves(a, SPLIT)
    total = tl.dot(high, b, total, input_precision="ieee")
    if SPLIT:
        total = tl.dot(low, b, total)
    return total


@triton.jit
def ridge_strip(
    space, ridge, ridge_stride, start, head, count, first,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, DIAGONAL: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """The ridge of a tile's rows for channels first .. first + STRIP, [M, 1], or as wide with DIAGONAL.

    ridge: fp32 [tokens or 1, H], or [H, D] with DIAGONAL; ridge_stride: of tokens, 0 where all have one.
    """
    if DIAGONAL:
        channel = first + tl.arange(0, STRIP)
        own = tl.load(ridge + head * DIM + channel, mask=channel < DIM, other=1.0)[None, :]
    else:
        slot = tl.arange(0, M)
        own = tl.load(ridge + start * ridge_stride + head + slot * ridge_stride, mask=slot < count, other=1.0)[:, None]
    if ABSOLUTE:
        own = own * absolute_factor(line(space, LSE, M, PADDED))[:, None]
    return own


@triton.jit
def absolute_factor(lse):
    """As `reference.absolute_factor`, of lse in units of log2."""
    return tl.exp2(tl.minimum(tl.maximum(-lse, -64.0), 64.0))


@triton.jit
def load_rows(
    base, n, end, stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows n .. n + N of one head, [N, PADDED]; zero from `end` on (MASKED).

    The offsets within the block are the same int32 for every n: they cost no registers in a loop.
    """
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    pointers = base + tl.cast(n, tl.int64) * stride + (slot[:, None] * stride + channel[None, :])
    if MASKED:
        return tl.load(pointers, mask=(n + slot < end)[:, None] & (channel < DIM)[None, :], other=0.0)
    if DIM == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(channel < DIM)[None, :], other=0.0)
