"""Relative attention: oracles of its definition, the chunked form against it, every gradient."""

import math

import pytest
import torch

from farspan.kernels.relative import Sinusoid, Table, blocks, features, operands, passes, relative_attention
from farspan.kernels.relative.chunked import relative_forward
from farspan.kernels.relative.positions import turned
from farspan.kernels.relative.spans import Span
from farspan.kernels.softmax import softmax_attention

RAGGED = (1, 2, 37, 16, 17, 1, 5, 5, 70)
HEADS, CHANNELS = 4, 8
backends = pytest.mark.parametrize("backend", ["reference", "chunked"])
kinds = pytest.mark.parametrize("kind", ["table", "sinusoid"])


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def inputs(lengths, kv_heads=2, dtype=torch.float64):
    shapes = [(1, sum(lengths), n, CHANNELS) for n in (HEADS, kv_heads, kv_heads)]
    return [normal(*shape, dtype=dtype) for shape in (*shapes, (HEADS, CHANNELS))]


def learned(kind, distances=200, dtype=torch.float64):
    if kind == "table":
        return Table(normal(HEADS, distances, CHANNELS, dtype=dtype), normal(HEADS, distances, dtype=dtype))
    return Sinusoid(normal(HEADS, 6, CHANNELS, dtype=dtype), normal(HEADS, CHANNELS, dtype=dtype))


def prefix_state(counts, kv_heads=2, dtype=torch.float64):
    return tuple(tuple(normal(n, kv_heads, CHANNELS, dtype=dtype) for _ in range(2)) for n in counts)


def run(arguments, positions, lengths, **options):
    return relative_attention(*arguments, positions, lengths, boundaries(lengths), **options)[0]


def with_gradients(output, leaves):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(
        output, leaves, weight.to(output.dtype), materialize_grads=True, allow_unused=True, retain_graph=True
    )
    return [output, *gradients]


def assert_close(got, expected, tolerance=1e-12):
    for a, b in zip(got, expected, strict=True):
        assert not a.numel() or (a - b).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


def by_pairs(q, k, v, u, table, scale, window=None):
    """The definition pair by pair, of one document [n, H, D], keys of as many heads."""
    outputs = []
    for h in range(q.shape[1]):
        for i in range(len(q)):
            first = 0 if window is None else max(0, i - window + 1)
            scores = []
            for j in range(first, i + 1):
                row = min(i - j, table.r.shape[1] - 1)
                score = (q[i, h] + u[h]) @ k[j, h] + q[i, h] @ table.r[h, row] + table.beta[h, row]
                scores.append(scale * score)
            outputs.append(torch.stack(scores).softmax(0) @ v[first : i + 1, h])
    return torch.stack(outputs).unflatten(0, (q.shape[1], -1)).transpose(0, 1)


# The definition


@backends
@pytest.mark.parametrize(("window", "distances"), [(None, 20), (None, 4), (5, 20), (5, 3)])
def test_definition_by_pairs(backend, window, distances):
    q, k, v, u = inputs((11,), kv_heads=HEADS)
    table = learned("table", distances)
    expected = by_pairs(q[0], k[0], v[0], u, table, 0.3, window)[None]
    got = run((q, k, v, u), table, (11,), window=window, scale=0.3, backend=backend)
    leaves = [q, k, v, u, table.r, table.beta]
    assert_close(with_gradients(got, leaves), with_gradients(expected, leaves))


@backends
def test_hand_value(backend):
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    beta = torch.tensor([[0, math.log(4)]], dtype=torch.float64)
    table = Table(torch.zeros(1, 2, 1, dtype=torch.float64), beta)
    u = torch.zeros(1, 1, dtype=torch.float64)
    o = run((one, one, v, u), table, (2,), scale=1.0, backend=backend)
    torch.testing.assert_close(o.flatten(), torch.tensor([1, 0.8], dtype=torch.float64))


@backends
def test_sinusoids_are_the_table_that_they_make(backend):
    arguments, sinusoid = inputs(RAGGED), learned("sinusoid")
    leaves = [*arguments, sinusoid.projection, sinusoid.nu]
    by_table = run(arguments, sinusoid.table(70), RAGGED, backend=backend)
    got = run(arguments, sinusoid, RAGGED, backend=backend)
    assert_close(with_gradients(got, leaves), with_gradients(by_table, leaves))


@backends
def test_without_relative_terms_it_is_attention(backend):
    arguments = inputs(RAGGED)
    u = torch.zeros_like(arguments[3])
    zeros = Table(torch.zeros(HEADS, 3, CHANNELS, dtype=torch.float64), torch.zeros(HEADS, 3, dtype=torch.float64))
    expected, _ = softmax_attention(*arguments[:3], RAGGED, boundaries(RAGGED), backend="reference")
    assert_close([run((*arguments[:3], u), zeros, RAGGED, backend=backend)], [expected])


def test_relative_shifts_of_other_codes_are_indexing_by_distance():
    queries, keys, table = 5, 9, 16
    q, r = torch.randn(queries, 4), torch.randn(2 * table, 4)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    visible = distance >= 0
    # Transformer-XL: rows by descending distance, a zero column on the left
    x = q @ r[:keys].flip(0).T
    padded = torch.cat([torch.zeros(queries, 1), x], 1).view(keys + 1, queries)[1:].reshape(queries, keys)
    expected = (q @ r[:keys].T).gather(1, distance.clamp(min=0))
    torch.testing.assert_close(padded[visible], expected[visible])
    # the release: rows by key - query + table, a zero column on the right
    wide = q @ r[table - keys : table + queries].T
    rows = torch.cat([wide, torch.zeros(queries, 1)], 1).view(keys + queries + 1, queries)[:-1]
    released = rows.reshape(queries, keys + queries)[:, -keys:]
    torch.testing.assert_close(released, (q @ r.T).gather(1, table - distance))


# The chunked form


@kinds
@pytest.mark.parametrize("window", [None, 1, 3, 17, 64])
@pytest.mark.parametrize("distances", [1, 5, 200])
@pytest.mark.parametrize("prefixes", [None, (0, 5, 20, 1, 0, 3, 64, 7, 2)])
def test_chunked_equals_reference(monkeypatch, kind, window, distances, prefixes):
    monkeypatch.setattr(blocks, "ROWS", 16)
    arguments, positions = inputs(RAGGED), learned(kind, distances)
    state = None if prefixes is None else prefix_state(prefixes)
    leaves = [*arguments, *vars(positions).values(), *(x for pair in state or () for x in pair)]
    options = {"window": window, "initial_state": state}
    got, expected = (run(arguments, positions, RAGGED, backend=b, **options) for b in ("chunked", "reference"))
    assert_close(with_gradients(got, leaves), with_gradients(expected, leaves))


@kinds
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize(("rows", "scores"), [(1, 1), (7, 100), (128, 10**6)])
def test_block_size_changes_nothing(monkeypatch, kind, kv_heads, rows, scores):
    arguments, positions = inputs((40, 3), kv_heads), learned(kind, 9)
    leaves = [*arguments, *vars(positions).values()]
    expected = with_gradients(run(arguments, positions, (40, 3), backend="reference"), leaves)
    monkeypatch.setattr(blocks, "ROWS", rows)
    monkeypatch.setattr(blocks, "SCORES", scores)
    assert_close(with_gradients(run(arguments, positions, (40, 3), backend="chunked"), leaves), expected)


@kinds
def test_gradcheck(monkeypatch, kind):
    monkeypatch.setattr(blocks, "ROWS", 3)
    lengths, positions = (1, 8), learned(kind, 5)

    def attend(q, k, v, u, *tensors):
        return run((q, k, v, u), type(positions)(*tensors), lengths, backend="chunked")

    leaves = [x[..., :2].detach().clone().requires_grad_() for x in (*inputs(lengths), *vars(positions).values())]
    if kind == "table":
        leaves[5] = positions.beta
    assert torch.autograd.gradcheck(attend, leaves)


@kinds
def test_a_softmax_over_more_keys_has_the_gradients_of_its_parts(kind):
    """What a ring of ranks does: spans of keys one by one, merged, and the backward of each with the whole's lse."""
    (q, k, v, u), positions = inputs((30,)), learned(kind, 12)
    a, p, table, beta = operands(q, u, positions, torch.arange(30), 30)
    forward, backward = passes("chunked", q)
    scale, do = 0.3, torch.randn(1, 30, HEADS, CHANNELS, dtype=torch.float64)
    whole = list(Span(0, 30, 0, 30, 0, 0))
    o, lse = forward(a, p, k, v, table, beta, whole, None, scale)
    expected = backward(do, a, p, k, v, table, beta, o, lse, whole, None, scale)
    cut = 11
    parts = [(slice(0, 30), slice(0, cut), 0, 0), (slice(cut, 30), slice(cut, 30), cut, cut)]
    found = [torch.zeros_like(x) for x in expected]
    for rows, keys, query_position, key_position in parts:
        span = [0, rows.stop - rows.start, 0, keys.stop - keys.start, query_position, key_position]
        own = do[:, rows], a[:, rows], p[:, rows], k[:, keys], v[:, keys], table, beta, o[:, rows], lse[:, rows]
        part = backward(*own, span, None, scale)
        for total, x, where in zip(found, part, (rows, rows, keys, keys, None, None), strict=True):
            if where is None:
                total += x
            else:
                total[:, where] += x
    assert_close(found, expected)


def test_table_gradients_are_the_same_every_time():
    arguments, table = inputs(RAGGED, dtype=torch.float32), learned("table", 20, torch.float32)
    results = [with_gradients(run(arguments, table, RAGGED), [table.r, table.beta]) for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# Invariants


@backends
def test_redundancies(backend):
    (q, k, v, u), table = inputs(RAGGED), learned("table", 20)
    expected = run((q, k, v, u), table, RAGGED, backend=backend)
    assert_close([run((q, k, v, u), Table(table.r, table.beta + 3), RAGGED, backend=backend)], [expected])
    constant = torch.randn(CHANNELS, dtype=torch.float64)
    assert_close([run((q, k + constant, v, u), Table(table.r, table.beta), RAGGED, backend=backend)], [
        run((q, k, v, u), table, RAGGED, backend=backend)
    ])  # fmt: skip
    assert_close([run((q, k, v + constant, u), table, RAGGED, backend=backend)], [expected + constant])
    moved = Table(table.r, table.beta + table.r @ constant)
    by_bias = run((q + constant, k, v, u), table, RAGGED, backend=backend)
    assert_close([by_bias], [run((q, k, v, u + constant), moved, RAGGED, backend=backend)])
    dbeta = torch.autograd.grad(expected, table.beta, torch.randn_like(expected))[0]
    assert dbeta.abs().max() > 0.01 and dbeta.sum(1).abs().max() <= 1e-12


@kinds
@backends
def test_the_future_and_other_documents_change_nothing(kind, backend):
    lengths, positions = (9, 30, 1), learned(kind)
    q, k, v, u = (x.detach() for x in inputs(lengths))
    whole, start = run((q, k, v, u), positions, lengths, backend=backend), 0
    for length in lengths:
        own = [x[:, start : start + length] for x in (q, k, v)]
        assert_close([run((*own, u), positions, (length,), backend=backend)], [whole[:, start : start + length]])
        start += length
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 25:] += 1
    assert torch.equal(run((*changed, u), positions, lengths, backend=backend)[:, :25], whole[:, :25])


def test_positions_far_from_zero_change_nothing():
    (q, k, v, u), sinusoid = inputs((40,)), learned("sinusoid")
    expected = run((q, k, v, u), sinusoid, (40,), backend="chunked")
    first = 10**6
    p = turned(sinusoid.queries(q), first + torch.arange(40))
    table = features(first + torch.arange(40), p.shape[-1], torch.float64)
    o, _ = relative_forward(q + u, p, k, v, table, None, [0, 40, 0, 40, 0, 0], None, CHANNELS**-0.5)
    assert_close([o], [expected], 1e-8)
    in_fp32 = first + torch.arange(40)
    low = torch.cat([(in_fp32.float()[:, None] * 1.0).sin()], -1)
    assert (features(in_fp32, 2, torch.float32)[:, :1] - low).abs().max() < 0.1


@kinds
@pytest.mark.parametrize("window", [None, 4])
def test_final_state_continues(kind, window):
    (q, k, v, u), positions = inputs((20,)), learned(kind)
    whole = run((q, k, v, u), positions, (20,), window=window)
    head = relative_attention(
        *(x[:, :13] for x in (q, k, v)), u, positions, (13,), boundaries((13,)), window=window, return_state=True
    )
    rest = [x[:, 13:] for x in (q, k, v)]
    assert_close([head[0]], [whole[:, :13]])
    assert_close([run((*rest, u), positions, (7,), window=window, initial_state=head[1])], [whole[:, 13:]])


def test_half_precision_error_is_that_of_the_eager_path():
    arguments, positions = inputs(RAGGED), learned("sinusoid")
    exact = run(arguments, positions, RAGGED, backend="reference")
    low = [x.detach().bfloat16() for x in arguments]
    positions = Sinusoid(positions.projection.detach().bfloat16(), positions.nu.detach().bfloat16())
    got, eager = (run(low, positions, RAGGED, backend=b) for b in ("chunked", "reference"))
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"u": torch.zeros(2, 8)}, "u is"),
        ({"positions": Table(torch.zeros(4, 3, 7), torch.zeros(4, 3))}, "the table is r"),
        ({"positions": Table(torch.zeros(4, 0, 8), torch.zeros(4, 0))}, "no distance"),
        ({"positions": Sinusoid(torch.zeros(4, 5, 8), torch.zeros(4, 8))}, "no pairs"),
        ({"positions": Sinusoid(torch.zeros(4, 6, 8), torch.zeros(3, 8))}, "the sinusoid has"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    q, k, v, u = inputs((8,))
    arguments = {"u": u, "positions": learned("table"), **change}
    window = arguments.pop("window", None)
    with pytest.raises(ValueError, match=message):
        run((q, k, v, arguments["u"]), arguments["positions"], (8,), window=window)
