"""The fused Titans kernels against the definition, in Triton's interpreter; on a GPU in bf16."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from farspan.kernels.titans import (
    Gates,
    Memory,
    MemoryState,
    fused_linear,
    fused_mlp,
    fused_plan,
    fused_tiles,
    titans_memory,
)
from farspan.kernels.titans.fused import uncovered

# float32 rounding, relative to the norm of each result; some of the inputs' gradients are small differences, and each
# CPU orders sums otherwise
TOLERANCE = 2e-5

RAGGED = (17, 1, 16, 3)


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is read before it is written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small(monkeypatch):
    """Tiles of 16 slots: the interpreter takes as long for few tokens as for many, and few make many tiles."""
    monkeypatch.setattr(fused_tiles, "SLOTS", 16)


@pytest.fixture
def pieces(monkeypatch):
    """Every document a group of its own, every span two tiles long at most."""
    fused_plan.make_plan.cache_clear()
    monkeypatch.setattr(fused_plan, "CARRIED", 1)
    monkeypatch.setattr(fused_plan, "SPAN", 1)
    yield
    fused_plan.make_plan.cache_clear()


def leaf(x):
    return x.detach().requires_grad_()


def make(tokens, hidden=0, norm=False, heads=1, dim=16, dtype=torch.float32, device="cpu"):
    """q, k, v, the gates and the memory, one layer without hidden units."""
    q, k = (normalize(torch.randn(1, tokens, heads, dim), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, heads, dim)
    logits = torch.randn(3, 1, tokens, heads)
    rate = (0.1 if hidden else 0.5) * logits[2].sigmoid()
    widths = [dim, hidden, dim] if hidden else [dim, dim]
    pairs = list(pairwise(widths))
    weights = [torch.randn(heads, a, b) * (1 if i == 0 else a**-0.5) for i, (a, b) in enumerate(pairs)]
    affine = [1 + 0.1 * torch.randn(heads, dim), 0.1 * torch.randn(heads, dim)]
    q, k, v = (leaf(x.to(device, dtype)) for x in (q, k, v))
    gates = Gates(*(leaf(x.to(device)) for x in (logsigmoid(logits[0] + 2), logsigmoid(logits[1]), rate)))
    weights, affine = ([leaf(x.to(device)) for x in side] for side in (weights, affine))
    return q, k, v, gates, Memory(tuple(weights), tuple(affine) if norm else None)


def flat(x):
    if isinstance(x, torch.Tensor):
        return [x] if x.numel() else []
    return [tensor for part in x or () for tensor in flat(part)]


def like(x, tensors):
    """x with its tensors, those that have numbers, taken from an iterator."""
    if isinstance(x, torch.Tensor):
        return next(tensors) if x.numel() else x.double()
    if x is None:
        return None
    parts = [like(part, tensors) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


def run(arguments, lengths, refresh, backend, exact=False, state=None, **options):
    """y, the state, and the gradients of all inputs and of the state, for fixed random gradients of every result."""
    leaves = flat((arguments, state))
    inputs = [x.double() for x in leaves] if exact else leaves
    *arguments, state = like((*arguments, state), iter(inputs))
    y, final = titans_memory(
        *arguments, lengths, refresh, initial_state=state, return_state=True, backend=backend, **options
    )
    results = [x for x in flat((y, final)) if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in results)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*results, *gradients)]


def errors(found, expected):
    assert len(found) == len(expected)
    sizes = []
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and bool(one.isfinite().all())
        one, other = one.detach().double(), other.detach().double()
        sizes.append(float((one - other).norm() / (other.norm() + 1e-9)))
    return sizes


def check(arguments, lengths, refresh, state=None, oracle="reference", **options):
    expected = run(arguments, lengths, refresh, oracle, exact=True, state=state, **options)
    found = run(arguments, lengths, refresh, "fused", state=state, **options)
    assert max(errors(found, expected)) < TOLERANCE, errors(found, expected)


@pytest.mark.parametrize("refresh", [1, 4, 5, 16])
@pytest.mark.parametrize(("read", "decay_to"), [("post", "zero"), ("pre", "init")])
def test_linear_memory_equals_the_definition(small, refresh, read, decay_to):
    check(make(sum(RAGGED), heads=2 if refresh == 4 else 1), RAGGED, refresh, read=read, decay_to=decay_to)


@pytest.mark.parametrize(
    ("slots", "lengths", "refresh"), [(32, (33,), 1), (64, (65,), 1), (64, (70,), 3), (64, (66,), 64)]
)
def test_linear_memory_in_longer_tiles(monkeypatch, slots, lengths, refresh):
    """Blocks beside the diagonal of what is inverted, and tiles that a refresh does not fill."""
    monkeypatch.setattr(fused_tiles, "SLOTS", slots)
    check(make(sum(lengths)), lengths, refresh, oracle="chunked")


@pytest.mark.parametrize(
    ("lengths", "refresh", "norm", "read", "activation"),
    [
        (RAGGED, 4, True, "post", "silu"),
        (RAGGED, 4, False, "pre", "silu"),
        ((3, 1), 1, True, "pre", "silu"),
        ((17, 16, 15), 16, False, "post", "silu"),
        ((17, 3), 16, True, "pre", "gelu"),
        ((21, 3), 20, True, "post", "silu"),
    ],
)
def test_two_layers_equal_the_definition(lengths, refresh, norm, read, activation):
    arguments = make(sum(lengths), 32, norm, heads=2 if refresh > 4 else 1)
    check(arguments, lengths, refresh, read=read, activation=activation)


@pytest.mark.parametrize(("hidden", "norm"), [(0, False), (20, True), (150, False)])
def test_widths_that_are_no_power_of_two(small, hidden, norm):
    check(make(9, hidden, norm, dim=12), (9,), 3)


def state_of(arguments, offsets, refresh):
    """The state of documents that have seen some tokens, as leaves."""
    *_, memory = arguments
    heads, dim = memory.weights[0].shape[:2]
    seen = (*make(sum(offsets), heads=heads, dim=dim)[:4], memory)
    with torch.no_grad():
        _, found = titans_memory(*seen, offsets, refresh, return_state=True, backend="reference")
    return MemoryState(*(tuple(map(leaf, x)) if isinstance(x, tuple) else leaf(x) for x in found))


@pytest.mark.parametrize(("hidden", "norm"), [(0, False), (24, True)])
@pytest.mark.parametrize(("refresh", "offsets"), [(4, (8, 4)), (4, (5, 3)), (1, (2, 3))])
def test_documents_go_on(small, hidden, norm, refresh, offsets):
    lengths = (9, 2) if refresh > 1 else (3, 1)
    arguments = make(sum(lengths), hidden, norm)
    check(arguments, lengths, refresh, state=state_of(arguments, offsets, refresh), offsets=offsets)


@pytest.mark.parametrize(("hidden", "refresh"), [(0, 4), (16, 4)])
def test_spans_and_groups_change_nothing(small, pieces, hidden, refresh):
    lengths = (33, 1, 20) if not hidden else (9, 1, 6)
    arguments = make(sum(lengths), hidden)
    check(arguments, lengths, refresh, oracle="chunked")
    plan = (fused_mlp if hidden else fused_linear).plan_of
    sizes = [torch.zeros(1, 1, 4, 2)] * 2 if hidden else torch.zeros(1, 1, 4, 2)
    groups = plan(sizes, [0, lengths[0], lengths[0] + 1], list(lengths), refresh)
    assert [group.documents for group in groups] == [(0,), (2,), (1,)]
    assert len(groups[0].spans) > 1 and groups[0].boundaries == len(groups[0].spans) - 1


@pytest.mark.parametrize("hidden", [0, 16])
def test_slices_of_one_projection(small, hidden):
    """q, k and v may be views into one tensor; their gradients arrive there."""
    q, k, v, gates, memory = make(6, hidden, heads=2)
    joined = torch.cat([x.flatten(2) for x in (v, q, k)], dim=-1).detach().requires_grad_()

    def result(backend):
        v, q, k = (x.unflatten(-1, (2, 16)) for x in joined.chunk(3, dim=-1))
        y, _ = titans_memory(q, k, v, gates, memory, (6,), 4, backend=backend)
        return y, *torch.autograd.grad(y.square().sum(), joined)

    assert max(errors(result("fused"), result("reference"))) < TOLERANCE


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_state_alone_has_gradients(small, hidden):
    *inputs, memory = make(9, hidden)
    found = {}
    for backend in ("reference", "fused"):
        _, state = titans_memory(*inputs, memory, (9,), 4, return_state=True, backend=backend)
        found[backend] = torch.autograd.grad(state.momentum[0].square().sum(), [inputs[1], inputs[2], *memory.weights])
    assert max(errors(found["fused"], found["reference"])) < TOLERANCE


def check_half(arguments, lengths, refresh, limits):
    """Relative errors of y, of q, k, v and of the gates, against the same inputs computed in fp32."""
    q, k, v, gates, memory = arguments
    wide = (*(leaf(x.float()) for x in (q, k, v)), gates, memory)
    (y, *expected), (own, *found) = (
        _y_and_gradients(inputs, lengths, refresh, backend)
        for inputs, backend in ((wide, "chunked"), (arguments, "fused"))
    )
    assert own.dtype == q.dtype
    out, grad, gate = limits
    assert errors([own], [y])[0] < out
    assert max(errors(found[:3], expected[:3])) < grad
    assert max(errors(found[3:], expected[3:])) < gate


def _y_and_gradients(arguments, lengths, refresh, backend):
    y, _ = titans_memory(*arguments, lengths, refresh, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = (y.float() * torch.randn(y.shape, generator=generator).to(y.device)).sum()
    return y.detach(), *torch.autograd.grad(loss, flat(arguments)[:6])


@pytest.mark.parametrize(("hidden", "norm"), [(0, False), (32, True)])
def test_half_precision(small, hidden, norm):
    """fp16, because the interpreter does not multiply bf16; operands are rounded to it, states are not."""
    check_half(make(21, hidden, norm, dtype=torch.float16), (20, 1), 4, (1e-3, 3e-3, 3e-3))


@pytest.mark.parametrize("hidden", [0, 16])
def test_operators_have_fake_kernels(small, hidden):
    """Shapes and dtypes without running, as torch.compile needs them, agree with what comes."""
    q, k, v, gates, memory = make(10, hidden)
    states = [torch.cat([w, torch.zeros_like(w)], 1)[None] for w in memory.weights]
    constants = ([0, 4], [4, 6], 4, None)
    if hidden:
        operator, arguments = fused_mlp._mlp_forward, (*states, [], *constants, "silu", True)
    else:
        operator, arguments = fused_linear._linear_forward, (*states, *constants, True)
    torch.library.opcheck(operator, (q, k, v, *gates, *arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 144}, "head_dim=144"),
        ({"refresh": 65}, "refresh=65"),
        ({"hidden": 16, "refresh": 33}, "refresh=33"),
        ({"hidden": 16, "dim": 65}, "head_dim=65"),
        ({"depth": 3}, "3 layers"),
        ({"norm": True}, "norm on a memory of one layer"),
        ({"hidden": 16, "decay_to": "init"}, "decay_to='init'"),
    ],
)
def test_what_is_not_covered_is_refused(change, words):
    """And `auto` asks the same function."""
    change = dict(change)
    options = {name: change.pop(name, default) for name, default in (("refresh", 4), ("decay_to", "zero"))}
    depth = change.pop("depth", 1)
    q, k, v, gates, memory = make(3, **change)
    memory = Memory(memory.weights * depth, memory.norm)
    with pytest.raises(ValueError, match=f"does not cover.*{words}.*auto"):
        titans_memory(q, k, v, gates, memory, (3,), options["refresh"], decay_to=options["decay_to"], backend="fused")
    assert words in uncovered(v, memory, **options)
    assert uncovered(*(x for x in make(3, 16, True)[2::2]), 32, "zero") is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "norm", "refresh"), [(0, False, 1), (0, False, 64), (256, True, 16), (64, False, 32)]
)
def test_on_a_gpu(hidden, norm, refresh):
    arguments = make(3000, hidden, norm, heads=4, dim=64, dtype=torch.bfloat16, device="cuda")
    check_half(arguments, (2100, 1, 899), refresh, (5e-3, 1e-2, 2e-2))
