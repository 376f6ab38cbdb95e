"""Softmax and window attention: the definition against a loop, the fast paths against the definition."""

import math
from inspect import signature

import pytest
import torch

from farspan.kernels.attention_statistics import attention_statistics
from farspan.kernels.blocks import attention_block, attention_block_backward, hidden_mask
from farspan.kernels.cca import core_attention, pool_groups
from farspan.kernels.interval import interval_attention
from farspan.kernels.local_linear import local_linear_attention
from farspan.kernels.operator import OPERATORS, choose_backend
from farspan.kernels.rat import rat
from farspan.kernels.relative import relative_attention
from farspan.kernels.softmax import attention_step, softmax_attention
from farspan.kernels.softmax import chunked as softmax_chunked
from farspan.kernels.softplus import softplus_attention
from farspan.kernels.titans import titans_memory
from farspan.kernels.window import window_attention

RAGGED = (1, 2, 37, 16, 17, 1, 70)


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def inputs(lengths, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, device="cpu"):
    total = sum(lengths)
    shapes = [(1, total, heads, head_dim), (1, total, kv_heads, head_dim), (1, total, kv_heads, head_dim)]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def attend(q, k, v, lengths, window, **options):
    cu_seqlens = boundaries(lengths).to(q.device)
    if window is None:
        return softmax_attention(q, k, v, lengths, cu_seqlens, **options)
    return window_attention(q, k, v, lengths, cu_seqlens, window, **options)


def naive(q, k, v, lengths, window, before):
    """One query at a time, from the words of the definition."""
    output, start = torch.zeros_like(q), 0
    for document, length in enumerate(lengths):
        keys = torch.cat([before[document][0], k[0, start : start + length]])
        values = torch.cat([before[document][1], v[0, start : start + length]])
        for i in range(length):
            last = len(keys) - length + i
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(q.shape[2]):
                own = head // (q.shape[2] // k.shape[2])
                scores = keys[first : last + 1, own] @ q[0, start + i, head] / math.sqrt(q.shape[3])
                output[0, start + i, head] = scores.softmax(0) @ values[first : last + 1, own]
        start += length
    return output


def prefix_state(counts, kv_heads=2, head_dim=8):
    def part(count):
        return torch.randn(count, kv_heads, head_dim, dtype=torch.float64, requires_grad=True)

    return tuple((part(count), part(count)) for count in counts)


windows = pytest.mark.parametrize("window", [None, 1, 3, 17, 64])


@windows
def test_reference_is_the_definition(window):
    lengths = (1, 5, 20)
    q, k, v = inputs(lengths)
    before = prefix_state((0, 3, 20))
    output, _ = attend(q, k, v, lengths, window, initial_state=before, backend="reference")
    torch.testing.assert_close(output, naive(q, k, v, lengths, window, before), rtol=0, atol=1e-13)


@windows
@pytest.mark.parametrize("prefixes", [None, (0, 5, 20, 1, 0, 3, 64)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_chunked_equals_reference(window, prefixes, kv_heads):
    q, k, v = inputs(RAGGED, kv_heads=kv_heads)
    state = None if prefixes is None else prefix_state(prefixes, kv_heads)
    leaves = [q, k, v, *(part for pair in state or () for part in pair)]
    weight, results = torch.randn_like(q), []
    for backend in ("reference", "chunked"):
        output, _ = attend(q, k, v, RAGGED, window, initial_state=state, backend=backend)
        results.append(
            [output, *torch.autograd.grad(output, leaves, weight, materialize_grads=True, allow_unused=True)]
        )
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 4, 16, 100])
def test_window_block_size_changes_nothing(block):
    q, k, v = inputs(RAGGED)
    weight, results = torch.randn_like(q), []
    for size in (block, None):
        output, _ = attend(q, k, v, RAGGED, 7, block=size, backend="chunked")
        results.append([output, *torch.autograd.grad(output, (q, k, v), weight)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_softmax_query_block_size_changes_nothing(monkeypatch):
    q, k, v = inputs((40,))
    state = prefix_state((9,))
    whole, _ = attend(q, k, v, (40,), None, initial_state=state, backend="chunked")
    monkeypatch.setattr(softmax_chunked, "MASKED_QUERIES", 7)
    pieces, _ = attend(q, k, v, (40,), None, initial_state=state, backend="chunked")
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-13)


def test_window_gradcheck():
    lengths = (1, 3, 9)
    q, k, v = inputs(lengths, heads=2, kv_heads=1, head_dim=2)

    def run(q, k, v):
        return attend(q, k, v, lengths, 3, block=2, backend="chunked")[0]

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_block_in_plain_matrix_form_equals_the_flash_kernel(monkeypatch, causal):
    """The form of devices without torch's CPU flash kernel, which is the one that runs here otherwise."""
    q, k, v = (x[0].transpose(0, 1)[None].detach() for x in inputs((24,), kv_heads=2))
    mask = None if causal else hidden_mask(torch.ones(24, 24, dtype=torch.bool).triu(2), q.dtype)
    do = torch.randn_like(q)

    def run():
        output, lse = attention_block(q, k, v, 0.3, mask, causal)
        return [output, lse, *attention_block_backward(do, q, k, v, output, lse, 0.3, mask, causal)]

    expected = run()

    class Elsewhere(str):
        type = "elsewhere"

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "device", Elsewhere("cpu"), raising=False)
        got = run()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_final_state_continues(window, backend):
    lengths, first = (3, 11), (1, 6)
    q, k, v = inputs(lengths)
    whole, _ = attend(q, k, v, lengths, window, backend=backend)

    def piece(x, begin):
        documents = x[0].split(lengths)
        parts = [d[:n] if begin else d[n:] for d, n in zip(documents, first, strict=True)]
        return torch.cat(parts)[None]

    head, state = attend(*(piece(x, True) for x in (q, k, v)), first, window, return_state=True, backend=backend)
    rest = tuple(n - m for n, m in zip(lengths, first, strict=True))
    tail, _ = attend(*(piece(x, False) for x in (q, k, v)), rest, window, initial_state=state, backend=backend)
    torch.testing.assert_close(head, piece(whole, True), rtol=0, atol=1e-13)
    torch.testing.assert_close(tail, piece(whole, False), rtol=0, atol=1e-13)
    weight = torch.randn_like(whole)
    pieces = (head * piece(weight, True)).sum() + (tail * piece(weight, False)).sum()
    for a, b in zip(torch.autograd.grad(pieces, (q, k, v)), torch.autograd.grad(whole, (q, k, v), weight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    if window is not None:
        assert all(len(keys) <= window - 1 for keys, _ in state)


def test_step_reads_only_counted_slots():
    q = torch.randn(3, 1, 4, 8, dtype=torch.float64)
    keys, values = torch.randn(2, 3, 2, 10, 8, dtype=torch.float64)
    counts = torch.tensor([1, 4, 10])
    output = attention_step(q, keys, values, counts)
    poisoned = keys.clone()
    for row, count in enumerate(counts.tolist()):
        poisoned[row, :, count:] = 1e9
        key, value = (x[row, :, :count].transpose(0, 1) for x in (keys, values))
        expected, _ = softmax_attention(
            q[row, None],
            key[None, -1:],
            value[None, -1:],
            (1,),
            boundaries((1,)),
            initial_state=((key[:-1], value[:-1]),),
            backend="reference",
        )
        torch.testing.assert_close(output[row, None], expected, rtol=0, atol=1e-13)
    assert torch.equal(attention_step(q, poisoned, values, counts), output)


def test_window_registration():
    q, k, v = inputs((40,), dtype=torch.float32)
    torch.library.opcheck(torch.ops.farspan.window_forward, (q, k, v, [40], [0], 7, 0.3, 16))


def test_half_precision_error_is_that_of_the_eager_path():
    lengths = (100, 3, 200)
    q, k, v = inputs(lengths, head_dim=32)
    exact, _ = attend(q, k, v, lengths, 33, backend="reference")
    low = [x.detach().bfloat16() for x in (q, k, v)]
    got, _ = attend(*low, lengths, 33, backend="chunked")
    eager, _ = attend(*low, lengths, 33, backend="reference")
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (3, 4)}, "sum to 7, the row has 8"),
        ({"lengths": (8, 0)}, "document lengths"),
        ({"window": 0}, "at least 1"),
        ({"kv": 3}, "shapes disagree"),
        ({"backend": "fast"}, "not one of"),
        ({"backend": "fused"}, "needs CUDA"),
        ({"state": 3}, "initial state has 3 documents"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    q, k, v = inputs((8,), kv_heads=change.get("kv", 2))
    options = {"backend": change["backend"]} if "backend" in change else {}
    if "state" in change:
        options["initial_state"] = prefix_state((1,) * change["state"])
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, change.get("lengths", (8,)), change.get("window", 3), **options)


def test_auto_keeps_float64_exact():
    assert choose_backend(OPERATORS["softmax"], "auto", torch.zeros(1, dtype=torch.float64)) == "chunked"


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("cca", (pool_groups, core_attention)),
        ("interval", (interval_attention,)),
        ("softmax", (softmax_attention,)),
        ("softplus", (softplus_attention,)),
        ("window", (window_attention,)),
        ("rat", (rat,)),
        ("titans", (titans_memory,)),
        ("local_linear", (local_linear_attention,)),
        ("attention_statistics", (attention_statistics,)),
        ("relative", (relative_attention,)),
    ],
)
def test_every_operator_declares_its_arguments(name, functions):
    declared = OPERATORS[name]
    named = {*declared.per_head, *declared.per_group, *declared.replicated, *declared.per_head_parameters}
    options = {"scale", "return_state", "block", "backend"} - named  # a scale may be a parameter of each head
    assert named == {name for function in functions for name in signature(function).parameters} - options


def test_all_operators_are_tested_for_their_declaration():
    names = "attention_statistics cca interval local_linear rat relative softmax softplus titans window"
    assert set(OPERATORS) == set(names.split())


@pytest.mark.gpu
@windows
@pytest.mark.parametrize("lengths", [(1,), (1, 2, 777, 4000, 1), (70_000,)])
def test_fused_on_cuda(window, lengths):
    q, k, v = inputs(lengths, kv_heads=2, head_dim=64, dtype=torch.float32, device="cuda")
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    weight = torch.randn_like(q)
    results = []
    long = sum(lengths) > 10_000  # the reference holds every score
    for backend, leaves in (("chunked" if long else "reference", (q, k, v)), ("chunked", low), ("fused", low)):
        output, _ = attend(*leaves, lengths, window, backend=backend)
        results.append([output, *torch.autograd.grad(output, leaves, weight.to(output.dtype))])
    for exact, eager, fused in zip(*results, strict=True):
        scale = (eager.float() - exact).abs().max()
        assert (fused.float() - exact).abs().max() <= 2 * scale + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_block_on_cuda(causal, kv_heads):
    """The flash kernel on half precision against the products in fp32: o, lse, and gradients from a wider softmax's."""
    shapes = (4, 700), (kv_heads, 700 if causal else 900), (kv_heads, 700 if causal else 900)
    q, k, v = (torch.randn(2, heads, tokens, 64, device="cuda") for heads, tokens in shapes)
    do, gap = torch.randn_like(q), 0.5
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        low = [x.to(dtype) for x in (q, k, v)]
        o, lse = attention_block(*low, 0.125, causal=causal)
        wider = (o, lse + gap)  # as if other keys had part of the weight
        results.append([o, lse, *attention_block_backward(do.to(dtype), *low, *wider, 0.125, causal=causal)])
    for exact, fast in zip(*results, strict=True):
        assert (fast.float() - exact).abs().max() <= 0.02 * exact.abs().max()
