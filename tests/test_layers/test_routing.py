"""Routing attention: the layer against masks written out token by token, and what follows from the definition."""

import math
import warnings

import pytest
import torch

from farspan.layers import Sequence, build
from farspan.layers.rotary import rope_tables, rotate

WIDTH, HEADS, DIM, LOCAL = 16, 3, 8, 1
LEAKY = "balanced_leaks_future"
RAGGED = (1, 2, 30, 17, 1, 45)
RULES = ("nearest", "streaming", LEAKY)


def make(dtype=torch.float64, **options):
    torch.manual_seed(1)
    options = {"clusters": 3, "window": 6, "local_heads": LOCAL, "local_window": 4, "head_dim": DIM, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build("routing", width=WIDTH, heads=HEADS, **options).to(dtype)


def rows(lengths, dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(1, sum(lengths), WIDTH, dtype=dtype)


def members(scores, options):
    """For each cluster and time the tokens that it shows to a query at that time, as sets; scores: [T, C]."""
    tokens, window, shown = len(scores), options.window, {}
    for cluster in range(options.clusters):
        column = scores[:, cluster].tolist()
        for time in range(tokens):
            if options.membership == "nearest":
                best = [sorted(range(options.clusters), key=lambda c: (-scores[s, c], c)) for s in range(time + 1)]
                there = [s for s in range(time + 1) if cluster in best[s][: options.choices]][-window:]
            else:
                seen = range(tokens if options.membership == LEAKY else time + 1)
                there = sorted(seen, key=lambda s: (-column[s], s))[:window]
            # the ring's last member is the token itself, if it is in the cluster at all
            shown[cluster, time] = {s for s in there if s <= time} if time in there else set()
    return shown


def attention(q, k, v, keys):
    keys = sorted(keys)
    return (k[keys] @ q / math.sqrt(DIM)).softmax(0) @ v[keys]


def oracle(mixer, x, lengths):
    """The whole layer from its definition, by loops over documents, heads, clusters and tokens."""
    options, outputs = mixer.options, []
    for document in x[0].split(lengths):
        tokens = len(document)
        tables = rope_tables(Sequence.packed((tokens,)), options.rope, DIM, x.dtype)
        q, v = (linear(document).unflatten(-1, (-1, DIM)) for linear in (mixer.query, mixer.value))
        k = mixer.key(document).unflatten(-1, (-1, DIM)) if options.local_heads else None
        heads = []
        for head in range(HEADS):
            own = q[:, head]
            if head < options.local_heads:
                turned, keys = (rotate(y[:, None], tables)[:, 0] for y in (own, k[:, head]))
                seen = [range(max(0, t - options.local_window + 1), t + 1) for t in range(tokens)]
                heads.append(torch.stack([attention(turned[t], keys, v[:, head], seen[t]) for t in range(tokens)]))
                continue
            centred = own - own.mean(-1, keepdim=True)
            own = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            scores = (own @ mixer.centroids.mu[head - options.local_heads].to(x.dtype).t()).detach()
            turned, shown, o = rotate(own[:, None], tables)[:, 0], members(scores, options), []
            for t in range(tokens):
                parts = []
                for cluster in range(options.clusters):
                    keys = shown[cluster, t]
                    if keys and options.self_rule == "last_resort" and len(keys) > 1:
                        keys = keys - {t}
                    if keys:
                        parts.append(attention(turned[t], turned, v[:, head], keys))
                o.append(torch.stack(parts).mean(0) if parts else torch.zeros(DIM, dtype=x.dtype))
            heads.append(torch.stack(o))
        outputs.append(torch.stack(heads, dim=1).flatten(1))
    return mixer.output(torch.cat(outputs))[None]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"choices": 2},
        {"self_rule": "always"},
        {"window": 1},
        {"local_heads": 0},
        {"clusters": 1},
        {"membership": "streaming"},
        {"membership": "streaming", "self_rule": "always"},
        {"membership": "streaming", "window": 1},
        {"membership": LEAKY},
        {"membership": LEAKY, "window": 100},
    ],
    ids=str,
)
def test_layer_is_the_definition(options, backend):
    mixer, x = make(backend=backend, **options), rows(RAGGED).requires_grad_()
    found, expected = mixer(x, Sequence.packed(RAGGED)).output, oracle(mixer, x, RAGGED)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight, inputs = torch.randn_like(found), [x, *mixer.parameters()]
    pair = [torch.autograd.grad(o, inputs, weight) for o in (found, expected)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("membership", ["nearest", "streaming"])
def test_the_future_changes_no_bit(membership):
    """In fp32, of a document long enough for many tiles; and no gradient comes from it."""
    mixer = make(torch.float32, membership=membership, window=20, clusters=4, local_window=20)
    x = rows((400,), torch.float32)
    before = mixer(x).output
    for time in (1, 57, 200, 399):
        changed = x.clone()
        changed[:, time:] = torch.randn_like(changed[:, time:])
        assert torch.equal(mixer(changed).output[:, :time], before[:, :time])
    x.requires_grad_()
    gradient = torch.autograd.grad(mixer(x).output[:, 123].sum(), x)[0]
    assert gradient[:, 124:].eq(0).all() and gradient[:, 123].ne(0).any()


def test_balanced_leaks_the_future():
    """Tokens after the 200th change; with them outputs before, and in how many clusters tokens are."""
    mixer = make(membership=LEAKY, clusters=8, window=32, local_heads=0)
    x = rows((256,))
    changed = x.clone()
    changed[:, 200:] = torch.randn_like(changed[:, 200:])
    before, after = mixer(x).output[0, :200], mixer(changed).output[0, :200]
    moved = (before != after).any(-1).float().mean()
    assert moved > 0.25
    # the gradient does not show it: membership is discrete, and attention itself looks back
    x.requires_grad_()
    assert torch.autograd.grad(mixer(x).output[:, 123].sum(), x)[0][:, 124:].eq(0).all()


def test_balanced_warns_and_its_metrics_say_so():
    with pytest.warns(UserWarning, match="leaky, and not comparable"):
        mixer = build("routing", width=WIDTH, heads=4, clusters=2, window=8, membership=LEAKY)
    assert mixer.train()(rows((20,), torch.float32)).metrics["routing_leaky"] == 1


def test_balanced_decodes_by_the_streaming_rule():
    leaky, causal, x = make(membership=LEAKY), make(membership="streaming"), rows((40,))
    state = leaky.new_state(1)
    with torch.no_grad():
        steps = [leaky(part, state=state).output for part in x.split((13, 1, 1, 20, 1, 1, 1, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(steps, 1), causal(x).output, rtol=0, atol=1e-13)
    assert not torch.allclose(leaky(x).output, causal(x).output)


# Reductions to attention that is known


def heads_of(mixer, x):
    """Normalised queries, rotated, and values of the routing heads: [1, T, H, D]."""
    sequence = Sequence.rows(1, x.shape[1])
    q, v = (linear(x).unflatten(-1, (-1, DIM)) for linear in (mixer.query, mixer.value))
    q = torch.nn.functional.layer_norm(q, (DIM,), eps=1e-6)
    return rotate(q, rope_tables(sequence, mixer.options.rope, DIM, x.dtype)), v


def softmax(q, k, v, window=10**9):
    place = torch.arange(q.shape[1])
    seen = (place <= place[:, None]) & (place > place[:, None] - window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"clusters": 1, "window": 50}, 50),
        ({"clusters": 1, "window": 7}, 7),
        ({"clusters": 1, "window": 50, "membership": LEAKY}, 50),
        ({"clusters": 4, "window": 50, "membership": "streaming"}, 50),
        ({"clusters": 1, "window": 50, "membership": "streaming"}, 50),
    ],
    ids=str,
)
def test_one_cluster_is_attention_and_a_window(options, window):
    mixer, x = make(local_heads=0, self_rule="always", **options), rows((50,))
    q, v = heads_of(mixer, x)
    torch.testing.assert_close(mixer(x).output, mixer.output(softmax(q, q, v, window)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("membership", RULES)
def test_the_order_of_centroids_changes_nothing(membership):
    mixer, x = make(membership=membership), rows((60,))
    before = mixer(x).output
    mixer.centroids.mu.copy_(mixer.centroids.mu[:, [2, 0, 1]])
    torch.testing.assert_close(mixer(x).output, before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("membership", ["streaming", LEAKY])
def test_the_length_of_a_centroid_changes_nothing_where_tokens_compete(membership):
    mixer, x = make(membership=membership), rows((60,))
    before = mixer(x).output
    mixer.centroids.mu[:, 1] *= 4.0
    assert torch.equal(mixer(x).output, before)


def test_queries_are_on_the_sphere_and_their_scale_and_mean_do_not_count():
    mixer, x = make(local_heads=0), rows((60,))
    q, _ = heads_of(mixer, x)
    assert ((q.square().sum(-1) - DIM).abs() < 1e-3 * DIM).all()
    before = mixer(x).output
    with torch.no_grad():
        weight = mixer.query.weight.view(HEADS, DIM, WIDTH)
        weight.mul_(3.0).add_(torch.randn(HEADS, 1, WIDTH, dtype=weight.dtype))
    torch.testing.assert_close(mixer(x).output, before, rtol=0, atol=1e-4)  # the epsilon is not scaled
    assert mixer(torch.zeros(1, 20, WIDTH, dtype=x.dtype)).output.eq(0).all()


def test_unrouted_tokens_give_and_get_nothing():
    """One cluster with room for four of fifty tokens: of the others the head is exactly zero, with no gradient."""
    mixer, x = make(local_heads=0, clusters=1, window=4, membership=LEAKY), rows((50,)).requires_grad_()
    with torch.no_grad():
        mixer.output.weight.copy_(torch.eye(WIDTH, HEADS * DIM))
    o = mixer(x).output
    unrouted = o.eq(0).all(-1)[0]
    # the first two heads are what the output shows, and they may choose different tokens
    assert 42 <= int(unrouted.sum()) <= 46
    weight = torch.randn_like(o) * unrouted[:, None]
    assert torch.autograd.grad(o, x, weight)[0].eq(0).all()


@pytest.mark.parametrize("membership", RULES)
def test_equal_tokens_and_two_runs_are_resolved_alike(membership):
    mixer, x = make(torch.float32, membership=membership), rows((60,), torch.float32)
    x = x.repeat_interleave(3, dim=1)
    first = mixer(x).output
    assert torch.equal(first, mixer(x).output)
    expected = oracle(mixer, x, (180,))
    torch.testing.assert_close(first, expected, rtol=0, atol=3e-6)


# Decoding


@pytest.mark.parametrize(
    "options", [{}, {"choices": 2}, {"membership": "streaming"}, {"self_rule": "always"}, {"window": 1}], ids=str
)
def test_rings_wrap_and_rows_of_different_lengths_go_on(options):
    """A hundred tokens through rings of two clusters x 6; rows that stand at different positions, pieces and steps."""
    mixer = make(**{"clusters": 2, **options})
    lengths = [(20, 3, 1), (1, 1, 1), (1, 1, 1), (30, 1, 44), (1, 1, 1), (47, 60, 2)]
    totals = [sum(part[i] for part in lengths) for i in range(3)]
    x = [rows((n,))[0] for n in totals]
    whole = [mixer(row[None]).output[0] for row in x]
    state, seen = mixer.new_state(3), [0, 0, 0]
    with torch.no_grad():
        for part in lengths:
            piece = torch.cat([x[i][s : s + n] for i, (s, n) in enumerate(zip(seen, part, strict=True))])
            expected = torch.cat([whole[i][s : s + n] for i, (s, n) in enumerate(zip(seen, part, strict=True))])
            found = mixer(piece[None], Sequence.packed(part, offsets=seen), state).output[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            seen = [s + n for s, n in zip(seen, part, strict=True)]
    assert (state["count"].sum(-1) >= (2 * 6 if "membership" not in options else 6)).all()


def test_a_state_is_bounded_by_clusters_times_window():
    mixer = make(torch.float32)
    routing, local = HEADS - LOCAL, LOCAL
    slots = routing * 3 * 6 + local * 4
    assert mixer.state_bytes(10**6) == slots * 2 * DIM * 4 + routing * 3 * 8 + 8


def test_adversarial_data_costs_no_more():
    """All tokens in one cluster: as many tiles' scores as when they are shared out evenly, and no key twice."""
    from farspan.kernels.interval import chunked
    from farspan.layers.routing_lists import Row, nearest_lists

    costs = []
    for assigned in (torch.zeros(4096, 2, 1, dtype=torch.int64), torch.randint(0, 16, (4096, 2, 1))):
        lists = nearest_lists(assigned, Row.of(Sequence.rows(1, 4096)), 16, 128, True)
        size = chunked.tile_size(lists.length)
        tensors = lists.queries, lists.keys, lists.first, lists.last, lists.starts, lists.until
        costs.append(sum(len(tile.lows) * size * tile.span for tile in chunked._tiles(*tensors, size)))
    assert costs[0] < 1.5 * costs[1]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"clusters": 0}, "clusters=0 must be at least 1"),
        ({"local_window": 0}, "local_window=0 must be at least 1"),
        ({"choices": 4}, "choices=4 must be from 1 to clusters=3"),
        ({"choices": 2, "membership": "streaming"}, "choices=2 belongs to membership=nearest"),
        ({"membership": "balanced"}, "unknown membership 'balanced'; .*valid: balanced_leaks_future"),
        ({"self_rule": "never"}, "unknown self_rule 'never'"),
        ({"local_heads": 3}, "local_heads=3 must be from 0 to 2 of 3 heads"),
        ({"decay": 1.0}, "decay=1.0 and early_decay=0.99 must be from 0 to below 1"),
        ({"head_dim": 7}, "must be even for rotary positions"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_more_clusters_than_tokens_are_refused_when_a_recipe_is_read(tmp_path):
    from farspan.lm.recipe import load_recipe

    path = tmp_path / "r.yaml"
    path.write_text(
        "extends: recall_tiny.yaml\nmodel: {mixer_pattern: [{mixer: routing, clusters: 100, window: 16}]}\n".replace(
            "recall_tiny.yaml", str(_recipes() / "eval/recall_tiny.yaml")
        )
    )
    with pytest.raises(ValueError, match=r"clusters=100 do not suit rows of 64 tokens: .* about 4"):
        load_recipe(path).decoder_config()


def _recipes():
    from pathlib import Path

    return Path(__file__).parents[2] / "recipes"
