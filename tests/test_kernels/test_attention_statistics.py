"""WAAD, FAI and row distances: a loop over tokens, analytic maps, and blocks against whole maps in float64."""

import math

import pytest
import torch

from farspan.kernels.attention_statistics import (
    EffectiveMap,
    Moments,
    attention_statistics,
    chunked,
    effective_statistics,
)
from farspan.kernels.attention_statistics.bands import future_rows
from farspan.kernels.attention_statistics.reference import statistics_of_map
from farspan.kernels.window import window_attention

RAGGED = (1, 70, 2, 37, 130, 1)


def inputs(lengths, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    q, k = (torch.randn(1, sum(lengths), n, head_dim, dtype=dtype) for n in (heads, kv_heads))
    return 2 * q, k


def responses(lengths, seed=1, share=0.7):
    """Prompts of some tokens, then the response, with a few tokens in it that carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for length in lengths:
        row = torch.arange(length) >= int((1 - share) * length)
        parts.append(row & (torch.rand(length, generator=generator) > 0.1))
    return torch.cat(parts)


def naive(q, k, rows, lengths, window, clip, horizon):
    """From the words of the definition, one token at a time."""
    tokens, heads = q.shape[1:3]
    a = torch.zeros(heads, tokens, tokens, dtype=q.dtype)
    ends = [sum(lengths[: i + 1]) for i, length in enumerate(lengths) for _ in range(length)]
    begins = [sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]
    for t in range(tokens):
        low = max(begins[t], 0 if window is None else t - window + 1)
        for h in range(heads):
            scores = k[0, low : t + 1, h // (heads // k.shape[2])] @ q[0, t, h] / math.sqrt(q.shape[3])
            a[h, t, low : t + 1] = scores.softmax(0)
    distance, waad, fai = (torch.zeros(tokens, heads, dtype=q.dtype) for _ in range(3))
    count = torch.zeros(tokens, dtype=torch.int64)
    for t in rows.nonzero()[:, 0].tolist():
        for s in range(t + 1):
            distance[t] += a[:, t, s] * (t - s)
            waad[t] += a[:, t, s] * min(t - s, clip)
        seen = [u for u in range(t + horizon[0], min(ends[t] - 1, t + horizon[1]) + 1) if rows[u]]
        count[t] = len(seen)
        if seen:
            fai[t] = a[:, seen, t].mean(1)
    return distance, waad, fai, count


def compare(found, expected, tolerances=(1e-9, 1e-9, 1e-9)):
    for name, ours, theirs, tolerance in zip(("distance", "waad", "fai"), found, expected, tolerances, strict=False):
        worst = (ours - theirs).abs().max().item()
        assert worst <= tolerance, f"{name}: {worst}"
    assert torch.equal(found.count, expected[3])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("window", "horizon"), [(None, (3, 20)), (None, (0, 1000)), (5, (2, 9)), (40, (10, 100))])
def test_backends_equal_a_loop(backend, window, horizon):
    lengths = (1, 40, 2, 37)
    q, k = inputs(lengths)
    rows = responses(lengths)
    expected = naive(q, k, rows, lengths, window, 7, horizon)
    options = {"window": window, "waad_window": 7, "horizon": horizon, "backend": backend}
    compare(attention_statistics(q, k, rows, lengths, **options), expected)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("lengths", [(64, 64, 64), (129,), RAGGED])
@pytest.mark.parametrize("window", [None, 16])
def test_single_precision_is_within_the_limits(kv_heads, lengths, window):
    q, k = inputs(lengths, kv_heads=kv_heads)
    rows = responses(lengths)
    expected = attention_statistics(q, k, rows, lengths, window=window, backend="reference")
    found = attention_statistics(q.float(), k.float(), rows, lengths, window=window, backend="chunked")
    compare(found, expected, (1e-4, 5e-5, 1e-6))
    assert (found.lse - expected.lse).abs().max() < 1e-5
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("lengths", [(64, 64, 64), (129,), RAGGED])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("tiles", [(64, 4096, 2**18), (16, 24, 500)])
def test_with_the_log_sum_exp_of_the_layer(monkeypatch, kv_heads, lengths, window, tiles):
    for name, value in zip(("ROWS", "KEYS", "TILE"), tiles, strict=True):
        monkeypatch.setattr(chunked, name, value)
    q, k = inputs(lengths, kv_heads=kv_heads)
    rows = responses(lengths)
    expected = attention_statistics(q, k, rows, lengths, window=window, backend="reference")
    options = {"window": window, "backend": "chunked", "lse": expected.lse}
    compare(attention_statistics(q, k, rows, lengths, **options), expected)
    found = attention_statistics(q.float(), k.float(), rows, lengths, **options)
    compare(found, expected, (1e-4, 5e-5, 1e-6))


@pytest.mark.parametrize("length", [1, 9, 10, 11, 12])
def test_the_edges_of_the_horizon(length):
    q, k = inputs((length + 5,))
    rows = torch.arange(length + 5) >= 5
    found = attention_statistics(q, k, rows, (length + 5,))
    compare(found, naive(q, k, rows, (length + 5,), None, 10, (10, 100)))
    assert found.count[5:].tolist() == [max(0, length - 10 - s) for s in range(length)]


def test_prompts_alone_give_nothing():
    q, k = inputs((20, 30))
    found = attention_statistics(q, k, torch.zeros(50, dtype=torch.bool), (20, 30))
    assert not any(x.any() for x in found[:4])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_soft_caps_scales_and_pieces(backend):
    q, k = inputs((30, 50))
    rows = responses((30, 50))
    scale = torch.rand(4, dtype=torch.float64) + 0.1
    found = attention_statistics(q, k, rows, (30, 50), scale=scale, softcap=1.5, backend=backend)
    scores = torch.einsum("ihd,jhd->hij", q[0], k[0].repeat_interleave(2, 1)) * scale[:, None, None]
    same = torch.arange(80) >= 30
    hidden = (same[:, None] != same) | (torch.arange(80)[:, None] < torch.arange(80))
    a = (1.5 * (scores / 1.5).tanh()).masked_fill(hidden, -math.inf).softmax(-1)
    compare(found, statistics_of_map(a, rows, (30, 50), 10, (10, 100)))
    # pieces cut what is seen, the horizon still counts the rows of the whole document
    cut = attention_statistics(q, k, rows, (16, 14, 16, 16, 16, 2), documents=(30, 50), backend=backend)
    assert torch.equal(cut.count, found.count)
    inner = attention_statistics(q, k, rows, (16, 14, 16, 16, 16, 2), backend=backend)
    torch.testing.assert_close(cut.distance, inner.distance)
    torch.testing.assert_close(cut.fai * cut.count[:, None], inner.fai * inner.count[:, None])


def test_row_distances_equal_blocks_of_rows():
    q, k = inputs((700, 90), dtype=torch.float32)
    rows = responses((700, 90))
    flash = attention_statistics(q, k, rows, (700, 90), backend="chunked")
    by_rows = attention_statistics(q, k, rows, (700, 90), softcap=1e6, backend="chunked")
    compare(flash, by_rows, (2e-3, 1e-4, 1e-6))  # tanh(x / 1e6) itself costs a few digits


def test_the_log_sum_exp_is_that_of_attention():
    from farspan.kernels.window.chunked import _window_forward

    q, k = inputs(RAGGED, dtype=torch.float32)
    for window in (8, 1000):
        _, lse = _window_forward(q, k, k, list(RAGGED), [0] * len(RAGGED), window, 8**-0.5, 64)
        found = attention_statistics(q, k, responses(RAGGED), RAGGED, window=window)
        assert (found.lse - lse).abs().max() < 2e-6
    assert window_attention  # the operator whose log-sum-exp this is


class Given(EffectiveMap):
    """A map that is written out."""

    def __init__(self, a, documents):
        self.a, self.documents, self.heads, self.device = a, documents, len(a), a.device

    def moments(self):
        at = torch.arange(self.tokens)
        mass = self.a.sum(-1)
        return Moments(((self.a * (at[:, None] - at)).sum(-1) / mass.clamp(min=1e-6)).t(), mass.t())

    def block(self, rows, keys):
        return self.a[:, rows, keys].clone()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
class TestAnalyticMaps:
    def run(self, a, backend, **options):
        tokens = a.shape[-1]
        effective = Given(a[None].double(), (tokens,))
        return effective_statistics(effective, torch.ones(tokens, dtype=torch.bool), backend=backend, **options)

    def test_identity(self, backend):
        found = self.run(torch.eye(150), backend)
        assert not found.distance.any() and found.waad.abs().max() == 0 and not found.fai.any()
        found = self.run(torch.eye(150), backend, horizon=(0, 20))
        torch.testing.assert_close(found.fai[:, 0], 1 / found.count.double())

    def test_the_token_before(self, backend):
        a = torch.diag(torch.ones(149), -1)
        a[0, 0] = 1
        found = self.run(a, backend)
        assert (found.waad[1:] == 1).all() and (found.distance[1:] == 1).all() and found.waad[0] == 0

    def test_uniform(self, backend):
        n, w = 150, 10
        a = torch.ones(n, n, dtype=torch.float64).tril() / torch.arange(1, n + 1)[:, None]
        found = self.run(a, backend)
        t = torch.arange(n).double()
        far = (w * (w - 1) / 2 + w * (t + 1 - w)) / (t + 1)
        torch.testing.assert_close(found.distance[:, 0], t / 2)
        torch.testing.assert_close(found.waad[:, 0], torch.where(t <= w, t / 2, far))
        for s in (0, 40, 139):
            expected = (1 / (torch.arange(s + 10, min(n - 1, s + 100) + 1) + 1)).mean()
            assert found.fai[s, 0] == pytest.approx(expected.item())

    def test_the_first_token(self, backend):
        a = torch.zeros(150, 150)
        a[:, 0] = 1
        found = self.run(a, backend)
        t = torch.arange(150.0).double()
        torch.testing.assert_close(found.distance[:, 0], t)
        torch.testing.assert_close(found.waad[:, 0], t.clamp(max=10))
        assert found.fai[0] == 1 and not found.fai[1:].any()

    def test_rows_without_mass_count_as_nothing(self, backend):
        a = torch.zeros(60, 60)
        a[30:, 3] = 0.5
        rows = torch.ones(60, dtype=torch.bool)
        found = effective_statistics(Given(a[None].double(), (60,)), rows, backend=backend)
        assert not found.waad[:30].any() and not found.distance[:30].any()
        assert (found.waad[30:] == 10).all() and found.fai[3] == pytest.approx(30 / 47)


def test_bounds_and_mass():
    q, k = inputs(RAGGED)
    rows = responses(RAGGED)
    found = attention_statistics(q, k, rows, RAGGED, horizon=(0, 10**6), waad_window=10)
    wider = attention_statistics(q, k, rows, RAGGED, horizon=(0, 10**6), waad_window=11)
    assert (found.waad >= -1e-12).all() and (found.waad <= 10).all()
    assert (found.fai >= 0).all() and (found.fai <= 1).all()
    assert (found.waad <= found.distance + 1e-9).all() and (found.waad <= wider.waad + 1e-9).all()
    everything = torch.ones_like(rows)
    found = attention_statistics(q, k, everything, RAGGED, horizon=(0, 10**6))
    mass = (found.count[:, None] * found.fai).sum(0)
    torch.testing.assert_close(mass, torch.full_like(mass, len(rows)))


def test_prompt_rows_and_neighbours_change_nothing():
    lengths = (40, 60)
    q, k = inputs(lengths)
    rows = responses(lengths)
    before = attention_statistics(q, k, rows, lengths)
    q = torch.where(rows[:, None, None], q, torch.randn_like(q))  # queries of rows that do not count
    k = k.clone()
    k[:, :40] = torch.randn_like(k[:, :40])  # another document
    after = attention_statistics(q, k, rows, lengths)
    for ours, theirs in zip(before[:3], after[:3], strict=True):
        torch.testing.assert_close(ours[40:], theirs[40:])
        alone = attention_statistics(q[:, 40:], k[:, 40:], rows[40:], lengths[1:])
    for ours, theirs in zip(after[:3], alone[:3], strict=True):
        torch.testing.assert_close(ours[40:], theirs, atol=2e-6, rtol=0)


def test_group_first_equals_head_first():
    q, k = inputs((120,))
    rows = responses((120,))
    from farspan.kernels.attention_statistics.reference import softmax_map

    a, _ = softmax_map(q, k, (120,), None, 8**-0.5, None)
    group = [0, 2, 3]
    first = statistics_of_map(a[group].mean(0, keepdim=True), rows, (120,), 10, (10, 100))
    found = attention_statistics(q, k, rows, (120,))
    torch.testing.assert_close(first[1][:, 0], found.waad[:, group].mean(1))
    torch.testing.assert_close(first[2][:, 0], found.fai[:, group].mean(1))


def test_half_precision_against_its_rounded_inputs():
    lengths = (300,)
    q, k = inputs(lengths, head_dim=64, dtype=torch.bfloat16)
    rows = responses(lengths)
    exact = attention_statistics(q.double(), k.double(), rows, lengths, backend="reference")
    found = attention_statistics(q, k, rows, lengths)
    assert found.waad.dtype == torch.float32
    compare(found, exact, (1e-3, 1e-3, 1e-3))


def test_future_rows_by_counting():
    rows = responses(RAGGED)
    count = future_rows(rows, RAGGED, (3, 11))
    start = 0
    for length in RAGGED:
        for s in range(length):
            seen = rows[start + s + 3 : start + min(length, s + 12)].sum() if s + 3 < length else 0
            assert count[start + s] == (seen if rows[start + s] else 0)
        start += length


def test_what_is_refused():
    q, k = inputs((20,))
    rows = torch.ones(20, dtype=torch.bool)
    with pytest.raises(ValueError, match="waad_window=0"):
        attention_statistics(q, k, rows, (20,), waad_window=0)
    with pytest.raises(ValueError, match="horizon"):
        attention_statistics(q, k, rows, (20,), horizon=(5, 2))
    with pytest.raises(ValueError, match="bool"):
        attention_statistics(q, k, rows.long(), (20,))
    with pytest.raises(ValueError, match="lse is"):
        attention_statistics(q, k, rows, (20,), lse=torch.zeros(q.shape[2], 20))
    with pytest.raises(ValueError, match="pieces"):
        attention_statistics(q, k, rows, (19,))
    with pytest.raises(ValueError, match="shapes disagree"):
        attention_statistics(q, k[..., :4], rows, (20,))
    with pytest.raises(ValueError, match="window=0"):
        attention_statistics(q, k, rows, (20,), window=0)


@pytest.mark.parametrize("options", [{}, {"window": 65}, {"softcap": 20.0}])
def test_memory_is_linear_in_the_tokens(options):
    from farspan.eval.memory import peak_bytes

    def bytes_of(tokens):
        q, k = torch.randn(1, tokens, 2, 16), torch.randn(1, tokens, 1, 16)
        rows = torch.arange(tokens) > 100
        return peak_bytes(lambda: attention_statistics(q, k, rows, (tokens,), **options))

    small, large = bytes_of(4096), bytes_of(8192)
    blocks = 4 * 4 * 4 * 1024 * 1024 if options.get("softcap") else 0  # buffers of a fixed size
    assert large < 2.1 * small + blocks
    assert large < 8192**2  # a quarter of a map of one head
