"""Softplus attention: golden values and oracles on the literal definition, then the chunked form, every gradient."""

import math

import pytest
import torch

from farspan.kernels.softmax import softmax_attention
from farspan.kernels.softplus import Config, attend, chunked, normalise, softplus_attention, softplus_step
from farspan.kernels.softplus.chunked import _softplus_forward
from farspan.kernels.softplus.maps import apply_map, map_slope
from farspan.kernels.softplus.reference import row_weights

RAGGED = (1, 2, 37, 16, 17, 1, 5, 5, 70)
POWERS = (0, 1, 2, 2.5, 3, 15)
ABLATIONS = [
    {"phi": "exp"},
    {"phi": "exp", "power": 0},
    {"phi": "exp", "power": 0, "qk_norm": False, "length_scale": "inverse_sqrt_d"},
    {"phi": "sigmoid"},
    {"phi": "relu", "power": 2},
    {"phi": "relu2", "power": 0},
    {"phi": "gelu", "power": 2},
    {"phi": "gelu", "power": 0},
    {"l1": False, "power": 0},
    {"qk_norm": False, "length_scale": "log_n"},
    {"scale_multiplier": 0.5, "free_rows": 7},
    {"eps": 1e-2, "power": 2},
    {"eps": 1e-2, "power": 0},
    {"dead_row": "zero"},
]


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def inputs(lengths, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, device="cpu"):
    shapes = [(1, sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def prefix_state(counts, kv_heads=2, head_dim=8, dtype=torch.float64):
    """Keys normalised, as the operator leaves them, and values."""

    def part(count, norm):
        x = torch.randn(count, kv_heads, head_dim, dtype=dtype)
        return (x / x.norm(dim=-1, keepdim=True) if norm else x).requires_grad_()

    return tuple((part(count, True), part(count, False)) for count in counts)


def run(arguments, lengths, **options):
    return softplus_attention(*arguments, lengths, boundaries(lengths), **options)[0]


def with_gradients(output, leaves, seed=7):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad(
        output, leaves, weight.to(output.dtype), materialize_grads=True, allow_unused=True, retain_graph=True
    )
    return [output, *gradients]


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max())) if a.numel() else True


def literal(q, k, power, window=None, eps=0.0):
    """P of one head as the paper writes it, q, k: [n, d]: mask, softplus, l1, shift, clip, power, l1; no softening."""
    n, d = q.shape
    rows = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        first = 0 if window is None else max(0, i - window + 1)
        visible = i + 1 - first
        unit = q[i] / q[i].norm()
        scores = [math.log(d) * math.log(visible) * unit @ (k[j] / k[j].norm()) for j in range(first, i + 1)]
        f = torch.log(1 + torch.exp(torch.stack(scores)))
        weights = f / (f.sum() + eps)
        if power:
            offset = 1.0 if visible > 3 else 0.0
            weights = torch.relu(weights * visible - offset) ** power
            weights = weights / (weights.sum() + eps)
        rows[i, first : i + 1] = weights
    return rows


backends = pytest.mark.parametrize("backend", ["reference", "chunked"])
powers = pytest.mark.parametrize("power", POWERS)


def weights_of(q, k, backend, **options):
    """P [n, n] of one head, read off with unit vectors as values, so n = head_dim at most."""
    n, d = q.shape
    v = torch.eye(n, d, dtype=q.dtype)
    return run((q[None, :, None], k[None, :, None], v[None, :, None]), (n,), backend=backend, **options)[0, :, 0, :n]


# Golden values and the definition


@backends
def test_golden_values(backend):
    angles = torch.tensor([0, 60, 90, 120, 180], dtype=torch.float64).deg2rad()
    k = torch.stack([angles.cos(), angles.sin()], -1)
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(5, 2)
    v = torch.arange(1, 6, dtype=torch.float64)[:, None].expand(5, 2)
    arguments = [x[None, :, None] for x in (q, k, v)]

    def check(got, expected, tolerance=1e-8):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)

    outputs = {
        0: [1, 1.46030715, 1.83516377, 2.10852687, 2.27347587],
        2: [1, 1.42111146, 1.68125188, 1.05802874, 1.12875779],
        15: [1, 1.08420077, 1.02810396, 1.0, 1.00000059],
    }
    for power, expected in outputs.items():
        check(run(arguments, (5,), power=power, backend=backend)[0, :, 0, 0], expected)

    def row(index, power):
        """Weights of a row: outputs on one-hot values, two at a time."""
        parts = []
        for first in range(0, 5, 2):
            one_hot = torch.zeros(5, 2, dtype=torch.float64)
            one_hot[range(first, min(first + 2, 5)), range(min(2, 5 - first))] = 1
            y = run((*arguments[:2], one_hot[None, :, None]), (5,), power=power, backend=backend)
            parts.append(y[0, index, 0])
        return torch.cat(parts)[:5]

    check(row(4, 0), [0.36445344, 0.26322084, 0.18056593, 0.11791601, 0.07384378])
    check(row(4, 2), [0.87124221, 0.12875779, 0, 0, 0])
    check(row(3, 2), [0.94197126, 0.05802874, 0, 0, 0])


def test_golden_scores():
    config = Config()
    c = config.row_scale(torch.tensor([1, 5, 1024]), 2, torch.float64)
    cosines = torch.tensor([1, 0.5, 0, -0.5, -1], dtype=torch.float64)
    expected = torch.tensor([1.11557735, 0.55778868, 0, -0.55778868, -1.11557735], dtype=torch.float64)
    torch.testing.assert_close(c[1] * cosines, expected, rtol=0, atol=1e-8)
    assert c[0] == 0
    for head_dim, visible, scale in ((64, 1024, 28.8), (64, 16384, 40.4), (128, 131072, 57.2), (256, 1048576, 76.9)):
        assert abs(config.row_scale(torch.tensor(visible), head_dim, torch.float64) - scale) < 0.05


@backends
@powers
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 9])
def test_threshold_form_is_the_literal_definition(backend, power, window):
    q, k = (torch.randn(24, 24, dtype=torch.float64) for _ in range(2))
    expected = literal(q, k, power, window)
    torch.testing.assert_close(
        weights_of(q, k, backend, power=power, window=window), expected, rtol=0, atol=1e-12 * max(1, power)
    )


@backends
@pytest.mark.parametrize("power", [0, 2, 15])
def test_gradients_are_those_of_the_literal_definition(backend, power):
    q, k, v = inputs((33,), heads=1, kv_heads=1)
    expected = (literal(q[0, :, 0], k[0, :, 0], power) @ v[0, :, 0])[None, :, None]
    got = run((q, k, v), (33,), power=power, backend=backend)
    assert_close(with_gradients(got, (q, k, v)), with_gradients(expected, (q, k, v)))


@backends
@pytest.mark.parametrize("power", [0, 3, 15])
def test_eps_is_that_of_the_public_reproduction(backend, power):
    """Also where it does harm: with a strong common direction every excess is small, and the row is damped."""
    q, k = (torch.randn(24, 24, dtype=torch.float64) for _ in range(2))
    expected = literal(q, k, power, eps=1e-8)
    torch.testing.assert_close(weights_of(q, k, backend, power=power, eps=1e-8), expected, rtol=0, atol=1e-12)
    common = 8 * torch.randn(24, dtype=torch.float64)
    damped = literal(q + common, k + common, power, eps=1e-8)
    got = weights_of(q + common, k + common, backend, power=power, eps=1e-8)
    torch.testing.assert_close(got, damped, rtol=1e-6, atol=1e-14)
    exact = weights_of(q + common, k + common, backend, power=power)
    torch.testing.assert_close(exact.sum(-1), torch.ones(24, dtype=torch.float64))
    if power == 15:
        assert damped.sum(-1).median() < 1e-3


# Invariants


@backends
def test_power_one_without_a_shift_is_lssa(backend):
    arguments = inputs(RAGGED)
    shiftless = run(arguments, RAGGED, power=1, free_rows=1000, backend=backend)
    assert_close(
        with_gradients(shiftless, arguments),
        with_gradients(run(arguments, RAGGED, power=0, backend=backend), arguments),
    )


@backends
def test_exp_with_the_usual_scale_is_softmax_attention(backend):
    arguments = inputs(RAGGED)
    options = {"phi": "exp", "power": 0, "qk_norm": False, "length_scale": "inverse_sqrt_d"}
    expected, _ = softmax_attention(*arguments, RAGGED, boundaries(RAGGED), backend="reference")
    got = run(arguments, RAGGED, backend=backend, **options)
    assert_close(with_gradients(got, arguments), with_gradients(expected, arguments))


@backends
@powers
def test_weights_are_a_distribution(backend, power):
    q, k = (torch.randn(40, 40, dtype=torch.float64) for _ in range(2))
    weights = weights_of(q, k, backend, power=power)
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, dtype=torch.float64))
    q, k, v = inputs((40,))
    constant = torch.ones_like(v) * torch.arange(8)
    expected = torch.arange(8.0, dtype=torch.float64).expand(1, 40, 4, 8)
    torch.testing.assert_close(run((q, k, constant), (40,), power=power, backend=backend), expected)


@backends
def test_a_weight_is_zero_exactly_where_the_score_is_at_most_the_mean(backend):
    q, k = (torch.randn(32, 32, dtype=torch.float64) for _ in range(2))
    weights = weights_of(q, k, backend, power=15)
    cosines = (q / q.norm(dim=-1, keepdim=True)) @ (k / k.norm(dim=-1, keepdim=True)).T
    for i in range(3, 32):
        f = torch.log1p((math.log(32) * math.log(i + 1) * cosines[i, : i + 1]).exp())
        assert torch.equal(weights[i, : i + 1] == 0, f <= f.mean())
    assert (weights[16:] == 0).double().mean() > 0.5


@backends
def test_the_first_rows_are_not_shifted(backend):
    q, k = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    weights = weights_of(q, k, backend, power=15)
    assert weights[0].tolist() == [1, 0, 0]
    lssa = weights_of(q, k, backend, power=0)
    assert_close([weights], [lssa**15 / (lssa**15).sum(-1, keepdim=True)])
    assert (weights.tril() > 0).sum() == 6


@backends
@pytest.mark.parametrize("power", [0, 2, 15])
def test_lengths_of_queries_and_keys_do_not_matter(backend, power):
    arguments = inputs(RAGGED)
    q, k, v = arguments
    output, dq, dk, _ = with_gradients(run(arguments, RAGGED, power=power, backend=backend), arguments)
    for x, dx in ((q, dq), (k, dk)):
        along = (x * dx).sum(-1)
        assert along.abs().max() <= 1e-12 and dx.abs().max() > 1e-3
    scaled = run((7 * q, k / 1000, v), RAGGED, power=power, backend=backend)
    assert_close([scaled], [output])


@backends
@pytest.mark.parametrize("power", [0, 15])
def test_order_of_earlier_keys_does_not_matter(backend, power):
    q, k, v = inputs((2,))
    ((keys, values),) = prefix_state((30,))
    order = torch.randperm(30)
    options = {"power": power, "backend": backend}
    expected = run((q, k, v), (2,), initial_state=((keys, values),), **options)
    assert_close([run((q, k, v), (2,), initial_state=((keys[order], values[order]),), **options)], [expected])
    moved = run((q, k, v), (2,), initial_state=((keys[order], values),), **options)
    assert (moved - expected).abs().max() > 1e-3


@backends
@pytest.mark.parametrize("power", [0, 15])
def test_the_future_and_other_documents_change_nothing(backend, power):
    lengths = (9, 30, 1)
    q, k, v = (x.detach() for x in inputs(lengths))
    whole = run((q, k, v), lengths, power=power, backend=backend)
    start = 0
    for length in lengths:
        own = [x[:, start : start + length] for x in (q, k, v)]
        assert_close([run(own, (length,), power=power, backend=backend)], [whole[:, start : start + length]])
        start += length
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 25:] += 1
    assert torch.equal(run(changed, lengths, power=power, backend=backend)[:, :25], whole[:, :25])


@backends
@pytest.mark.parametrize("power", [0, 15])
def test_a_window_as_long_as_the_document_is_causal(backend, power):
    arguments = inputs(RAGGED)
    expected = run(arguments, RAGGED, power=power, backend=backend)
    for window in (70, 500):
        got = run(arguments, RAGGED, power=power, window=window, backend=backend)
        assert_close(with_gradients(got, arguments), with_gradients(expected, arguments))


@backends
def test_a_clipped_key_gets_its_gradient_through_the_mean(backend):
    """With unit keys along the axes the query's gradient, before it is normalised, is c times that of the scores."""
    n = 24
    q, k = normalise(torch.randn(1, 1, 1, n, dtype=torch.float64)), torch.eye(n, dtype=torch.float64)
    v = torch.randn(n, n, dtype=torch.float64)
    q.requires_grad_()
    state = ((k[:-1, None], v[:-1, None]),)
    o = attend(q, k[None, -1:, None], v[None, -1:, None], (1,), Config(power=3), state, backend)
    do = torch.randn(n, dtype=torch.float64)
    c = math.log(n) * math.log(n)
    dz = torch.autograd.grad(o, q, do.view(1, 1, 1, n))[0].flatten() / c

    z = c * q.detach().flatten()
    f = torch.log1p(z.exp())
    r = torch.relu(f - f.mean())
    p = r**3 / (r**3).sum()
    dy = 3 * r**2 / (r**3).sum() * (v @ do - (p @ v) @ do)
    h = dy.sum() / n
    clipped = r == 0
    assert 5 < clipped.sum() < 20 and h.abs() > 1e-4
    torch.testing.assert_close(dz[clipped], (-h * torch.sigmoid(z))[clipped], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(dz, torch.sigmoid(z) * (dy - h), rtol=1e-10, atol=1e-14)


@backends
def test_a_single_surviving_key_sends_no_gradient(backend):
    q, k, v = inputs((12,), heads=1, kv_heads=1, head_dim=4)
    with torch.no_grad():
        k[0, :, 0], q[0, 11, 0] = torch.tensor([-1.0, 0.1, 0, 0]), torch.tensor([1.0, 0, 0, 0])
        k[0, 5, 0] = torch.tensor([1.0, 0, 0, 0])
    o = run((q, k, v), (12,), power=15, backend=backend)
    assert_close([o[0, 11]], [v[0, 5]])
    dq, dk, dv = torch.autograd.grad(o[0, 11].sum(), (q, k, v))
    assert dq.abs().max() < 1e-13 and dk.abs().max() < 1e-13
    assert_close([dv[0, 5, 0]], [torch.ones(4, dtype=torch.float64)])
    assert dv.count_nonzero() == 4


# Rows without a direction, and hard numbers


@backends
@pytest.mark.parametrize("dead_row", ["lssa", "zero"])
def test_dead_rows(backend, dead_row):
    """A zero query, zero keys and identical keys; nothing is NaN, and zero vectors get no gradient."""
    q, k, v = arguments = inputs((40,))
    with torch.no_grad():
        q[0, 10], q[0, 1] = 0, 0
        k[0, :, 1] = k[0, 0, 1]
        k[0, 20, 0] = 0
    o, *gradients = with_gradients(run(arguments, (40,), dead_row=dead_row, backend=backend), arguments)
    assert all(x.isfinite().all() for x in (o, *gradients))
    means = v[0].cumsum(0) / torch.arange(1, 41, dtype=torch.float64)[:, None, None]
    means = means.repeat_interleave(2, dim=1)
    dead = torch.zeros(40, 4, dtype=torch.bool)
    dead[10] = True
    dead[3:, 2:] = True
    expected = means[dead] if dead_row == "lssa" else torch.zeros_like(means[dead])
    torch.testing.assert_close(o[0][dead], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(o[0, 1], means[1], rtol=0, atol=1e-12)  # sees two keys: never dead
    dq, dk, _ = gradients
    assert not dq[0, 10].any() and not dk[0, 20, 0].any() and dk[0, 19, 0].any()
    if dead_row == "lssa":
        assert_close([o], [run(arguments, (40,), backend="reference")])
    lssa = run(arguments, (40,), power=0, backend=backend)
    torch.testing.assert_close(lssa[0, 10], means[10], rtol=0, atol=1e-12)


def test_dead_rows_have_the_gradients_of_the_definition():
    _, k, _ = arguments = inputs((40,))
    with torch.no_grad():
        k[0, :, 1] = k[0, 0, 1]
    for power in (1, 15):
        results = [
            with_gradients(run(arguments, (40,), power=power, backend=b), arguments) for b in ("reference", "chunked")
        ]
        assert_close(*results)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_aligned_key_among_opposed_ones(backend, dtype):
    """The literal formula overflows here: A * N reaches 500, and its power 15 has 40 digits."""
    n, d = 1024, 64
    direction = torch.randn(d)
    q = direction.expand(1, n, 1, d).to(dtype).requires_grad_()
    k = -direction.expand(1, n, 1, d).clone()
    k[0, 500] = direction
    k = k.to(dtype).requires_grad_()
    v = torch.randn(1, n, 1, d).to(dtype).requires_grad_()
    o = run((q, k, v), (n,), power=15, backend=backend)
    gradients = torch.autograd.grad(o, (q, k, v), torch.randn_like(o))
    assert all(x.isfinite().all() for x in (o, *gradients))
    torch.testing.assert_close(o[0, 500:], v[0, 500:501].expand(n - 500, 1, d), rtol=1e-6, atol=0)


@backends
def test_a_large_power_takes_the_largest_score(backend):
    weights = weights_of(*(torch.randn(64, 64, dtype=torch.float64) for _ in range(2)), backend, power=400)
    assert weights.isfinite().all()
    assert (weights[3:].amax(-1) > 0.95).double().mean() > 0.9


@backends
@pytest.mark.parametrize("phi", ["softplus", "exp"])
def test_scores_beyond_the_range_of_exp(backend, phi):
    """Without unit vectors nothing bounds the scores; fp32 exp ends at 88."""
    q, k, v = (x.detach().float() * 6 for x in inputs((60,)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for power in (0, 15):
        options = {"power": power, "phi": phi, "qk_norm": False, "backend": backend}
        got = with_gradients(run(leaves, (60,), **options), leaves)
        expected = with_gradients(run(exact, (60,), **options), exact)
        assert all(x.isfinite().all() for x in got)
        assert_close([got[0].double()], [expected[0]], 1e-3)


@backends
@pytest.mark.parametrize("power", [0, 15])
def test_not_a_number_is_not_hidden(backend, power):
    q, k, v = (x.detach() for x in inputs((40,), heads=1, kv_heads=1))
    q[0, 30] = math.nan
    o = run((q, k, v), (40,), power=power, backend=backend)
    assert o[0, 30].isnan().all() and o[0, :30].isfinite().all() and o[0, 31:].isfinite().all()


def test_softplus_keeps_its_small_values():
    z = torch.tensor([-80.0, -40, -20, -10, -1, 0, 1, 20, 79, 81, 1e4])
    torch.testing.assert_close(apply_map(z, "softplus").double(), torch.log1p(z.double().exp()).nan_to_num(posinf=1e4))
    assert (apply_map(z, "softplus") > 0).all()


@pytest.mark.parametrize("phi", ["softplus", "exp", "sigmoid", "relu", "relu2", "gelu"])
def test_slopes_of_the_maps(phi):
    z = torch.linspace(-6, 6, 50, dtype=torch.float64).requires_grad_()
    f = apply_map(z, phi, torch.tensor(6.0))
    (expected,) = torch.autograd.grad(f.sum(), z)
    torch.testing.assert_close(map_slope(z.detach(), phi, f.detach()), expected)


def test_normalise():
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    x[2, 1] = 0
    x.requires_grad_()
    norms = normalise(x).norm(dim=-1)
    expected = torch.ones(5, 3, dtype=torch.float64)
    expected[2, 1] = 0
    torch.testing.assert_close(norms, expected)
    (gradient,) = torch.autograd.grad(normalise(x).sum(), x)
    assert gradient.isfinite().all() and not gradient[2, 1].any()
    with torch.no_grad():
        x[2, 1] = 1
    assert torch.autograd.gradcheck(normalise, (x,))
    low = torch.randn(7, 64).bfloat16()
    assert normalise(low).dtype == torch.bfloat16
    assert torch.equal(normalise(low), (low.float() / low.float().norm(dim=-1, keepdim=True)).bfloat16())


# The chunked form


@powers
@pytest.mark.parametrize("window", [None, 1, 3, 17, 64])
@pytest.mark.parametrize("prefixes", [None, (0, 5, 20, 1, 0, 3, 4, 4, 64)])
def test_chunked_equals_reference(power, window, prefixes):
    for kv_heads in (1, 2, 4):
        agree(kv_heads, prefixes, power=power, window=window)


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_chunked_equals_reference_in_ablations(options):
    for kv_heads in (1, 4):
        agree(kv_heads, (0, 5, 20, 1, 0, 3, 4, 4, 64), **options)


def agree(kv_heads, prefixes, **options):
    arguments = inputs(RAGGED, kv_heads=kv_heads)
    state = None if prefixes is None else prefix_state(prefixes, kv_heads)
    leaves = [*arguments, *(part for pair in state or () for part in pair)]
    results = [
        with_gradients(run(arguments, RAGGED, initial_state=state, backend=backend, **options), leaves)
        for backend in ("chunked", "reference")
    ]
    assert_close(*results)


@pytest.mark.parametrize("sizes", [(1, 1), (4, 24), (16, 16), (64, 100_000)], ids=str)
@pytest.mark.parametrize("options", [{}, {"power": 0}, {"window": 19}, {"phi": "exp"}, {"eps": 1e-3}], ids=str)
def test_size_of_blocks_and_tiles_changes_nothing(monkeypatch, sizes, options):
    arguments, results = inputs(RAGGED), []
    results.append(with_gradients(run(arguments, RAGGED, backend="chunked", **options), arguments))
    monkeypatch.setattr(chunked, "ROWS", sizes[0])
    monkeypatch.setattr(chunked, "TILE", sizes[1])
    results.append(with_gradients(run(arguments, RAGGED, backend="chunked", **options), arguments))
    assert_close(*results)


@pytest.mark.parametrize("power", [0, 15])
def test_tiles_below_the_threshold_are_left_out(monkeypatch, power):
    """Keys that agree with the queries in one stretch only: many tiles have no weight, all have gradients."""
    q, k, _ = arguments = inputs((200,), heads=1, kv_heads=1)
    with torch.no_grad():
        q.abs_()
        k.abs_().neg_()
        k[0, 100:120] *= -1
    monkeypatch.setattr(chunked, "ROWS", 16)
    monkeypatch.setattr(chunked, "TILE", 16 * 16)
    results = [
        with_gradients(run(arguments, (200,), power=power, backend=b), arguments) for b in ("chunked", "reference")
    ]
    assert_close(*results)
    assert all(x[0, :100].abs().max() > 0 for x in results[0][1:3])


def test_gradcheck():
    lengths = (1, 3, 9)
    arguments = inputs(lengths, heads=2, kv_heads=1, head_dim=3)
    for options in ({"power": 3}, {"power": 0}, {"power": 2.5, "window": 4}):
        assert torch.autograd.gradcheck(lambda *x, o=options: run(x, lengths, backend="chunked", **o), arguments)


def test_registration():
    q, k, v = (normalise(x).detach().requires_grad_() for x in inputs((40,), dtype=torch.float32))
    options = (15.0, None, 3, 1.0, "lssa", 0.0, "softplus", True, True, "log_d_log_n")
    torch.library.opcheck(_softplus_forward, (q, k, v, [40], [0], *options))


@pytest.mark.parametrize("power", [0, 3, 15])
def test_single_precision(power):
    lengths = (100, 3, 700)
    exact = inputs(lengths, head_dim=32)
    single = [x.detach().float().requires_grad_() for x in exact]
    expected = with_gradients(run(exact, lengths, power=power, backend="reference"), exact)
    got = with_gradients(run(single, lengths, power=power, backend="chunked"), single)
    assert_close([got[0].double()], [expected[0]], 1e-5)
    # a flat row's u has the rounding of f - mean, times the power
    assert_close([x.double() for x in got[1:]], expected[1:], 1e-5 * max(1, power))


@pytest.mark.parametrize("power", [0, 3, 15])
def test_half_precision_error_is_that_of_the_eager_path(power):
    """Against fp32 on the same rounded unit vectors; what is left is the rounding of v and o."""
    lengths = (100, 3, 200)
    low = [x.detach().bfloat16() for x in inputs(lengths, head_dim=32)]
    q, k = (normalise(x) for x in low[:2])
    config = Config(power=power)
    exact = attend(q.float(), k.float(), low[2].float(), lengths, config, backend="reference")
    got, eager = (attend(q, k, low[2], lengths, config, backend=b) for b in ("chunked", "reference"))
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()
    assert (got - exact).abs().max() <= 0.01 * exact.abs().max()


@backends
@pytest.mark.parametrize("window", [None, 1, 4])
def test_final_state_continues(backend, window):
    lengths, first = (3, 11), (1, 6)
    arguments = inputs(lengths)
    options = {"window": window, "backend": backend}
    whole = run(arguments, lengths, **options)

    def piece(x, begin):
        documents = x[0].split(lengths)
        return torch.cat([d[:n] if begin else d[n:] for d, n in zip(documents, first, strict=True)])[None]

    head, state = softplus_attention(
        *(piece(x, True) for x in arguments), first, boundaries(first), return_state=True, **options
    )
    rest = tuple(n - m for n, m in zip(lengths, first, strict=True))
    tail = run([piece(x, False) for x in arguments], rest, initial_state=state, **options)
    assert_close([head, tail], [piece(whole, True), piece(whole, False)])
    weight = torch.randn_like(whole)
    pieces = (head * piece(weight, True)).sum() + (tail * piece(weight, False)).sum()
    assert_close(torch.autograd.grad(pieces, arguments), torch.autograd.grad(whole, arguments, weight))
    assert all(
        len(keys) == n if window is None else len(keys) <= window - 1 for (keys, _), n in zip(state, first, strict=True)
    )


# Decoding


@pytest.mark.parametrize("power", [0, 2.5, 15])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_step_is_one_row_of_the_whole(power, kv_heads):
    """And reads the counted slots only, in any order."""
    keys, values = torch.randn(2, 3, kv_heads, 10, 8, dtype=torch.float64)
    keys, q = normalise(keys), normalise(torch.randn(3, 1, 4, 8, dtype=torch.float64))
    counts, config = torch.tensor([1, 4, 10]), Config(power=power)
    output = softplus_step(q, keys, values, counts, config)
    for row, count in enumerate(counts.tolist()):
        key, value = (x[row, :, :count].transpose(0, 1) for x in (keys, values))
        state = ((key[:-1], value[:-1]),)
        expected = attend(q[row, None], key[None, -1:], value[None, -1:], (1,), config, state, "reference")
        torch.testing.assert_close(output[row, None], expected, rtol=0, atol=1e-13)
        keys[row, :, count:], values[row, :, count:] = 1e9, 1e9
    assert torch.equal(softplus_step(q, keys, values, counts, config), output)
    order = torch.randperm(4)
    keys[1, :, :4], values[1, :, :4] = keys[1, :, order], values[1, :, order]
    assert_close([softplus_step(q, keys, values, counts, config)], [output])


def test_a_step_in_half_precision_does_not_round_scores():
    keys, values = torch.randn(2, 2, 2, 300, 64).bfloat16()
    q, keys = normalise(torch.randn(2, 1, 4, 64).bfloat16()), normalise(keys)
    counts, config = torch.tensor([300, 200]), Config()
    exact = softplus_step(q.float(), keys.float(), values.float(), counts, config)
    got = softplus_step(q, keys, values, counts, config)
    assert got.dtype == torch.bfloat16
    assert (got - exact).abs().max() <= 0.01 * exact.abs().max()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.5}, "power=0.5 must be 1 or more, or 0"),
        ({"power": -1}, "power=-1 must be"),
        ({"power": math.inf}, "power=inf must be"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"free_rows": 0}, "free_rows=0 must be at least 1"),
        ({"scale_multiplier": 0}, "scale_multiplier=0 must be above 0"),
        ({"eps": -1e-8}, "eps=-1e-08 must be 0 or more"),
        ({"phi": "tanh"}, "phi='tanh' is not one of softplus, exp"),
        ({"dead_row": "nan"}, "dead_row='nan' is not one of lssa, zero"),
        ({"length_scale": "log"}, "length_scale='log' is not one of"),
        ({"l1": False}, "without the l1 norm use power=0"),
        ({"l1": False, "power": 0, "phi": "exp"}, "does not overflow"),
        ({"backend": "fused", "phi": "exp"}, "no kernels for other values of phi"),
        ({"backend": "fast"}, "not one of"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(inputs((8,)), (8,), **options)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="head_dim=1 must be at least 2"):
        run(inputs((8,), head_dim=1), (8,))
    assert run(inputs((8,), head_dim=1), (8,), length_scale="log_n").isfinite().all()
    with pytest.raises(ValueError, match="sum to 7, the row has 8"):
        run(inputs((8,)), (3, 4))
    with pytest.raises(ValueError, match="shapes disagree"):
        run(inputs((8,), kv_heads=3), (8,))
    with pytest.raises(ValueError, match="initial state has 2 documents"):
        run(inputs((8,)), (8,), initial_state=prefix_state((1, 1)))


def test_row_weights_of_a_whole_row_permute_with_the_keys():
    """A row that sees all keys: no order among them."""
    z, order = torch.randn(1, 1, 30, dtype=torch.float64) * 5, torch.randperm(30)
    seen, counts = torch.ones(1, 30, dtype=torch.bool), torch.tensor([30])
    for power in (0, 2, 15):
        weights = row_weights(z, seen, counts, Config(power=power))
        torch.testing.assert_close(row_weights(z[..., order], seen, counts, Config(power=power)), weights[..., order])
