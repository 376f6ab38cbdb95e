"""RAT: golden values and oracles on the definition, then the chunked form against it, every gradient."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from farspan.kernels.rat import RatState, rat
from farspan.kernels.rat import grid as rat_grid
from farspan.kernels.rat.chunked import _rat_forward

RAGGED = (1, 2, 37, 16, 17, 1)
OFFSETS = (0, 5, 20, 1, 16, 0)
CHUNKS = (1, 2, 3, 8, 16, 70)


def tables(chunks, head_dim, dtype=torch.float64):
    angles = torch.arange(chunks)[:, None] * 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inputs(time, heads=4, groups=2, head_dim=6, dtype=torch.float64):
    """q, k, v, gate, gate_bias, z."""
    shapes = [(1, time, groups, head_dim)] * 2 + [(1, time, heads, head_dim)] * 2
    shapes += [(heads, head_dim), (1, time, heads, head_dim)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def state(offsets, chunk, heads=4, head_dim=6, dtype=torch.float64):
    known = sum(offset // chunk for offset in offsets)
    sizes = (len(offsets), len(offsets), known, known)
    return RatState(*(torch.randn(size, heads, head_dim, dtype=dtype, requires_grad=True) for size in sizes))


def run(arguments, lengths, chunk, backend, rope=True, **options):
    """y and what exists of the final state."""
    rope = tables(90, arguments[2].shape[-1], arguments[2].dtype) if rope else None
    y, final = rat(*arguments, lengths, chunk, rope=rope, backend=backend, **options)
    return [y, *(part for part in final if part.numel())]


def with_gradients(outputs, leaves):
    weights = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=weights, dtype=x.dtype) for x in outputs]
    return outputs + list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True, allow_unused=True))


backends = pytest.mark.parametrize("backend", ["reference", "chunked"])


# The specification's golden vector: H = 1, d = 2, L = 2, T = 5, z = 1


@backends
def test_golden_vector(backend):
    t = torch.arange(5, dtype=torch.float64)
    q, k = torch.stack([(t + 1).sin(), (t + 1).cos()], -1), torch.stack([(2 * t).cos(), (3 * t).sin()], -1)
    v, gate = torch.stack([t + 1, (-1.0) ** t * t], -1), torch.stack([(t - 2) / 2, (1 - t) / 3], -1)
    leaves = [x[None, :, None].requires_grad_() for x in (q, k, v, gate)]
    bias, z = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 5, 1, 2), 1e3, dtype=torch.float64)
    rope = [
        (0.73105858, 0.0),
        (1.52092301, -0.5),
        (1.50998484, 0.37050483),
        (1.95065157, -1.00612371),
        (1.74022833, 0.35875166),
    ]
    none = [*rope[:2], (1.50978747, 0.38621264), (1.94927241, -1.00449937), (1.76254425, 0.27207721)]
    for positions, expected in ((True, rope), (False, none)):
        y = run([*leaves, bias, z], (5,), 2, backend, rope=positions)[0]
        torch.testing.assert_close(y[0, :, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)
    y = run([*leaves, bias, z], (5,), 2, backend)[0]
    dq, dk, dv, dgate = (x[0, :, 0] for x in torch.autograd.grad(y.sum(), leaves))
    expected = {
        "dgate": (
            dgate,
            [
                (-0.34976266, 0.0),
                (-0.78401394, 0.57756685),
                (-0.72188020, -0.39628752),
                (-0.51981852, 0.69355867),
                (-0.35599901, -0.25716020),
            ],
        ),
        "dq": (
            dq,
            [(0, 0), (0, 0), (-0.11467791, -0.05413117), (-0.00261327, -0.00557843), (-0.10773852, -0.19268449)],
        ),
        "dk": (
            dk,
            [
                (-0.08202771, 0.07417032),
                (-0.18499316, 0.17768335),
                (0.09014087, -0.12907385),
                (0.08451947, 0.12775940),
                (-0.13741683, 0.11049726),
            ],
        ),
        "dv": (
            dv,
            [
                (1.38254386, 0.91008393),
                (1.46926344, 1.18020838),
                (0.50089347, 0.45664303),
                (0.29053140, 0.50847628),
                (0.09339391, 0.25387098),
            ],
        ),
    }
    for name, (got, want) in expected.items():
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-8, msg=name)


# Special cases


@backends
def test_chunk_of_one_is_softmax_attention_on_gated_keys(backend):
    q, k, v, gate, bias, z = arguments = inputs(20)
    y = run(arguments, (20,), 1, backend)[0]
    cos, sin = tables(20, 6)

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        c, s = cos[None, :, None], sin[None, :, None]
        return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

    keep = torch.sigmoid(-(gate + bias))
    queries, keys, values = turn(q.repeat(1, 1, 2, 1)), turn(k.repeat(1, 1, 2, 1) * keep), v * keep
    heads = [x.transpose(1, 2) for x in (queries, keys, values)]
    expected = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2) * torch.sigmoid(z)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@backends
@pytest.mark.parametrize("chunk", [20, 33])
def test_one_chunk_is_a_gated_recurrence(backend, chunk):
    q, _, v, gate, bias, z = arguments = inputs(20)
    y = run(arguments, (20,), chunk, backend)[0]
    running, expected = torch.zeros_like(v[:, 0]), []
    for t in range(20):
        g = torch.sigmoid(gate[:, t] + bias)
        running = g * running + (1 - g) * v[:, t]
        expected.append(running)
    torch.testing.assert_close(y, torch.stack(expected, 1) * torch.sigmoid(z), rtol=0, atol=1e-13)
    assert torch.autograd.grad(y.sum(), q, materialize_grads=True, allow_unused=True)[0].abs().max() <= 1e-15


@backends
def test_closed_gates_give_strided_attention(backend):
    q, k, v, gate, bias, z = inputs(16, groups=4)
    gate = torch.full_like(gate, -1e3)
    y = run([q, k, v, gate, bias, z], (16,), 4, backend, rope=False)[0]
    visible = torch.tensor([[j == i or (j % 4 == 3 and j // 4 < i // 4) for j in range(16)] for i in range(16)])
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*heads, attn_mask=visible).transpose(1, 2) * torch.sigmoid(z)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@backends
def test_outputs_stay_in_the_hull_of_the_values(backend):
    q, k, v, gate, bias, _ = inputs(40)
    open_output = torch.full_like(v, 1e3)
    y = run([q, k, v, gate, bias, open_output], (40,), 8, backend)[0]
    assert (y.abs() <= v.abs().cummax(dim=1).values + 1e-12).all()


@backends
def test_a_rotation_of_all_chunks_changes_nothing(backend):
    arguments = inputs(30)
    cos, sin = tables(60, 6)
    here, _ = rat(*arguments, (30,), 4, rope=(cos, sin), backend=backend)
    there, _ = rat(*arguments, (30,), 4, rope=(cos[17:], sin[17:]), backend=backend)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-13)


@backends
def test_order_of_finished_chunks_does_not_matter_without_rope(backend):
    arguments, chunk = inputs(3), 4
    before = state((12,), chunk)
    shuffled = before._replace(keys=before.keys[[2, 0, 1]], values=before.values[[2, 0, 1]])
    results = [
        run(arguments, (3,), chunk, backend, rope=False, offsets=(12,), initial_state=s)[0] for s in (before, shuffled)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-14)


@backends
@pytest.mark.parametrize("which", [0, 1])
def test_groups_reach_their_own_heads(backend, which):
    arguments = [x.detach() for x in inputs(20, heads=6, groups=3)]
    before = run(arguments, (20,), 4, backend)[0]
    arguments[which] = arguments[which].clone()
    arguments[which][:, :, 1] += 1
    changed = (run(arguments, (20,), 4, backend)[0] - before).abs().amax((0, 1, 3)) > 0
    assert changed.tolist() == [False, True, False, False, True, False]


@backends
def test_chunks_speak_through_their_summaries_alone(backend):
    """A change inside chunk 0 that leaves its last running state as it was does not reach later chunks."""
    q, k, v, gate, bias, z = (x.detach().clone() for x in inputs(12))
    gate[:, 3] = -1e3  # the last token of chunk 0 overwrites the state
    before = run([q, k, v, gate, bias, z], (12,), 4, backend)[0]
    v[:, :3] += 1
    k[:, :3] += 1
    after = run([q, k, v, gate, bias, z], (12,), 4, backend)[0]
    assert torch.equal(before[:, 4:], after[:, 4:]) and not torch.equal(before[:, :3], after[:, :3])


# The chunked form against the definition


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("offsets", [None, OFFSETS], ids=["fresh", "continued"])
def test_chunked_equals_reference(chunk, groups, rope, offsets):
    arguments = inputs(sum(RAGGED), groups=groups)
    before = None if offsets is None else state(offsets, chunk)
    leaves = [*arguments, *(before or ())]
    results = [
        with_gradients(run(arguments, RAGGED, chunk, backend, rope, offsets=offsets, initial_state=before), leaves)
        for backend in ("reference", "chunked")
    ]
    for expected, got in zip(*results, strict=True):
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("size", [1, 24, 1000])
def test_block_size_changes_nothing(monkeypatch, size):
    arguments = inputs(sum(RAGGED))
    expected = with_gradients(run(arguments, RAGGED, 8, "chunked"), arguments)
    monkeypatch.setattr(rat_grid, "TOKENS_AT_ONCE", size)
    monkeypatch.setattr("farspan.kernels.rat.chunked.MASKED_CHUNKS", max(1, size // 24))
    for got, want in zip(with_gradients(run(arguments, RAGGED, 8, "chunked"), arguments), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradcheck():
    arguments = inputs(7, heads=2, groups=1, head_dim=2)
    before = state((3, 0), 2, heads=2, head_dim=2)

    def function(*leaves):
        outputs = run(leaves[:6], (5, 2), 2, "chunked", offsets=(3, 0), initial_state=RatState(*leaves[6:]))
        return tuple(outputs)

    assert torch.autograd.gradcheck(function, (*arguments, *before))


@pytest.mark.parametrize(("gate", "score"), [(30.0, 1.0), (-30.0, 1.0), (0.0, 100.0)])
def test_extremes_stay_finite_and_right(gate, score):
    arguments = inputs(33)
    with torch.no_grad():
        arguments[3] += gate
        arguments[0] *= score
    results = [with_gradients(run(arguments, (33,), 8, backend), arguments) for backend in ("reference", "chunked")]
    for expected, got in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.detach().abs().max())))


def test_closing_gates_lose_no_precision():
    """1 - g as sigmoid(-a): in fp32 the difference would be off by 7e-4 at a = 11."""
    q, k, v, gate, bias, z = inputs(64)
    arguments = [q, k, v, torch.full_like(gate, 11.0), bias * 0, z]
    exact = run(arguments, (64,), 64, "reference")[0]
    single = run([x.float() for x in arguments], (64,), 64, "chunked")[0]
    assert (single.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_half_precision_error_is_that_of_the_eager_path():
    arguments = [x.detach() for x in inputs(200, head_dim=32)]
    exact = run(arguments, (150, 50), 16, "reference")[0]
    low = [x.bfloat16() for x in arguments]
    got, eager = (run(low, (150, 50), 16, backend)[0] for backend in ("chunked", "reference"))
    assert (got - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_backward_is_deterministic():
    arguments = inputs(50)
    results = [with_gradients(run(arguments, (50,), 8, "chunked"), arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_registration():
    arguments = inputs(20, dtype=torch.float32)
    running, nothing = torch.zeros(2, 4, 6), torch.zeros(0, 4, 6)
    call = (*arguments, *tables(9, 6, torch.float32), running, running, nothing, nothing, [13, 7], [0, 0], 4, 0.3)
    torch.library.opcheck(_rat_forward, call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (3, 4)}, "sum to 7, the row has 8"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"groups": 3}, "4 heads cannot share 3 groups"),
        ({"rope": tables(1, 6)}, "must be .2 or more chunks"),
        ({"rope": tables(9, 4)}, "rope tables"),
        ({"offsets": (5,)}, "need an initial state"),
        ({"offsets": (5,), "initial_state": state((9,), 4)}, "summaries"),
        ({"gate": 3}, "gate, gate_bias and z"),
        ({"backend": "fast"}, "not one of"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    change = dict(change)
    arguments = inputs(8, groups=change.pop("groups", 2))
    if change.pop("gate", None):
        arguments[3] = arguments[3][:, :3]
    lengths, chunk = change.pop("lengths", (8,)), change.pop("chunk", 4)
    with pytest.raises(ValueError, match=message):
        rat(*arguments, lengths, chunk, **change)
