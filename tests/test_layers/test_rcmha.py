"""RCMHA as a layer: options, convolutions, reductions to other layers, tables on shards and in states, windows."""

import itertools

import pytest
import torch

from farspan.layers import Sequence, build
from farspan.layers.rcmha_convolution import HeadConvolution
from farspan.parallel import ContextParallel
from farspan.parallel.comm import all_gather

WIDTH, HEADS = 16, 4
FORMS = [
    {},
    {"relative": "table", "distances": 64},
    {"relative": "table", "distances": 7, "clamp": True},
    {"relative": "table", "distances": 9, "window": 9, "kernel": 4},
    {"window": 6, "conv_shared_heads": True, "sinusoids": 6},
    {"kernel": 1},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def make(dtype=torch.float64, **options):
    """Every parameter at random: at their start the relative terms say nothing."""
    torch.manual_seed(1)
    mixer = build("rcmha", width=WIDTH, heads=HEADS, **{"kv_heads": 2, **options}).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(std=0.5)
    return mixer


def gradients(output, mixer, *inputs):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return list(torch.autograd.grad(output, [*inputs, *mixer.parameters()], weight))


def assert_same(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        a, b = a.detach(), b.detach()
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def dense(mixer, x):
    """The definition on one document x [T, width]: explicit taps, every pair."""
    options, linears = mixer.options, mixer.projections
    taps = mixer.convolution.taps()
    projected = torch.cat([linears.query(x), linears.key(x), linears.value(x)], -1)
    convolved = torch.zeros_like(projected)
    for t in range(len(x)):
        for i in range(min(t + 1, options.kernel)):
            convolved[t] += taps[options.kernel - 1 - i] * projected[t - i]
    heads = convolved.unflatten(-1, (-1, options.head_dim))
    q, k, v = heads.split((HEADS, options.kv_heads, options.kv_heads), 1)
    u, positions = mixer.biases()
    table = positions if hasattr(positions, "r") else positions.table(len(x))
    out = torch.zeros_like(q)
    for h, i in itertools.product(range(HEADS), range(len(x))):
        first = 0 if options.window is None else max(0, i - options.window + 1)
        group, rows = h * options.kv_heads // HEADS, range(first, i + 1)
        scores = torch.stack(
            [
                (q[i, h] + u[h]) @ k[j, group] + q[i, h] @ table.r[h, d] + table.beta[h, d]
                for j in rows
                for d in (min(i - j, table.r.shape[1] - 1),)
            ]
        )
        out[i, h] = (scores * options.head_dim**-0.5).softmax(0) @ v[first : i + 1, group]
    return linears.output(out.flatten(1))


@forms
@pytest.mark.parametrize("length", [1, 2, 13])
def test_layer_is_the_definition(form, length):
    mixer = make(**form)
    x = torch.randn(1, length, WIDTH, dtype=torch.float64).requires_grad_()
    output, expected = mixer(x).output, dense(mixer, x[0])[None]
    assert_same([output, *gradients(output, mixer, x)], [expected, *gradients(expected, mixer, x)])


@forms
@pytest.mark.parametrize("backend", ["chunked", "fused"])
def test_backends_agree(form, backend):
    dtype, tolerance = (torch.float64, 1e-12) if backend == "chunked" else (torch.float32, 1e-5)
    mixer, reference = make(dtype, backend=backend, **form), make(dtype, backend="reference", **form)
    sequence = Sequence.packed((1, 2, 9, 17, 30))
    x = torch.randn(1, sequence.tokens, WIDTH, dtype=dtype).requires_grad_()
    output, expected = mixer(x, sequence).output, reference(x, sequence).output
    got = [output, *gradients(output, mixer, x)]
    assert_same(got, [expected, *gradients(expected, reference, x)], tolerance)


# Reductions, by copying weights


def test_identity_kernels_leave_relative_attention():
    mixer, plain = make(conv_init="identity"), make(kernel=1)
    plain.load_state_dict({**mixer.state_dict(), "convolution.weight": torch.ones(plain.convolution.weight.shape)})
    mixer.convolution.reset_parameters()
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    assert_same([mixer(x).output], [plain(x).output])


@pytest.mark.parametrize("relative", ["sinusoid", "table"])
def test_with_one_tap_of_one_and_no_relative_terms_it_is_softmax_attention(relative):
    mixer = make(kernel=1, relative=relative, distances=20)
    softmax = build("softmax", width=WIDTH, heads=HEADS, kv_heads=2, rope=None).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if not name.startswith("projections"):
                parameter.zero_()
        mixer.convolution.weight.fill_(1)
    softmax.projections.load_state_dict(mixer.projections.state_dict())
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    assert_same([mixer(x).output], [softmax(x).output])


def test_a_head_and_a_channel_are_convolved_by_themselves():
    convolution = HeadConvolution((2, 1, 1), 3, 3, False, "uniform").double()
    for channel in range(12):
        x = torch.zeros(1, 7, 12, dtype=torch.float64)
        x[0, 2, channel] = 1
        y, _ = convolution(x, torch.zeros(1, 2, 12, dtype=torch.float64), (7,))
        taps = convolution.taps()[:, channel].flip(0)
        assert torch.equal(y[0, 2:5, channel], taps) and y.count_nonzero() == 3


def test_tap_order_is_that_of_a_cropped_library_convolution():
    convolution = HeadConvolution((2, 1, 1), 3, 3, False, "uniform").double()
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    weight = convolution.taps().T[:, None]
    released = torch.nn.functional.conv1d(x.mT, weight, padding=2, groups=12)[..., :-2].mT
    assert_same([convolution(x, torch.zeros(1, 2, 12, dtype=torch.float64), (9,))[0]], [released])


def test_shared_kernels_are_equal_ones_of_all_heads():
    shared, own = make(conv_shared_heads=True), make()
    weights = {**shared.state_dict(), "convolution.weight": shared.convolution.taps().detach().flatten()}
    own.load_state_dict(weights)
    x = torch.randn(1, 15, WIDTH, dtype=torch.float64)
    assert_same([own(x).output], [shared(x).output])
    assert shared.convolution.weight.numel() == 3 * 3 * 4  # 192 + ... per layer at the released size: 3 x 3 x 16


def test_start():
    mixer = build("rcmha", width=WIDTH, heads=HEADS, relative="table", distances=8)
    taps = mixer.convolution.taps()
    assert (taps[-1] == 0.5).all() and torch.allclose(taps[:-1], torch.tensor(0.5 / 3))
    assert not any(x.any() for x in (mixer.u, mixer.table, mixer.beta))
    assert all(parameter.ndim == 1 for name, parameter in mixer.named_parameters() if "projections" not in name)


# Sequences in pieces


@forms
@pytest.mark.parametrize("cuts", [(20, 1), (1, 20), (2,) * 10 + (1,), (4, 1, 5, 11)])
def test_any_segmentation_equals_one_pass(form, cuts):
    """Gradients too: with detached states this is segment recurrence whose convolutions have their true history."""
    mixer = make(**form)
    x = torch.randn(2, 21, WIDTH, dtype=torch.float64).requires_grad_()
    state = mixer.new_state(2)
    pieces = torch.cat([mixer(piece, state=state).output for piece in x.split(cuts, dim=1)], dim=1)
    whole = mixer(x).output
    assert_same([pieces, *gradients(pieces, mixer, x)], [whole, *gradients(whole, mixer, x)])


@forms
def test_steps_equal_forward(form):
    mixer, x = make(**form), torch.randn(2, 21, WIDTH, dtype=torch.float64)
    state = mixer.new_state(2)
    with torch.no_grad():
        steps = [mixer(token, state=state).output for token in x.split(1, dim=1)]
    assert_same([torch.cat(steps, dim=1)], [mixer(x).output])


@forms
def test_causality_through_the_convolutions(form):
    mixer, sequence = make(**form), Sequence.packed((9, 12, 5))
    x = torch.randn(1, 26, WIDTH, dtype=torch.float64)
    before = mixer(x, sequence).output
    for time in (0, 8, 9, 10, 20, 21, 25):
        changed = x.clone()
        changed[:, time] += 1
        after = mixer(changed, sequence).output
        end = next(end for end in (9, 21, 26) if time < end)
        assert torch.equal(after[:, :time], before[:, :time]) and torch.equal(after[:, end:], before[:, end:])
        assert not torch.allclose(after[:, time], before[:, time])


def sharded_errors(mesh, form):
    """The largest error of output and every gradient, for each layout and way to attend."""
    mixer, found = make(**form), {}
    lengths = (1, 2, 31, 17, 2)
    torch.manual_seed(4)
    x, dy = (torch.randn(1, sum(lengths), WIDTH, dtype=torch.float64) for _ in range(2))

    def results(x, dy, sequence):
        x = x.clone().requires_grad_()
        output = mixer(x, sequence).output
        return [output.detach(), *torch.autograd.grad(output, [x, *mixer.parameters()], dy)]

    expected = results(x, dy, Sequence.packed(lengths))
    for layout, attention in itertools.product(("contiguous", "zigzag"), ("gather", "ring")):
        shard = ContextParallel(mesh, layout, attention).shard(lengths, mixer.grid)
        y, dx, *own = results(shard.take(x), shard.take(dy), Sequence.sharded(shard))
        actual = [shard.whole(y), shard.whole(dx), *(all_gather(g, shard.axis).sum(0) for g in own)]
        errors = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(actual, expected, strict=True)]
        found[layout, attention] = float(torch.stack(errors).max())
    return found


@forms
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_shards_equal_one_rank(run_distributed, form, sizes):
    for found in run_distributed(sharded_errors, sizes, form):
        assert all(error <= 1e-12 for error in found.values()), found


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 0}, "kernel=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"distances": 0}, "distances=0 must be at least 1"),
        ({"sinusoids": 5}, "sinusoids=5 must be even"),
        ({"relative": "tabel"}, "relative='tabel' is not known"),
        ({"conv_init": "zero"}, "conv_init='zero' is not known"),
        ({"kv_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build("rcmha", width=WIDTH, heads=HEADS, **options)
    assert "\n" not in str(error.value)


def test_a_table_that_is_too_short_is_refused_unless_told_to_clamp():
    mixer, x = make(relative="table", distances=10), torch.randn(1, 11, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a document of 11 tokens .* use distances: 11, window: 10, or clamp: true"):
        mixer(x)
    mixer(x[:, :10])
    make(relative="table", distances=10, clamp=True)(x)
    make(relative="table", distances=10, window=10)(x)
    state = mixer.new_state(1)
    mixer(x[:, :10], state=state)
    with pytest.raises(ValueError, match="a document of 11 tokens"):
        mixer(x[:, 10:], state=state)
