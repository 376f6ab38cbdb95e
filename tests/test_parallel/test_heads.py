"""Ulysses: dealing out heads, exact attention for any number of heads and key heads."""

import pytest
import torch

from farspan.parallel.heads import grouped_to_heads, own_heads, plan_heads, to_heads, to_tokens

# Query heads, key heads, ranks: divisible, key heads on several ranks, one key head, heads that do not divide.
SIZES = [(4, 4, 2), (4, 2, 4), (4, 1, 4), (5, 1, 2), (6, 2, 4), (8, 2, 3), (9, 3, 4)]
TOKENS, CHANNELS = 3, 4  # of each rank, of each head

sizes = pytest.mark.parametrize(("heads", "key_heads", "ranks"), SIZES)


def whole_row(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, *shape, CHANNELS, generator=generator, dtype=torch.float64)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention [1, T, H, D]; query head h reads key head h // (H / Hk)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


# The plan


@sizes
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_are_dealt_out_once_with_what_they_read(heads, key_heads, ranks, interleaved):
    plan = plan_heads(heads, key_heads, ranks, interleaved)
    assert [head for own in plan.queries for head in own] == list(range(heads))
    counts = [len(own) for own in plan.queries]
    assert max(counts) - min(counts) <= 1 and plan.load == heads / ranks / max(counts)
    for own, keys, reads in zip(plan.queries, plan.keys, plan.reads, strict=True):
        expected = [head % key_heads if interleaved else head // (heads // key_heads) for head in own]
        assert [keys[read] for read in reads] == expected and sorted(set(expected)) == list(keys)


def test_load_is_the_busy_share_of_the_ranks():
    assert plan_heads(8, 8, 4).load == 1
    assert plan_heads(5, 1, 2).load == pytest.approx(5 / 6)
    assert plan_heads(9, 3, 4).load == 0.75


@pytest.mark.parametrize(("heads", "ranks"), [(1, 2), (3, 4)])
def test_fewer_heads_than_ranks_are_refused(heads, ranks):
    with pytest.raises(ValueError, match=rf"{heads} heads are fewer than {ranks} .*use parallel\.ulysses={heads} or"):
        plan_heads(heads, 1, ranks)


# The exchange


def round_trip(mesh, heads):
    """Whether a rank gets all tokens of its heads, and its tokens come back; and the error of the gradient, which
    arrives transposed.
    """
    axis, lists = mesh.ulysses, plan_heads(heads, heads, mesh.ulysses.size).queries
    x, weight = (whole_row(axis.size * TOKENS, heads, seed=seed) for seed in (0, 1))
    own = slice(axis.rank * TOKENS, (axis.rank + 1) * TOKENS)
    local = x[:, own].clone().requires_grad_()
    there = to_heads(local, lists, axis)
    back = to_tokens(there, lists, axis)
    mine = weight[:, :, list(lists[axis.rank])].permute(3, 0, 2, 1).contiguous()
    (gradient,) = torch.autograd.grad((there.permute(3, 0, 2, 1) * mine).sum(), local)
    same = torch.equal(there, x[:, :, list(lists[axis.rank])]) and torch.equal(back, local)
    return same, error(gradient, weight[:, own])


@pytest.mark.parametrize(("heads", "ranks"), [(1, 1), (4, 2), (5, 2), (4, 4), (8, 3), (9, 4)])
def test_tokens_to_heads_and_back(run_distributed, heads, ranks):
    assert run_distributed(round_trip, (1, ranks), heads) == [(True, 0.0)] * ranks


def attends(mesh, heads, key_heads, interleaved):
    """Errors of the output and of the gradients of q, k and v on this rank's tokens."""
    axis = mesh.ulysses
    plan, tokens = plan_heads(heads, key_heads, axis.size, interleaved), axis.size * TOKENS
    rows = [whole_row(tokens, count, seed=seed) for seed, count in enumerate((heads, key_heads, key_heads))]
    weight, own = whole_row(tokens, heads, seed=3), slice(axis.rank * TOKENS, (axis.rank + 1) * TOKENS)
    whole = [x.clone().requires_grad_() for x in rows]
    q, k, v = whole
    if interleaved:
        k, v = (x.repeat(1, 1, heads // key_heads, 1) for x in (k, v))
    expected = attend(q, k, v)
    local = [x[:, own].clone().requires_grad_() for x in rows]
    output = to_tokens(attend(*grouped_to_heads(*local, plan, axis)), plan.queries, axis)
    gradients = torch.autograd.grad((output * weight[:, own]).sum(), local)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), whole)
    pairs = [(output, expected), *zip(gradients, expected_gradients, strict=True)]
    return [error(found, reference[:, own]) for found, reference in pairs]


@sizes
@pytest.mark.parametrize("interleaved", [False, True])
def test_attention_of_own_heads_equals_that_of_all(run_distributed, heads, key_heads, ranks, interleaved):
    for errors in run_distributed(attends, (1, ranks), heads, key_heads, interleaved):
        assert all(error <= 1e-12 for error in errors)


def sums_own(mesh, heads):
    """The gradient that this rank gives a per-head parameter, and whether it used its own rows."""
    axis = mesh.ulysses
    plan = plan_heads(heads, heads, axis.size)
    parameter = torch.arange(2.0 * heads).view(heads, 2).requires_grad_()
    own = own_heads(parameter, plan, axis)
    rows = list(plan.queries[axis.rank])
    (gradient,) = torch.autograd.grad((own * (parameter.detach()[rows] + 1)).sum(), parameter)
    return torch.equal(own, parameter[rows]), gradient


@pytest.mark.parametrize(("heads", "ranks"), [(3, 1), (4, 2), (5, 3), (9, 4)])
def test_gradients_of_own_heads_are_complete_over_the_ranks(run_distributed, heads, ranks):
    results = run_distributed(sums_own, (1, ranks), heads)
    assert all(same for same, _ in results)
    assert torch.equal(sum(gradient for _, gradient in results), torch.arange(2.0 * heads).view(heads, 2) + 1)
