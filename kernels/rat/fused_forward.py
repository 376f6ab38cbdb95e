"""Forward kernels of RAT.

F0  pieces    only where chunks are longer than a piece: each piece is scanned from nothing, leaving its last state and
              the product of its gates; a second kernel carries the states over the pieces of a chunk.
F1  states    a program owns some rows (chunks or pieces) and all heads of a group, and walks over the slots of its rows
              in lockstep with the running states in registers. It stores v~ (where the output will be), the score of
              each token with itself, the query turned by its chunk's angle, and at the ends the summaries and states.
F2  attend    a program owns a tile of tokens of one document and one head. Its online softmax starts from the self term
              (m = score, l = 1, acc = v~), so no row is ever empty, and runs over blocks of summaries, with the mask
              only at the boundary. It stores y = sigmoid(z) o over v~, and lse over the scores.

q, k, v, gate, z are read in place with any token stride. Addresses are int64, everything but matrix operands is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("rows", "slots", "tokens", "chunk", "tiles", "entries", "summaries", "chunks", "share", "capacity", "splits")


@triton.jit(do_not_specialize=SIZES)
def piece_ends_kernel(
    k, v, gate, bias, table, product, end_key, end_value, rows, slots, k_stride, v_stride, gate_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """F0. The states that each row leaves when it starts from nothing, the product of its gates; fp32 [rows, H, D]."""
    part = tl.program_id(0) % (GROUPS * tl.cdiv(HEADS // GROUPS, SHARE))
    tile = tl.program_id(0) // (GROUPS * tl.cdiv(HEADS // GROUPS, SHARE))
    group = part % GROUPS
    head, real_head = heads_of(part, HEADS, GROUPS, SHARE)
    channel, real = channels(DIM, PADDED)
    lane = head[:, None] * DIM + channel[None, :]
    real_lane = real_head[:, None] & real[None, :]
    row = tile.to(tl.int64) * N + tl.arange(0, N)
    base = tl.load(table + row, mask=row < rows, other=0)
    first = tl.load(table + rows + row, mask=row < rows, other=0)
    end = tl.load(table + 2 * rows + row, mask=row < rows, other=0)
    b = tl.load(bias + lane, mask=real_lane, other=0.0).to(tl.float32)

    key = tl.zeros([N, SHARE, PADDED], tl.float32)
    value = tl.zeros([N, SHARE, PADDED], tl.float32)
    open_product = tl.full([N, SHARE, PADDED], 1.0, tl.float32)
    for slot in tl.range(0, slots, num_stages=STAGES):
        here = (slot >= first) & (slot < end)
        token = base + slot
        lanes_here = here[:, None, None] & real_lane[None]
        a = tl.load(gate + token[:, None, None] * gate_stride + lane[None], mask=lanes_here, other=float("inf"))
        own = k + token[:, None] * k_stride + group * DIM + channel[None, :]
        new_key = tl.load(own, mask=here[:, None] & real[None, :], other=0.0).to(tl.float32)
        new = tl.load(v + token[:, None, None] * v_stride + lane[None], mask=lanes_here, other=0.0).to(tl.float32)
        opened, closed = gates(a.to(tl.float32) + b[None])
        key -= closed * (key - new_key[:, None, :])
        value -= closed * (value - new)
        open_product *= opened
    at = row[:, None, None] * (HEADS * DIM) + lane[None]
    stored = (row < rows)[:, None, None] & real_lane[None]
    tl.store(product + at, open_product, mask=stored)
    tl.store(end_key + at, key, mask=stored)
    tl.store(end_value + at, value, mask=stored)


@triton.jit(do_not_specialize=SIZES)
def carry_kernel(
    product, ends, start, table, carried, chunks, width, WIDE: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """State at the near end of every row of a chunk, from what each row leaves when it starts from nothing.

    product, ends, carried: fp32 [rows, width]; start: fp32 [documents, width], what the first row of a continued chunk
    starts from (not in REVERSE, where adjoints run from the last row to the first).
    """
    blocks = tl.cdiv(width, WIDE)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    lane = (tl.program_id(0) % blocks) * WIDE + tl.arange(0, WIDE)
    inside = lane < width
    first = tl.load(table + chunk)
    count = tl.load(table + chunks + chunk)
    given = tl.load(table + 2 * chunks + chunk)
    if REVERSE:
        state = tl.zeros([WIDE], tl.float32)
    else:
        state = tl.load(start + given * width + lane, mask=inside & (given >= 0), other=0.0)
    for step in range(count):
        at = (first + (count - 1 - step if REVERSE else step)) * width + lane
        tl.store(carried + at, state, mask=inside)
        gain = tl.load(product + at, mask=inside, other=0.0)
        state = gain * state + tl.load(ends + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def states_kernel(
    q, k, v, gate, bias, cos, sin, initial_key, initial_value, table,
    turned, score, tilde, keys, values, final_key, final_value,
    rows, slots, tokens, scale, q_stride, k_stride, v_stride, gate_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    N: tl.constexpr, SHARE: tl.constexpr, STAGES: tl.constexpr, ROTATE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """F1. turned: [T, G, D] (only with ROTATE); score: fp32 [H, T]; tilde: [T, H, D]; keys, values: [summaries, H, D];
    final_key, final_value: fp32 [documents, H, D].
    """
    parts = GROUPS * tl.cdiv(HEADS // GROUPS, SHARE)
    part = tl.program_id(0) % parts
    group = part % GROUPS
    head, real_head = heads_of(part, HEADS, GROUPS, SHARE)
    channel, real = channels(DIM, PADDED)
    lane = head[:, None] * DIM + channel[None, :]
    real_lane = real_head[:, None] & real[None, :]
    row = (tl.program_id(0) // parts).to(tl.int64) * N + tl.arange(0, N)
    inside = row < rows
    base = tl.load(table + row, mask=inside, other=0)
    first = tl.load(table + rows + row, mask=inside, other=0)
    end = tl.load(table + 2 * rows + row, mask=inside, other=0)
    index = tl.load(table + 3 * rows + row, mask=inside, other=0)
    summary = tl.load(table + 4 * rows + row, mask=inside, other=-1)
    final = tl.load(table + 5 * rows + row, mask=inside, other=-1)
    given = tl.load(table + 6 * rows + row, mask=inside, other=-1)
    if PIECES:
        given = tl.where(inside, row, -1)
    b = tl.load(bias + lane, mask=real_lane, other=0.0).to(tl.float32)
    if ROTATE:
        cosine, sine = angles(cos, sin, index, inside, DIM, PADDED)
        swapped = swapped_channels(DIM, PADDED)

    at = given[:, None, None] * (HEADS * DIM) + lane[None]
    continued = (given >= 0)[:, None, None] & real_lane[None]
    key = tl.load(initial_key + at, mask=continued, other=0.0).to(tl.float32)
    value = tl.load(initial_value + at, mask=continued, other=0.0).to(tl.float32)
    for slot in tl.range(0, slots, num_stages=STAGES):
        here = (slot >= first) & (slot < end)
        token = base + slot
        lanes_here = here[:, None, None] & real_lane[None]
        channels_here = here[:, None] & real[None, :]
        a = tl.load(gate + token[:, None, None] * gate_stride + lane[None], mask=lanes_here, other=float("inf"))
        shared = group * DIM + channel[None, :]
        new_key = tl.load(k + token[:, None] * k_stride + shared, mask=channels_here, other=0.0).to(tl.float32)
        new = tl.load(v + token[:, None, None] * v_stride + lane[None], mask=lanes_here, other=0.0).to(tl.float32)
        query = tl.load(q + token[:, None] * q_stride + shared, mask=channels_here, other=0.0).to(tl.float32)
        # k~ - (1 - g)(k~ - k): exact where the gate is all but closed to new tokens
        closed = 1.0 / (1.0 + tl.exp(a.to(tl.float32) + b[None]))
        key -= closed * (key - new_key[:, None, :])
        value -= closed * (value - new)
        own = tl.sum(query[:, None, :] * key, axis=2) * scale
        tl.store(score + head[None, :] * tokens + token[:, None], own, mask=here[:, None] & real_head[None, :])
        tl.store(tilde + token[:, None, None] * (HEADS * DIM) + lane[None], value, mask=lanes_here)
        if ROTATE:
            other = q + token[:, None] * q_stride + group * DIM + swapped[None, :]
            partner = tl.load(other, mask=channels_here, other=0.0).to(tl.float32)
            first_heads = channels_here & (part < GROUPS)
            to = turned + token[:, None] * (GROUPS * DIM) + shared
            tl.store(to, query * cosine + partner * sine, mask=first_heads)

    stored = (final >= 0)[:, None, None] & real_lane[None]
    at = final[:, None, None] * (HEADS * DIM) + lane[None]
    tl.store(final_key + at, key, mask=stored)
    tl.store(final_value + at, value, mask=stored)
    if ROTATE:
        key = key * cosine[:, None, :] + swap_halves(key, N, SHARE, PADDED) * sine[:, None, :]
    stored = (summary >= 0)[:, None, None] & real_lane[None]
    at = summary[:, None, None] * (HEADS * DIM) + lane[None]
    tl.store(keys + at, key, mask=stored)
    tl.store(values + at, value, mask=stored)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    turned, keys, values, z, score, y, table, tiles, tokens, chunk, scale, turned_stride, z_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """F2. score holds the self scores and becomes lse, fp32 [H, T]; y holds v~ and becomes y, [T, H, D]."""
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    start = tl.load(table + tile)
    count = tl.load(table + tiles + tile).to(tl.int32)
    position = tl.load(table + 2 * tiles + tile).to(tl.int32)
    key_start = tl.load(table + 3 * tiles + tile)
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    inside = slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    visible = (position + slot) // chunk

    # scalar int64 for the tile, int32 within it
    own = slot[:, None] * (HEADS * DIM) + channel[None, :]
    y += (start * HEADS + head) * DIM
    turned += start * turned_stride + (head % GROUPS) * DIM
    z += start * z_stride + head * DIM
    score += head.to(tl.int64) * tokens + start
    q = tl.load(turned + slot[:, None] * turned_stride + channel[None, :], mask=mask, other=0.0)
    most = tl.load(score + slot, mask=inside, other=0.0) * LOG2E
    weight = tl.full([M], 1.0, tl.float32)
    acc = tl.load(y + own, mask=mask, other=0.0).to(tl.float32)

    seen = tl.max(tl.where(inside, visible, 0), axis=0)
    whole = position // chunk // N * N
    keys += (key_start * HEADS + head) * DIM
    values += (key_start * HEADS + head) * DIM
    log2_scale = scale * LOG2E
    acc, weight, most = attend_blocks(
        acc, weight, most, q, keys, values, visible, 0, whole, seen, log2_scale,
        HEADS, DIM, PADDED, N, STAGES, False,
    )  # fmt: skip
    acc, weight, most = attend_blocks(
        acc, weight, most, q, keys, values, visible, whole, seen, seen, log2_scale,
        HEADS, DIM, PADDED, N, STAGES, True,
    )  # fmt: skip

    tl.store(score + slot, (most + tl.log2(weight)) / LOG2E, mask=inside)
    out = tl.load(z + slot[:, None] * z_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    result = acc / weight[:, None] / (1.0 + tl.exp(-out))
    tl.store(y + own, result, mask=mask)


@triton.jit
def attend_blocks(
    acc, weight, most, q, keys, values, visible, begin, end, seen, log2_scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax of the tile over summaries begin .. end, in units of log2."""
    for n in tl.range(begin, end, N, num_stages=STAGES):
        k = load_summaries(keys, n, seen, HEADS, DIM, PADDED, N, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * log2_scale
        if MASKED:
            scores = tl.where((n + tl.arange(0, N))[None, :] < visible[:, None], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        v = load_summaries(values, n, seen, HEADS, DIM, PADDED, N, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        most = higher
    return acc, weight, most


@triton.jit
def load_summaries(
    base, n, end, HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr
):
    """Summaries n .. n + N of one head, [N, PADDED]; zero from `end` on (MASKED).

    The offsets within the block are the same int32 for every n: they cost no registers in a loop.
    """
    slot, channel = tl.arange(0, N), tl.arange(0, PADDED)
    pointers = base + tl.cast(n, tl.int64) * (HEADS * DIM) + (slot[:, None] * (HEADS * DIM) + channel[None, :])
    if MASKED:
        return tl.load(pointers, mask=(n + slot < end)[:, None] & (channel < DIM)[None, :], other=0.0)
    if DIM == PADDED:
        return tl.load(pointers)
    return tl.load(pointers, mask=(channel < DIM)[None, :], other=0.0)


@triton.jit
def heads_of(part, HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr):
    """The heads of part `part` of a row (group part % GROUPS, SHARE of its heads): int64 [SHARE], and which exist."""
    share = part // GROUPS * SHARE + tl.arange(0, SHARE)
    return (part % GROUPS + GROUPS * share).to(tl.int64), share < HEADS // GROUPS


@triton.jit
def channels(DIM: tl.constexpr, PADDED: tl.constexpr):
    """Channels of a head, and which exist. Each half is padded by itself: rotation pairs i with i + PADDED / 2."""
    lane = tl.arange(0, PADDED)
    if DIM == PADDED:
        return lane, lane < PADDED
    half = lane // (PADDED // 2)
    within = lane % (PADDED // 2)
    return half * (DIM // 2) + within, within < DIM // 2


@triton.jit
def swapped_channels(DIM: tl.constexpr, PADDED: tl.constexpr):
    """The channel that each channel rotates with."""
    lane = tl.arange(0, PADDED)
    return (1 - lane // (PADDED // 2)) * (DIM // 2) + lane % (PADDED // 2)


@triton.jit
def angles(cos, sin, index, inside, DIM: tl.constexpr, PADDED: tl.constexpr):
    """cos and signed sin of chunks `index`, so that turned x = x * cos + swapped x * sin; fp32 [N, PADDED]."""
    lane = tl.arange(0, PADDED)
    within = lane % (PADDED // 2)
    at = index[:, None] * (DIM // 2) + within[None, :]
    mask = inside[:, None] & (within < DIM // 2)[None, :]
    sign = tl.where(lane < PADDED // 2, -1.0, 1.0)
    return tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0) * sign[None, :]


@triton.jit
def swap_halves(x, N: tl.constexpr, SHARE: tl.constexpr, PADDED: tl.constexpr):
    """[N, SHARE, PADDED] with the halves of the last dimension exchanged."""
    first, second = tl.split(tl.permute(tl.reshape(x, [N, SHARE, 2, PADDED // 2]), [0, 1, 3, 2]))
    return tl.reshape(tl.permute(tl.join(second, first), [0, 1, 3, 2]), [N, SHARE, PADDED])


@triton.jit
def gates(a):
    """sigmoid(a) and sigmoid(-a), both without cancellation."""
    small = tl.exp(-tl.abs(a))
    large = 1.0 / (1.0 + small)
    return tl.where(a >= 0, large, small * large), tl.where(a >= 0, small * large, large)
