"""Forward kernel of core attention.

F  attend    a program owns a tile of queries of one piece and one head. Its online softmax runs over blocks of keys,
             from the first key that its first query sees to its last query, and then over blocks of cores. The mask is
             applied only where a block reaches beyond what every query of the tile sees: at both ends of the keys, at
             the end of the cores. It stores o, and lse over the scores.

    query t sees    cores 0 .. c(t) - 1 and keys g c(t) .. t,    c(t) = max(0, t + 1 - s) // g

q, k, v and cores are read in place with any token stride. Addresses are int64, everything but matrix operands is fp32.
The division is of a number that is not negative: it truncates in Triton, and must not show core 0 too early.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# The maximum before the first score: finite, so that a block in which a query sees nothing leaves no NaN.
LOWEST = tl.constexpr(-1.0e30)

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = (
    "tiles", "entries", "pairs", "rows", "tokens", "groups", "group", "window", "keys_seen", "cores_seen"
)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    q, k, v, core_k, core_v, o, lse, table, tiles, tokens, group, window, keys_seen, cores_seen, scale, bias,
    q_stride, k_stride, v_stride, core_k_stride, core_v_stride,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, CORE_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """F. o: [T, H, D]; lse: fp32 [H, T], infinite where a query sees nothing. keys_seen, cores_seen: 1, or 0 for the
    softmax over the other part alone.
    """
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
    q += start * q_stride + head * DIM
    queries = tl.load(q + slot[:, None] * q_stride + channel[None, :], mask=mask, other=0.0)
    acc = tl.zeros([M, PADDED], tl.float32)
    weight = tl.zeros([M], tl.float32)
    most = tl.full([M], LOWEST, tl.float32)
    log2_scale = scale * LOG2E

    first, end, left, whole, all_blocks = key_blocks(position, count, group, window, N)
    whole *= keys_seen
    acc, weight, most = attend_blocks(
        acc, weight, most, queries, k, v, cores * group, query + 1, first + left * N, whole, 0, 0, end, log2_scale, 0.0,
        k_stride, v_stride, DIM, PADDED, N, STAGES, False, False,
    )  # fmt: skip
    acc, weight, most = attend_blocks(
        acc, weight, most, queries, k, v, cores * group, query + 1, first, all_blocks * keys_seen - whole, left, whole,
        end, log2_scale, 0.0, k_stride, v_stride, DIM, PADDED, N, STAGES, True, False,
    )  # fmt: skip
    end, whole, all_blocks = core_blocks(position, count, group, window, N)
    acc, weight, most = attend_blocks(
        acc, weight, most, queries, core_k, core_v, cores, cores, 0, whole * cores_seen, 0, 0, end, log2_scale,
        bias * LOG2E, core_k_stride, core_v_stride, DIM, PADDED, N, STAGES, False, True,
    )  # fmt: skip
    acc, weight, most = attend_blocks(
        acc, weight, most, queries, core_k, core_v, cores, cores, whole * N, (all_blocks - whole) * cores_seen, 0, 0,
        end, log2_scale, bias * LOG2E, core_k_stride, core_v_stride, DIM, PADDED, N, STAGES, True, True,
    )  # fmt: skip

    something = weight > 0
    weight = tl.where(something, weight, 1.0)
    at = lse + head.to(tl.int64) * tokens + start + slot
    tl.store(at, tl.where(something, (most + tl.log2(weight)) / LOG2E, float("inf")), mask=inside)
    o += (start * HEADS + head) * DIM
    tl.store(o + slot[:, None] * (HEADS * DIM) + channel[None, :], acc / weight[:, None], mask=mask)


@triton.jit
def key_blocks(position, count, group, window, N: tl.constexpr):
    """Keys that `count` queries from `position` on see: the first one, the end, how many blocks of N from the first on
    begin before what the last query sees, how many blocks after these all queries see, and how many blocks in all.
    """
    first = tl.maximum(position + 1 - window, 0) // group * group
    end = position + count
    left = tl.cdiv(tl.maximum(end - window, 0) // group * group - first, N)
    whole = tl.maximum(position + 1 - first - left * N, 0) // N
    return first, end, left, whole, tl.cdiv(end - first, N)


@triton.jit
def core_blocks(position, count, group, window, N: tl.constexpr):
    """Cores that `count` queries from `position` on see: the end, blocks of N that all see, and blocks in all."""
    end = tl.maximum(position + count - window, 0) // group
    return end, tl.maximum(position + 1 - window, 0) // group // N, tl.cdiv(end, N)


@triton.jit
def attend_blocks(
    acc, weight, most, queries, k, v, low, high, first, blocks, gap, jump, end, log2_scale, log2_bias,
    k_stride, v_stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr, CORES: tl.constexpr,
):  # fmt: skip
    """The online softmax of the tile over `blocks` blocks of keys (or cores) from `first` on, in units of log2.

    MASKED: after `gap` blocks the next `jump` ones are left out; row i of the tile sees low[i] .. high[i] - 1, with
    CORES 0 .. high[i] - 1.
    """
    for block in tl.range(0, blocks, num_stages=STAGES):
        n = first + block * N
        if MASKED:
            n += tl.where(block < gap, 0, jump * N)
        keys = load_rows(k, n, end, k_stride, DIM, PADDED, N, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * log2_scale
        if CORES:
            scores += log2_bias
        if MASKED:
            scores = tl.where(visible(n, low, high, N, CORES), scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        values = load_rows(v, n, end, v_stride, DIM, PADDED, N, MASKED)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="tf32x3")
        most = higher
    return acc, weight, most


@triton.jit
def visible(n, low, high, N: tl.constexpr, CORES: tl.constexpr):
    """bool [M, N]: which of n .. n + N - 1 every row sees."""
    index = n + tl.arange(0, N)
    if CORES:
        return index[None, :] < high[:, None]
    return (index[None, :] >= low[:, None]) & (index[None, :] < high[:, None])


@triton.jit
def load_rows(base, n, end, stride, DIM: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
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
