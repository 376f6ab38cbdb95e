"""Relative attention in Triton against its definition: outputs and every gradient; and the skew of its tiles."""

import pytest
import torch

from farspan.kernels.relative import Sinusoid, Table, relative_attention

RAGGED = (1, 2, 37, 16, 17, 1, 33)
PREFIXES = (0, 5, 20, 1, 0, 3, 40)


def results(backend, kind, window, distances, prefixes, device="cpu", dtype=torch.float32, heads=4, channels=8):
    torch.manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape).to(device, dtype).requires_grad_()

    tokens, keys = sum(RAGGED), 2
    q, k, v = normal(1, tokens, heads, channels), normal(1, tokens, keys, channels), normal(1, tokens, keys, channels)
    u = normal(heads, channels)
    shapes = {"table": ((heads, distances, channels), (heads, distances))}
    shapes["sinusoid"] = ((heads, 6, channels), (heads, channels))
    learned = [normal(*shape) for shape in shapes[kind]]
    positions = (Table if kind == "table" else Sinusoid)(*learned)
    state = (
        None if prefixes is None else tuple((normal(n, keys, channels), normal(n, keys, channels)) for n in prefixes)
    )
    leaves = [q, k, v, u, *learned, *(x for pair in state or () for x in pair)]
    cu_seqlens = torch.tensor([0, *torch.tensor(RAGGED).cumsum(0)], dtype=torch.int32, device=device)
    options = {"window": window, "initial_state": state, "backend": backend}
    o, _ = relative_attention(q, k, v, u, positions, RAGGED, cu_seqlens, **options)
    return [o, *torch.autograd.grad(o, leaves, torch.randn(o.shape).to(o), materialize_grads=True, allow_unused=True)]


kinds = pytest.mark.parametrize("kind", ["table", "sinusoid"])


@kinds
@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.parametrize("distances", [1, 5, 90])
@pytest.mark.parametrize("prefixes", [None, PREFIXES])
def test_fused_equals_reference(kind, window, distances, prefixes):
    if kind == "sinusoid" and distances != 90:
        return  # they have no table
    arguments = kind, window, distances, prefixes
    for got, expected in zip(results("fused", *arguments), results("reference", *arguments), strict=True):
        if got.numel():
            assert (got - expected).abs().max() <= 5e-6 * max(1.0, float(expected.detach().abs().max()))


def test_fused_table_gradients_are_the_same_every_time():
    one, other = (results("fused", "table", None, 5, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_permutation_of_a_tile_is_an_involution_and_halves_are_used_again():
    n, (i0, j0) = 8, (40, 16)
    row, column = torch.arange(n)[:, None], torch.arange(n)
    permutation = (row - column - 1) % n
    assert torch.equal(permutation.gather(1, permutation), column.expand(n, n))
    scores = torch.randn(n, 100)  # of a row with every distance

    def halves(first):
        return (scores[:, i0 - first + shift + torch.arange(n)] for shift in (1 - n, 1))

    for first in (j0, j0 + n):
        lo, hi = halves(first)
        skewed = torch.where(column >= row, lo, hi).gather(1, permutation)
        assert torch.equal(skewed, scores.gather(1, i0 + row - first - column))
    assert torch.equal(next(halves(j0)), list(halves(j0 + n))[1])


def test_fused_refuses_what_it_has_no_kernels_for():
    with pytest.raises(ValueError, match="use backend='chunked'"):
        results("fused", "table", None, 5, None, dtype=torch.float64)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("channels", [64, 128])
def test_fused_on_cuda(kind, channels):
    arguments = kind, None, 50, None, "cuda"
    exact = results("reference", *arguments, torch.float32, channels=channels)
    eager, fused = (results(b, *arguments, torch.bfloat16, channels=channels) for b in ("reference", "fused"))
    for truth, slow, fast in zip(exact, eager, fused, strict=True):
        scale = (slow.float() - truth).abs().max()
        assert (fast.float() - truth).abs().max() <= 2 * scale + 1e-6
