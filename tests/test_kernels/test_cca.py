"""Core-context-aware attention: oracles of the definition, the blockwise form against it, every gradient."""

import itertools
import math

import pytest
import torch

from farspan.kernels.cca import Piece, chunked, core_attention, cores_seen, plan, pool, pool_groups, prefix_needed
from farspan.kernels.cca.reference import visible
from farspan.kernels.cca.step import core_step
from farspan.kernels.softmax.reference import attention_reference

BACKENDS = ("reference", "chunked")
backends = pytest.mark.parametrize("backend", BACKENDS)
# (tokens, group, window): windows that the group divides and does not, below the group, beyond the tokens; lengths that
# the group divides and does not, and below it
SIZES = [(64, 4, 8), (61, 4, 7), (40, 8, 16), (33, 16, 16), (10, 16, 4), (50, 1, 6), (37, 5, 3), (5, 4, 1), (9, 3, 9)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "n{}-g{}-s{}".format(*size))


def tensors(tokens, heads=4, kv_heads=2, head_dim=6, dtype=torch.float64):
    shapes = [(1, tokens, count, head_dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attend(q, k, v, group, window, lengths=None, backend="reference", core_heads="q", pool="significance", **options):
    """Pooling and attention of whole documents."""
    pieces, starts, token = [], [], 0
    for length in lengths or (q.shape[1],):
        pieces.append(Piece(length, 0, 0, token, sum(map(len, starts))))
        starts.append(token + group * torch.arange(length // group))
        token += length
    starts = torch.cat(starts)
    ends = q[:, starts + group - 1]
    cores = pool_groups(ends, k, v, starts, group, core_heads=core_heads, pool=pool, backend=backend)
    return core_attention(q, k, v, *cores, tuple(pieces), group, window, backend=backend, **options)


def full(q, k, v):
    return attention_reference(q, k, v, (q.shape[1],), (0,), q.shape[-1] ** -0.5)


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# Oracles


@backends
def test_golden_values(backend):
    """d = 1, scale 1, groups and windows of 2, queries of 1."""
    q = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    k = torch.tensor([0, math.log(2), 0, math.log(3), 0, 0], dtype=torch.float64).view(1, 6, 1, 1)
    v = torch.arange(1, 7, dtype=torch.float64).view(1, 6, 1, 1)
    starts = torch.tensor([0, 2])
    core_k, core_v = pool_groups(q[:, starts + 1], k, v, starts, 2, backend=backend)
    close(core_k.flatten().tolist(), [2 / 3 * math.log(2), 3 / 4 * math.log(3)])
    close(core_v.flatten().tolist(), [5 / 3, 15 / 4])
    o = core_attention(q, k, v, core_k, core_v, (Piece(6, 0, 0, 0, 0),), 2, 2, backend=backend)
    close(o.flatten().tolist(), [1.0, 1.66666667, 2.0, 3.15811739, 3.43772426, 3.78288180], 1e-8)


@backends
@pytest.mark.parametrize("window", [1, 2, 7, 40])
def test_groups_of_one_are_full_attention(backend, window):
    q, k, v = tensors(40)
    close(attend(q, k, v, 1, window, backend=backend), full(q, k, v))


@backends
@pytest.mark.parametrize("group", [1, 3, 8, 50])
def test_a_window_as_long_as_the_document_is_full_attention(backend, group):
    q, k, v = tensors(40)
    close(attend(q, k, v, group, 40, backend=backend), full(q, k, v))


@backends
@pytest.mark.parametrize("window", [1, 4, 6])
def test_a_bias_of_log_group_is_full_attention_where_keys_are_constant_in_groups(backend, window):
    q, k, v = tensors(42)
    k = k[:, ::4].repeat_interleave(4, dim=1)[:, :42]
    close(attend(q, k, v, 4, window, backend=backend, core_bias=math.log(4)), full(q, k, v))
    assert not torch.allclose(attend(q, k, v, 4, window, backend=backend), full(q, k, v))


def test_every_token_counts_once_by_itself_or_its_core():
    for group, window, tokens in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 5, 8, 19), (1, 3, 7, 8, 30)):
        cores, raw = visible(Piece(tokens, 0, 0, 0, 0), group, window, torch.device("cpu"))
        counts = raw.long()
        counts[:, : group * cores.shape[1]] += cores.long().repeat_interleave(group, dim=1)
        assert torch.equal(counts, torch.ones(tokens, tokens, dtype=torch.int64).tril())
        near = raw.sum(1)
        position = torch.arange(tokens)
        assert torch.equal(cores.sum(1), torch.tensor([cores_seen(t, group, window) for t in range(tokens)]))
        assert bool((near >= (position + 1).clamp(max=window)).all() and (near <= window + group - 1).all())
        assert all(prefix_needed(t, group, window) == int(near[t]) - 1 for t in range(tokens))


@pytest.mark.parametrize(("group", "window"), [(4, 3), (4, 8), (5, 7), (3, 1)])
def test_the_first_query_that_sees_a_core(group, window):
    """Division that truncates would show core 0 too early."""
    assert cores_seen(group + window - 2, group, window) == 0
    assert cores_seen(group + window - 1, group, window) == 1


@backends
def test_causal_and_far_reaching(backend):
    """A token changes no earlier output, and every later one: through its own key, then through its core."""
    q, k, v = tensors(30)
    o = attend(q, k, v, 4, 5, backend=backend)
    for token in (0, 3, 4, 17, 29):
        (gradient,) = torch.autograd.grad(o[:, token].sum(), v, retain_graph=True)
        reached = gradient.abs().sum((0, 2, 3)) > 0
        assert reached.tolist() == [True] * (token + 1) + [False] * (29 - token)


@backends
def test_outputs_are_averages_of_values(backend):
    q, k, v = tensors(30)
    close(attend(q, k, torch.ones_like(v), 4, 5, backend=backend), torch.ones_like(q))
    o = attend(q, k, v, 4, 5, backend=backend)
    lowest, highest = (getattr(v, f"cum{side}")(dim=1).values.repeat_interleave(2, dim=2) for side in ("min", "max"))
    assert bool((o >= lowest - 1e-12).all() and (o <= highest + 1e-12).all())


@backends
def test_one_softmax_is_the_merge_of_two_by_their_log_sum_exp(backend):
    q, k, v = tensors(30)
    raw, cores = (attend(q, k, v, 4, 5, backend=backend, parts=parts) for parts in ("raw", "cores"))
    starts = torch.arange(0, 28, 4)
    core_k, _ = pool_groups(q[:, starts + 3], k, v, starts, 4, backend=backend)
    sees_cores, sees_tokens = visible(Piece(30, 0, 0, 0, 0), 4, 5, q.device)
    lse = []
    for keys, sees in ((core_k[:, : sees_cores.shape[1]], sees_cores), (k.repeat_interleave(2, dim=2), sees_tokens)):
        scores = torch.einsum("ihd,jhd->ihj", q[0], keys[0]) * 6**-0.5
        lse.append(scores.masked_fill(~sees[:, None], -math.inf).logsumexp(-1))
    beta = torch.sigmoid(lse[0] - lse[1])[None, ..., None]
    close(beta * cores + (1 - beta) * raw, attend(q, k, v, 4, 5, backend=backend))
    assert not bool(cores[:, :8].any())  # c(t) = 0


@backends
def test_pooled_projections_are_projections_of_what_is_pooled(backend):
    """With a bias too, since the weights sum to 1."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((12, 5), (5, 6), (6,)))
    q, k, _ = tensors(12, heads=1, kv_heads=1)
    v = (x @ weight + bias)[None, :, None]
    starts = torch.arange(0, 12, 4)
    _, core_v = pool_groups(q[:, starts + 3], k, v, starts, 4, backend=backend)
    w = (torch.einsum("mhd,mrhd->mr", q[0, starts + 3], k[0].unflatten(0, (3, 4))) * 6**-0.5).softmax(-1)
    pooled = torch.einsum("mr,mrc->mc", w, x.unflatten(0, (3, 4)))
    close(core_v[0, :, 0], pooled @ weight + bias)


# The blockwise form


def both(tensors_, run):
    weight, results = None, []
    for backend in BACKENDS:
        o = run(backend)
        weight = torch.randn_like(o) if weight is None else weight
        gradients = torch.autograd.grad(o, tensors_, weight, allow_unused=True, materialize_grads=True)
        results.append([o, *gradients])
    for expected, got in zip(*results, strict=True):
        close(got, expected)


@sizes
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("core_heads", ["q", "kv"])
def test_chunked_equals_reference(size, kv_heads, core_heads):
    tokens, group, window = size
    inputs = tensors(tokens, kv_heads=kv_heads)
    both(inputs, lambda backend: attend(*inputs, group, window, backend=backend, core_heads=core_heads, core_bias=0.7))


@pytest.mark.parametrize("parts", ["both", "raw", "cores"])
@pytest.mark.parametrize("pool", ["significance", "mean", "max"])
def test_chunked_equals_reference_for_every_choice(parts, pool):
    inputs = tensors(53)
    both(inputs, lambda backend: attend(*inputs, 4, 9, backend=backend, parts=parts, pool=pool))


@pytest.mark.parametrize("core_heads", ["q", "kv"])
def test_packed_documents_are_separate(core_heads):
    lengths = (1, 2, 33, 4, 5, 1, 60)
    inputs = tensors(sum(lengths))
    options = {"core_heads": core_heads, "core_bias": 0.3}
    both(inputs, lambda backend: attend(*inputs, 4, 6, lengths, backend=backend, **options))
    packed = attend(*inputs, 4, 6, lengths, backend="chunked", **options)
    documents = zip(*(x.split(lengths, dim=1) for x in inputs), strict=True)
    close(packed, torch.cat([attend(*document, 4, 6, backend="chunked", **options) for document in documents], dim=1))


@pytest.mark.parametrize("cut", [1, 8, 11, 12, 13, 31, 32, 33, 59])
@pytest.mark.parametrize("size", [(4, 12), (5, 7), (16, 3)], ids=str)
def test_pieces_with_prefixes_equal_the_whole(cut, size):
    """Two pieces of one document that share cores, and keys where the second one's prefix reaches."""
    group, window = size
    q, k, v = tensors(60)
    starts = group * torch.arange(60 // group)
    prefix = prefix_needed(cut, group, window)
    pieces = (Piece(cut, 0, 0, 0, 0), Piece(60 - cut, cut, prefix, cut - prefix, 0))

    def run(backend, pieces=pieces):
        cores = pool_groups(q[:, starts + group - 1], k, v, starts, group, backend=backend)
        return core_attention(q, k, v, *cores, pieces, group, window, core_bias=0.4, backend=backend)

    both((q, k, v), run)
    close(run("chunked"), run("reference", (Piece(60, 0, 0, 0, 0),)))
    longer = Piece(60 - cut, cut, cut, 0, 0)  # more keys than needed change nothing
    close(run("chunked", (pieces[0], longer)), run("chunked"))


@pytest.mark.parametrize(("queries", "scores", "heads"), [(1, 1, 1), (8, 1000, 3), (64, 10**6, 8), (1000, 10**6, 2)])
def test_block_sizes_change_nothing(monkeypatch, queries, scores, heads):
    inputs = tensors(150, kv_heads=4)
    weight, results = torch.randn_like(inputs[0]), []
    for chosen in (False, True):
        if chosen:
            monkeypatch.setattr(plan, "QUERIES", queries)
            monkeypatch.setattr(chunked, "SCORES", scores)
            monkeypatch.setattr(chunked, "HEADS_AT_ONCE", heads)
            monkeypatch.setattr(pool, "TOKENS_AT_ONCE", 9)
        o = attend(*inputs, 4, 10, backend="chunked")
        results.append([o, *torch.autograd.grad(o, inputs, weight)])
    for expected, got in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize(("kv_heads", "core_heads"), [(1, "q"), (2, "kv"), (4, "q")])
@pytest.mark.parametrize("many", [1, 3, 1000])
def test_cores_are_read_by_many_queries(monkeypatch, kv_heads, core_heads, many):
    """Blocks of a thousand queries shrunk to 16: several of them, a rest, two documents, with and without mask."""
    for name, value in (("QUERIES", 8), ("CORE_QUERIES", 16), ("MANY_CORES", many)):
        monkeypatch.setattr(plan, name, value)
    given = tensors(150, 4, kv_heads)
    cores = list(plan.core_blocks([97, 0, 0, 0, 0, 53, 0, 0, 97, 24], 4, 7, given[0]))
    assert cores[-1].queries.stop == 150
    assert any(block.mask is None for block in cores) == (many < 1000)
    both(given, lambda backend: attend(*given, 4, 7, (97, 53), backend, core_heads=core_heads, core_bias=0.7))


@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_scores_within_and_beyond_the_bound(factor):
    """Only beyond it are maxima subtracted."""
    q, k, v = tensors(90, kv_heads=2)
    assert chunked._bounded(factor * q, k, 0.3) == (factor == 1.0)
    both((q, k, v), lambda backend: attend(factor * q, k, v, 4, 10, backend=backend) / factor)


def test_gradcheck_of_pooling():
    q, k, v = tensors(3, kv_heads=2, head_dim=3)[:1] + tensors(11, kv_heads=2, head_dim=3)[1:]
    pooled = torch.randn_like(k).requires_grad_()
    starts = torch.tensor([7, 0, 3])  # anywhere, rows left out
    for core_heads in ("q", "kv"):

        def run(q, k, v, pooled, core_heads=core_heads):
            options = {"core_heads": core_heads, "pooled_keys": pooled, "backend": "chunked"}
            return pool_groups(q, k, v, starts, 3, **options)

        assert torch.autograd.gradcheck(run, (q, k, v, pooled))


def test_gradcheck_of_attention():
    q, k, v = tensors(14, kv_heads=1, head_dim=2, heads=2)
    core_k, core_v = (torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(*inputs):
        return core_attention(*inputs, (Piece(14, 0, 0, 0, 0),), 3, 2, core_bias=0.2, backend="chunked")

    assert torch.autograd.gradcheck(run, (q, k, v, core_k, core_v))


def test_registration():
    q, k, v = tensors(40, dtype=torch.float32)
    starts = torch.arange(0, 40, 4)
    inputs = (q[:, starts].detach().requires_grad_(), k, v, k.detach().clone().requires_grad_(), starts, 4, 0.3)
    torch.library.opcheck(torch.ops.farspan.cca_pool_forward, inputs)
    torch.library.opcheck(torch.ops.farspan.cca_pool_forward, (*inputs[:3], None, *inputs[4:]))
    cores = [torch.randn(1, 10, 4, 6, requires_grad=True) for _ in range(2)]
    inputs = (q, k, v, *cores, [40, 0, 0, 0, 0], 4, 6, 0.5, 0.3, "both")
    torch.library.opcheck(torch.ops.farspan.cca_forward, inputs)


def test_scores_that_underflow_cost_no_precision():
    """Far below the largest: the weights are 0, gradients finite."""
    q, k, v = tensors(60, dtype=torch.float32)
    o = attend(q * 300, k, v, 4, 6, backend="chunked")
    close(o, attend(q * 300, k, v, 4, 6, backend="reference"), 1e-4)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(o.sum(), (q, k, v)))


def test_half_precision_error_is_that_of_the_eager_path():
    q, k, v = tensors(300, head_dim=32)
    exact = attend(q, k, v, 8, 33)
    low = [x.detach().bfloat16() for x in (q, k, v)]
    got, eager = (attend(*low, 8, 33, backend=backend) for backend in ("chunked", "reference"))
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()


# The step, refusals


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_equals_the_operator_whatever_unseen_slots_hold(kv_heads, recorded):
    group, window, slots = 3, 5, 10
    lengths = (1, 7, 8, 22)
    ring = window + group - 1
    q, keys, values = (
        torch.randn(4, 1, 4, 6),
        torch.full((4, kv_heads, ring, 6), 1e4),
        torch.full((4, kv_heads, ring, 6), 1e4),
    )
    q, keys, values = (x.double() for x in (q, keys, values))
    core_keys, core_values = (torch.full((4, 4, slots, 6), 1e4, dtype=torch.float64) for _ in range(2))
    expected = []
    for row, length in enumerate(lengths):
        _, k, v = (x.detach() for x in tensors(length, kv_heads=kv_heads))
        cores = [torch.randn(1, length // group, 4, 6, dtype=torch.float64) for _ in range(2)]
        first = max(0, length - ring)
        place = torch.arange(first, length) % ring
        keys[row, :, place], values[row, :, place] = (x[0, first:].transpose(0, 1) for x in (k, v))
        for cache, new in zip((core_keys, core_values), cores, strict=True):
            cache[row, :, : length // group] = new[0].transpose(0, 1)
        piece = Piece(1, length - 1, length - 1, 0, 0)
        expected.append(core_attention(q[row, None], k, v, *cores, (piece,), group, window, core_bias=0.3))
    if recorded:
        q.requires_grad_()
    got = core_step(q, keys, values, core_keys, core_values, torch.tensor(lengths) - 1, group, window, 0.3)
    close(got, torch.cat(expected))
    if recorded:
        (gradient,) = torch.autograd.grad(got.sum(), q)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"piece": Piece(9, 0, 0, 0, 0)}, "do not make up 10 queries"),
        ({"piece": Piece(10, 4, 0, 0, 0)}, "needs a prefix of 4 keys"),
        ({"piece": Piece(10, 4, 5, 0, 0)}, "is impossible"),
        ({"piece": Piece(10, 0, 0, 1, 0)}, "beyond the 10 rows of keys"),
        ({"piece": Piece(10, 0, 0, 0, 2)}, "beyond the 3 that there are"),
        ({"group": 0}, "group=0"),
        ({"window": 0}, "at least 1"),
        ({"parts": "near"}, "parts='near' is not known to cca; valid: both, cores, raw"),
        ({"cores": 3}, "shapes disagree"),
        ({"backend": "fast"}, "not one of"),
    ],
)
def test_bad_arguments_of_attention_are_refused(change, message):
    q, k, v = tensors(10)
    cores = [torch.randn(1, 3, change.get("cores", 4), 6, dtype=torch.float64) for _ in range(2)]
    options = {name: change[name] for name in ("parts", "backend") if name in change}
    pieces = (change.get("piece", Piece(10, 0, 0, 0, 0)),)
    with pytest.raises(ValueError, match=message):
        core_attention(q, k, v, *cores, pieces, change.get("group", 3), change.get("window", 4), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "sum"}, "pool='sum' is not known to cca; valid: significance, mean, max"),
        ({"core_heads": "all"}, "core_heads='all' is not known"),
        ({"group": 0}, "group=0 must be at least 1"),
        ({"group": 6}, "2 groups of 6 tokens do not fit in 10 rows"),
        ({"q_end": None}, "q_end None for 2 groups"),
        ({"v": 1}, "shapes disagree"),
    ],
)
def test_bad_arguments_of_pooling_are_refused(change, message):
    q, k, v = tensors(10)
    q_end = change.get("q_end", q[:, :2])
    options = {name: change[name] for name in ("pool", "core_heads") if name in change}
    with pytest.raises(ValueError, match=message):
        pool_groups(q_end, k, v[:, : 10 - change.get("v", 0)], torch.tensor([0, 3]), change.get("group", 3), **options)
