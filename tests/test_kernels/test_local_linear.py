"""Local linear attention: golden values, the ridge regressions that it is, both solvers and every gradient."""

import itertools

import pytest
import torch

from farspan.kernels.local_linear import chunked as chunked_module
from farspan.kernels.local_linear import local_linear_attention, local_linear_step
from farspan.kernels.local_linear.chunked import local_linear_chunked
from farspan.kernels.local_linear.gram import covariance
from farspan.kernels.local_linear.solve import Tile, choose_solver, conjugate_gradients
from farspan.kernels.softmax.reference import attention_reference, visible

RAGGED = (1, 2, 37, 16, 16, 1, 40)
TIGHT = {"tolerance": 1e-15, "iterations": 200}
EXACT = {"gram": {"solver": "gram"}, "cg": {"solver": "cg", **TIGHT}}
solvers = pytest.mark.parametrize("solver", sorted(EXACT))
variants = pytest.mark.parametrize(
    ("kernel", "ridge_mode"), [("dot", "relative"), ("dot", "absolute"), ("rbf", "relative"), ("rbf", "absolute")]
)


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def inputs(lengths, heads=4, kv_heads=2, head_dim=6, value_dim=None, dtype=torch.float64, norm=False):
    """q, k, v; with `norm` the root mean square of every query and key is 1, as it is behind a qk_norm."""
    total = sum(lengths)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim or head_dim)]
    tensors = [torch.randn(1, total, *shape, dtype=dtype) for shape in shapes]
    if norm:
        tensors[:2] = (torch.nn.functional.rms_norm(x, x.shape[-1:]) for x in tensors[:2])
    return [x.requires_grad_() for x in tensors]


def attend(q, k, v, ridge, lengths, **options):
    return local_linear_attention(q, k, v, ridge, lengths, boundaries(lengths), **options)


def ridges(kind, tokens, heads=4, head_dim=6):
    shape = {"head": (heads,), "token": (1, tokens, heads), "channel": (heads, head_dim)}[kind]
    return (0.2 + torch.rand(shape, dtype=torch.float64)).requires_grad_()


def weights_of(q, keys, ridge, scale, kernel="dot", ridge_mode="relative"):
    """The weights of one query [D] over keys [n, D], from the words of the definition: an explicit regression with an
    intercept that is not penalised, on raw weights. ridge: a number or [D].
    """
    scores = scale * keys @ q
    if kernel == "rbf":
        scores = -scale * (keys - q).square().sum(-1) / 2
    top = scores.max()
    w = (scores - top).exp()
    penalty = ridge * (w.sum() if ridge_mode == "relative" else (-top).exp())
    if kernel == "rbf" and ridge_mode == "absolute":  # the operator leaves out the factor exp(-scale q.q / 2)
        penalty = penalty * (-scale * q.square().sum() / 2).exp()
    design = torch.cat([torch.ones(len(keys), 1, dtype=q.dtype), keys - q], dim=1)
    penalties = torch.cat([torch.zeros(1, dtype=q.dtype), torch.as_tensor(penalty, dtype=q.dtype).expand(len(q))])
    normal = design.T @ (w[:, None] * design) + torch.diag(penalties)
    return torch.linalg.solve(normal, design.T * w)[0]


def regressions(q, k, v, ridge, lengths, scale, window=None, kernel="dot", ridge_mode="relative"):
    """The output of every query, one regression at a time."""
    output, start = q.new_zeros(*q.shape[:3], v.shape[3]), 0
    for length in lengths:
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            rows = slice(start + first, start + i + 1)
            for head in range(q.shape[2]):
                own = head // (q.shape[2] // k.shape[2])
                taken = ridge[head] if ridge.ndim < 3 else ridge[0, start + i, head]
                weights = weights_of(q[0, start + i, head], k[0, rows, own], taken, scale, kernel, ridge_mode)
                output[0, start + i, head] = weights @ v[0, rows, own]
        start += length
    return output


# Golden values


GOLDEN = {
    "q": [(1, 0), (0.5, -1), (-0.5, 2)],
    "k": [(0, 1), (1, 1), (2, -1)],
    "v": [(1, 2), (3, -1), (0, 4)],
    "do": [(1, 1), (1, -1), (0.5, 2)],
}
GOLDEN_RESULTS = {
    "o": [(1, 2), (2.083331538291, 0.375002692564), (1.681422794965, 0.907274864435)],
    "dq": [(0, 0), (2.066017712634, 0), (-2.146662782918, -0.192684847203)],
    "dk": [(-1.036741705687, 7.001429394479), (0.688924572731, -5.527817167254), (-0.198222145590, -0.538731761091)],
    "dv": [(1.893864946790, 2.283788632887), (0.676725996328, -0.001424860416), (-0.070590943118, -0.282363772471)],
    "dridge": [0, 0.137446688302, 0.265469161379],
}
GOLDEN_ABSOLUTE = {
    "o": [(1, 2), (2.073933627069, 0.389099559396), (1.898803361688, 0.486925306590)],
    "dridge": [0, 0.149883283604, 1.459295738378],
}
backends = pytest.mark.parametrize(
    "options", [{"backend": "reference"}, *({"backend": "chunked", **EXACT[name]} for name in sorted(EXACT))]
)


@backends
@pytest.mark.parametrize(("mode", "golden"), [("relative", GOLDEN_RESULTS), ("absolute", GOLDEN_ABSOLUTE)])
def test_golden_values(options, mode, golden):
    q, k, v, do = (torch.tensor(GOLDEN[name], dtype=torch.float64)[None, :, None] for name in ("q", "k", "v", "do"))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ridge = torch.full((1, 3, 1), 0.5, dtype=torch.float64, requires_grad=True)
    o, *_ = attend(q, k, v, ridge, (3,), scale=0.5, ridge_mode=mode, **options)
    found = dict(zip(("dq", "dk", "dv", "dridge"), torch.autograd.grad(o, (q, k, v, ridge), do), strict=True), o=o)
    for name, expected in golden.items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found[name].view(expected.shape), expected, rtol=0, atol=1e-11)
    assert torch.equal(found["dq"][0, 0], torch.zeros(1, 2, dtype=torch.float64))


@backends
def test_golden_weights(options):
    q, k = (torch.tensor(GOLDEN[name], dtype=torch.float64)[None, :, None] for name in ("q", "k"))
    v = torch.eye(3, dtype=torch.float64)[None, :, None]  # the output is the weights
    o, *_ = attend(q, k, v, torch.tensor([0.5], dtype=torch.float64), (3,), scale=0.5, **options)
    expected = torch.tensor([0.871061431871, 0.270120454365, -0.141181886235], dtype=torch.float64)
    torch.testing.assert_close(o[0, 2, 0], expected, rtol=0, atol=1e-11)


# The definition


@variants
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("window", [None, 7])
def test_reference_is_the_regression(kernel, ridge_mode, kind, window):
    lengths = (1, 5, 14)
    q, k, v = inputs(lengths, value_dim=3)
    ridge, kinds = ridges(kind, 20), {"window": window, "kernel": kernel, "ridge_mode": ridge_mode}
    o, *_ = attend(q, k, v, ridge, lengths, scale=0.3, backend="reference", **kinds)
    with torch.no_grad():
        expected = regressions(q, k, v, ridge, lengths, 0.3, **kinds)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-11)


def test_the_published_form_is_the_same_function():
    """Centred on the query, with a ridge relative to the sum of the weights; it divides by what can vanish."""
    q, k, v = (x[0, :, 0].detach() for x in inputs((20,), heads=1, kv_heads=1))
    expected, *_ = attend(*(x[None, :, None] for x in (q, k, v)), torch.full((1,), 0.3), (20,), backend="reference")
    w = (q[-1] @ k.T * 6**-0.5).exp()
    z = k - q[-1]
    mu = w @ z
    rho = torch.linalg.solve(z.T @ (w[:, None] * z) + 0.3 * w.sum() * torch.eye(6, dtype=q.dtype), mu)
    nu = w * (1 - z @ rho) / (w.sum() - mu @ rho)
    torch.testing.assert_close(nu @ v, expected[0, -1, 0], rtol=0, atol=1e-7)  # the ridge was given in fp32


# The chunked backend


def compare(q, k, v, ridge, lengths, tolerance, options, state=None, **kinds):
    """Largest error of outputs and every gradient, relative to each tensor's largest value."""
    leaves = [q, k, v, ridge, *(part for pair in state or () for part in pair)]
    leaves += [x for x in kinds.values() if isinstance(x, torch.Tensor)]
    weight, results = None, []
    for choice in ({"backend": "reference"}, {"backend": "chunked", **options}):
        o, *_ = attend(q, k, v, ridge, lengths, initial_state=state, **kinds, **choice)
        weight = torch.randn_like(o) if weight is None else weight
        results.append([o, *torch.autograd.grad(o, leaves, weight, materialize_grads=True, allow_unused=True)])
    for number, (expected, found) in enumerate(zip(*results, strict=True)):
        if expected.numel():
            error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
            assert error <= tolerance, (number, error)


@solvers
@variants
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("window", [None, 1, 3, 17])
def test_chunked_equals_reference(solver, kernel, ridge_mode, kind, window):
    q, k, v = inputs(RAGGED, value_dim=5)
    kinds = {"kernel": kernel, "ridge_mode": ridge_mode, "window": window}
    kinds["scale"] = (0.2 + 0.2 * torch.rand(4, dtype=torch.float64)).requires_grad_()
    compare(q, k, v, ridges(kind, sum(RAGGED)), RAGGED, 1e-11, EXACT[solver], **kinds)


@solvers
@pytest.mark.parametrize("prefixes", [(0, 5, 20, 1, 0, 3, 50), (4,) * 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 6])
def test_chunked_equals_reference_after_earlier_keys(solver, prefixes, kv_heads, window):
    q, k, v = inputs(RAGGED, kv_heads=kv_heads)
    state = tuple(
        tuple(torch.randn(n, kv_heads, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)) for n in prefixes
    )
    compare(q, k, v, ridges("head", 0), RAGGED, 1e-11, EXACT[solver], state, window=window)


@solvers
@pytest.mark.parametrize("length", [1, 2, 63, 65, 127, 129, 389])
def test_lengths_that_no_block_divides(solver, length):
    q, k, v = inputs((length,), heads=2, kv_heads=1, norm=True)
    compare(q, k, v, ridges("head", length, heads=2), (length,), 1e-11, EXACT[solver])


@solvers
@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (8, 100), (24, 5000), (1000, 2**20)])
def test_how_the_work_is_cut_changes_nothing(monkeypatch, solver, rows, tile):
    monkeypatch.setattr(chunked_module, "ROWS", rows)
    monkeypatch.setattr(chunked_module, "TILE", tile)
    lengths = (9, 9, 9, 2, 30)
    q, k, v = inputs(lengths)
    compare(q, k, v, ridges("head", 0), lengths, 1e-11, EXACT[solver], window=None)
    compare(q, k, v, ridges("token", sum(lengths)), lengths, 1e-11, EXACT[solver], window=4)


def test_4096_tokens_by_regressions_of_some():
    """Too long for the definition as a whole: single queries by regression, their gradients by autograd through it."""
    length, chosen = 4096, (0, 1, 64, 1000, 4095)
    q, k, v = inputs((length,), heads=1, kv_heads=1, norm=True)
    ridge = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(chosen), 6, dtype=torch.float64)
    results = []
    for solver in ("gram", "cg", None):
        if solver is None:
            rows = [
                weights_of(q[0, i, 0], k[0, : i + 1, 0], ridge[0], 6**-0.5) @ v[0, : i + 1, 0] if i else v[0, 0, 0]
                for i in chosen
            ]
            taken = torch.stack(rows)
        else:
            o, *_ = attend(q, k, v, ridge, (length,), backend="chunked", **EXACT[solver])
            taken = o[0, list(chosen), 0]
        results.append([taken, *torch.autograd.grad(taken, (q, k, v, ridge), weight)])
    *ours, expected = results
    for found in ours:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("solver", ["gram", "cg"])
@variants
def test_gradcheck(solver, kernel, ridge_mode):
    lengths = (1, 3, 4)
    q, k, v = inputs(lengths, heads=2, kv_heads=1, head_dim=3, value_dim=2)
    scale = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)
    before = torch.randn(4, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, ridge, scale, before, values, window):
        state = ((before[:2, 0], values),) + ((before[:0, 0], values[:0]),) * 2
        kinds = {"kernel": kernel, "ridge_mode": ridge_mode, "window": window}
        return attend(
            q, k, v, ridge, lengths, scale=scale, initial_state=state, backend="chunked", **kinds, **EXACT[solver]
        )[0]

    for window, kind in ((None, "channel"), (3, "token")):
        leaves = (q, k, v, ridges(kind, 8, 2, 3), scale, before, values)
        assert torch.autograd.gradcheck(run, (*leaves, window))


def test_a_second_derivative_is_refused():
    q, k, v = inputs((5,))
    o, *_ = attend(q, k, v, ridges("head", 5), (5,), backend="chunked")
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(dq.sum(), q)


# Conjugate gradients


def single_precision_errors(ridge, options, head_dim=64, length=256):
    q, k, v = (x.detach() for x in inputs((length,), heads=1, kv_heads=1, head_dim=head_dim, norm=True))
    weight = torch.randn(1, length, 1, head_dim, dtype=torch.float64)
    results = []
    for dtype, choice in (
        (torch.float64, {"backend": "reference"}),
        (torch.float32, {"backend": "chunked", **options}),
    ):
        # a ridge for each token: the sum of their gradients, of both signs, is no measure of an error
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, torch.full((1, length, 1), ridge))]
        o, *_ = attend(*leaves, (length,), **choice)
        results.append([o, *torch.autograd.grad(o, leaves, weight.to(dtype))])
    return [float((b - a).detach().norm() / a.detach().norm()) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize(
    ("ridge", "options", "tolerance"),
    [
        (1.0, {"solver": "gram"}, 5e-5),
        (0.1, {"solver": "gram"}, 5e-5),
        (1.0, {"solver": "cg", "tolerance": 1e-6, "iterations": 64}, 5e-5),
        (0.1, {"solver": "cg", "tolerance": 1e-6, "iterations": 64}, 5e-5),
        (1.0, {"solver": "cg", "tolerance": 1e-3, "iterations": 32}, 4e-3),
        (0.1, {"solver": "cg", "tolerance": 1e-3, "iterations": 32}, 2e-2),
    ],
)
def test_single_precision_is_as_exact_as_its_tolerance(ridge, options, tolerance):
    errors = single_precision_errors(ridge, options)
    assert max(errors) <= tolerance, errors


def test_half_precision_inputs_are_solved_in_fp32():
    q, k, v = (x.detach().bfloat16() for x in inputs((200, 3), head_dim=32, norm=True))
    ridge = torch.full((4,), 0.5)
    exact, *_ = attend(q.double(), k.double(), v.double(), ridge.double(), (200, 3), backend="reference")
    for solver in ("gram", "cg"):
        low, *_ = attend(q, k, v, ridge, (200, 3), backend="chunked", solver=solver, tolerance=1e-6, iterations=64)
        assert low.dtype == torch.bfloat16
        rounded = (exact.bfloat16() - exact).abs().max()
        assert (low - exact).abs().max() <= 1.1 * rounded


def test_autocast_changes_no_bit():
    q, k, v = inputs((40,), dtype=torch.float32)
    ridge, results = torch.full((4,), 0.5), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            o, *_ = attend(q, k, v, ridge, (40,), backend="chunked")
            results.append([o, *torch.autograd.grad(o.sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 5, 8])
def test_truncated_solves_have_weights_that_sum_to_one(iterations):
    lengths = (1, 12, 30)
    q, k, _ = (x.detach() for x in inputs(lengths))
    ones = torch.ones(1, sum(lengths), 2, 1, dtype=torch.float64)
    ridge, scale = torch.full((1, 4, 1), 0.05, dtype=torch.float64), torch.full((4,), 0.4, dtype=torch.float64)
    arguments = (ridge, scale, lengths, (0, 0, 0), "dot", "relative", None, "cg", 1e-14, iterations)
    o, statistics = local_linear_chunked(q, k, ones, *arguments)
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=1e-12)
    assert float(statistics[1]) == iterations
    v = torch.randn(1, sum(lengths), 2, 6, dtype=torch.float64)
    o, _ = local_linear_chunked(q, k, v, *arguments)
    softmax = attention_reference(q, k, v, lengths, (0, 0, 0), 0.4)
    assert torch.allclose(o, softmax, rtol=0, atol=1e-13) == (iterations == 0)


def test_weights_reproduce_the_query():
    """sum_j nu_j k_j = q + ridge x: the fit through the keys themselves misses by what the ridge takes."""
    q, k, _ = (x.detach() for x in inputs((30,), heads=1, kv_heads=1))
    for ridge, expected in ((0.7, None), (1e-9, q[0, 20:, 0])):
        o, *_ = attend(q, k, k, torch.full((1,), ridge, dtype=torch.float64), (30,), backend="chunked")
        if expected is None:
            keys, p = k[0, :, 0], (q[0, -1, 0] @ k[0, :, 0].T * 6**-0.5).softmax(0)
            c = keys - p @ keys
            x = torch.linalg.solve(c.T @ (p[:, None] * c) + ridge * torch.eye(6, dtype=q.dtype), p @ keys - q[0, -1, 0])
            torch.testing.assert_close(o[0, -1, 0], q[0, -1, 0] + ridge * x, rtol=0, atol=1e-12)
        else:
            torch.testing.assert_close(o[0, 20:, 0], expected, rtol=0, atol=1e-6)


def test_every_row_stops_on_its_own():
    """A row that has converged is frozen: it does not change with what is solved beside it."""
    keys, queries = torch.randn(1, 50, 8, dtype=torch.float64), torch.randn(1, 6, 8, dtype=torch.float64)
    p = (queries @ keys.mT * torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0, 9.0], dtype=torch.float64)[:, None]).softmax(-1)
    ridge = torch.tensor([1e6, 100.0, 1.0, 0.1, 0.01, 1e-4], dtype=torch.float64).view(1, 6, 1)
    tile = Tile(p, keys, p @ keys, ridge)
    b = tile.mean - queries
    solved = conjugate_gradients(tile, b, 1e-6, 100)
    assert len(set(solved.iterations.flatten().tolist())) > 3
    rest = b - tile.times(solved.x)[0]
    assert bool((rest.norm(dim=-1) <= 1.01e-6 * b.norm(dim=-1)).all())
    for row in range(6):
        stopped = conjugate_gradients(tile, b, 1e-6, int(solved.iterations[0, row]))
        assert torch.equal(stopped.x[0, row], solved.x[0, row])
    capped = conjugate_gradients(tile, b, 1e-6, 3)
    assert capped.iterations.max() == 3 and capped.residual.max() > 1e-6


def test_conjugate_gradients_end_after_as_many_iterations_as_there_are_channels():
    q, k, v = (x.detach() for x in inputs((300,), heads=1, kv_heads=1, head_dim=64, norm=True))
    ridge = torch.ones(1, dtype=torch.float64)
    for length in (1, 2, 20, 64, 300):
        taken = (x[:, :length] for x in (q, k, v))
        _, _, found = attend(*taken, ridge, (length,), backend="chunked", solver="cg", tolerance=1e-10, iterations=300)
        assert found.residual_max <= 1e-10
        assert found.iterations_max <= min(length - 1, 64) + 2


def test_statistics_tell_when_the_cap_is_reached():
    q, k, v = inputs((80,), norm=True)
    ridge, options = torch.full((4,), 0.01, dtype=torch.float64), {"backend": "chunked", "solver": "cg"}
    *_, short = attend(q, k, v, ridge, (80,), iterations=2, tolerance=1e-3, **options)
    *_, long = attend(q, k, v, ridge, (80,), iterations=50, tolerance=1e-3, **options)
    assert short.iterations_max == 2 and short.residual_max > 1e-3
    assert 2 < long.iterations <= long.iterations_max < 50 and long.residual_max <= 1e-3
    *_, direct = attend(q, k, v, ridge, (80,), backend="chunked", solver="gram")
    *_, expected = attend(q, k, v, ridge, (80,), backend="reference")
    assert direct.iterations_max == 0 and direct.residual_max < 1e-12
    assert not any(x.requires_grad for x in long)
    torch.testing.assert_close(direct.reach_max, expected.reach_max)


def test_the_cheaper_solver_is_taken():
    assert choose_solver("auto", 16, 16, torch.float32) == "gram"
    assert choose_solver("auto", 64, 16, torch.float32) == "cg"
    assert choose_solver("auto", 64, 64, torch.float32) == "gram"  # so many iterations are for small ridges
    assert choose_solver("auto", 128, 64, torch.float32) == "cg"
    assert choose_solver("auto", 128, 16, torch.float64) == "gram"
    assert choose_solver("cg", 16, 16, torch.float64) == "cg"


# What the operator is: limits, symmetries, bounds


@solvers
def test_a_large_ridge_is_softmax_attention(solver):
    lengths = (5, 40)
    q, k, v = (x.detach() for x in inputs(lengths, norm=True))
    softmax = attention_reference(q, k, v, lengths, (0, 0), 6**-0.5)
    errors = []
    for ridge in (1e2, 1e4, 1e6, 1e12):
        o, *_ = attend(q, k, v, torch.full((4,), ridge, dtype=torch.float64), lengths, **EXACT[solver])
        errors.append(float((o - softmax).abs().max()))
    assert errors[0] < 0.1 and errors[3] < 1e-10
    for before, after in ((errors[0], errors[1]), (errors[1], errors[2])):
        assert 0.005 < after / before < 0.02  # the error falls as 1 / ridge


@solvers
def test_an_infinite_bandwidth_is_affine_ridge_regression(solver):
    q, k, v = (x.detach() for x in inputs((30,), heads=1, kv_heads=1))
    o, *_ = attend(q, k, v, torch.full((1,), 0.3, dtype=torch.float64), (30,), scale=0.0, **EXACT[solver])
    for i in (1, 3, 29):
        keys, values = k[0, : i + 1, 0], v[0, : i + 1, 0]
        ck, cv = keys - keys.mean(0), values - values.mean(0)
        line = torch.linalg.solve(ck.T @ ck / (i + 1) + 0.3 * torch.eye(6, dtype=q.dtype), ck.T @ cv / (i + 1))
        torch.testing.assert_close(o[0, i, 0], values.mean(0) + (q[0, i, 0] - keys.mean(0)) @ line, rtol=0, atol=1e-12)


@solvers
@pytest.mark.parametrize("kernel", ["dot", "rbf"])
def test_linear_data_is_fitted_as_the_ridge_vanishes(solver, kernel):
    q, k, _ = (x.detach() for x in inputs((40,), heads=1, kv_heads=1))
    line, offset = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    errors = []
    for ridge in (1e-3, 1e-6, 1e-9):
        taken = torch.full((1,), ridge, dtype=torch.float64)
        o, *_ = attend(q, k, k @ line + offset, taken, (40,), kernel=kernel, **EXACT[solver])
        errors.append(float((o - (q @ line + offset))[0, 12:].abs().max()))
    assert errors[0] > 1e-4
    for before, after in itertools.pairwise(errors):
        assert 3e-4 < after / before < 3e-3


@solvers
def test_a_huge_scale_picks_one_value(solver):
    q, k, v = (x.detach() for x in inputs((30,), heads=1, kv_heads=1))
    o, *_ = attend(q, k, v, torch.full((1,), 0.1, dtype=torch.float64), (30,), scale=1e6, **EXACT[solver])
    scores = (q[0, :, 0] @ k[0, :, 0].T).masked_fill(~visible(30, 0, None, q.device), float("-inf"))
    torch.testing.assert_close(o[0, :, 0], v[0, scores.argmax(-1), 0], rtol=0, atol=1e-12)


@solvers
def test_symmetries(solver):
    lengths = (25, 6)
    q, k, v = (x.detach() for x in inputs(lengths))
    ridge = torch.full((4,), 0.4, dtype=torch.float64)

    def run(q, k, v, ridge=ridge, scale=0.3, **kinds):
        return attend(q, k, v, ridge, lengths, scale=scale, **kinds, **EXACT[solver])[0]

    o = run(q, k, v)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    shift = torch.randn(6, dtype=torch.float64)
    for same in (
        (run(q, k, 3 * v + 2) - 2) / 3,  # affine in the values
        run(q @ rotation, k @ rotation, v),
        run(5 * q, 5 * k, v, 25 * ridge, 0.3 / 25),  # the scale of q and k
        run(q, k, v, ridge[:, None].expand(4, 6)),  # the same ridge for every channel
        run(q, k, v, ridge.expand(1, 31, 4)),
    ):
        torch.testing.assert_close(same, o, rtol=0, atol=1e-12)
    assert (run(q + shift, k + shift, v) - o).abs().max() > 1e-3
    torch.testing.assert_close(
        run(q + shift, k + shift, v, kernel="rbf"), run(q, k, v, kernel="rbf"), rtol=0, atol=1e-11
    )
    order = torch.cat([torch.randperm(24), torch.arange(24, 31)])  # all that the query of token 24 sees before it
    mixed = run(q, k[:, order], v[:, order])
    torch.testing.assert_close(mixed[:, 24:], o[:, 24:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.01, 0.3, 5.0])
def test_the_step_away_from_softmax_attention_is_bounded(ridge):
    q, k, v = (x.detach() for x in inputs((60,), heads=1, kv_heads=1))
    o, *_ = attend(q, k, v, torch.full((1,), ridge, dtype=torch.float64), (60,), backend="chunked")
    scores = (q[0, :, 0] @ k[0, :, 0].T * 6**-0.5).masked_fill(~visible(60, 0, None, q.device), float("-inf"))
    p = scores.softmax(-1)
    mean, gap = p @ v[0, :, 0], (q[0, :, 0] - p @ k[0, :, 0]).norm(dim=-1)
    deviation = (p @ v[0, :, 0].square().sum(-1) - mean.square().sum(-1)).clamp(min=0).sqrt()
    assert bool(((o[0, :, 0] - mean).norm(dim=-1) <= deviation * gap / (2 * ridge**0.5) + 1e-12).all())


@solvers
@pytest.mark.parametrize("window", [None, 5])
def test_the_first_token_takes_its_value(solver, window):
    lengths = (1, 20, 3)
    q, k, v = inputs(lengths, dtype=torch.float32)
    ridge = torch.full((1, 24, 4), 0.1, requires_grad=True)
    o, *_ = attend(q, k, v, ridge, lengths, window=window, backend="chunked", **EXACT[solver])
    firsts = [0, 1, 21]
    assert torch.equal(o[:, firsts], v[:, firsts].repeat_interleave(2, dim=2))
    dq, dridge = torch.autograd.grad(o, (q, ridge), torch.randn_like(o))
    assert not dq[:, firsts].any() and not dridge[:, firsts].any() and dq[:, 2:20].all()


@solvers
@pytest.mark.parametrize("window", [None, 40])
def test_causality_is_exact(monkeypatch, solver, window):
    monkeypatch.setattr(chunked_module, "ROWS", 32)
    q, k, v = inputs((70,), dtype=torch.float32)
    ridge = torch.full((4,), 0.3)
    o, *_ = attend(q, k, v, ridge, (70,), window=window, backend="chunked", **EXACT[solver])
    for t in (1, 16, 31, 40, 69):
        changed = [torch.cat([x[:, :t], torch.randn_like(x[:, t:])], dim=1) for x in (q, k, v)]
        after, *_ = attend(*changed, ridge, (70,), window=window, backend="chunked", **EXACT[solver])
        assert torch.equal(after[:, :t], o[:, :t])
        gradients = torch.autograd.grad(o[:, :t].sum(), (q, k, v), retain_graph=True)
        assert not any(g[:, t:].any() for g in gradients)


@variants
def test_gradients_of_scores_sum_to_zero(kernel, ridge_mode):
    """A constant on the scores of a row changes nothing, unless the ridge is absolute: q along a direction that all
    keys share moves every score alike and no fit.
    """
    q, k, v = (x.detach() for x in inputs((20,), heads=1, kv_heads=1))
    common = torch.zeros(6, dtype=torch.float64)
    common[0] = 3.0
    k = torch.cat([common[:1].expand(1, 20, 1, 1), k[..., 1:]], dim=-1)
    moved = q + common
    kinds = {"kernel": kernel, "ridge_mode": ridge_mode, "backend": "chunked"}
    ridge = torch.tensor([0.5], dtype=torch.float64)
    same = torch.allclose(attend(q, k, v, ridge, (20,), **kinds)[0], attend(moved, k, v, ridge, (20,), **kinds)[0])
    assert same == (ridge_mode == "relative")


def test_few_key_heads_are_repeated_ones():
    lengths = (20, 3)
    q, k, v = inputs(lengths, heads=6, kv_heads=2)
    ridge = torch.full((6,), 0.4, dtype=torch.float64)
    o, *_ = attend(q, k, v, ridge, lengths, backend="chunked")
    repeated, *_ = attend(q, *(x.repeat_interleave(3, dim=2) for x in (k, v)), ridge, lengths, backend="chunked")
    torch.testing.assert_close(o, repeated, rtol=0, atol=1e-13)
    weight = torch.randn_like(o)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), weight) for x in (o, repeated)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [0, 3])
def test_the_output_is_an_affine_attention_with_a_probe(iterations):
    """With r = x: (1 + d2 / d1) O1 / d1 - O2 / d1 of d1 = sum w, d2 = sum w (r k), O1 = sum w v, O2 = sum w (r k) v."""
    q, k, v = (x.detach() for x in inputs((30,), heads=1, kv_heads=1))
    ridge, scale = torch.full((1, 1, 1), 0.2, dtype=torch.float64), torch.full((1,), 0.4, dtype=torch.float64)
    settings = ([30], [0], "dot", "relative", None, "cg", 1e-14, iterations)
    o, x, *_ = torch.ops.farspan.local_linear_forward(q, k, v, ridge, scale, *settings)
    w = (0.4 * q[0, :, 0] @ k[0, :, 0].T).exp() * visible(30, 0, None, q.device)
    probe = x[0, :, 0] @ k[0, :, 0].T
    d1, d2 = w.sum(-1, keepdim=True), (w * probe).sum(-1, keepdim=True)
    o1, o2 = w @ v[0, :, 0], (w * probe) @ v[0, :, 0]
    torch.testing.assert_close(o[0, :, 0], (1 + d2 / d1) * o1 / d1 - o2 / d1, rtol=0, atol=1e-12)


# Keys that are hard on a solver


def hard(name, length, head_dim, dtype):
    """q, k, v, and a scale that leaves scores as large as those of normed keys: their rounding is not in question."""
    q, k, v = (x.detach() for x in inputs((length,), heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype, norm=True))
    scale = head_dim**-0.5
    if name == "duplicates":
        k = k[:, torch.arange(length) // 9 * 9]
    elif name == "identical":
        k = k[:, :1].expand(-1, length, -1, -1)
    elif name == "rank 1":
        k = k[:, :1] * torch.randn(1, length, 1, 1, dtype=dtype)
    elif name == "common mean":
        q, k, scale = q + 30, k + 30, scale / 900
    else:
        size = {"tiny": 1e-12, "large": 30.0, "huge": 1e8}[name]
        q, k, scale = size * q, size * k, scale if name == "tiny" else scale / size**2
    return q, k, v, scale


HARD = ("duplicates", "identical", "rank 1", "common mean", "tiny", "large", "huge")


def hard_errors(name, options, ridge=1.0):
    """Largest errors in fp32 against float64 on the same numbers, relative to each tensor's largest value."""
    q, k, v, scale = hard(name, 150, 16, torch.float32)
    results = []
    for dtype, choice in (
        (torch.float64, {"backend": "reference"}),
        (torch.float32, {"backend": "chunked", **options}),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, torch.full((1, 150, 2), ridge))]
        o, _, found = attend(*leaves, (150,), scale=scale, **choice)
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([x.detach() for x in (o, *torch.autograd.grad(o, leaves, weight))])
    finite = all(bool(x.isfinite().all()) for x in results[1]) and bool(found.residual_max.isfinite())
    return finite, [float((b - a).abs().max() / a.abs().max().clamp(min=1e-2)) for a, b in zip(*results, strict=True)]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("solver", ["gram", "cg"])
def test_hard_keys(name, solver):
    """What is stated: 5e-5 in fp32, or where keys are large for the ridge, a rounding of |k|^2 / ridge."""
    finite, errors = hard_errors(name, {"solver": solver, "tolerance": 1e-6, "iterations": 64})
    assert finite
    tolerance = {"large": 2**-24 * 30**2 * 16, "huge": float("inf")}.get(name, 5e-5)
    assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("solver", ["gram", "cg"])
def test_identical_keys_average_the_values(solver):
    q, k, v, scale = hard("identical", 150, 16, torch.float32)
    o, *_ = attend(q, k, v, torch.full((2,), 1e-3), (150,), scale=scale, backend="chunked", solver=solver)
    mean = v.cumsum(1) / torch.arange(1, 151).view(1, -1, 1, 1)
    torch.testing.assert_close(o, mean.expand(-1, -1, 2, -1), rtol=0, atol=1e-6)


def test_a_matrix_that_is_not_positive_is_solved_by_descent():
    """Rounding of huge keys hides the ridge, Cholesky refuses, and the row falls back."""
    keys = 1e6 * torch.randn(1, 1, 16).expand(1, 5, 16) * torch.tensor([1.0, -1.0, 0.5, 2.0, -3.0]).view(1, 5, 1)
    p = torch.full((1, 3, 5), 0.2)
    tile = Tile(p, keys, p @ keys, torch.full((1, 3, 1), 0.1))
    matrix = covariance(tile) + 0.1 * torch.eye(16)
    assert torch.linalg.cholesky_ex(matrix).info.any()
    solved = chunked_module.solve_gram(tile, torch.randn(1, 3, 16), 1e-3, 16)
    assert solved.x.isfinite().all() and solved.iterations.max() > 0


@pytest.mark.parametrize("solver", ["gram", "cg"])
def test_numbers_that_are_none_propagate(solver):
    """To every later token of their document and none of another, and no solver waits for them to converge."""
    lengths = (12, 12, 5)
    q, k, v = (x.detach() for x in inputs(lengths, dtype=torch.float32))
    k[0, 15] = float("nan")
    o, *_ = attend(q, k, v, torch.ones(4), lengths, backend="chunked", solver=solver, iterations=10_000)
    assert o[:, :12].isfinite().all() and o[:, 15:24].isnan().all() and o[:, 24:].isfinite().all()


# Decoding


@variants
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_step_equals_the_last_token(kernel, ridge_mode, kind, parts):
    lengths, capacity = (1, 4, 30), 33
    documents = [inputs((n,), value_dim=5) for n in lengths]
    scale = (0.2 + 0.2 * torch.rand(4, dtype=torch.float64)).requires_grad_()
    kinds = {"kernel": kernel, "ridge_mode": ridge_mode, "scale": scale}
    keys, values = torch.randn(3, 2, capacity, 6), torch.randn(3, 2, capacity, 5)
    keys, values = keys.double(), values.double()
    for row, (_, k, v) in enumerate(documents):
        keys[row, :, : lengths[row]] = k[0].detach().transpose(0, 1)
        values[row, :, : lengths[row]] = v[0].detach().transpose(0, 1)
    keys.requires_grad_(), values.requires_grad_()
    ridge = ridges(kind, 3)
    query = torch.cat([q[:, -1:] for q, _, _ in documents]).detach().requires_grad_()
    own = ridge.transpose(0, 1) if kind == "token" else ridge
    o = local_linear_step(query, keys, values, torch.tensor(lengths), own, parts=parts, **kinds)
    expected = []
    for row, length in enumerate(lengths):
        q, k, v = (x[row, :, :length].transpose(0, 1)[None] for x in (keys, keys, values))
        q = torch.cat([documents[row][0][:, :-1], query[row : row + 1]], dim=1)
        taken = ridge[:, row : row + 1].expand(1, length, 4) if kind == "token" else ridge
        expected.append(attend(q, k, v, taken, (length,), backend="reference", **kinds)[0][:, -1])
    expected = torch.cat(expected)[:, None]
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(o)
    leaves = (query, keys, values, ridge, scale)
    for a, b in zip(*(torch.autograd.grad(x, leaves, weight) for x in (o, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_step_reads_only_counted_slots():
    q = torch.randn(3, 1, 4, 8)
    keys, values = torch.randn(2, 3, 2, 10, 8)
    counts, ridge = torch.tensor([1, 4, 10]), torch.full((4,), 0.5)
    output = local_linear_step(q, keys, values, counts, ridge, parts=3)
    for row, count in enumerate(counts.tolist()):
        keys[row, :, count:], values[row, :, count:] = 1e9, 1e9
    assert torch.equal(local_linear_step(q, keys, values, counts, ridge, parts=3), output)


def test_long_caches_are_read_in_parts(monkeypatch):
    from farspan.kernels.local_linear import step

    q, keys, values = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 300, 8), torch.randn(2, 2, 300, 8)
    counts, ridge, found = torch.tensor([300, 70]), torch.ones(4), []
    of, sizes = step._Fit.of, []
    monkeypatch.setattr(step._Fit, "of", lambda scores, keys: sizes.append(keys.shape[2]) or of(scores, keys))
    for numbers in (step.NUMBERS, 2 * 4 * 8 * 128, 1):
        monkeypatch.setattr(step, "NUMBERS", numbers)
        found.append(local_linear_step(q, keys, values, counts, ridge))
    assert sizes == [300, 128, 128, 44, 64, 64, 64, 64, 44]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def test_step_in_single_precision():
    q, k, v = (x.detach() for x in inputs((500,), head_dim=64, norm=True))
    ridge = torch.full((4,), 0.5)
    exact, *_ = attend(q, k, v, ridge.double(), (500,), backend="chunked")
    caches = (x[0].transpose(0, 1)[None].float() for x in (k, v))
    o = local_linear_step(q[:, -1:].float(), *caches, torch.tensor([500]), ridge, parts=4)
    assert (o - exact[:, -1:]).abs().max() <= 1e-4 * exact[:, -1].abs().max()


@pytest.mark.parametrize("name", HARD)
def test_step_on_hard_keys(name):
    q, k, v, scale = hard(name, 150, 16, torch.float32)
    caches = (x[0].transpose(0, 1)[None] for x in (k, v))
    o = local_linear_step(q[:, -1:], *caches, torch.tensor([150]), torch.ones(2), scale=scale, parts=3)
    assert o.isfinite().all()
    if name != "huge":
        wide = (x.double() for x in (q, k, v, torch.ones(2)))
        exact, *_ = attend(*wide, (150,), scale=scale, backend="reference")
        assert (o - exact[:, -1:]).abs().max() <= 5e-5 * exact[:, -1].abs().max()


# States, registration, refusals


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_final_state_continues(window, backend):
    lengths, first = (3, 11), (1, 6)
    q, k, v = inputs(lengths)
    ridge = ridges("head", 14)
    whole, *_ = attend(q, k, v, ridge, lengths, window=window, backend=backend)

    def piece(x, begin):
        documents = x[0].split(lengths)
        return torch.cat([d[:n] if begin else d[n:] for d, n in zip(documents, first, strict=True)])[None]

    options = {"window": window, "backend": backend}
    head, state, _ = attend(*(piece(x, True) for x in (q, k, v)), ridge, first, return_state=True, **options)
    rest = tuple(n - m for n, m in zip(lengths, first, strict=True))
    tail, *_ = attend(*(piece(x, False) for x in (q, k, v)), ridge, rest, initial_state=state, **options)
    torch.testing.assert_close(head, piece(whole, True), rtol=0, atol=1e-13)
    torch.testing.assert_close(tail, piece(whole, False), rtol=0, atol=1e-13)
    weight, leaves = torch.randn_like(whole), (q, k, v, ridge)
    pieces = (head * piece(weight, True)).sum() + (tail * piece(weight, False)).sum()
    for a, b in zip(torch.autograd.grad(pieces, leaves), torch.autograd.grad(whole, leaves, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    if window is not None:
        assert all(len(keys) <= window - 1 for keys, _ in state)


def test_registration():
    q, k, v = inputs((40,), dtype=torch.float32)
    ridge, scale = torch.ones(1, 4, 1, requires_grad=True), torch.ones(4, requires_grad=True)
    settings = ([25, 15], [0, 0], "dot", "relative", None, "cg", 1e-3, 8)
    torch.library.opcheck(torch.ops.farspan.local_linear_forward, (q, k, v, ridge, scale, *settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (3, 4)}, "sum to 7, the row has 8"),
        ({"lengths": (8, 0)}, "document lengths"),
        ({"kv_heads": 3}, "shapes disagree"),
        ({"ridge": torch.zeros(4)}, "ridge=0 must be above 0"),
        ({"ridge": torch.tensor([1.0, -2.0, 1.0, 1.0])}, "ridge=-2 must be above 0"),
        ({"ridge": torch.full((4,), float("nan"))}, "ridge=nan must be above 0"),
        ({"ridge": torch.tensor([1.0, 1.0, 1.0, float("inf")])}, "ridge=inf must be above 0 and finite"),
        ({"ridge": torch.ones(3)}, r"ridge \[3\] must be \[heads\]"),
        ({"scale": torch.ones(3)}, "one for each of 4 heads"),
        ({"window": 0}, "at least 1"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be above 0"),
        ({"solver": "lu"}, "solver='lu' is not known"),
        ({"kernel": "cosine"}, "kernel='cosine' is not known"),
        ({"ridge_mode": "none"}, "ridge_mode='none' is not known"),
        ({"backend": "fast"}, "not one of"),
        ({"initial_state": ((torch.zeros(2, 2, 5), torch.zeros(2, 2, 6)),)}, r"keys \[2, 2, 5\].* must be \[n, 2, 6\]"),
        ({"initial_state": ()}, "initial state has 0 documents"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    change = dict(change)
    q, k, v = inputs((8,), kv_heads=change.pop("kv_heads", 2))
    ridge, lengths = change.pop("ridge", torch.ones(4)), change.pop("lengths", (8,))
    with pytest.raises(ValueError, match=message) as caught:
        attend(q, k, v, ridge, lengths, **change)
    assert "\n" not in str(caught.value)
