"""Streaming and balanced membership against brute force over every prefix."""

import pytest
import torch

from farspan.layers.routing_membership import Held, balanced, hold, streaming

HEADS, CLUSTERS, TOKENS = 2, 3, 101


def scores(quantum=None, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(HEADS, CLUSTERS, TOKENS)
    return x if quantum is None else (x * quantum).round() / quantum


def best(column, count, window):
    """The `window` best of the first `count` tokens; of equal ones the first."""
    return set(sorted(range(count), key=lambda s: (-column[s], s))[:window])


def brute_force(x, window):
    enters = torch.zeros(x.shape, dtype=torch.bool)
    leaves = torch.full(x.shape, TOKENS)
    for head in range(HEADS):
        for cluster in range(CLUSTERS):
            column, before = x[head, cluster].tolist(), set()
            for time in range(TOKENS):
                now = best(column, time + 1, window)
                assert len(now) <= window
                enters[head, cluster, time] = time in now
                for gone in before - now:
                    leaves[head, cluster, gone] = time
                before = now
    return enters, leaves


windows = pytest.mark.parametrize("window", [1, 2, 7, 40, 200])
quanta = pytest.mark.parametrize("quantum", [None, 4, 0.5])  # of 0.5 nearly all scores are equal


@windows
@quanta
def test_streaming_is_the_best_of_every_prefix(window, quantum):
    x = scores(quantum)
    found, (enters, leaves) = streaming(x, window), brute_force(x, window)
    assert torch.equal(found.enters, enters)
    assert torch.equal(found.leaves[enters], leaves[enters])


@windows
@quanta
def test_in_the_end_it_holds_what_the_balanced_rule_does(window, quantum):
    x = scores(quantum)
    found = streaming(x, window)
    assert torch.equal(found.enters & (found.leaves == TOKENS), balanced(x, window).enters)
    source, taken = hold(x, found, window)
    held = torch.zeros(x.shape).scatter_add_(-1, source, taken.float())
    assert torch.equal(held.bool(), balanced(x, window).enters)


@windows
@quanta
@pytest.mark.parametrize("cut", [1, 32, 60, 100])
def test_going_on_equals_the_whole(window, quantum, cut):
    x = scores(quantum)
    whole, first, rest = streaming(x, window), x[..., :cut], x[..., cut:]
    source, taken = hold(first, streaming(first, window), window)
    held = Held(first.gather(-1, source).masked_fill(~taken, float("-inf")), source)
    # places are in no order
    mixed = torch.randperm(window)
    held, source, taken = Held(*(part[..., mixed] for part in held)), source[..., mixed], taken[..., mixed]
    found = streaming(rest, window, held)
    assert torch.equal(found.enters, whole.enters[..., cut:])
    inside = found.enters
    assert torch.equal(found.leaves[inside] + cut, whole.leaves[..., cut:][inside])
    assert torch.equal(found.leaves_held[taken] + cut, whole.leaves.gather(-1, source)[taken].clamp(min=cut))


def test_admissions_are_as_many_as_expected():
    """w (1 + H_T - H_w) for scores in random order."""
    torch.manual_seed(0)
    tokens, window, clusters = 2048, 64, 200
    found = streaming(torch.randn(1, clusters, tokens), window)
    counts = found.enters.sum(-1).float()
    expected = window * (1 + sum(1 / n for n in range(window + 1, tokens + 1)))
    deviation = counts.std() / clusters**0.5
    assert abs(float(counts.mean()) - expected) < 4 * deviation
    assert expected == pytest.approx(285, abs=1)


@pytest.mark.parametrize("window", [1, 40, 200])
def test_balanced_groups_have_exactly_window_members(window):
    found = balanced(scores(0.5), window)
    assert found.enters.sum(-1).eq(min(window, TOKENS)).all()
    for head in range(HEADS):
        for cluster in range(CLUSTERS):
            column = scores(0.5)[head, cluster].tolist()
            assert set(found.enters[head, cluster].nonzero()[:, 0].tolist()) == best(column, TOKENS, window)


def test_many_tokens_are_in_no_balanced_group():
    """With C w = T about 37 % of tokens are in none, where scores are independent."""
    torch.manual_seed(0)
    times = balanced(torch.randn(50, 8, 256), 32).enters.sum(1)
    assert float((times == 0).float().mean()) == pytest.approx((1 - 1 / 8) ** 8, abs=0.02)
