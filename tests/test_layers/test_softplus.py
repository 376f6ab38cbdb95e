"""The softplus mixer beside the contract suite: options, windows, states, ablations, and its rule on a mesh."""

import itertools

import pytest
import torch

from farspan.eval.memory import peak_bytes
from farspan.kernels.softplus import Config
from farspan.layers import Sequence, build
from farspan.layers.rotary import Rope
from farspan.parallel import ContextParallel

RAGGED = (1, 2, 9, 16, 17, 1, 30)
OPTIONS = {
    "lssar": {},
    "lssa": {"power": 0.0},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "lssa window": {"power": 0.0, "window": 40},
    "no rope": {"rope": None, "power": 3.0},
    "softmax control": {"phi": "exp", "power": 0.0},
    "no unit vectors": {"qk_norm": False, "scale_multiplier": 0.3},
    "compatible": {"compat_eps": 1e-8},
}
options_of = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def make(dtype=torch.float64, **options):
    torch.manual_seed(1)
    return build("softplus", width=16, heads=4, **{"kv_heads": 2, **options}).to(dtype)


def assert_same(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        assert (a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


def gradients(mixer, output, x):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return torch.autograd.grad(output, [x, *mixer.parameters()], weight)


# Options


def test_defaults_are_those_of_the_operator():
    assert make().config == Config()
    assert make(compat_eps=1e-8, power=3.0).config == Config(eps=1e-8, power=3.0)
    assert sum(p.numel() for p in make().parameters()) == sum(
        p.numel() for p in build("softmax", width=16, heads=4, kv_heads=2).parameters()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 0.9}, "power=0.9 must be 1 or more, or 0"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"head_dim": 1, "rope": None}, "head_dim=1 must be at least 2"),
        ({"phi": "softmax"}, "phi='softmax' is not one of softplus, exp, sigmoid"),
        ({"dead_row": "mean"}, "dead_row='mean' is not one of lssa, zero"),
        ({"length_scale": "sqrt"}, "length_scale='sqrt' is not one of"),
        ({"compat_eps": -1.0}, "eps=-1.0 must be 0 or more"),
        ({"l1": False}, "use power=0"),
        ({"qk_norm": "rms"}, "qk_norm='rms' is a str; it takes bool"),
        ({"powr": 3.0}, "unknown option 'powr' of mixer softplus; did you mean 'power'"),
        ({"causal": False}, "unknown option 'causal'"),
        ({"head_dim": 3}, "head_dim=3 must be even for rotary positions"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("made", "used"),
    [
        ({"window": 5}, {"window": 6}),
        ({"window": 5}, {}),
        ({}, {"window": 5}),
        ({"kv_heads": 4}, {}),
        ({"head_dim": 8}, {}),
    ],
    ids=str,
)
def test_a_state_made_with_other_options_is_refused(made, used):
    mixer, x = make(**made), torch.randn(2, 7, 16, dtype=torch.float64)
    state = mixer.new_state(2)
    with torch.no_grad():
        mixer(x, state=state)
        with pytest.raises(ValueError, match="it was made with other options than"):
            make(**used)(x, state=state)


# Against each other


@options_of
def test_backends_agree(options):
    x, sequence, results = torch.randn(1, sum(RAGGED), 16, dtype=torch.float64).requires_grad_(), None, []
    sequence = Sequence.packed(RAGGED)
    for backend in ("chunked", "reference"):
        mixer = make(backend=backend, **options)
        output = mixer(x, sequence).output
        results.append([output, *gradients(mixer, output, x)])
    assert_same(*results)


@options_of
@pytest.mark.parametrize("cuts", [(1,) * 21, (20, 1), (4, 1, 5, 11)], ids=str)
def test_pieces_and_steps_equal_the_whole(options, cuts):
    mixer, x = make(**options), torch.randn(2, 21, 16, dtype=torch.float64).requires_grad_()
    state = mixer.new_state(2)
    pieces = torch.cat([mixer(piece, state=state).output for piece in x.split(cuts, dim=1)], dim=1)
    whole = mixer(x).output
    assert_same([pieces], [whole])
    assert_same(gradients(mixer, pieces, x), gradients(mixer, whole, x))
    assert sum(value.nbytes for value in state.values()) == 2 * mixer.state_bytes(21)


@options_of
def test_ragged_pieces_equal_the_whole(options):
    mixer, x = make(**options), torch.randn(3, 24, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, state, seen = mixer(x).output, mixer.new_state(3), [0, 0, 0]
        for lengths in [(4, 9, 1), (1, 1, 1), (2, 13, 7), (17, 1, 15)]:
            parts = [x[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            expected = [whole[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            sequence = Sequence.packed(lengths, offsets=seen)
            assert_same([mixer(torch.cat(parts)[None], sequence, state).output[0]], [torch.cat(expected)])
            seen = [start + n for start, n in zip(seen, lengths, strict=True)]


def test_the_state_keeps_unit_keys():
    mixer = make(torch.float32)
    state = mixer.new_state(1)
    with torch.no_grad():
        mixer(torch.randn(1, 9, 16), state=state)
    torch.testing.assert_close(state["key"][0, :, :9].norm(dim=-1), torch.ones(2, 9))
    assert not state["key"][0, :, 9:].any()


def test_rotation_and_normalisation_commute():
    """RoPE keeps lengths, so the lengths of the projections do not matter."""
    mixer, x = make(rope=Rope(theta=100.0)), torch.randn(1, 30, 16, dtype=torch.float64)
    expected = mixer(x).output
    with torch.no_grad():
        mixer.projections.query.weight *= 3
        mixer.projections.key.weight /= 50
    assert_same([mixer(x).output], [expected])


def test_flops_and_state_are_those_of_softmax_and_window():
    softmax = build("softmax", width=16, heads=4, kv_heads=2).double()
    window = build("window", width=16, heads=4, kv_heads=2, window=5).double()
    for length in (1, 4, 5, 100):
        for causal in (True, False):
            assert make().flops(length, causal) == softmax.flops(length, causal)
            assert make(window=5).flops(length, causal) == window.flops(length, causal)
    assert make().state_bytes(300) == softmax.state_bytes(300)
    assert make(window=5).state_bytes(300) == window.state_bytes(300)


@pytest.mark.parametrize("options", [{"window": 16}, {"power": 0.0}], ids=str)
def test_memory_is_linear_in_length(options):
    mixer = make(torch.float32, **options)

    def train(length):
        x = torch.randn(1, length, 16).requires_grad_()
        return peak_bytes(lambda: mixer(x).output.sum().backward())

    train(256)
    assert train(4096) <= 4.4 * train(1024)


# Behaviour


def test_only_a_large_power_ignores_many_more_keys():
    """One matching key among n that do not match: its weight stays with power 15, and is diluted without."""
    from farspan.kernels.softplus import softplus_attention

    found = {}
    for power, n in itertools.product((0, 15), (64, 4096)):
        torch.manual_seed(2)
        d = 64
        q, k = torch.randn(1, 1, 1, d), torch.randn(n, 1, d)
        k[7] = q[0, 0] + 0.5 * torch.randn(d)
        k = k / k.norm(dim=-1, keepdim=True)
        v = torch.zeros(n, 1, d)
        v[7] = 1
        own = torch.randn(1, 1, 1, d), torch.zeros(1, 1, 1, d)
        o, _ = softplus_attention(q, *own, (1,), torch.tensor([0, 1]), power=power, initial_state=((k, v),))
        found[power, n] = float(o.mean())
    assert found[15, 4096] > 0.9 * found[15, 64] > 0.8
    assert found[0, 4096] < 0.1 * found[0, 64]


# On a mesh: windows, LSSA and ablations (the contract suite has the default)


def sharded_errors(mesh, options, dtype):
    """The largest error of output and gradients, over layouts, against the whole row."""
    mixer, found = make(dtype, **options), []
    torch.manual_seed(4)
    for lengths in (RAGGED, (53,), (1,) * 7):
        x = torch.randn(1, sum(lengths), 16, dtype=dtype).requires_grad_()
        expected = mixer(x, Sequence.packed(lengths)).output
        weight = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, [x, *mixer.parameters()], weight)
        for layout in ("contiguous", "zigzag") if mesh.ring.size > 1 else ("contiguous",):
            shard = ContextParallel(mesh, layout).shard(lengths)
            o = mixer(shard.take(x), Sequence.sharded(shard)).output
            got = list(torch.autograd.grad(o, [x, *mixer.parameters()], shard.take(weight)))
            for gradient in got:
                torch.distributed.all_reduce(gradient, group=mesh.context.group)
            pairs = [(shard.whole(o), expected), *zip(got, wanted, strict=True)]
            found += [float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)) for a, b in pairs]
    return max(found) if all(error == error for error in found) else float("nan")


@pytest.mark.parametrize("sizes", [(2, 1), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", ["lssa", "window", "window of one", "softmax control", "no unit vectors"])
def test_sharded_equals_whole(run_distributed, name, sizes):
    assert all(error <= 1e-12 for error in run_distributed(sharded_errors, sizes, OPTIONS[name], torch.float64))


def prefilled(mesh, options):
    """The error of the state that a sharded prefill fills, and of the step after it."""
    mixer = make(**options)
    torch.manual_seed(4)
    lengths = (9, 30, 1)
    x, token = torch.randn(1, 40, 16, dtype=torch.float64), torch.randn(3, 1, 16, dtype=torch.float64)
    found = []
    with torch.no_grad():
        whole = mixer.new_state(3)
        mixer(x, Sequence.packed(lengths), whole)
        for layout in ("contiguous", "zigzag"):
            shard = ContextParallel(mesh, layout).shard(lengths)
            state = mixer.new_state(3)
            mixer(shard.take(x), Sequence.sharded(shard), state)
            found += [float((state[name] - whole[name]).abs().max()) for name in ("key", "value", "position")]
            steps = [
                mixer(token, state={key: value.clone() for key, value in s.items()}).output for s in (state, whole)
            ]
            found.append(float((steps[0] - steps[1]).abs().max()))
    return max(found)


@pytest.mark.parametrize("options", [{}, {"window": 5}], ids=str)
def test_sharded_prefill_fills_the_state(run_distributed, options):
    assert all(error <= 1e-12 for error in run_distributed(prefilled, (2, 2), options))


def fetched_gradients(mesh):
    """Gradients of keys of which the ranks' shares are 256, 1 and 1."""
    mixer = make(torch.bfloat16)
    shard = ContextParallel(mesh).shard((8,))
    k, v = (torch.ones(1, 2, 2, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ((keys, values),) = mixer._halo(k, v, Sequence.sharded(shard))
    share = 256.0 if mesh.ring.rank == 1 else 1.0
    (keys.sum() * share + values.sum() * share).backward()
    return [float(x.grad.unique()) for x in (k, v)]


def test_gradients_of_fetched_keys_are_added_in_fp32(run_distributed):
    """In bf16 256 + 1 is 256."""
    found = run_distributed(fetched_gradients, (4, 1))
    assert found == [[258.0, 258.0], [2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]
