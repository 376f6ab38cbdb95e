"""The mixer cca: its options, its states and what they weigh, and its equality with its own definition."""

import math

import pytest
import torch

from farspan.kernels.cca import cores_seen
from farspan.layers import Sequence, build

CHOICES = [
    {"kv_heads": 2},
    {"kv_heads": 2, "core_heads": "kv"},
    {"kv_heads": 2, "pool": "mean"},
    {"pool": "max"},
    {"kv_heads": 1, "core_rope": "group_end"},
    {"fusion": "two_softmax"},
    {"core_bias": math.log(4), "qk_norm": True, "rope": None},
    {"window": 1},
    {"window": 6, "kv_heads": 2, "core_heads": "kv", "core_rope": "group_end", "fusion": "two_softmax"},
]
choices = pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(map(str, options.values())))
LLAMA2_7B = {"width": 4096, "heads": 32, "rope": None}


def make(**options):
    torch.manual_seed(1)
    mixer = build("cca", **{"width": 16, "heads": 4, "group": 4, "window": 9, **options}).double()
    if mixer.theta is not None:
        torch.nn.init.normal_(mixer.theta)  # so that heads differ
    return mixer


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@choices
def test_chunked_equals_reference(options):
    x, results = torch.randn(1, 70, 16, dtype=torch.float64, requires_grad=True), []
    sequence = Sequence.packed((1, 3, 37, 8, 21))
    weight = torch.randn_like(x)
    for backend in ("reference", "chunked"):
        mixer = make(backend=backend, **options)
        o = mixer(x, sequence).output
        results.append([o, *torch.autograd.grad(o, [x, *mixer.parameters()], weight)])
    for expected, got in zip(*results, strict=True):
        close(got, expected)


@choices
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 9, 10, 12, 13, 21, 24, 25, 39])
def test_prefill_then_steps_equal_one_shot(options, cut):
    """At splits on, before and after multiples of the group and of the window."""
    mixer, x = make(**options), torch.randn(2, 40, 16, dtype=torch.float64)
    state = mixer.new_state(2)
    with torch.no_grad():
        whole = mixer(x).output
        parts = [mixer(x[:, :cut], state=state).output]
        parts += [mixer(token, state=state).output for token in x[:, cut:].split(1, dim=1)]
    close(torch.cat(parts, dim=1), whole)


@choices
def test_gradients_flow_through_states(options):
    mixer, x = make(**options), torch.randn(2, 30, 16, dtype=torch.float64, requires_grad=True)
    state, weight = mixer.new_state(2), torch.randn(2, 30, 16, dtype=torch.float64)
    cuts = (6, 1, 1, 1, 9, 1, 11)
    parts = torch.cat([mixer(part, state=state).output for part in x.split(cuts, dim=1)], dim=1)
    results = [torch.autograd.grad(o, [x, *mixer.parameters()], weight) for o in (parts, mixer(x).output)]
    for got, expected in zip(*results, strict=True):
        close(got, expected)


def test_group_end_turns_the_keys_of_a_group_to_its_end():
    """Against the definition: keys without positions are pooled, the core is turned to the last token's."""
    mixer = make(core_rope="group_end", heads=1, kv_heads=1, width=6, window=1)
    x, group = torch.randn(1, 8, 6, dtype=torch.float64), 4
    q, k, v = (linear(x)[0] for linear in (mixer.projections.query, mixer.projections.key, mixer.projections.value))
    frequency = 10_000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)

    def turned(row, position):
        a, b = row[:3], row[3:]
        cos, sin = (position * frequency).cos(), (position * frequency).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    queries = torch.stack([turned(row, t) for t, row in enumerate(q)])
    keys = torch.stack([turned(row, t) for t, row in enumerate(k)])
    w = (keys[:group] @ queries[group - 1] / 6**0.5).softmax(0)
    core, value = turned(w @ k[:group], group - 1), w @ v[:group]
    seen_k, seen_v = torch.cat([core[None], keys[4:6]]), torch.cat([value[None], v[4:6]])
    o = (seen_k @ queries[5] / 6**0.5).softmax(0) @ seen_v
    close(mixer(x).output[0, 5], mixer.projections.output(o))


def test_two_softmax_begins_with_a_small_share_of_the_cores():
    mixer = build("cca", width=16, heads=4, group=4, window=9, fusion="two_softmax")
    assert mixer.theta.tolist() == [-2.0] * 4
    assert build("cca", width=16, heads=4).theta is None  # no parameters of its own as published


def test_group_and_window_change_without_new_weights():
    mixer, other = make(group=4, window=9), make(group=8, window=16)
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(1, 60, 16, dtype=torch.float64)
    assert not torch.allclose(mixer(x).output, other(x).output)


def test_flops_count_what_is_seen():
    for group, window, length in [(1, 1, 5), (4, 9, 100), (3, 7, 41), (16, 5, 20), (5, 20, 60), (4, 9, 12)]:
        mixer = make(group=group, window=window)
        keys = sum(t + 1 - (group - 1) * cores_seen(t, group, window) for t in range(length)) / length
        pooling = 6 * 16 * group * cores_seen(length - 1, group, window) / length
        assert mixer.flops(length) == pytest.approx(mixer.projections.flops() + 4 * 16 * keys + pooling)


# What states weigh


def test_state_bytes_of_llama2_7b_at_128k():
    """The published reduction by 93 %: 64 GiB of all layers' keys and values in half precision to 4.5 GiB."""
    with torch.device("meta"):
        mixer, softmax = (build(name, **LLAMA2_7B) for name in ("cca", "softmax"))
    length, layers = 131_072, 32
    own, everything = (layers * m.state_bytes(length, torch.bfloat16) for m in (mixer, softmax))
    assert everything / 2**30 == pytest.approx(64, abs=0.001)
    assert own / 2**30 == pytest.approx(4.5, abs=0.01)
    assert 1 - own / everything == pytest.approx(0.93, abs=0.001)


@pytest.mark.parametrize(("core_heads", "reduction"), [("q", 0.742), ("kv", 0.930)])
def test_cores_of_query_heads_cost_more_with_grouped_queries(core_heads, reduction):
    with torch.device("meta"):
        options = {**LLAMA2_7B, "kv_heads": 8}
        mixer, softmax = build("cca", **options, core_heads=core_heads), build("softmax", **options)
    own, everything = (m.state_bytes(131_072, torch.bfloat16) for m in (mixer, softmax))
    assert 1 - own / everything == pytest.approx(reduction, abs=0.001)


@pytest.mark.parametrize("core_heads", ["q", "kv"])
def test_state_bytes_are_the_formula(core_heads):
    mixer = make(kv_heads=2, core_heads=core_heads)
    heads, length = {"q": 4, "kv": 2}[core_heads], 128 * 4 * 3  # full blocks of cores
    entries = heads * (length // 4) + 2 * (9 + 4 - 1)
    assert mixer.state_bytes(length, torch.float16) == 2 * entries * 4 * 2 + 6 * 8


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "group=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"pool": "sum"}, "pool='sum' is not known to cca; valid: significance, mean, max"),
        ({"core_rope": "pre"}, "core_rope='pre' is not known to cca; valid: post, group_end"),
        ({"core_heads": "k"}, "core_heads='k' is not known to cca; valid: q, kv"),
        ({"fusion": "add"}, "fusion='add' is not known to cca; valid: concat, two_softmax"),
        ({"kv_heads": 3}, "not divisible by kv_heads=3"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "other",
    [
        {"group": 5, "window": 8},  # a ring of as many slots
        {"window": 10},
        {"core_rope": "group_end"},
        {"kv_heads": 2, "core_heads": "kv"},
        {"pool": "mean"},
    ],
)
def test_a_state_of_other_options_is_refused(other):
    shared = {"kv_heads": 2} if "kv_heads" in other else {}
    mixer, state = make(**shared), make(**{**shared, **other}).new_state(2)
    with pytest.raises(ValueError, match=r"the state was made with .* make a new state"):
        mixer(torch.randn(2, 3, 16, dtype=torch.float64), state=state)


def test_a_state_of_another_mixer_is_refused():
    with pytest.raises(ValueError, match="make a new state"):
        make()(torch.randn(2, 3, 16, dtype=torch.float64), state=build("softmax", width=16, heads=4).new_state(2))
