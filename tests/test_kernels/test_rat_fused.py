"""The fused RAT kernels against the definition, in Triton's interpreter; on a GPU in bf16 against the chunked form."""

import pytest
import torch

from farspan.kernels.launch import Tile
from farspan.kernels.rat import RatState, fused, fused_plan, fused_tiles
from farspan.kernels.rat.chunked import rat_chunked
from farspan.kernels.rat.fused import rat_fused
from farspan.kernels.rat.fused_plan import Plan, make_plan
from farspan.kernels.rat.reference import rat_reference
from farspan.kernels.rat.step import rat_step

RESULTS = ("y", "keys", "values", "key", "value")
INPUTS = ("q", "k", "v", "gate", "bias", "z", "key", "value", "keys", "values")
NAMES = (*RESULTS, *(f"gradient of {name}" for name in INPUTS))

# float32 rounding of values of order 1 to 10, summed over up to 100 tokens
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is read before it is written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(lengths, offsets, chunk, heads, groups, dim, rope, dtype=torch.float32, device="cpu"):
    """Inputs in the order of rat_fused up to z, the rotation, and the states."""
    tokens, documents = sum(lengths), len(lengths)
    known = sum(offset // chunk for offset in offsets)
    shapes = [(1, tokens, groups, dim)] * 2 + [(1, tokens, heads, dim)] * 2 + [(heads, dim), (1, tokens, heads, dim)]
    data = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    states = [torch.randn(documents, heads, dim, device=device).requires_grad_() for _ in range(2)]
    states += [torch.randn(known, heads, dim).to(device, dtype).requires_grad_() for _ in range(2)]
    return data, table(max(map(sum, zip(lengths, offsets, strict=True))) // chunk + 1, dim, device, rope), states


def table(chunks, dim, device="cpu", rope=True):
    angles = torch.arange(chunks)[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    return (angles.cos().to(device), angles.sin().to(device)) if rope else None


def run(function, inputs, lengths, offsets, chunk):
    """Every result and every gradient, for fixed random gradients of every result."""
    data, rope, states = inputs
    scale = data[2].shape[-1] ** -0.5
    y, summaries, final = function(*data, rope, tuple(states[:2]), tuple(states[2:]), lengths, offsets, chunk, scale)
    results = [y, *summaries, *final]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in results)
    gradients = torch.autograd.grad(loss, [*data, *states], allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*results, *gradients)]


def check(inputs, lengths, offsets, chunk):
    expected = run(rat_reference, inputs, lengths, offsets, chunk)
    found = run(rat_fused, inputs, lengths, offsets, chunk)
    for name, one, other in zip(NAMES, expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


RAGGED = ((21, 1, 38, 1), (0, 0, 5, 9))


@pytest.mark.parametrize(
    ("lengths", "offsets", "chunk", "heads", "groups", "dim", "rope"),
    [
        ((5, 1, 14), (0, 2, 0), 1, 4, 2, 16, True),
        (*RAGGED, 2, 2, 1, 16, False),
        (*RAGGED, 3, 6, 2, 24, True),
        (*RAGGED, 8, 4, 4, 16, True),
        ((50, 1), (0, 0), 16, 2, 1, 64, True),
        (*RAGGED, 40, 3, 1, 16, True),
        ((1,), (0,), 4, 2, 2, 16, True),
        ((8,), (0,), 8, 2, 1, 16, True),
        ((3,), (13,), 8, 4, 2, 24, False),
    ],
)
def test_equals_the_definition(lengths, offsets, chunk, heads, groups, dim, rope):
    check(make(lengths, offsets, chunk, heads, groups, dim, rope), lengths, offsets, chunk)


@pytest.mark.parametrize("chunk", [17, 40, 90])
def test_long_chunks_go_in_pieces(chunk, monkeypatch):
    monkeypatch.setattr(fused_plan, "PIECE", 16)
    lengths, offsets = (90, 1, 30), (0, 5, 23)
    check(make(lengths, offsets, chunk, 2, 1, 16, True), lengths, offsets, chunk)


def test_small_tiles_and_split_sums(monkeypatch):
    """Many blocks per document, queries split among programs, heads of a group in several parts."""
    monkeypatch.setitem(fused_tiles.TILES, (80, 64), (Tile(32, 32, 4, 1),) * 3)  # halved for float32
    monkeypatch.setattr(fused, "BACKWARD", fused_tiles.Lockstep(16, 4, 1))
    lengths, offsets = (290, 20), (0, 3)
    inputs = make(lengths, offsets, 8, 2, 1, 16, True)
    assert make_plan(lengths, offsets, 8, fused_plan.PIECE, torch.device("cpu")).key_table(16, 16, 2)[1] == 2
    check(inputs, lengths, offsets, 8)


def test_slices_of_one_projection():
    """q, k, v, gate and z may be views into one tensor; their gradients arrive there."""
    lengths, offsets, heads, groups, dim = (9, 4), (0, 0), 2, 1, 16
    inputs = make(lengths, offsets, 4, heads, groups, dim, True)
    q, k, v, gate, bias, z = (x.detach() for x in inputs[0])
    joined = torch.cat([x.flatten(2) for x in (z, v, gate, q, k)], dim=-1).requires_grad_()

    def result(function):
        parts = joined.split([x.flatten(2).shape[-1] for x in (z, v, gate, q, k)], dim=-1)
        z_, v_, gate_, q_, k_ = (x.unflatten(-1, (-1, dim)) for x in parts)
        data = (q_, k_, v_, gate_, bias, z_)
        states = inputs[2]
        y, *_ = function(*data, inputs[1], tuple(states[:2]), tuple(states[2:]), lengths, offsets, 4, 0.25)
        return y, *torch.autograd.grad(y.square().sum(), joined)

    for one, other in zip(result(rat_reference), result(rat_fused), strict=True):
        torch.testing.assert_close(other, one, rtol=TOLERANCE, atol=TOLERANCE)


def check_half(inputs, lengths, offsets, chunk):
    """Errors in half precision are at most twice those of the chunked form, both against it in fp32."""
    exact = [[x.detach().float().requires_grad_() for x in part] for part in (inputs[0], inputs[2])]
    truth = run(rat_chunked, (exact[0], inputs[1], exact[1]), lengths, offsets, chunk)
    eager = run(rat_chunked, inputs, lengths, offsets, chunk)
    found = run(rat_fused, inputs, lengths, offsets, chunk)
    for name, right, one, other in zip(NAMES, truth, eager, found, strict=True):
        size = right.norm() + 1e-6
        allowed = 2 * (one.float() - right).norm() / size + 1e-5
        assert (other.float() - right).norm() / size <= allowed, name


def test_half_precision():
    """fp16, because the interpreter does not multiply bf16."""
    lengths, offsets = (120, 3), (5, 0)
    check_half(make(lengths, offsets, 4, 4, 2, 16, True, torch.float16), lengths, offsets, 4)


def test_states_alone_have_gradients():
    """No gradient comes in for the output, nor for half of the states."""
    lengths, offsets = (9, 4), (0, 3)
    data, rope, states = make(lengths, offsets, 4, 2, 1, 16, True)

    def result(function):
        _, (keys, _), (_, value) = function(
            *data, rope, tuple(states[:2]), tuple(states[2:]), lengths, offsets, 4, 0.25
        )
        loss = keys.square().sum() + value.square().sum()
        return torch.autograd.grad(loss, [*data[1:4], states[0]])

    for one, other in zip(result(rat_reference), result(rat_fused), strict=True):
        torch.testing.assert_close(other, one, rtol=TOLERANCE, atol=TOLERANCE)


def test_same_bits_again():
    lengths, offsets = (21, 38), (0, 5)
    inputs = make(lengths, offsets, 8, 4, 2, 16, True)
    for one, other in zip(*(run(rat_fused, inputs, lengths, offsets, 8) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_registered_as_an_operator():
    """The fake tensors and the autograd formula agree with the kernels."""
    data, rope, states = make((9, 4), (3, 0), 4, 2, 1, 16, True)
    arguments = (*data, *rope, *states, [9, 4], [3, 0], 4, 0.25)
    torch.library.opcheck(
        torch.ops.farspan.rat_fused_forward.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(("chunk", "heads"), [(1, 2), (3, 1), (16, 1)])
def test_every_query_meets_every_visible_summary_once(chunk, heads):
    lengths, offsets = (700, 1, 90, 33), (0, 7, 50, 32)
    plan = Plan(lengths, offsets, chunk, 256, torch.device("cpu"))
    entries, splits = plan.key_table(16, 16, heads)
    assert splits > 1
    met = torch.zeros(plan.summaries, sum(lengths), dtype=torch.int64)
    written = torch.zeros(splits, plan.summaries, dtype=torch.int64)
    for key, count, index, begin, position, end, full, split in entries.T.tolist():
        written[split, key : key + count] += 1
        seen = (position + torch.arange(end - begin)) // chunk
        visible = index + torch.arange(count)[:, None] < seen
        met[key : key + count, begin:end] += visible
        assert visible[:, max(0, full - begin) :].all()
    assert (written == 1).all()
    start = first = 0
    for length, offset in zip(lengths, offsets, strict=True):
        total = (offset + length) // chunk
        seen = (offset + torch.arange(length)) // chunk
        expected = torch.zeros(plan.summaries, length, dtype=torch.int64)
        expected[first : first + total] = torch.arange(total)[:, None] < seen
        assert torch.equal(met[:, start : start + length], expected)
        start, first = start + length, first + total


@pytest.mark.parametrize("dim", [15, 258])
def test_refuses_other_head_dims(dim):
    inputs = make((3,), (0,), 4, 1, 1, dim, False)
    with pytest.raises(ValueError, match="even head dims up to 256"):
        run(rat_fused, inputs, (3,), (0,), 4)


def step_by_step(backend, dtype, chunk, heads, groups, dim, rope, waits, tokens, spare=0):
    """Every row from position 0, row b alone for the first waits[b] tokens; outputs and states, found and expected."""
    batch, turn = len(waits), table(tokens, dim, rope=rope)
    q, k = (torch.randn(batch, tokens, groups, dim, dtype=dtype) for _ in range(2))
    v, gate, z = (torch.randn(batch, tokens, heads, dim, dtype=dtype) for _ in range(3))
    bias = torch.randn(heads, dim, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    nothing = torch.zeros(1, heads, dim, dtype=wide)
    none = torch.zeros(0, heads, dim, dtype=dtype)
    expected = [
        rat_reference(
            *(x[row, None] for x in (q, k, v, gate)), bias, z[row, None], turn, (nothing, nothing), (none, none),
            (tokens,), (0,), chunk, dim**-0.5,
        )
        for row in range(batch)
    ]  # fmt: skip
    capacity = -(-tokens // chunk) + spare
    state = RatState(
        *(torch.full((batch, heads, dim), torch.nan, dtype=wide) for _ in range(2)),
        *(torch.full((batch, heads, capacity, dim), 7.0, dtype=dtype) for _ in range(2)),
    )
    positions = torch.zeros(batch, dtype=torch.int64)
    found = torch.full_like(v, torch.nan)

    def move(rows):
        own = RatState(*(x[rows].clone() for x in state))
        at = positions[rows]
        inputs = (x[rows, at][:, None] for x in (q, k, v, gate))
        y, after = rat_step(*inputs, bias, z[rows, at][:, None], at, chunk, own, turn, backend=backend)
        for x, new in zip(state, after, strict=True):
            x[rows] = new
        found[rows, at] = y[:, 0]
        positions[rows] += 1

    for row, wait in enumerate(waits):
        for _ in range(wait):
            move(torch.tensor([row]))
    while (positions < tokens).any():
        move((positions < tokens).nonzero()[:, 0])
    chunks = tokens // chunk
    return (
        (found, state.keys[:, :, :chunks].transpose(1, 2), state.values[:, :, :chunks].transpose(1, 2), state.key),
        (
            torch.cat([one[0] for one in expected]),
            *(torch.stack([one[1][side] for one in expected]) for side in range(2)),
            torch.cat([one[2][0] for one in expected]),
        ),
    )


@pytest.mark.parametrize(
    ("chunk", "heads", "groups", "rope"), [(1, 2, 1, True), (4, 4, 2, True), (5, 4, 4, False), (40, 2, 1, True)]
)
def test_steps_equal_the_definition_in_float64(chunk, heads, groups, rope):
    pairs = step_by_step("chunked", torch.float64, chunk, heads, groups, 8, rope, (0, 3, 9), 23)
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("chunk", "groups", "rope", "dim", "waits", "tokens", "spare"),
    [(3, 2, True, 24, (0, 9), 14, 0), (1, 1, False, 16, (0,), 36, 300)],
)
def test_fused_steps_equal_the_definition(chunk, groups, rope, dim, waits, tokens, spare):
    """spare: so many slots that the summaries of a row are split among programs."""
    pairs = step_by_step("fused", torch.float32, chunk, 2, groups, dim, rope, waits, tokens, spare)
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_step_records_gradients():
    q, k, v, gate, z = (torch.randn(2, 1, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(5))
    bias = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keys, values = (torch.randn(2, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positions = torch.tensor([5, 8])

    def step(*x):
        y, after = rat_step(*x[:6], positions, 3, RatState(*x[6:]), table(4, 8))
        return y, *after

    inputs = (q, k, v, gate, bias, z, key, value, keys, values)
    assert torch.autograd.gradcheck(step, inputs)
    with torch.no_grad():
        detached = step(*(x.clone() for x in inputs))
    for one, other in zip(step(*inputs), detached, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture
def compiled_kernels():
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 is set; run with TRITON_INTERPRET=0")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("lengths", "offsets", "chunk"),
    [
        ((1,), (0,), 16),
        ((4099, 1, 900, 16, 17), (0, 0, 37, 16, 0), 16),
        ((70_001, 3), (0, 0), 16),
        ((3001, 500), (0, 3), 1),
        ((3001, 500), (0, 3), 40),
        ((9001, 500), (0, 3), 9001),
    ],
)
def test_bf16_errs_at_most_twice_as_much_as_chunked(lengths, offsets, chunk, dim, compiled_kernels):
    inputs = make(lengths, offsets, chunk, 4, 2, dim, True, torch.bfloat16, "cuda")
    check_half(inputs, lengths, offsets, chunk)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(compiled_kernels):
    """The last document of a row of 2^31 elements has the results and gradients of the document alone."""
    last, heads, dim, chunk = 5000, 16, 128, 64
    lengths = (2**31 // (heads * dim), last)
    bias = torch.randn(heads, dim, device="cuda")
    rope = table(lengths[0] // chunk + 1, dim, "cuda")
    groups = (2, 2, heads, heads, heads)
    inputs = [torch.randn(1, sum(lengths), n, dim, device="cuda", dtype=torch.bfloat16) for n in groups]

    def results(inputs, lengths):
        q, k, v, gate, z = inputs = [x.requires_grad_() for x in inputs]
        running = (torch.zeros(len(lengths), heads, dim, device="cuda"),) * 2
        before, offsets = (v.new_zeros(0, heads, dim),) * 2, (0,) * len(lengths)
        y, *_ = rat_fused(q, k, v, gate, bias, z, rope, running, before, lengths, offsets, chunk, dim**-0.5)
        return [x[:, -last:] for x in (y.detach(), *torch.autograd.grad(y[:, -last:].sum(), inputs))]

    alone = results([x[:, -last:].clone() for x in inputs], (last,))
    for one, other in zip(alone, results(inputs, lengths), strict=True):
        torch.testing.assert_close(other, one)  # up to the order in which parts are summed
