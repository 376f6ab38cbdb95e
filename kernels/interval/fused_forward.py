"""Forward kernel of interval attention.

A program owns a tile of at most M query entries of one segment (`kernels.interval.tiles`) and runs over the key entries
from its first entry's first to its last entry's last, N at a time. Rows of q, k and v are read through the lists: a row
is one run of D numbers, so that a copy in the order of the lists would gain nothing. Softmax runs along with fp32
maximum and sum; hidden keys add exact zeros, so that a row depends on nothing but what it sees.

Stored: o at the place that the list of destinations gives, fp32 lse by entry, -inf for empty intervals.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from batch to batch: a kernel is not compiled again because one of them is 1 or a multiple of 16.
SIZES = ("tiles", "queries_count", "keys_count")

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    q, k, v, o, lse, queries, keys, first, last, until, places, table, tiles, queries_count, keys_count, scale,
    DIM: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    LEAVES: tl.constexpr,
):  # fmt: skip
    """o: [rows, DIM]; lse: fp32 [Nq]. LEAVES: whether keys have an `until`."""
    start, count = load_tile(table, tiles)
    if count == 0:
        return
    slot, channel = tl.arange(0, M), tl.arange(0, PADDED)
    entry, inside = start + slot, slot < count
    mask = inside[:, None] & (channel < DIM)[None, :]
    rows = tl.load(queries + entry, mask=inside, other=0)
    data = tl.load(q + rows[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    begin = tl.load(first + entry, mask=inside, other=0).to(tl.int32)
    end = tl.load(last + entry, mask=inside, other=0).to(tl.int32)
    low = tl.load(first + start).to(tl.int32)
    high = tl.load(last + start + count - 1).to(tl.int32)

    acc = tl.zeros([M, PADDED], tl.float32)
    top, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    for n in tl.range(low, high, N, num_stages=STAGES):
        at = n + tl.arange(0, N)
        there = at < high
        key_rows = tl.load(keys + at, mask=there, other=0)
        columns = load_rows(k, key_rows, there, DIM, PADDED)
        z = tl.dot(data, tl.trans(columns), input_precision="ieee") * (scale * LOG2E)
        seen = (at[None, :] >= begin[:, None]) & (at[None, :] < end[:, None])
        if LEAVES:
            out = tl.load(until + at, mask=there, other=0).to(tl.int32)
            seen &= entry[:, None] < out[None, :]
        z = tl.where(seen, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(z - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, axis=1)
        values = load_rows(v, key_rows, there, DIM, PADDED)
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = higher
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    norm = tl.where(empty, float("-inf"), top / LOG2E + tl.log(tl.where(empty, 1.0, total)))
    place = tl.load(places + entry, mask=inside, other=0)
    tl.store(o + place[:, None] * DIM + channel[None, :], acc, mask=mask)
    tl.store(lse + entry, norm, mask=inside)


@triton.jit
def load_tile(table, tiles):
    """First entry and number of entries of this program's tile. Entries are counted in int32, rows in int64."""
    tile = tl.program_id(0)
    return tl.load(table + tile).to(tl.int32), tl.load(table + tiles + tile).to(tl.int32)


@triton.jit
def load_rows(x, rows, there, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of x [rows, DIM], [N, PADDED]; 0 where not there. rows: int64."""
    channel = tl.arange(0, PADDED)
    return tl.load(
        x + rows[:, None] * DIM + channel[None, :], mask=there[:, None] & (channel < DIM)[None, :], other=0.0
    )
