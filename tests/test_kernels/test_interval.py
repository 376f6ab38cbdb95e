"""Interval attention: the definition against loops over queries and keys, the fast path against the definition."""

import math
from dataclasses import replace

import pytest
import torch

from farspan.kernels.interval import Intervals, interval_attention, interval_step
from farspan.kernels.interval.entries import sorted_rows, sum_rows
from farspan.kernels.interval.tiles import inverse, most_tiles, query_tiles

HEADS, DIM = 2, 8


def tensors(tokens, dtype=torch.float64, keys=None):
    torch.manual_seed(0)
    shapes = [(1, n, HEADS, DIM) for n in (tokens, keys or tokens, keys or tokens)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def sort_tokens(groups, tokens):
    """Rows in the order of (head, group, token), the group of each, and where groups begin; groups: [HEADS, ...], group
    of token i mod tokens, below 0 for none.
    """
    entries = []
    for head in range(HEADS):
        for i, group in enumerate(groups[head].tolist()):
            if group >= 0:
                entries.append((head, group, i % tokens))
    entries = sorted(set(entries))
    rows = torch.tensor([token * HEADS + head for head, _, token in entries])
    segment = torch.tensor([head * 10 + group for head, group, _ in entries])
    starts = torch.searchsorted(segment, torch.arange(10 * HEADS + 1))
    return rows, segment, starts, entries


def lists(kind, tokens, window=7):
    """Lists of every kind that routing makes, of random groups."""
    torch.manual_seed(1)
    groups = torch.randint(0, 3, (HEADS, tokens))
    if kind == "repeated":
        groups = torch.cat([groups, torch.randint(0, 3, (HEADS, tokens))], dim=1)
    if kind == "padding":
        groups[:, ::3] = -1
    if kind == "one group":
        groups.zero_()
    rows, segment, starts, _ = sort_tokens(groups, tokens)
    entry = torch.arange(len(rows))
    begin = starts[segment]
    first, until, reach = torch.maximum(begin, entry - window + 1), None, window
    if kind in ("leaving", "whole"):
        first, reach = begin, tokens
    if kind == "leaving":
        until = entry + torch.randint(1, 20, entry.shape)
    last = entry + 1 - (entry > first).long()
    return Intervals(rows, rows, first, last, starts, reach, tokens // 3 + 1, until, kind == "repeated")


def unshared(tokens):
    """Two lists: queries and keys have groups of their own, and a query sees the keys of its group up to its position;
    some see none.
    """
    torch.manual_seed(2)
    queries, q_segment, starts, q_entries = sort_tokens(torch.randint(0, 4, (HEADS, tokens)), tokens)
    keys, k_segment, _, k_entries = sort_tokens(torch.randint(0, 4, (HEADS, tokens)), tokens)
    first = torch.searchsorted(k_segment, q_segment)
    moments = torch.tensor([100_000 * int(s) + e[2] for s, e in zip(k_segment, k_entries, strict=True)])
    now = torch.tensor([100_000 * int(s) + e[2] for s, e in zip(q_segment, q_entries, strict=True)])
    last = torch.searchsorted(moments, now, right=True)
    assert (first == last).any()
    return Intervals(queries, keys, first, last, starts, tokens, tokens // 4 + 1)


def naive(q, k, v, intervals):
    """Entry by entry, key by key, from the words of the definition."""
    rows = [x.reshape(-1, DIM) for x in (q, k, v)]
    sums, counts = [torch.zeros(DIM, dtype=q.dtype) for _ in rows[0]], [0] * len(rows[0])
    for entry, row in enumerate(intervals.queries.tolist()):
        seen = range(int(intervals.first[entry]), int(intervals.last[entry]))
        seen = [f for f in seen if intervals.until is None or entry < intervals.until[f]]
        counts[row] += 1
        if seen:
            keys = intervals.keys[seen]
            p = (rows[1][keys] @ rows[0][row] / math.sqrt(DIM)).softmax(0)
            sums[row] = sums[row] + p @ rows[2][keys]
    return torch.stack([total / max(1, n) for total, n in zip(sums, counts, strict=True)]).view(q.shape)


KINDS = ["window", "whole", "leaving", "repeated", "padding", "one group", "unshared"]


def make(kind, tokens):
    return unshared(tokens) if kind == "unshared" else lists(kind, tokens)


def results(inputs, intervals, backend, weight):
    o = naive(*inputs, intervals) if backend == "naive" else interval_attention(*inputs, intervals, backend=backend)
    return [o, *torch.autograd.grad(o, inputs, weight)]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [33, 64])
def test_backends_are_the_definition(backend, kind, tokens):
    inputs = tensors(tokens)
    weight = torch.randn_like(inputs[0])
    expected = results(inputs, make(kind, tokens), "naive", weight)
    for found, value in zip(results(inputs, make(kind, tokens), backend, weight), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_equals_reference_over_many_tiles(kind):
    inputs = tensors(700)
    intervals = make(kind, 700)
    intervals = replace(intervals, reach=max(intervals.reach, 60))
    weight = torch.randn_like(inputs[0])
    pair = [results(inputs, intervals, backend, weight) for backend in ("reference", "chunked")]
    for found, value in zip(*reversed(pair), strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 200, 10_000])
def test_the_size_of_tiles_changes_nothing(length):
    inputs, intervals = tensors(300), lists("window", 300)
    weight = torch.randn_like(inputs[0])
    expected = results(inputs, intervals, "chunked", weight)
    for found, value in zip(
        results(inputs, replace(intervals, length=length), "chunked", weight), expected, strict=True
    ):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["leaving", "repeated", "unshared"])
def test_gradcheck(kind):
    inputs, intervals = tensors(6), make(kind, 6)
    assert torch.autograd.gradcheck(lambda *x: interval_attention(*x, intervals, backend="chunked"), inputs)


def test_half_precision_is_as_good_as_rounding_its_inputs():
    exact, intervals = tensors(200, torch.float32), lists("window", 200)
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    weight = torch.randn_like(exact[0]).bfloat16()
    rounded = [x.detach().float().requires_grad_() for x in half]
    expected = results(rounded, intervals, "reference", weight.float())
    for found, value in zip(results(half, intervals, "chunked", weight), expected, strict=True):
        assert found.dtype == torch.bfloat16
        # half a unit in the last place of 8 bits, of the result and of o where it goes into delta
        torch.testing.assert_close(found.float(), value, rtol=2**-7, atol=2**-7 * float(value.detach().abs().max()))


def test_rows_without_entries_and_empty_intervals_are_zero():
    inputs, intervals = tensors(33), lists("padding", 33)
    o, dq, dk, dv = results(inputs, intervals, "chunked", torch.ones(1, 33, HEADS, DIM, dtype=torch.float64))
    absent = torch.ones(33 * HEADS, dtype=torch.bool)
    absent[intervals.queries] = False
    for x in (o, dq, dk, dv):
        assert x.view(-1, DIM)[absent].eq(0).all() and x.isfinite().all()
    nothing = replace(intervals, first=intervals.first, last=intervals.first)
    for x in results(inputs, nothing, "chunked", torch.ones(1, 33, HEADS, DIM, dtype=torch.float64)):
        assert x.eq(0).all()


def test_constant_values_give_the_constant():
    (q, k, _), intervals = tensors(40), lists("repeated", 40)
    values = torch.full((1, 40, HEADS, DIM), 3.0, dtype=torch.float64)
    o = interval_attention(q, k, values, intervals).view(-1, DIM)
    torch.testing.assert_close(o, torch.full_like(o, 3.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_bit_equal(kind):
    inputs, intervals = tensors(300, torch.float32), make(kind, 300)
    weight = torch.randn_like(inputs[0])
    pair = [results(inputs, intervals, "chunked", weight) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_a_group_depends_on_no_bit_of_what_follows():
    """Group 0 with 50 tokens more, and other groups of other sizes: the first 100 outputs stay as they are."""
    (q, k, v), outputs = tensors(400, torch.float32), []
    for extra, other in ((0, 80), (50, 23)):
        rows = torch.cat([torch.arange(100 + extra), torch.arange(200, 200 + other)]) * HEADS
        starts = torch.tensor([0, 100 + extra, 100 + extra + other])
        entry = torch.arange(len(rows))
        first = torch.maximum(starts[(entry >= starts[1]).long()], entry - 29)
        intervals = Intervals(rows, rows, first, entry + 1, starts, 30, 100)
        outputs.append(interval_attention(q, k, v, intervals)[:, :100, 0])
    assert torch.equal(*outputs)


def test_inverse_intervals_are_those_of_brute_force():
    for kind in KINDS:
        intervals = make(kind, 40)
        entry, key = torch.arange(len(intervals.queries)), torch.arange(len(intervals.keys))
        seen = (key >= intervals.first[:, None]) & (key < intervals.last[:, None])
        if intervals.until is not None:
            seen &= entry[:, None] < intervals.until
        low, high = inverse(intervals.first, intervals.last, intervals.until, len(key))
        assert torch.equal(seen, (entry[:, None] >= low) & (entry[:, None] < high))


def test_tiles_cover_every_entry_once_and_cross_no_segment():
    starts = torch.tensor([0, 0, 1, 70, 70, 134, 200, 200])
    for size in (1, 16, 64, 256):
        first, count = query_tiles(starts, 200, size)
        assert len(first) == most_tiles(len(starts) - 1, 200, size)
        runs = [list(range(f, f + n)) for f, n in zip(first.tolist(), count.tolist(), strict=True) if n]
        assert [entry for run in runs for entry in run] == list(range(200)) and max(map(len, runs)) <= size
        segment = torch.searchsorted(starts[1:], torch.arange(200), right=True)
        assert all(len(segment[run].unique()) == 1 for run in runs)


def test_sums_of_rows():
    entries, x = torch.tensor([3, 0, 3, 1, 3]), torch.arange(10.0).view(5, 2)
    order = sorted_rows(entries, 5)
    expected = torch.zeros(5, 2).index_add(0, entries, x)
    assert torch.equal(sum_rows(x, *order), expected) and order.counts.tolist() == [1, 1, 0, 3, 0]


def test_a_step_averages_the_groups_that_have_keys():
    torch.manual_seed(3)
    q, keys, values = torch.randn(2, HEADS, DIM), *(torch.randn(2, HEADS, 3, 5, DIM) for _ in range(2))
    seen = torch.rand(2, HEADS, 3, 5) < 0.5
    seen[0, 0] = False
    seen[1, :, 2] = False
    o = interval_step(q, keys, values, seen)
    for row in range(2):
        for head in range(HEADS):
            parts = []
            for group in range(3):
                own = seen[row, head, group]
                if own.any():
                    p = (keys[row, head, group][own] @ q[row, head] / math.sqrt(DIM)).softmax(0)
                    parts.append(p @ values[row, head, group][own])
            expected = torch.stack(parts).mean(0) if parts else torch.zeros(DIM)
            torch.testing.assert_close(o[row, head], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reach": 0}, "reach=0 and length=12 must be at least 1"),
        ({"first": torch.zeros(3, dtype=torch.int64)}, "lists disagree: 66 queries with 3 and 66 ends"),
        ({"until": torch.zeros(3, dtype=torch.int64)}, "66 keys, 3 ends"),
        ({"keys": torch.zeros(66)}, "must be int64 vectors"),
    ],
)
def test_wrong_lists_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(lists("window", 33), **change)


def test_wrong_shapes_are_refused():
    q, k, v = tensors(33)
    with pytest.raises(ValueError, match="shapes disagree"):
        interval_attention(q, k[..., :4], v, lists("window", 33))
