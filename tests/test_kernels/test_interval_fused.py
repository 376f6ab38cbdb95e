"""The Triton kernels of interval attention in the interpreter, in fp32, against the definition."""

from dataclasses import replace

import pytest
import torch

from farspan.kernels.interval import Intervals, interval_attention


def lists(kind, tokens, heads):
    torch.manual_seed(1)
    group = torch.randint(0, 3, (heads, tokens))
    repeated = kind == "repeated"
    token = torch.arange(tokens).expand(heads, -1)
    if repeated:
        group, token = torch.cat([group, (group + 1) % 3], 1), torch.cat([token, token], 1)
    head = torch.arange(heads)[:, None].expand_as(group)
    segment = (head * 3 + group).flatten()
    order = (segment * tokens + token.flatten()).argsort()
    rows, segment = (token * heads + head).flatten()[order], segment[order]
    starts = torch.searchsorted(segment, torch.arange(3 * heads + 1))
    entry = torch.arange(len(rows))
    begin = starts[segment]
    first, until, reach = torch.maximum(begin, entry - 39), None, 40
    if kind == "leaving":
        first, until, reach = begin, entry + torch.randint(1, 60, entry.shape), tokens
    last = entry + 1 - (entry > first).long()
    if kind == "empty":
        last = torch.where(entry % 2 == 0, last, first).cummax(0).values
        last = torch.maximum(last.minimum(entry + 1), first)
        last = last.where(entry > 20, first)
    return Intervals(rows, rows, first, last, starts, reach, tokens // 3 + 1, until, repeated)


def compare(inputs, intervals, tolerance=4e-6):
    weight, found = torch.randn_like(inputs[0]), []
    for backend in ("reference", "fused"):
        o = interval_attention(*inputs, intervals, backend=backend)
        found.append([o, *torch.autograd.grad(o, inputs, weight)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["window", "leaving", "repeated", "empty"])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 16), (33, 8), (150, 16), (64, 40)])
def test_fused_equals_reference(kind, tokens, dim):
    torch.manual_seed(0)
    inputs = [torch.randn(1, tokens, 2, dim, requires_grad=True) for _ in range(3)]
    compare(inputs, lists(kind, tokens, 2))


def test_queries_may_be_some_of_the_keys():
    torch.manual_seed(0)
    whole = lists("window", 90, 2)
    asks = whole.queries // 2 >= 45
    place = asks.nonzero()[:, 0]
    starts = torch.searchsorted(place, whole.starts)
    queries = whole.queries[asks] - 45 * 2
    some = Intervals(queries, whole.keys, whole.first[asks], whole.last[asks], starts, 40, 15)
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (45, 90, 90))
    compare((q, k, v), some)
    full = torch.cat([torch.zeros_like(q), q], dim=1)
    o = interval_attention(full, k, v, whole)[:, 45:]
    torch.testing.assert_close(interval_attention(q, k, v, some, backend="fused"), o, rtol=0, atol=2e-6)


def test_no_bit_depends_on_what_follows():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 200, 1, 16) for _ in range(3))
    outputs = []
    for length in (130, 177):
        entry = torch.arange(length)
        first = (entry - 59).clamp(min=0)
        intervals = Intervals(entry, entry, first, entry + 1, torch.tensor([0, length]), 60, 100)
        outputs.append(interval_attention(q, k, v, intervals, backend="fused")[:, :130])
    assert torch.equal(*outputs)


def test_double_precision_and_large_heads_are_refused():
    inputs = [torch.randn(1, 30, 2, 16, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ValueError, match="fp32, bf16 or fp16, not 16 in torch"):
        interval_attention(*inputs, lists("window", 30, 2), backend="fused")
    inputs = [torch.randn(1, 30, 2, 300) for _ in range(3)]
    with pytest.raises(ValueError, match="head dims up to 256"):
        interval_attention(*inputs, lists("window", 30, 2), backend="fused")


def test_lists_without_entries():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 2, 16, requires_grad=True) for _ in range(3)]
    none = torch.zeros(0, dtype=torch.int64)
    empty = replace(
        lists("window", 4, 2), queries=none, keys=none, first=none, last=none, starts=torch.zeros(3, dtype=torch.int64)
    )
    for backend in ("chunked", "fused"):
        o = interval_attention(*inputs, empty, backend=backend)
        assert o.eq(0).all()
        assert all(x.eq(0).all() for x in torch.autograd.grad(o.sum(), inputs))
