"""What mixers hand out: maps that, times their values, are their outputs; and nothing where nobody listens."""

import pytest
import torch

from farspan.kernels.attention_statistics.reference import map_of, softmax_map, statistics_of_map
from farspan.layers import build
from farspan.layers.attention_tap import SoftmaxWeights, WeightsBeside, listening
from farspan.layers.mixer import MIXERS
from farspan.layers.sequence import Sequence

LENGTHS = (40, 1, 25)
SHARED = {"width": 32, "heads": 4}


def run(mixer, sequence=None):
    """x, its sequence, what the mixer returned, and the maps that it handed out."""
    torch.manual_seed(0)
    mixer = mixer.double()
    for parameter in mixer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    sequence = sequence or Sequence.packed(LENGTHS)
    x = torch.randn(1, sequence.tokens, 32, dtype=torch.float64)
    heard = []
    with listening(lambda module, build: heard.append((module, build()))), torch.no_grad():
        output = mixer(x, sequence).output
    return x, sequence, output, heard


@torch.no_grad()
def map_in_full(weights):
    if isinstance(weights, SoftmaxWeights):
        q, k = weights.q, weights.k
        scale = q.shape[-1] ** -0.5 if weights.scale is None else weights.scale
        return softmax_map(q, k, weights.pieces or weights.documents, weights.window, scale, weights.softcap)[0]
    if isinstance(weights, WeightsBeside):
        return torch.cat([map_in_full(part) for part in weights.parts])
    return map_of(weights.effective)


def mixed(a, v):
    return torch.einsum("hts,shd->thd", a, v[0].repeat_interleave(a.shape[0] // v.shape[2], 1))[None]


ATTENTION = [
    ("softmax", {"kv_heads": 2, "qk_norm": True}),
    ("window", {"kv_heads": 2, "window": 7}),
    ("softplus", {"kv_heads": 2}),
    ("softplus", {"power": 0, "window": 9}),
    ("softplus", {"power": 0, "qk_norm": False, "phi": "exp", "length_scale": "inverse_sqrt_d"}),
    ("cca", {"kv_heads": 2, "group": 4, "window": 9}),
    ("cca", {"group": 3, "window": 2, "core_rope": "group_end"}),
    ("cca", {"group": 4, "window": 9, "fusion": "two_softmax"}),
    ("cca", {"group": 4, "window": 9, "pool": "mean", "core_bias": 1.0}),
    ("rat", {"head_dim": 1, "heads": 32, "chunk": 6, "rope": "none", "groups": 4}),
]


@pytest.mark.parametrize(("name", "options"), ATTENTION)
def test_times_the_values_it_is_the_output(name, options):
    mixer = build(name, **{**SHARED, **options})
    x, sequence, output, heard = run(mixer)
    (module, weights), *more = heard
    assert module is mixer and mixer.attends and not more and weights.documents == LENGTHS
    a = map_in_full(weights)
    assert len(a) == weights.heads == mixer.options.heads
    if name == "rat":
        z, v, *_ = (part.unflatten(-1, (-1, 1)) for part in mixer.input(x).split(mixer.sizes, dim=-1))
        expected = mixer.output((torch.sigmoid(z) * mixed(a, v)).flatten(2))
    else:
        _, _, v = mixer.projections(x, sequence)
        expected = mixer.projections.merge(mixed(a, v))
    torch.testing.assert_close(expected, output)


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2, "window": 9}, {"relative": "table", "distances": 11, "clamp": True}]
)
def test_rcmha_hands_out_its_scores(options):
    mixer = build("rcmha", **SHARED, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.3)
    x, sequence, output, heard = run(mixer)
    (_, weights), *more = heard
    assert mixer.attends and not more and weights.documents == LENGTHS
    sides = [linear(x) for linear in (mixer.projections.query, mixer.projections.key, mixer.projections.value)]
    v = mixer._convolved(torch.cat(sides, -1), sequence, None)[..., -sides[2].shape[-1] :].unflatten(-1, (-1, 8))
    torch.testing.assert_close(mixer.projections.merge(mixed(map_in_full(weights), v)), output)


@pytest.mark.parametrize(
    "options",
    [
        {"clusters": 3, "window": 5, "local_heads": 2, "local_window": 7},
        {"clusters": 2, "window": 9, "local_heads": 0, "self_rule": "always", "rope": None},
    ],
)
def test_routing_hands_out_both_kinds_of_heads(options):
    mixer = build("routing", **SHARED, **options)
    x, _, output, heard = run(mixer)
    (_, weights), *more = heard
    assert mixer.attends and not more and weights.documents == LENGTHS
    a = map_in_full(weights)
    assert len(a) == weights.heads == 4
    expected = mixer.output(mixed(a, mixer.value(x).unflatten(-1, (4, -1))).flatten(2))
    torch.testing.assert_close(expected, output)
    rows = torch.arange(sum(LENGTHS)) % 3 > 0
    got = weights.statistics(rows, 4, (2, 9))
    for value, expected in zip(got[:4], statistics_of_map(a, rows, LENGTHS, 4, (2, 9)), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf", "bandwidth": "learned"}, {"window": 9, "kv_heads": 2}])
def test_local_linear_hands_out_the_weights_of_its_fit(options):
    mixer = build("local_linear", **SHARED, **options)
    _, _, _, heard = run(mixer)
    a = map_in_full(heard[0][1])
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
    q, k, scale = (heard[0][1].q, heard[0][1].k, mixer.scale())
    t, s, head = 30, 25, 3
    keys = k[0, max(0, t - options.get("window", 99) + 1) : t + 1, head // (4 // k.shape[2])]
    if "kernel" in options:
        scale = scale[head]
        distance = (q[0, t, head, :8] - keys[:, :8]).square().sum(-1)
        scores = -scale * distance / 2  # of the query itself, the same for every key
    else:
        scores = scale * keys @ q[0, t, head]
    expected = scores.softmax(0)[s - t - 1]
    torch.testing.assert_close(a[head, t, s], expected)


@pytest.mark.parametrize("variant", ["mag", "mal"])
@pytest.mark.parametrize("persistent", [0, 3])
def test_the_window_of_titans(variant, persistent):
    mixer = build("titans", **SHARED, variant=variant, persistent=persistent, window=6, refresh=4)
    _, sequence, _, heard = run(mixer)
    assert mixer.attends and heard[0][0] is mixer.window and len(heard) == 1
    a = map_in_full(heard[0][1])
    back = torch.arange(66)[:, None] - torch.arange(66)
    assert not a[:, (back < 0) | (back >= 6)].any()
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))  # persistent rows are no tokens
    if not persistent:
        x = torch.randn(1, 66, 32, dtype=torch.float64)
        with listening(lambda module, build: heard.append((module, build()))), torch.no_grad():
            o = mixer.window.attend(x, None, sequence, None)
        _, _, v = mixer.window.projections(x, sequence)
        torch.testing.assert_close(mixer.window.projections.merge(mixed(map_in_full(heard[1][1]), v)), o)


def test_the_segments_of_titans():
    mixer = build("titans", **SHARED, variant="mac", segment=8, refresh=4)
    _, _, _, heard = run(mixer)
    weights = heard[0][1]
    assert weights.documents == LENGTHS and weights.pieces == (8,) * 5 + (1,) + (8, 8, 8, 1)
    a = map_in_full(weights)
    assert not a[:, 16:24, :16].any() and a[:, 23, 16:24].all()


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_nothing_is_built_where_nobody_listens(name, monkeypatch):
    from farspan.layers import attention_tap

    monkeypatch.setattr(attention_tap, "_hand_out", lambda *_: pytest.fail("nobody listens"))
    mixer = build(name, **SHARED)
    mixer(torch.randn(1, 20, 32))
    state = mixer.new_state(1)
    with listening(lambda *_: pytest.fail("a pass with a state is not handed out")), torch.no_grad():
        mixer(torch.randn(1, 5, 32), state=state)
        mixer(torch.randn(1, 1, 32), state=state)


@pytest.mark.parametrize("lengths", [LENGTHS, (33, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_computes_the_same_bits_where_somebody_listens(lengths, dtype):
    torch.manual_seed(0)
    mixer, sequence = build("softmax", **SHARED, kv_heads=2).to(dtype), Sequence.packed(lengths)
    x, heard = torch.randn(1, sum(lengths), 32, dtype=dtype, requires_grad=True), []
    outputs = [mixer(x, sequence).output]
    with listening(lambda module, build: heard.append(build())):
        outputs.append(mixer(x, sequence).output)
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(o.float().square().sum(), x)[0] for o in outputs))
    (weights,) = heard
    wide = (weights.q.double(), weights.k.double(), lengths, None, weights.q.shape[-1] ** -0.5, None)
    rows = torch.arange(sum(lengths)) % 3 > 0
    found = weights.statistics(rows, 10, (10, 100))
    expected = statistics_of_map(softmax_map(*wide)[0], rows, lengths, 10, (10, 100))
    for ours, theirs in zip(found, expected[:3], strict=False):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


def test_one_listener_at_a_time():
    with listening(print), pytest.raises(RuntimeError, match="already"), listening(print):
        pass


@pytest.mark.parametrize(
    ("name", "options"),
    [("titans", {"variant": "memory"}), ("cca", {"pool": "max"}), ("softplus", {"phi": "gelu", "power": 0})],
)
def test_what_has_no_weights_hands_out_nothing(name, options):
    mixer = build(name, **SHARED, **options)
    assert not mixer.attends
    if name != "softplus":
        assert not run(mixer)[3]
