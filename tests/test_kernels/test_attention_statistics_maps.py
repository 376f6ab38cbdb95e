"""Effective maps: times the values they are the output of their operator, and blocks of them are parts of the whole."""

import pytest
import torch

from farspan.kernels.attention_statistics import effective_statistics
from farspan.kernels.attention_statistics.cca import CoreMap
from farspan.kernels.attention_statistics.rat import RecurrentMap
from farspan.kernels.attention_statistics.reference import map_of
from farspan.kernels.attention_statistics.softplus import SoftplusMap
from farspan.kernels.cca import Piece, core_attention, cores_seen, pool_groups
from farspan.kernels.rat import rat
from farspan.kernels.softplus import Config, attend, normalise

LENGTHS = (1, 70, 2, 37, 150)
TOKENS = sum(LENGTHS)


def randn(*shape, dtype=torch.float64):
    return torch.randn(1, TOKENS, *shape, dtype=dtype)


def documents_of_a_map(a):
    """No weight goes to another document or to a later token."""
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    foreign = document[:, None] != document
    assert not a[:, foreign].any() and not a.triu(1).any() and (a >= 0).all()


def blocks_are_parts(effective):
    """Row moments, and statistics by blocks, are those of the whole map."""
    torch.manual_seed(3)
    rows = torch.rand(TOKENS) > 0.3
    for options in ({}, {"waad_window": 20, "horizon": (0, 40)}, {"horizon": (5, 1000)}):
        expected = effective_statistics(effective, rows, backend="reference", **options)
        found = effective_statistics(effective, rows, **options)
        for ours, theirs in zip(found[:4], expected[:4], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


SOFTPLUS = {
    "lssa": {"power": 0},
    "lssar": {"power": 15},
    "window": {"power": 3, "window": 9},
    "dead rows": {"power": 3, "dead_row": "zero", "phi": "relu"},
    "eps": {"power": 2.5, "eps": 1e-8},
    "exp": {"power": 2, "phi": "exp"},
    "no l1": {"power": 0, "l1": False, "phi": "sigmoid", "length_scale": "log_n"},
}


@pytest.mark.parametrize("options", SOFTPLUS.values(), ids=SOFTPLUS)
def test_softplus(options):
    torch.manual_seed(0)
    config = Config(**options)
    q, k, v = normalise(randn(4, 8)), normalise(randn(2, 8)), randn(2, 8)
    effective = SoftplusMap(q, k, LENGTHS, config)
    a = map_of(effective)
    documents_of_a_map(a)
    o = attend(q, k, v, LENGTHS, config, backend="reference")
    torch.testing.assert_close(torch.einsum("hts,shd->thd", a, v[0].repeat_interleave(2, 1)), o[0])
    if config.l1 and not config.eps and config.phi == "softplus":
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
    blocks_are_parts(effective)


CORES = {
    "published": {},
    "narrow window": {"window": 3, "group": 7},
    "mean": {"pool": "mean", "core_bias": 1.2},
    "key-value cores": {"core_heads": "kv"},
    "two softmaxes": {"two": True},
}


@pytest.mark.parametrize("options", CORES.values(), ids=CORES)
def test_cca(options):
    torch.manual_seed(0)
    group, window = options.get("group", 4), options.get("window", 13)
    pool, bias = options.get("pool", "significance"), options.get("core_bias", 0.0)
    q, k, v = 2 * randn(4, 8), randn(2, 8), randn(2, 8)
    pieces, starts, token, core = [], [], 0, 0
    for length in LENGTHS:
        count = cores_seen(length - 1, group, window)
        pieces.append(Piece(length, 0, 0, token, core))
        starts.append(token + group * torch.arange(count))
        token, core = token + length, core + count
    pieces, starts = tuple(pieces), torch.cat(starts)
    q_end = q[:, starts + group - 1]
    cores = pool_groups(q_end, k, v, starts, group, pool=pool, core_heads=options.get("core_heads", "q"))
    inputs = (q, k, v, *cores, pieces, group, window)
    share = None
    o = core_attention(*inputs, core_bias=bias, backend="reference")
    if options.get("two"):
        sees = torch.tensor([cores_seen(t, group, window) > 0 for length in LENGTHS for t in range(length)])
        share = sees[:, None] * torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
        raw, far = (core_attention(*inputs, parts=parts, backend="reference") for parts in ("raw", "cores"))
        o = torch.lerp(raw, far, share[..., None])
    effective = CoreMap(q, k, cores[0], pieces, starts, group, window, pool=pool, core_bias=bias, share=share)
    a = map_of(effective)
    documents_of_a_map(a)
    torch.testing.assert_close(torch.einsum("hts,shd->thd", a, v[0].repeat_interleave(2, 1)), o[0])
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
    blocks_are_parts(effective)


def rope(chunks, dim):
    angles = torch.arange(chunks, dtype=torch.float64)[:, None] * torch.rand(dim // 2, dtype=torch.float64)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("chunk", [1, 4, 16, 33])
@pytest.mark.parametrize(("heads", "groups", "dim", "turned"), [(4, 2, 1, False), (4, 4, 8, True), (6, 2, 4, True)])
def test_rat(chunk, heads, groups, dim, turned):
    """Of one channel, and of channels with one gate in common, the map times v is the operator's output."""
    torch.manual_seed(0)
    q, k, v = 2 * randn(groups, dim), randn(groups, dim), randn(heads, dim)
    gate, bias = randn(heads, 1).expand(-1, -1, -1, dim), torch.rand(heads, 1, dtype=torch.float64).expand(-1, dim)
    tables = rope(200, dim) if turned else None
    effective = RecurrentMap(q, k, gate, bias, LENGTHS, chunk, tables)
    a = map_of(effective)
    documents_of_a_map(a)
    z = torch.full_like(v, 50.0)
    y, _ = rat(q, k, v, gate, bias, z, LENGTHS, chunk, rope=tables, backend="reference")
    torch.testing.assert_close(torch.einsum("hts,shd->thd", a, v[0]), y[0])
    assert (a.sum(-1) < 1).all()
    blocks_are_parts(effective)


def test_rat_averages_over_channels():
    """With a gate for each channel, the map is the mean of the channels' maps."""
    torch.manual_seed(0)
    q, k, gate, bias = randn(1, 4), randn(1, 4), 2 * randn(1, 4), torch.rand(1, 4, dtype=torch.float64)
    effective = RecurrentMap(q, k, gate, bias, LENGTHS, 8, None)
    a = map_of(effective)
    z = torch.full((1, TOKENS, 1, 4), 50.0, dtype=torch.float64)
    for token in (3, 40, 100, TOKENS - 30):
        v = torch.zeros_like(z)
        v[0, token] = 1
        y, _ = rat(q, k, v, gate, bias, z, LENGTHS, 8, backend="reference")
        torch.testing.assert_close(a[0, :, token], y[0, :, 0].mean(-1))
    blocks_are_parts(effective)


def test_what_has_no_weights():
    q, k = randn(2, 8), randn(2, 8)
    with pytest.raises(ValueError, match="gelu"):
        SoftplusMap(q, k, LENGTHS, Config(power=0, phi="gelu"))
    with pytest.raises(ValueError, match="pool=max"):
        CoreMap(q, k, q[:, :0], (Piece(TOKENS, 0, 0, 0, 0),), torch.zeros(0, dtype=torch.int64), 4, 8, pool="max")
