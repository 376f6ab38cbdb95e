"""The Titans memory: invariants of the definition, then the chunked form against it, every gradient."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from farspan.kernels.titans import Gates, Memory, MemoryState, lockstep, titans_memory
from farspan.kernels.titans import linear as titans_linear
from farspan.kernels.titans.network import activate, curvature

REFRESHES = (1, 2, 4, 8, 16)
OPTIONS = [
    (read, decay, activation)
    for read in ("post", "pre")
    for decay in ("zero", "init")
    for activation in ("silu", "gelu")
]

backends = pytest.mark.parametrize("backend", ["reference", "chunked"])
shapes = pytest.mark.parametrize(("depth", "norm"), [(1, False), (1, True), (2, False), (2, True)])


@pytest.fixture
def uncached():
    """The layout of documents made anew, for tests that change how it is made."""
    lockstep.make_groups.cache_clear()
    yield
    lockstep.make_groups.cache_clear()


def leaf(x):
    return x.detach().requires_grad_()


def inputs(time, depth=1, norm=False, heads=2, head_dim=3, dtype=torch.float64):
    """q, k, v, gates and memory; every layer of another width."""
    q, k = (leaf(normalize(torch.randn(1, time, heads, head_dim, dtype=dtype), dim=-1)) for _ in range(2))
    v = leaf(torch.randn(1, time, heads, head_dim, dtype=dtype))
    logits = torch.randn(3, 1, time, heads, dtype=dtype)
    gates = Gates(leaf(logsigmoid(logits[0] + 2)), leaf(logsigmoid(logits[1])), leaf(0.5 * logits[2].sigmoid()))
    widths = [head_dim, *range(head_dim + 1, head_dim + depth), head_dim]
    pairs = pairwise(widths)
    weights = tuple(
        leaf(torch.randn(heads, a, b, dtype=dtype) * (a**-0.5 if i else 1)) for i, (a, b) in enumerate(pairs)
    )
    affine = [leaf(torch.randn(heads, head_dim, dtype=dtype)) for _ in range(2)]
    return q, k, v, gates, Memory(weights, tuple(affine) if norm else None)


def flat(x):
    """The tensors of nested tuples that have numbers in them."""
    if isinstance(x, torch.Tensor):
        return [x] if x.numel() else []
    return [tensor for part in x or () for tensor in flat(part)]


def unflatten(tensors, like):
    if like is None:
        return None
    if isinstance(like, torch.Tensor):
        return next(tensors) if like.numel() else like
    parts = [unflatten(tensors, part) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def state(offsets, refresh, memory):
    """The state of documents that have seen some tokens, as leaves."""
    heads, head_dim = memory.weights[0].shape[:2]
    q, k, v, gates, _ = inputs(sum(offsets), heads=heads, head_dim=head_dim)
    seen = tuple(offset for offset in offsets if offset)
    with torch.no_grad():
        _, found = titans_memory(q, k, v, gates, memory, seen, refresh, return_state=True, backend="reference")
    return MemoryState(*(tuple(map(leaf, x)) if isinstance(x, tuple) else leaf(x) for x in found))


def part(arguments, first, last):
    q, k, v, gates, memory = arguments
    return *(x[:, first:last] for x in (q, k, v)), Gates(*(x[:, first:last] for x in gates)), memory


def run(arguments, lengths, refresh, backend="chunked", **options):
    return titans_memory(*arguments, tuple(lengths), refresh, backend=backend, return_state=True, **options)


def with_gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(7)
    pairs = [(x, torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)) for x in flat(outputs)]
    outputs, weights = zip(*((x, w) for x, w in pairs if x.requires_grad), strict=True)
    gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True, allow_unused=True)
    return [*(x.detach() for x, _ in pairs), *gradients]


def assert_equal(got, expected, tolerance=1e-11):
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * max(1.0, float(b.detach().abs().max())), msg=lambda m, i=index: f"{i}: {m}"
        )


# Invariants of the definition


@backends
@shapes
def test_no_rate_leaves_the_memory_as_it_was(backend, depth, norm):
    q, k, v, gates, memory = inputs(9, depth, norm)
    still = Gates(torch.zeros_like(gates.rate), gates.log_momentum, torch.zeros_like(gates.rate))
    y, final = run((q, k, v, still, memory), (9,), 4, backend)
    for found, given in zip(final.weights, memory.weights, strict=True):
        assert torch.equal(found[0], given)
    x = torch.einsum("bthi,hio->btho", q, memory.weights[0])
    if depth == 2:
        x = torch.einsum("bthi,hio->btho", torch.nn.functional.silu(x), memory.weights[1])
    if norm:
        x = q + memory.norm[0] * torch.nn.functional.layer_norm(x, (3,), eps=1e-6) + memory.norm[1]
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)

    decaying = still._replace(log_decay=gates.log_decay)
    _, final = run((q, k, v, decaying, memory), (9,), 1, backend)
    left = gates.log_decay[0].sum(0).exp()[:, None, None]
    for found, given in zip(final.weights, memory.weights, strict=True):
        torch.testing.assert_close(found[0], left * given, rtol=0, atol=1e-13)
    _, final = run((q, k, v, decaying, memory), (9,), 1, backend, decay_to="init")
    for found, given in zip(final.weights, memory.weights, strict=True):
        torch.testing.assert_close(found[0], given, rtol=0, atol=1e-13)


@backends
@shapes
def test_full_forgetting_and_no_momentum_leave_one_write(backend, depth, norm):
    """alpha = 1 and eta = 0 at the last token: M = -theta grad, at the weights before it; the floor of -20 is 2e-9."""
    _, k, v, gates, memory = arguments = inputs(5, depth, norm)
    for gate in gates[:2]:
        gate.data[:, -1] = -float("inf")
    _, before = run(part(arguments, 0, 4), (4,), 1, backend)
    _, final = run(arguments, (5,), 1, backend)
    point = [leaf(w[0]) for w in before.weights]
    x = torch.einsum("hi,hio->ho", k[0, -1], point[0])
    if depth == 2:
        x = torch.einsum("hi,hio->ho", torch.nn.functional.silu(x), point[1])
    if norm:
        x = k[0, -1] + memory.norm[0] * torch.nn.functional.layer_norm(x, (3,), eps=1e-6) + memory.norm[1]
    gradients = torch.autograd.grad(0.5 * (x - v[0, -1]).square().sum(), point)
    for found, gradient in zip(final.weights, gradients, strict=True):
        torch.testing.assert_close(found[0], -gates.rate[0, -1, :, None, None] * gradient, rtol=0, atol=1e-7)


@backends
def test_linear_memory_is_the_gated_delta_rule(backend):
    """eta = 0: beta = theta / (1 - alpha) and v' = (1 - alpha) v in a M (I - beta k k') + beta v' k'."""
    q, k, v, gates, memory = inputs(20)
    gates = gates._replace(log_momentum=torch.full_like(gates.rate, -float("inf")))
    y, _ = run((q, k, v, gates, memory), (20,), 1, backend)
    M, expected = memory.weights[0], []
    for t in range(20):
        a = gates.log_decay[0, t].exp()[:, None, None]
        beta, key = gates.rate[0, t][:, None, None] / a, k[0, t][:, :, None]
        M = a * (M - beta * key * (key.mT @ M)) + beta * key * (a * v[0, t][:, None])
        expected.append((q[0, t][:, None] @ M)[:, 0])
    torch.testing.assert_close(y[0], torch.stack(expected), rtol=0, atol=1e-7)  # of the floor: e^-20 = 2e-9


@backends
def test_one_write_of_a_unit_key_stores_its_value(backend):
    _, k, v, gates, memory = inputs(1)
    gates = Gates(torch.zeros_like(gates.rate), gates.log_momentum, torch.ones_like(gates.rate))
    y, _ = run((k, k, v, gates, memory), (1,), 1, backend)
    torch.testing.assert_close(y, v, rtol=0, atol=1e-14)


@backends
def test_a_repeated_pair_is_learned(backend):
    _, k, v, gates, memory = inputs(60)
    k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    gates = Gates(
        torch.zeros_like(gates.rate), torch.full_like(gates.rate, 0.3).log(), torch.full_like(gates.rate, 0.5)
    )
    y, _ = run((k, k, v, gates, memory), (60,), 1, backend)
    assert (y[0, -1] - v[0, -1]).norm() < 1e-8 * (y[0, 0] - v[0, 0]).norm()


@backends
def test_one_refresh_for_all_is_one_product(backend):
    """refresh >= N: E = K W - V, no error depends on another."""
    q, k, v, gates, memory = inputs(13)
    y, _ = run((q, k, v, gates, memory), (13,), 50, backend)
    W = memory.weights[0]
    errors = torch.einsum("thi,hio->tho", k[0], W) - v[0]
    S, M, expected = torch.zeros_like(W), W, []
    for t in range(13):
        a, eta = (x[0, t].exp()[:, None, None] for x in gates[:2])
        S = eta * S - gates.rate[0, t][:, None, None] * k[0, t][:, :, None] * errors[t][:, None]
        M = a * M + S
        expected.append((q[0, t][:, None] @ M)[:, 0])
    torch.testing.assert_close(y[0], torch.stack(expected), rtol=0, atol=1e-12)


@backends
@shapes
@pytest.mark.parametrize("refresh", [1, 4])
def test_no_token_sees_a_later_one(backend, depth, norm, refresh):
    q, k, v, gates, memory = inputs(11, depth, norm)
    for t in (0, 3, 4, 8):
        y, _ = run((q, k, v, gates, memory), (11,), refresh, backend)
        for gradient in torch.autograd.grad(y[:, t].square().sum(), (q, k, v, *gates)):
            assert not gradient[:, t + 1 :].any()


@backends
@shapes
def test_every_input_has_a_gradient_from_a_later_read(backend, depth, norm):
    """Keys and values too, and also where only tokens after the next refresh are in the loss: the second order."""
    q, k, v, gates, memory = inputs(9, depth, norm)
    y, _ = run((q, k, v, gates, memory), (9,), 4, backend)
    gradients = torch.autograd.grad(y[:, -1].square().sum(), (k, v, *gates, *memory.weights))
    for index, gradient in enumerate(gradients[:5]):
        first = index == 3  # there is no momentum before the first token
        assert (gradient[:, first:8].flatten(2).abs().amax(-1) > 0).all()
    for gradient in gradients[5:]:
        assert gradient.abs().max() > 0


@shapes
def test_documents_and_heads_do_not_meet(depth, norm):
    lengths, arguments = (3, 9, 1, 4), inputs(17, depth, norm)
    y, final = run(arguments, lengths, 4)
    starts = [0, 3, 12, 13, 17]
    for d, (first, last) in enumerate(pairwise(starts)):
        alone, alone_final = run(part(arguments, first, last), (last - first,), 4)
        assert_equal([alone, *flat(alone_final)], [y[:, first:last], *(x[d : d + 1] for x in flat(final))], 1e-13)
    q, k, v, gates, memory = arguments
    changed = v.detach().clone()
    changed[:, :, 1] += 1
    other = run((q, k, changed, gates, memory), lengths, 4)[0]
    assert torch.equal(other[:, :, 0], y[:, :, 0]) and not torch.equal(other[:, :, 1], y[:, :, 1])


# The chunked form against the definition


@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_chunked_equals_reference(depth, norm, refresh):
    b = refresh
    lengths = tuple(n for n in (1, 2, b - 1, b, b + 1, 3 * b + 5) if n)
    arguments = inputs(sum(lengths), depth, norm)
    read, decay_to, activation = OPTIONS[(depth + REFRESHES.index(refresh) + 3 * norm) % len(OPTIONS)]
    options = {"read": read, "decay_to": decay_to, "activation": activation}
    results = [
        with_gradients(run(arguments, lengths, refresh, backend, **options), flat(arguments))
        for backend in ("chunked", "reference")
    ]
    assert_equal(*results)


@pytest.mark.parametrize(("read", "decay_to", "activation"), OPTIONS)
@pytest.mark.parametrize("refresh", [1, 2, 5])
@pytest.mark.parametrize(("depth", "norm"), [(1, False), (1, True), (2, False), (3, True)])
def test_continued_documents(depth, norm, refresh, read, decay_to, activation):
    """From states inside blocks; gradients of all that a state holds."""
    lengths, offsets = (5, 1, 9, 2), (3, 4, 1, 6)
    arguments = inputs(sum(lengths), depth, norm, heads=1 + norm)
    before = state(offsets, refresh, arguments[-1])
    options = {"read": read, "decay_to": decay_to, "activation": activation}
    options |= {"offsets": offsets, "initial_state": before}
    leaves = [*flat(arguments), *flat(before)]
    results = [
        with_gradients(run(arguments, lengths, refresh, backend, **options), leaves)
        for backend in ("chunked", "reference")
    ]
    assert_equal(*results)


@backends
@shapes
@pytest.mark.parametrize("decay_to", ["zero", "init"])
def test_one_state_for_all_documents(backend, depth, norm, decay_to):
    lengths, arguments = (5, 1, 9), inputs(15, depth, norm)
    before = state((8,), 4, arguments[-1])
    repeated = MemoryState(
        *(
            tuple(x.expand(3, *x.shape[1:]) for x in p) if isinstance(p, tuple) else p.expand(3, *p.shape[1:])
            for p in before
        )
    )
    leaves, options = (
        [*flat(arguments), *before.weights, *before.momentum],
        {"decay_to": decay_to, "offsets": (8, 4, 0)},
    )
    results = [
        with_gradients(run(arguments, lengths, 4, backend, initial_state=given, **options), leaves)
        for given in (before, repeated)
    ]
    assert_equal(*results, 1e-13)


@shapes
@pytest.mark.parametrize("decay_to", ["zero", "init"])
@pytest.mark.parametrize("refresh", [1, 4])
def test_a_split_changes_nothing(depth, norm, decay_to, refresh):
    """At any position, and with gradients that go through the state."""
    arguments = inputs(13, depth, norm)
    leaves = flat(arguments)
    whole = with_gradients(run(arguments, (13,), refresh, decay_to=decay_to), leaves)
    for cuts in [(n,) for n in range(1, 13)] + [(1, 2, 3), (5, 6), (2, 11)]:
        outputs, carried, first = [], None, 0
        for last in (*cuts, 13):
            own = part(arguments, first, last)
            options = {"offsets": (first,), "initial_state": carried, "decay_to": decay_to}
            y, carried = run(own, (last - first,), refresh, **options)
            outputs.append(y)
            first = last
        assert_equal(with_gradients((torch.cat(outputs, 1), carried), leaves), whole)


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("tile", [1, 4, 12, 1000])
def test_tile_size_changes_nothing(monkeypatch, uncached, tile, refresh):
    arguments, lengths = inputs(40), (31, 2, 7)
    expected = with_gradients(run(arguments, lengths, refresh), flat(arguments))
    monkeypatch.setattr(titans_linear, "TILE", tile)
    lockstep.make_groups.cache_clear()
    assert_equal(with_gradients(run(arguments, lengths, refresh), flat(arguments)), expected, 1e-12)


@shapes
@pytest.mark.parametrize(("steps", "numbers"), [(1, 1), (2, 10**9), (100, 60), (100, 10**9)])
def test_kept_states_and_groups_change_nothing(monkeypatch, uncached, depth, norm, steps, numbers):
    """steps between kept states; numbers of state that documents side by side may have."""
    monkeypatch.setattr(titans_linear, "TILE", 4)
    arguments, lengths = inputs(45, depth, norm), (4, 29, 1, 9, 2)
    expected = with_gradients(run(arguments, lengths, 2), flat(arguments))
    lockstep.make_groups.cache_clear()
    monkeypatch.setattr(lockstep, "segment_length", lambda _: steps)
    monkeypatch.setattr(lockstep, "STATE_AT_ONCE", numbers)
    assert_equal(with_gradients(run(arguments, lengths, 2), flat(arguments)), expected, 1e-12)


@pytest.mark.parametrize(("depth", "norm", "refresh"), [(1, False, 1), (1, False, 2), (2, True, 2), (3, False, 2)])
def test_gradcheck(depth, norm, refresh):
    arguments = inputs(7, depth, norm, heads=1, head_dim=2)
    before = state((3,), refresh, arguments[-1])
    leaves = [*flat(arguments), *flat(before)]

    def function(*tensors):
        tensors = iter(tensors)
        own = [unflatten(tensors, x) for x in arguments]
        carried = unflatten(tensors, before)
        return tuple(flat(run(own, (7,), refresh, offsets=(3,), initial_state=carried)))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(("depth", "tokens"), [(1, 64 * 100), (2, 400)])
def test_what_is_kept_grows_with_the_root_of_the_blocks(depth, tokens):
    arguments = inputs(tokens, depth, depth == 2, heads=1, head_dim=8, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        titans_memory(*arguments, (tokens,), 4)
    whole = sum(x.numel() for x in flat(arguments)) + 9 * 2 * sum(w.numel() for w in arguments[-1].weights)
    assert sum(kept) <= 2 * whole  # inputs (also as the gates' floor keeps them), and 9 states between 100 blocks


def test_half_precision_inputs_are_computed_in_single():
    arguments = inputs(70, 2, True, head_dim=8, dtype=torch.float32)
    q, k, v, gates, memory = arguments
    low = [leaf(x.bfloat16()) for x in (q, k, v)]
    exact = [leaf(x.float()) for x in low]
    results = [
        with_gradients(titans_memory(*x, gates, memory, (70,), 16)[0], [*x, *gates, *memory.weights])
        for x in (low, exact)
    ]
    assert results[0][0].dtype == torch.bfloat16 and results[0][1].dtype == torch.bfloat16
    for got, want in zip(*results, strict=True):
        assert (got.float() - want).norm() <= 5e-3 * want.norm()  # one rounding of outputs and their gradient


@pytest.mark.parametrize("refresh", [1, 64])
def test_gradients_of_gates_keep_their_precision_in_sums(refresh):
    """Over all tokens, as a bias sums them: in float32 as far off as the definition in float32, not with the tile."""
    arguments = inputs(256, head_dim=32, heads=4, dtype=torch.float32)
    wide = [leaf(x.double()) for x in flat(arguments)]

    def summed(arguments, backend):
        q, k, v, gates, memory = arguments
        y = titans_memory(q, k, v, gates, memory, (256,), refresh, backend=backend)[0]
        return torch.stack([x.double().sum(1) for x in with_gradients([y], list(gates))[1:]])

    exact = summed(unflatten(iter(wide), arguments), "reference")
    errors = [float((summed(arguments, b) - exact).abs().max() / exact.abs().max()) for b in ("reference", "chunked")]
    assert errors[1] <= 3 * errors[0]


def test_operators_compile():
    arguments = inputs(21, 2, True, dtype=torch.float32)
    before = run(arguments, (13, 8), 4)[0]

    def function(*arguments):
        return titans_memory(*arguments, (13, 8), 4, return_state=True, backend="chunked")[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_equal(with_gradients(compiled(*arguments), flat(arguments)), with_gradients(before, flat(arguments)), 1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_derivatives_of_the_activations(activation):
    z = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    value, slope = activate(z, activation)
    torch.testing.assert_close(value, getattr(torch.nn.functional, activation)(z), rtol=0, atol=1e-14)
    first = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    torch.testing.assert_close(slope, first, rtol=0, atol=1e-14)
    torch.testing.assert_close(curvature(z, activation), torch.autograd.grad(first.sum(), z)[0], rtol=0, atol=1e-14)


# What does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refresh": 0}, "refresh=0 must be at least 1"),
        ({"read": "late"}, "read='late' is not one of post, pre"),
        ({"decay_to": "one"}, "decay_to='one' is not one of zero, init"),
        ({"activation": "relu"}, "activation='relu' is not one of silu, gelu"),
        ({"lengths": (5,)}, "document lengths"),
        ({"offsets": (4,)}, "need an initial state"),
        ({"offsets": (1, 1)}, "must count the earlier tokens of each of 1 documents"),
        ({"memory": Memory((torch.zeros(2, 3, 4),) * 5)}, "are not 1 to 4 layers"),
        ({"memory": Memory((torch.zeros(2, 3, 4),))}, "are not 1 to 4 layers"),
        ({"memory": Memory((torch.zeros(2, 3, 3),), (torch.zeros(2, 4),) * 2)}, "must be gain and bias of"),
        ({"gates": Gates(*(torch.zeros(1, 8, 3),) * 3)}, "q and the gates are"),
        ({"initial_state": 3}, "the initial state has shapes"),
    ],
)
def test_one_clear_line(change, message):
    q, k, v, gates, memory = inputs(8)
    options = {"lengths": (8,), "refresh": 4, "gates": gates, "memory": memory} | change
    if "initial_state" in change:
        options |= {"initial_state": state((5,), 3, memory), "offsets": (5,)}
    with pytest.raises(ValueError, match=message) as raised:
        titans_memory(q, k, v, **options)
    assert "\n" not in str(raised.value)
