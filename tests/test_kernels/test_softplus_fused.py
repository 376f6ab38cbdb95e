"""The fused softplus kernels against the definition, in Triton's interpreter; on a GPU against the chunked form."""

import math

import pytest
import torch

from farspan.kernels.launch import Tile
from farspan.kernels.softplus import Config, attend, normalise
from farspan.kernels.softplus import fused_tiles as tiles
from farspan.kernels.softplus.fused import softplus_fused
from farspan.kernels.softplus.fused_plan import key_table, query_table

# fp32 rounding, in the norm of a result or gradient; the power multiplies that of a score's excess over its mean.
TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is read before it is written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles within 40 tokens, so that whole ones and both kinds of edges occur."""
    monkeypatch.setitem(tiles.TILES, (4, 80, 64), (Tile(16, 16, 4, 1),) * 3)


def make(lengths, prefixes=None, heads=4, groups=2, dim=8, device="cpu"):
    """q, k, v in float64, exact in fp32, and per document earlier keys and values; a gradient of o."""
    count = sum(lengths)
    shapes = [(1, count, heads, dim), (1, count, groups, dim), (1, count, groups, dim)]
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    state = None
    if prefixes is not None:
        parts = [torch.randn(2, n, groups, dim, device=device) for n in prefixes]
        state = [(normalise(keys).double(), values.double()) for keys, values in parts]
    return [normalise(q).double(), normalise(k).double(), v.double()], state, torch.randn_like(q).double()


def run(inputs, lengths, config, backend, dtype):
    """o and the gradients of q, k, v and every earlier key and value, in float64."""
    data, state, do = inputs
    leaves = [x.to(dtype).requires_grad_() for x in data]
    pairs = None if state is None else [tuple(x.to(dtype).requires_grad_() for x in pair) for pair in state]
    o = attend(*leaves, lengths, config, pairs, backend)
    leaves += [x for pair in pairs or () for x in pair if len(x)]
    gradients = torch.autograd.grad(o, leaves, do.to(dtype), allow_unused=True, materialize_grads=True)
    return [x.detach().double() for x in (o, *gradients)]


def check(inputs, lengths, floor=1e-3, **options):
    """floor: what a norm is at least taken for; where weights saturate, gradients are differences of larger numbers."""
    config = Config(**options)
    expected = run(inputs, lengths, config, "reference", torch.float64)
    found = run(inputs, lengths, config, "fused", torch.float32)
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        error, size = (other - one).norm(), one.norm().clamp(min=floor)
        assert error <= TOLERANCE * max(2, config.power / 3) * size, (index, float(error / size))


@pytest.mark.parametrize("power", [0, 1, 2, 2.5, 3, 15])
@pytest.mark.parametrize("lengths", [(1,), (2, 3, 5), (33,), (21, 1, 16)], ids=str)
def test_equals_the_definition(power, lengths, small_tiles):
    check(make(lengths), lengths, power=power)


def test_longer_documents_in_the_tiles_of_a_launch():
    check(make((77, 3), heads=2, groups=1, dim=24), (77, 3), power=15)


@pytest.mark.parametrize(("power", "window"), [(0, 1), (15, 3), (2.5, 17), (15, 20), (3, 64)])
def test_window(power, window, small_tiles):
    check(make((40, 1, 18)), (40, 1, 18), power=power, window=window)


@pytest.mark.parametrize(("power", "window"), [(0, None), (15, None), (2.5, 9), (15, 30)])
def test_prefixes(power, window, small_tiles):
    """N counts the keys before a row, also where it begins inside a tile; some prefixes are outside the window."""
    lengths, prefixes = (20, 1, 7), (5, 33, 0)
    check(make(lengths, prefixes), lengths, power=power, window=window)


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 1)])
def test_shared_keys(heads, groups, small_tiles):
    check(make((19,), heads=heads, groups=groups), (19,), power=3)


def test_options():
    for options in ({"free_rows": 7}, {"free_rows": 1}, {"scale_multiplier": 0.4}, {"power": 40}):
        check(make((18,), heads=2), (18,), **{"power": 3, **options})
    check(make((18,), heads=2), (18,), floor=100, power=300)  # not by squaring


@pytest.mark.parametrize("dead_row", ["lssa", "zero"])
@pytest.mark.parametrize("power", [2, 15])
def test_dead_rows(dead_row, power, small_tiles):
    """Zero queries, and keys that are all the same; by their policy, with their gradients."""
    (q, k, v), _, _ = inputs = make((24,))
    q[0, 9], q[0, 1] = 0, 0
    k[0, :, 1] = k[0, 0, 1]
    check(inputs, (24,), power=power, dead_row=dead_row)
    o, *_ = run(inputs, (24,), Config(power=power, dead_row=dead_row), "fused", torch.float32)
    mean = v[0, :10, 0].mean(0).expand(2, -1) if dead_row == "lssa" else torch.zeros_like(o[0, 9, :2])
    torch.testing.assert_close(o[0, 9, :2], mean, rtol=0, atol=1e-6)


def test_one_aligned_key_among_opposed_ones():
    """The literal formula would raise A * N, up to 200, to the power 15."""
    direction = normalise(torch.randn(8)).double()
    q, k = direction.expand(1, 200, 1, 8).clone(), -direction.expand(1, 200, 1, 8).clone()
    k[0, 50] = direction
    v = torch.randn(1, 200, 1, 8).double()
    o, *gradients = run(([q, k, v], None, torch.randn(1, 200, 1, 8)), (200,), Config(), "fused", torch.float32)
    assert all(x.isfinite().all() for x in gradients)
    torch.testing.assert_close(o[0, 50:], v[0, 50:51].expand(150, 1, 8), rtol=1e-6, atol=1e-7)


def test_scores_that_underflow(small_tiles):
    """c is 140 here: rows with every score far below 0 have f of 0 in fp32 and give 0, not NaN."""
    direction = normalise(torch.randn(8)).double()
    q, k = direction.expand(1, 20, 1, 8).clone(), -direction.expand(1, 20, 1, 8).clone()
    inputs = [q, k, torch.randn(1, 20, 1, 8).double()], None, torch.randn(1, 20, 1, 8)
    for power in (0, 15):
        results = run(inputs, (20,), Config(power=power, scale_multiplier=30.0), "fused", torch.float32)
        assert all(x.isfinite().all() for x in results)
        assert not results[0][0, 19].any()


@pytest.mark.parametrize("power", [0, 1, 2.5, 15])
def test_not_a_number_is_not_hidden(power, small_tiles):
    (q, k, v), _, do = make((40,), heads=1, groups=1)
    q[0, 30], q[0, 2] = math.nan, math.nan
    o, *_ = run(([q, k, v], None, do), (40,), Config(power=power), "fused", torch.float32)
    wrong = o[0].isnan().all(-1)[:, 0]
    assert wrong.nonzero()[:, 0].tolist() == [2, 30] and o[0][~wrong].isfinite().all()


@pytest.mark.parametrize("power", [0, 15])
def test_half_precision(power):
    """fp16, because the interpreter does not multiply bf16. Scores that are all low fit it too: e^-20 is 0 in fp16."""
    inputs, _, do = make((40, 3), heads=2, groups=1, dim=16)
    inputs[1][0, :40] = -inputs[0][0, 39, :1] + 0.1 * torch.randn(40, 1, 16)
    inputs[1] = normalise(inputs[1])
    inputs = [x.half().double() for x in inputs], None, do.half().double()
    truth = run(inputs, (40, 3), Config(power=power), "reference", torch.float64)
    eager = run(inputs, (40, 3), Config(power=power), "reference", torch.float16)
    found = run(inputs, (40, 3), Config(power=power), "fused", torch.float16)
    for index, (right, one, other) in enumerate(zip(truth, eager, found, strict=True)):
        allowed = 2 * (one - right).norm() + 2e-3 * right.norm()  # weights and dz are rounded before their products
        assert (other - right).norm() <= allowed, index


def test_slices_of_one_projection():
    """q, k and v may be views into one tensor; their gradients arrive there."""
    parts = [normalise(torch.randn(1, 9, heads, 8)).flatten(2) for heads in (2, 1, 1)]
    joined = torch.cat(parts, dim=-1).requires_grad_()

    def result(backend):
        q, k, v = (x.unflatten(-1, (-1, 8)) for x in joined.split([16, 8, 8], dim=-1))
        o = attend(q, k, v, (9,), Config(power=3), None, backend)
        return o, *torch.autograd.grad(o.square().sum(), joined)

    for one, other in zip(result("reference"), result("fused"), strict=True):
        assert (other - one).norm() <= 2 * TOLERANCE * one.norm()


def test_repeats_bit_for_bit():
    inputs = make((40, 5))
    one, other = (run(inputs, (40, 5), Config(), "fused", torch.float32) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_registration():
    from farspan.kernels.softplus.fused import _fused_forward

    q, k, v = (x.float().requires_grad_() for x in make((12,), heads=2)[0])
    for power in (0.0, 3.0):
        torch.library.opcheck(_fused_forward, (q, k, v, [12], [0], power, None, 3, 1.0, "lssa"))


@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_tables_cover_every_pair(window):
    """Every token and every key is owned once, and a tile of keys is read by exactly the rows that see it."""
    lengths, prefixes, block = (20, 1, 33), (0, 17, 5), 16
    cpu = torch.device("cpu")
    owned = [torch.arange(s, s + n) for s, n in query_table(lengths, prefixes, window, block, cpu)[:2].T.tolist()]
    assert torch.cat(owned).sort()[0].tolist() == list(range(54))
    starts, keys = (0, 20, 21), (0, 20, 38)
    found = []
    for first, count, index, token, seeing, position in key_table(lengths, prefixes, window, block, cpu).T.tolist():
        document = max(d for d in range(3) if keys[d] <= first)
        assert index == first - keys[document]
        found += range(first, first + count)
        expected = [
            starts[document] + i
            for i in range(lengths[document])
            if any(0 <= prefixes[document] + i - j < (window or 10**6) for j in range(index, index + count))
        ]
        assert list(range(token, token + seeing)) == expected
        assert not seeing or position == prefixes[document] + token - starts[document]
    assert sorted(found) == list(range(76))


def test_what_has_no_kernel_is_refused():
    (q, k, v), _, _ = make((4,), dim=8)
    with pytest.raises(ValueError, match=r"not 8 in torch.float64; use backend='chunked'"):
        softplus_fused(q, k, v, (4,), (0,), Config())
    with pytest.raises(ValueError, match="no kernels for other values of eps"):
        softplus_fused(q.float(), k.float(), v.float(), (4,), (0,), Config(eps=1e-8))
    wide = torch.randn(1, 4, 1, 257)
    with pytest.raises(ValueError, match="head dims up to 256"):
        softplus_fused(wide, wide, wide, (4,), (0,), Config())


@pytest.mark.gpu
@pytest.mark.parametrize("power", [0, 2.5, 15])
@pytest.mark.parametrize("dim", [64, 128])
def test_bf16_on_a_gpu(power, dim):
    """Errors are at most twice those of the chunked form in bf16, both against it in float64."""
    lengths = (1000, 1, 3000)
    data, _, do = make(lengths, heads=8, groups=2, dim=dim, device="cuda")
    inputs = [x.bfloat16().double() for x in data], None, do.bfloat16().double()
    for window in (None, 300):
        config = Config(power=power, window=window)
        truth = run(inputs, lengths, config, "chunked", torch.float64)
        eager = run(inputs, lengths, config, "chunked", torch.bfloat16)
        found = run(inputs, lengths, config, "fused", torch.bfloat16)
        for index, (right, one, other) in enumerate(zip(truth, eager, found, strict=True)):
            allowed = 2 * (one - right).norm() + 5e-3 * right.norm()
            assert (other - right).norm() <= allowed, (index, window)
