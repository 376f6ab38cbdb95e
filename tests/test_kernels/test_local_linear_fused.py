"""The fused kernels of local linear attention against the definition, in Triton's interpreter; in bf16 as well."""

import pytest
import torch

from farspan.kernels.launch import Tile
from farspan.kernels.local_linear import fused, fused_plan, fused_tiles, local_linear_attention
from farspan.kernels.local_linear.fused_plan import Plan

# Solved as far as fp32 goes; the rest is rounding of sums over up to 60 keys, and of x, which the ridge magnifies.
SOLVED = {"solver": "cg", "tolerance": 1e-7, "iterations": 60}
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiles of 16 rows, so that few tokens have many, and memory that is read before it is written holds NaN."""
    tiles = dict.fromkeys(fused_tiles.TILES, (Tile(32, 32, 4, 1),) * 5)  # halved for fp32
    monkeypatch.setattr(fused_tiles, "TILES", tiles)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(lengths, heads=2, kv_heads=1, dim=8, value_dim=None, ridge="head", size=1.0, prefixes=None, norm=False):
    """q, k, v, ridge, scale and the keys and values before every document, float64 that fp32 holds."""
    tokens, value_dim = sum(lengths), value_dim or dim
    shapes = [(1, tokens, heads, dim), (1, tokens, kv_heads, dim), (1, tokens, kv_heads, value_dim)]
    shapes += [(n, kv_heads, c) for n in prefixes or () for c in (dim, value_dim)]
    q, k, v, *before = (torch.randn(shape).double() for shape in shapes)
    if norm:
        q, k = (torch.nn.functional.rms_norm(x, x.shape[-1:]).float().double() for x in (q, k))
    shape = {"head": (heads,), "token": (1, tokens, heads), "channel": (heads, dim)}[ridge]
    own = (size * (0.5 + torch.rand(shape))).double()
    scale = (dim**-0.5 * (0.5 + torch.rand(heads))).double()
    return [q, k, v, own, scale, *before]


def run(tensors, lengths, backend, dtype, **options):
    """o, every gradient for a fixed random one of o, and the statistics."""
    wide = torch.promote_types(dtype, torch.float32)  # of ridge and scale
    tensors = [x.to(wide if i in (3, 4) else dtype).requires_grad_() for i, x in enumerate(tensors)]
    q, k, v, ridge, scale, *before = tensors
    state = tuple(zip(before[::2], before[1::2], strict=True)) or None
    options = {**SOLVED, **options, "scale": scale, "initial_state": state, "backend": backend}
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    o, _, statistics = local_linear_attention(q, k, v, ridge, lengths, boundaries, **options)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    return [o.detach(), *torch.autograd.grad(o, tensors, weight)], statistics


def check(tensors, lengths, tolerance=TOLERANCE, dtype=torch.float32, **options):
    expected, _ = run(tensors, lengths, "reference", torch.float64, **options)
    found, statistics = run(tensors, lengths, "fused", dtype, **options)
    names = ("o", *(f"gradient of {name}" for name in ("q", "k", "v", "ridge", "scale")))
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        name = names[index] if index < len(names) else "gradient of the state"
        if one.numel():
            error = (other.double() - one).abs().max() / one.abs().max().clamp(min=1)
            assert error <= tolerance, f"{name}: {error:.1e}"
    return statistics


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 35])
def test_lengths_around_the_tiles(length):
    check(make((length,)), (length,))


@pytest.mark.parametrize("size", [0.1, 1, 10])
def test_ridges(size):
    check(make((20,), size=size, norm=True), (20,), tolerance=TOLERANCE * max(1, 1 / size))


@pytest.mark.parametrize(
    ("kernel", "mode", "ridge"),
    [
        ("dot", "relative", "token"),
        ("dot", "relative", "channel"),
        ("dot", "absolute", "head"),
        ("rbf", "relative", "head"),
        ("rbf", "absolute", "channel"),
    ],
)
def test_kernels_and_ridges(kernel, mode, ridge):
    check(make((18,), ridge=ridge, norm=True), (18,), kernel=kernel, ridge_mode=mode)


def test_grouped_heads_packed_documents_and_odd_head_dims():
    lengths = (1, 19, 2)
    check(make(lengths, heads=4, kv_heads=2, dim=6, value_dim=3, ridge="token"), lengths)


@pytest.mark.parametrize("window", [1, 5, 20])
def test_windows(window):
    check(make((1, 33), heads=1), (1, 33), window=window)


@pytest.mark.parametrize("window", [None, 7])
def test_keys_before_the_row(window):
    check(make((3, 17), prefixes=(20, 0)), (3, 17), window=window)


def test_heads_split_among_programs_and_in_one_change_nothing_but_rounding(monkeypatch):
    tensors = make((17,), heads=4)
    apart, _ = run(tensors, (17,), "fused", torch.float32)
    monkeypatch.setattr(fused_plan, "PROGRAMS", 1)
    monkeypatch.setattr(fused, "PROGRAMS", 1)  # one workspace for all tiles, in turn
    together, _ = run(tensors, (17,), "fused", torch.float32)
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(apart[0], together[0])


def test_the_first_token_gets_its_value():
    tensors = make((1, 1, 3))
    found, _ = run(tensors, (1, 1, 3), "fused", torch.float32)
    first = [0, 1, 2]
    assert torch.equal(found[0][0, first], tensors[2].float()[0, first].expand(-1, 2, -1))
    assert found[1][0, first].abs().max() < 1e-6, "gradient of q, of what would be x = (k - q) / ridge"


def test_what_has_converged_is_not_touched_by_the_rest():
    """Of two documents in tiles of their own and of one tile: a row does not depend on its neighbours."""
    tensors = make((16,))
    whole, _ = run(tensors, (16,), "fused", torch.float32, tolerance=1e-2)
    tensors[0][:, 9:] *= 5
    other, _ = run(tensors, (16,), "fused", torch.float32, tolerance=1e-2)
    assert torch.equal(whole[0][:, :9], other[0][:, :9]) and not torch.equal(whole[0][:, 9:], other[0][:, 9:])


def test_the_cap_and_the_statistics():
    tensors = make((20,), size=0.01)
    (o, *_), short = run(tensors, (20,), "fused", torch.float32, iterations=2)
    (exact, *_), long = run(tensors, (20,), "chunked", torch.float32, iterations=2)
    torch.testing.assert_close(o, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(short[1:], long[1:], rtol=1e-3, atol=1e-3)
    assert abs(short[0] - long[0]) < 1.01 / 20  # the first query, which sees one key, needs no iteration there
    assert short.iterations_max == 2 and short.residual_max > 1e-3


def test_ill_conditioned_keys_stay_finite():
    tensors = make((20,), size=1e-3)
    tensors[1] = tensors[1][:, :1].expand(-1, 20, -1, -1) + 1e-4 * tensors[1]
    tensors[0] = 100 * tensors[0]
    found, _ = run(tensors, (20,), "fused", torch.float32)
    assert all(x.isfinite().all() for x in found)


def test_nothing_hangs_on_what_is_no_number():
    tensors = make((18,))
    tensors[0][0, 4, 0, 0] = float("nan")
    (o, *_), _ = run(tensors, (18,), "fused", torch.float32)
    assert o[0, 4, 0].isnan().all() and o[0, :4].isfinite().all() and o[0, 5:].isfinite().all()


def test_programs_cover_every_query_and_key_once():
    plan = Plan((5, 1, 40), (0, 33, 7), 9, torch.device("cpu"))
    first, count, position, key = plan.query_table(16)
    assert sorted(t for a, n in zip(first, count, strict=True) for t in range(a, a + n)) == list(range(46))
    assert torch.equal(key, torch.where(first >= 6, 39, torch.where(first == 5, 5, 0)))
    assert torch.equal(position, torch.where(first >= 6, first + 1, torch.where(first == 5, 33, first)))
    first, count, index, begin, position, end = plan.key_table(16)
    assert sorted(t for a, n in zip(first, count, strict=True) for t in range(a, a + n)) == list(range(86))
    for entry in range(len(first)):
        document = 0 if first[entry] < 5 else 1 if first[entry] < 39 else 2
        start, length, prefix = ((0, 5, 0), (5, 1, 33), (6, 40, 7))[document]
        keys = range(int(index[entry]), int(index[entry] + count[entry]))
        seeing = [i for i in range(length) if any(i + prefix - 9 < j <= i + prefix for j in keys)]
        expected = (start + seeing[0], start + seeing[-1] + 1) if seeing else (begin[entry], begin[entry])
        assert (begin[entry], end[entry]) == expected
        assert position[entry] == begin[entry] - start + prefix


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"solver": "gram"}, "solver='gram'"),
        ({"dim": 129}, {}, "up to 128, not 129"),
        ({"dtype": torch.float64}, {}, "not float64"),
        ({"dtype": torch.float16}, {}, "not float16"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change, options, message):
    dtype = change.pop("dtype", torch.float32)
    with pytest.raises(ValueError, match=message):
        run(make((2,), **change), (2,), "fused", dtype, **options)
