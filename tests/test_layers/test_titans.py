"""Titans in all of its variants: causality, states, sharding, the guard, and what the paper leaves open."""

import copy
import itertools
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from farspan.kernels.titans.state import LOG_FLOOR
from farspan.kernels.titans.step import close_block
from farspan.layers import Sequence, build
from farspan.layers.titans_options import GATES, TitansOptions
from farspan.parallel import ContextParallel

WIDTH, HEADS = 16, 4
SMALL = {"depth": 2, "refresh": 4, "expansion": 1, "persistent": 3, "window": 5, "segment": 8}
LINEAR = {"depth": 1, "refresh": 1}
# Name: options. Every architecture with an MLP memory at a refresh, and with the exact linear one.
CASES = {
    "memory": {"variant": "memory"},
    "memory-linear": {"variant": "memory", **LINEAR},
    "memory-deep": {"variant": "memory", "depth": 3, "refresh": 3, "activation": "gelu", "norm": "none", "read": "pre"},
    "mac": {"variant": "mac"},
    "mac-linear": {"variant": "mac", **LINEAR},
    "mac-prev": {"variant": "mac", "h_query": "prev"},
    "mac-input": {"variant": "mac", "mac_update_source": "input"},
    "mag": {"variant": "mag"},
    "mag-linear": {"variant": "mag", "decay_to": "init", **LINEAR},
    "mal": {"variant": "mal"},
    "bare": {"variant": "mag", "persistent": 0, "conv": 0, "read": "pre", "decay_to": "init", "rope": None},
    "bare-mac": {"variant": "mac", "persistent": 0, "conv": 0, "read": "pre", "decay_to": "init", "rope": None},
}
cases = pytest.mark.parametrize("case", CASES)
RAGGED = (1, 2, 9, 16, 17, 1, 30)


def make(case, dtype=torch.float64, **options):
    torch.manual_seed(1)
    mixer = build("titans", width=WIDTH, heads=HEADS, **{**SMALL, **CASES[case], **options}).to(dtype)
    for parameter in mixer.parameters():  # rows and projections large enough to tell documents and tokens apart
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    if mixer.persistent is not None:
        torch.nn.init.normal_(mixer.persistent)
    return mixer


def rows(batch, time, dtype=torch.float64):
    return torch.randn(batch, time, WIDTH, dtype=dtype)


def gradients(mixer, output, *inputs):
    seed = torch.Generator().manual_seed(3)
    weight = torch.randn(output.shape, generator=seed, dtype=output.dtype)
    return list(torch.autograd.grad(output, [*inputs, *mixer.parameters()], weight))


def assert_same(left, right, tolerance=1e-11):
    """Relative to the largest value: float64 rounding, grown by the inner steps of a chain of weights."""
    for a, b in zip(left, right, strict=True):
        a, b = a.detach(), b.detach()
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


# Causality


@cases
def test_no_token_sees_a_later_one(case):
    """Exactly: the outputs before the change keep every bit."""
    mixer, x = make(case), rows(1, 29)
    before = mixer(x).output
    for time in (0, 1, 4, 7, 8, 12, 23):
        changed = x.clone()
        changed[:, time:] += torch.randn_like(changed[:, time:])
        after = mixer(changed).output
        assert torch.equal(after[:, :time], before[:, :time])
        assert not torch.allclose(after[:, time], before[:, time])


def one_segment(mixer, x, masked, running):
    """MAC's first segment, equations 21 to 25, from the same parts. As printed, every row sees all of h (not `masked`)
    and reads the memory as it is when the whole segment has been written (not `running`). The memory is linear.
    """
    layer, part, n = mixer.memory, mixer.context, x.shape[1]
    memory, start = layer.memory(x.dtype), layer.start(None, x.dtype)
    reads, _ = part.read_convolution(part.read_query(x), x.new_zeros(1, 3, WIDTH), (n,))
    rope = mixer._segment_rope(Sequence.rows(1, n), x.dtype)
    row = part.row(layer, x, reads, rope, mixer._persistent())
    h = layer.ask(row.asked[None], start.weights, memory)
    context = part._context(layer, h[0], row.opened, rope)
    sides = zip(row.persistent, context, (row.k, row.v), strict=True)
    keys, values = (torch.cat(side)[None].transpose(1, 2) for side in sides)
    causal = torch.ones(n, n).tril().bool()
    seen = torch.ones(n, SMALL["persistent"]).bool(), causal if masked else torch.ones(n, n).bool(), causal
    y = part.projections.merge(part._attend(row.q[None], keys, values, torch.cat(seen, dim=1)))
    asked = part.write_norm(y)
    inputs, _ = layer.inputs(layer.project(asked), asked, start.tail, (n,))
    m, state = layer.run(inputs, memory, (n,), return_state=True)
    if not running:
        m = layer.ask(inputs.q, state.weights, memory)
    return part.join(y, layer.merge(m, layer.opened(asked)))


def influence(run, x):
    """Of every token on every output, [outputs, tokens]."""
    jacobian = torch.autograd.functional.jacobian(lambda x: run(x)[0].sum(-1), x)
    return jacobian[:, 0].abs().amax(-1)


@pytest.mark.parametrize(("masked", "running"), [(False, False), (True, False), (False, True)])
def test_mac_as_printed_leaks_and_takes_both_repairs(masked, running):
    mixer, x = make("mac-linear"), rows(1, SMALL["segment"])
    later = torch.ones(SMALL["segment"], SMALL["segment"]).triu(1).bool()
    leak = influence(lambda x: one_segment(mixer, x, masked, running), x)
    assert leak[later].max() > 0.01 * leak.max()
    assert_same([one_segment(mixer, x, True, True)], [mixer(x).output])
    ours = influence(lambda x: mixer(x).output, x)
    assert (ours[later] == 0).all() and (ours.diagonal() > 0).all()


def test_mac_reaches_later_segments_through_the_memory_alone():
    mixer, x = make("mac-linear", conv=0), rows(1, 24)
    changed = x.clone()
    changed[:, 2] += 1.0
    assert not torch.allclose(mixer(changed).output[:, 16:], mixer(x).output[:, 16:])
    frozen = make("mac-linear", conv=0, write=False)
    assert torch.equal(frozen(changed).output[:, 8:], frozen(x).output[:, 8:])


# Documents and states


@cases
def test_packed_documents_are_separate(case):
    mixer, sequence = make(case), Sequence.packed(RAGGED)
    x = rows(1, sequence.tokens).requires_grad_()
    packed = mixer(x, sequence).output
    separate = torch.cat([mixer(document).output for document in x.split(RAGGED, dim=1)], dim=1)
    assert_same([packed], [separate])
    assert_same(gradients(mixer, packed, x), gradients(mixer, separate, x))


@cases
def test_steps_equal_forward(case):
    """At every position: below one block of refresh, at its ends, over the ends of segments and windows."""
    mixer, x = make(case), rows(2, 21)
    state = mixer.new_state(2)
    with torch.no_grad():
        steps = [mixer(token, state=state).output for token in x.split(1, dim=1)]
    assert_same([torch.cat(steps, dim=1)], [mixer(x).output])


@cases
@pytest.mark.parametrize("cuts", [(20, 1), (1, 20), (4, 1, 5, 11), (3, 1, 1, 1, 1, 14)])
def test_pieces_equal_forward_with_gradients(case, cuts):
    mixer, x = make(case), rows(2, 21).requires_grad_()
    state = mixer.new_state(2)
    pieces = torch.cat([mixer(piece, state=state).output for piece in x.split(cuts, dim=1)], dim=1)
    whole = mixer(x).output
    assert_same([pieces], [whole])
    assert_same(gradients(mixer, pieces, x), gradients(mixer, whole, x))


@cases
def test_ragged_pieces_equal_forward(case):
    mixer, x = make(case), rows(3, 24)
    whole, state, seen = mixer(x).output, mixer.new_state(3), [0, 0, 0]
    with torch.no_grad():
        for lengths in [(4, 9, 1), (1, 1, 1), (2, 13, 7), (17, 1, 15)]:
            parts = [x[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            expected = [whole[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            sequence = Sequence.packed(lengths, offsets=seen)
            assert_same([mixer(torch.cat(parts)[None], sequence, state).output[0]], [torch.cat(expected)])
            seen = [start + n for start, n in zip(seen, lengths, strict=True)]


@cases
def test_new_rows_join_rows_that_go_on(case):
    mixer, x = make(case), rows(2, 12)
    state = mixer.new_state(2)
    with torch.no_grad():
        alone = {name: value[:1].clone() for name, value in state.items()}
        mixer(x[:1, :5], state=alone)
        for name, value in alone.items():
            state[name][:1] = value
        sequence = Sequence.packed((7, 12), offsets=(5, 0))
        output = mixer(torch.cat([x[0, 5:], x[1]])[None], sequence, state).output[0]
    assert_same([output], [torch.cat([mixer(x).output[0, 5:], mixer(x).output[1]])])


@cases
def test_a_memory_filled_on_one_text_answers_later(case, tmp_path):
    mixer, x = make(case), rows(3, 15)
    state = mixer.new_state(3)
    with torch.no_grad():
        mixer(x[:, :10], state=state)
        save_file(state, tmp_path / "state.safetensors")
        loaded = load_file(tmp_path / "state.safetensors")
        order = torch.tensor([1, 1, 0])
        loaded = {name: value[order] for name, value in loaded.items()}
        answer = mixer(x[order, 10:], state=loaded).output
        blank = mixer(x[order, 10:]).output
    assert_same([answer], [mixer(x).output[order, 10:]])
    assert not torch.allclose(answer, blank)


@cases
def test_state_bytes_are_exact_and_constant(case):
    mixer = make(case, torch.bfloat16)
    assert mixer.state_bytes(1024) == mixer.state_bytes(1_000_000)
    state = mixer.new_state(2)
    with torch.no_grad():
        mixer(rows(2, 40, torch.bfloat16), state=state)
    assert sum(value.nbytes for value in state.values()) == 2 * mixer.state_bytes(40)


def test_a_position_of_a_million_is_a_position():
    """Nothing in a state grows with it: 24 tokens before and after a shift by whole segments and blocks."""
    mixer, x = make("mac"), rows(1, 24)
    near, far = mixer.new_state(1), mixer.new_state(1)
    with torch.no_grad():
        mixer(x[:, :9], state=near)
        far = {name: value.clone() for name, value in near.items()}
        far["position"] += 1_000_000 // 8 * 8
        assert_same([mixer(x[:, 9:10], state=far).output], [mixer(x[:, 9:10], state=near).output])
        assert_same([mixer(x[:, 10:], state=far).output], [mixer(x[:, 10:], state=near).output])
    assert sum(v.nbytes for v in far.values()) == sum(v.nbytes for v in near.values())


@cases
def test_a_reset_state_is_a_new_one(case):
    mixer, x = make(case), rows(2, 7)
    state = mixer.new_state(2)
    with torch.no_grad():
        mixer(rows(2, 11), state=state)
        state["position"] = torch.zeros(2, dtype=torch.int64)  # whatever the rest holds
        steps = [mixer(token, state=state).output for token in x.split(1, dim=1)]
    assert_same([torch.cat(steps, dim=1)], [mixer(x).output])


def test_steps_know_that_the_parameters_changed():
    """What documents begin with is kept between steps, and must not outlive the parameters that it was made of."""
    mixer, x = make("memory"), rows(1, 3)
    with torch.no_grad():
        for _ in range(2):
            state = mixer.new_state(1)
            steps = [mixer(token, state=state).output for token in x.split(1, dim=1)]
            assert_same([torch.cat(steps, dim=1)], [mixer(x).output])
            for parameter in mixer.parameters():
                parameter.data.mul_(1.1)  # as DeepSpeed does, without a new version of the parameter


@cases
def test_a_state_of_another_shape_is_refused(case):
    mixer = make(case)
    state = mixer.new_state(1)
    state["weights0"] = state["weights0"][:, :2]
    with pytest.raises(ValueError, match=r"the state's weights0 is \[1, 2, 4, 4\], this titans layer needs \[1, 4, 4"):
        mixer(rows(1, 3), state=state)
    state = mixer.new_state(1)
    del state["tail"]
    with pytest.raises(ValueError, match="the state's tail is nothing, this titans layer needs"):
        mixer(rows(1, 3), state=state)


# Persistent rows


@pytest.mark.parametrize("count", [1, 3, 4, 6])
@pytest.mark.parametrize("case", ["memory", "memory-linear"])
def test_persistent_rows_are_an_explicit_prefix(case, count):
    """With blocks that end with them: the memory alone reads [P, x] as it reads P in front of x."""
    mixer = make(case, persistent=count)
    refresh = mixer.options.refresh
    bare, x = copy.deepcopy(mixer), rows(1, 13)
    bare.persistent = None
    prefixed = torch.cat([mixer._persistent()[None], x], dim=1)
    expected = bare(prefixed).output[:, count:]
    same = torch.allclose(mixer(x).output, expected, rtol=0, atol=1e-11)
    assert same == (count % refresh == 0)  # elsewhere the grid of real tokens begins anew, on purpose


@pytest.mark.parametrize("case", ["mag", "mal", "mac"])
def test_every_token_sees_the_persistent_rows(case):
    mixer, x = make(case, write=False), rows(1, 21)
    output = mixer(x).output
    gradient = torch.autograd.grad(output[0, -1].sum(), mixer.persistent)[0]
    assert (gradient.unflatten(0, (3, -1)).abs().amax(-1) > 0).all()


def test_an_open_block_is_closed_as_if_a_refresh_came():
    """The weights that are left answer what the open block answered: the memory before the next token."""
    for case in ("memory", "memory-deep"):
        layer, x, lengths = make(case, read="pre").memory, rows(1, 6), (6,)
        memory = layer.memory(x.dtype)
        inputs, tails = layer.inputs(layer.project(x), x, x.new_zeros(1, 3, 3 * WIDTH), lengths)
        _, state = layer.run(inputs, memory, lengths, return_state=True)
        for position in (6, 7):
            token = rows(1, 1)
            following, tails = layer.inputs(layer.project(token), token, tails, (1,))
            closed = close_block(state, memory, layer.options.decay_to)
            y, state = layer.step(following, memory, state, torch.tensor([position]))
            assert_same([layer.ask(following.q, closed.weights, memory)], [y])


# The memory


def test_a_frozen_memory_is_its_start():
    mixer, x = make("memory", write=False, persistent=0), rows(1, 13)
    layer = mixer.memory
    state = mixer.new_state(1)
    with torch.no_grad():
        output = mixer(x, state=state).output
    for layer_number, weight in enumerate(layer.memory(x.dtype).weights):
        assert torch.equal(state[f"weights{layer_number}"][0], weight)
    projected, lengths = layer.project(x), (13,)
    inputs, _ = layer.inputs(projected, x, x.new_zeros(1, 3, 3 * WIDTH), lengths)
    y = layer.ask(inputs.q, tuple(w[None] for w in layer.memory(x.dtype).weights), layer.memory(x.dtype))
    assert_same([output], [layer.merge(y, layer.opened(x))])


@pytest.mark.parametrize(
    "options",
    [{"momentum": False}, {"decay": False}, {"theta_mode": "raw", "kappa": 0.5}, {"kappa": 1.5}, {"write": False}, {}],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_gates_stay_inside_their_bounds_whatever_the_weights(options, depth):
    """Bounds of the stable range: rate / (1 - momentum) <= kappa, or with raw rates the limit of the refresh."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixer = make("memory", depth=depth, refresh=1, **options)
    options = mixer.options
    for scale in (0.0, 1.0, 1000.0):
        gates = mixer.memory.gates(scale * rows(1, 200))
        decay, momentum = gates.log_decay.exp(), gates.log_momentum.exp()
        bound = options.kappa if options.theta_mode == "ema" else options.stable_rate
        assert (gates.rate <= bound * (1 - momentum) + 5e-9).all()  # e^-20 is the least momentum
        assert (gates.rate >= 0).all() and (decay <= 1).all() and (gates.log_decay >= LOG_FLOOR).all()
        assert options.momentum or (momentum <= 3e-9).all()
        assert options.decay or (decay == 1).all()
        assert options.write or ((gates.rate == 0) & (decay == 1)).all()
        assert not (options.write and options.decay) or scale == 0 or (decay < 1).any()


def test_heads_start_with_half_lives_from_64_to_4096_tokens():
    gates = make("memory").memory.gates(torch.zeros(1, 1, WIDTH, dtype=torch.float64))
    half_lives = -math.log(2) / gates.log_decay[0, 0]
    expected = torch.tensor([64.0, 256.0, 1024.0, 4096.0], dtype=torch.float64)
    assert_same([half_lives], [expected], 1e-3)  # the bias is kept in fp32
    assert_same([gates.log_momentum.exp()[0, 0], gates.rate[0, 0]], [torch.full((4,), 0.5), torch.full((4,), 0.25)])


def test_everything_learns():
    """Also the parameters that are reached through the inner gradients alone."""
    for case in CASES:
        mixer = make(case)
        output = mixer(rows(1, 21)).output[:, 12:]
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        found = torch.autograd.grad(output.square().sum(), parameters)
        dead = [name for name, g in zip(names, found, strict=True) if not g.abs().max() > 0]
        assert dead == [], case


def test_metrics_are_what_they_say():
    mixer, x = make("memory"), rows(1, 24)
    state = mixer.new_state(1)
    metrics = mixer(x, state=state).metrics
    norms = {
        name: sum(state[f"{entry}{layer}"].square().sum((-2, -1)) for layer in range(2)).sqrt().mean()
        for name, entry in (("memory/weight_norm", "weights"), ("memory/surprise", "momentum"))
    }
    assert_same([metrics[name] for name in norms], list(norms.values()), 1e-6)
    gates = mixer.memory.gates(x)
    assert_same([metrics["memory/decay"]], [(1 - gates.log_decay.exp()).mean()], 1e-6)
    assert_same([metrics["memory/momentum"]], [gates.log_momentum.exp().mean()], 1e-6)
    assert_same([metrics["memory/rate"]], [gates.rate.mean()], 1e-6)
    for case in CASES:
        metrics = make(case)(x).metrics
        assert len(metrics) == 5 and all(v.dtype == torch.float32 and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("case", ["mac", "mag"])
def test_every_way_to_join(case, gate):
    mixer, x = make(case, gate=gate), rows(1, 13)
    join = (mixer.join or mixer.context.join).double()
    y, m = rows(1, 5), rows(1, 5)
    normed = [z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for z in (y, m)]
    expected = {
        "norm_sigmoid": normed[0] * torch.sigmoid(normed[1]),
        "hadamard": y * m,
        "norm_both": torch.sigmoid(normed[0]) * torch.sigmoid(normed[1]),
        "hymba": normed[0] + normed[1],
    }[gate]
    assert_same([join(y, m)], [expected])
    assert mixer(x).output.isfinite().all()


# Backends and cost


@cases
def test_backends_agree(case):
    mixer, reference = make(case, backend="chunked"), make(case, backend="reference")
    sequence = Sequence.packed(RAGGED)
    x = rows(1, sequence.tokens).requires_grad_()
    output, expected = mixer(x, sequence).output, reference(x, sequence).output
    assert_same([output], [expected])
    assert_same(gradients(mixer, output, x), gradients(reference, expected, x))


@pytest.mark.parametrize("case", ["memory", "memory-linear", "mac", "mac-linear", "mag", "mal"])
def test_flops_are_as_stated(case):
    mixer, length = make(case, torch.float32, backend="reference"), 5  # all of them inside window and segment
    with FlopCounterMode(display=False) as counter:
        mixer(rows(1, length, torch.float32))
    attention = 4 * WIDTH * (SMALL["persistent"] + 2 * length) * length  # torch's own for CPU is not counted
    counted = counter.get_total_flops() + (attention if "mac" in case else 0)
    assert counted == round(length * mixer.flops(length, causal=False))
    assert mixer.flops(length) < mixer.flops(length, causal=False)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0 is not between 1 and 4"),
        ({"depth": 5}, "depth=5 is not between 1 and 4"),
        ({"refresh": 0}, "refresh=0 must be at least 1"),
        ({"segment": 0}, "segment=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"persistent": -1}, "persistent=-1 must be at least 0"),
        ({"conv": -1}, "conv=-1 must be the width"),
        ({"variant": "mac", "segment": 24, "refresh": 16}, "segment=24 is not a multiple of refresh=16.*=16"),
        ({"variant": "lmm"}, "variant='lmm' is not known to titans; valid: memory, mac, mag, mal"),
        ({"gate": "none"}, "gate='none' is not known"),
        ({"read": "both"}, "read='both' is not known"),
        ({"kappa": 2.5}, "kappa=2.5 must be above 0 and at most 2"),
        ({"kappa": 0.0}, "kappa=0.0 must be above 0"),
        ({"depth": 1, "refresh": 16, "theta_mode": "raw", "kappa": 1.2}, "leaves no room for momentum"),
        ({"variant": "mag", "head_dim": 3}, "head_dim=3 must be even"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build("titans", width=WIDTH, heads=HEADS, **options)
    assert "\n" not in str(error.value)


def test_a_rate_outside_the_stable_range_warns():
    with pytest.warns(UserWarning, match="kappa=0.5 is above 0.27.*refresh=64 began to diverge"):
        build("titans", width=WIDTH, heads=HEADS, depth=1, refresh=64, kappa=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices = itertools.product((1, 2, 4), (1, 2, 4, 8, 16, 32, 64, 256), (None, "none"))
        for depth, refresh, norm in choices:
            options = TitansOptions(width=WIDTH, heads=HEADS, depth=depth, refresh=refresh, norm=norm)
            assert options.kappa <= options.stable_rate


# On a shard

MESHES = [(4, 1), (2, 2)]  # a scan for linear memories, and relays; heads exchanged beside a ring
ROWS = {"one document": (53,), "ragged": RAGGED, "single tokens": (1,) * 7, "one token": (1,)}


def summed(tensors, axis):
    tensors = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        torch.distributed.all_reduce(tensor, group=axis.group)
    return tensors


def largest_error(found, expected):
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return float(torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in pairs]).max())


def gradients_of(loss, x, mixer):
    """Zeros for what a row of short documents does not use, such as the segment before."""
    return torch.autograd.grad(loss, [x, *mixer.parameters()], materialize_grads=True)


def sharded_errors(mesh, case):
    """The largest errors of output, gradients of input and parameters, and prefilled state, by row and layout."""
    mixer, found = make(case), {}
    for name, lengths in ROWS.items():
        torch.manual_seed(4)
        whole = Sequence.packed(lengths)
        x, weight = rows(1, whole.tokens).requires_grad_(), rows(1, whole.tokens)
        expected = mixer(x, whole).output
        expected = [expected, *gradients_of((expected * weight).sum(), x, mixer)]
        filled = mixer.new_state(len(lengths))
        with torch.no_grad():
            mixer(x, whole, filled)
        for layout in ("contiguous", "zigzag") if mesh.ring.size > 1 else ("contiguous",):
            shard = ContextParallel(mesh, layout).shard(lengths, mixer.grid)
            sequence = Sequence.sharded(shard)
            output = mixer(shard.take(x), sequence).output
            share = (output * shard.take(weight)).sum()
            shares = summed(gradients_of(share, x, mixer), mesh.context)
            state = mixer.new_state(len(lengths))
            with torch.no_grad():
                mixer(shard.take(x), sequence, state)
            actual = [shard.whole(output), *shares, *(state[key] for key in filled)]
            found[name, layout] = largest_error(actual, [*expected, *filled.values()])
    return found


@cases
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: f"ring{sizes[0]}-ulysses{sizes[1]}")
def test_sharded_equals_whole(run_distributed, case, sizes):
    for found in run_distributed(sharded_errors, sizes, case):
        assert all(error <= 1e-11 for error in found.values()), found


def test_heads_that_are_fewer_than_the_ranks_are_refused_but_by_mac():
    for case in ("memory", "mag", "mal", "mac"):
        mixer = make(case)
        if case == "mac":
            mixer.check_sharding(mixer.options, "zigzag", 2, 8)
            continue
        with pytest.raises(ValueError, match="4 heads are fewer than 8 Ulysses ranks"):
            mixer.check_sharding(mixer.options, "contiguous", 1, 8)
