"""The bigram baseline against its definition, pair by pair."""

from collections import Counter

import numpy as np
import pytest
import torch

from farspan.lm.train.bigram import Bigram

VOCABULARY = 6


def brute_force(pairs):
    """p[v][w] by the definition, with counts in dictionaries."""
    d = 0.75
    c, first, second = Counter(pairs), Counter(v for v, _ in pairs), Counter(w for _, w in pairs)
    n = Counter(v for v, _ in c)
    p = np.zeros((VOCABULARY, VOCABULARY))
    for v in range(VOCABULARY):
        for w in range(VOCABULARY):
            total = len(pairs)
            unigram = max(second[w] - d, 0) / total + d * len(second) / total / VOCABULARY
            p[v, w] = max(c[v, w] - d, 0) / first[v] + d * n[v] / first[v] * unigram if first[v] else unigram
    return p


def probabilities(model):
    """[v, w] read back from single-pair losses."""
    return np.array(
        [[np.exp(-model.loss([(np.array([v]), np.array([w]))])) for w in range(VOCABULARY)] for v in range(VOCABULARY)]
    )


@pytest.fixture
def pairs():
    r = np.random.default_rng(0)
    tokens = r.choice(VOCABULARY - 1, 60, p=[0.5, 0.2, 0.15, 0.1, 0.05])  # the last token never occurs
    return list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


@pytest.mark.parametrize("pieces", [1, 7])
def test_equals_the_definition_and_sums_to_one(pairs, pieces):
    model = Bigram(VOCABULARY)
    for piece in np.array_split(np.array(pairs), pieces):
        model.update(piece[:, 0], piece[:, 1])
    found = probabilities(model)
    np.testing.assert_allclose(found, brute_force(pairs), rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert found.min() > 0


def test_updates_after_a_loss_are_counted(pairs):
    model = Bigram(VOCABULARY)
    v, w = np.array(pairs).T
    model.update(v[:20], w[:20])
    probabilities(model)
    model.update(v[20:], w[20:])
    np.testing.assert_allclose(probabilities(model), brute_force(pairs), rtol=1e-12)


def test_loss_is_the_mean_over_valid_tokens(pairs):
    model = Bigram(VOCABULARY)
    v, w = torch.tensor(pairs).T
    model.update(v[None], w[None])
    p = brute_force(pairs)
    labels = torch.tensor([[1, -100, 5], [0, 2, -100]])
    ids = torch.tensor([[0, 1, 2], [3, 5, 1]])
    expected = -np.log([p[0, 1], p[2, 5], p[3, 0], p[5, 2]]).mean()
    assert model.loss([(ids[:1], labels[:1]), (ids[1:], labels[1:])]) == pytest.approx(expected, rel=1e-12)


def test_ignored_labels_are_not_counted(pairs):
    plain, masked = Bigram(VOCABULARY), Bigram(VOCABULARY)
    v, w = np.array(pairs).T
    plain.update(v, w)
    masked.update(np.append(v, 5), np.append(w, -100))
    np.testing.assert_array_equal(probabilities(plain), probabilities(masked))


def test_untrained_is_uniform():
    np.testing.assert_allclose(probabilities(Bigram(VOCABULARY)), 1 / VOCABULARY)


def test_no_valid_token_is_refused():
    with pytest.raises(ValueError, match="at least one valid token"):
        Bigram(VOCABULARY).loss([(np.array([1]), np.array([-100]))])
