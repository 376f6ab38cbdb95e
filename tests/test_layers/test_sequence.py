"""The packed row, rotary tables and strict options."""

import math

import pytest
import torch

from farspan.layers import Sequence, build
from farspan.layers.mlp import MLP
from farspan.layers.rotary import Rope, rope_tables, rotate


def test_positions_and_documents():
    sequence = Sequence.packed((2, 1, 3), offsets=(0, 5, 1))
    assert sequence.positions.tolist() == [0, 1, 5, 1, 2, 3]
    assert sequence.cu_seqlens.tolist() == [0, 2, 3, 6] and sequence.cu_seqlens.dtype == torch.int32
    assert sequence.document_of_token.tolist() == [0, 0, 1, 2, 2, 2]
    assert sequence.totals == (2, 6, 4) and not sequence.fresh and not sequence.single_tokens


def test_tables_are_built_once():
    sequence, calls = Sequence.rows(2, 3), []
    for _ in range(3):
        assert sequence.table("x", lambda: calls.append(1) or len(calls)) == 1


@pytest.mark.parametrize(("lengths", "offsets"), [((), None), ((1, 0), None), ((2,), (1, 2)), ((2,), (-1,))])
def test_bad_lengths_are_refused(lengths, offsets):
    with pytest.raises(ValueError, match="document lengths"):
        Sequence.packed(lengths, offsets=offsets)


def test_rotation_is_that_of_complex_numbers():
    sequence = Sequence.packed((7,), offsets=(1000,))
    x = torch.randn(1, 7, 2, 8, dtype=torch.float64)
    turned = rotate(x, rope_tables(sequence, Rope(), 8, x.dtype))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = sequence.positions[:, None, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), rtol=0, atol=1e-12)


def test_partial_rotation_leaves_the_rest():
    x = torch.randn(1, 5, 2, 8)
    turned = rotate(x, rope_tables(Sequence.rows(1, 5), Rope(frequencies=(1.0, 0.1)), 8, x.dtype))
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[:, 1:, :, :4], x[:, 1:, :, :4])


def test_far_positions_keep_their_angle():
    sequence = Sequence.packed((1,), offsets=(10_000_019,))
    cos, _ = rope_tables(sequence, Rope(), 8, torch.float32)
    assert cos[0, 0, 0] == pytest.approx(float(torch.tensor(10_000_019.0, dtype=torch.float64).cos()), abs=1e-6)


@pytest.mark.parametrize("name", ["softmax", "window"])
def test_options_do_something(name):
    """Every option changes the output (an option that no test reads is a defect)."""
    x = torch.randn(1, 40, 16)

    def output(**options):
        torch.manual_seed(0)
        mixer = build(name, width=16, heads=4, **options)
        for norm in ("query_norm", "key_norm"):
            if options.get("qk_norm"):
                torch.nn.init.uniform_(getattr(mixer.projections, norm).weight)
        return mixer(x).output

    plain = output()
    for options in (
        {"head_dim": 8},
        {"bias": True},
        {"kv_heads": 2},
        {"rope": None},
        {"rope": Rope(theta=100.0)},
        {"rope": Rope(frequencies=(1.0,))},
        {"qk_norm": True},
    ):
        assert not torch.allclose(output(**options), plain), options
    assert not torch.allclose(output(qk_norm=True, eps=1.0), output(qk_norm=True))
    if name == "window":
        assert not torch.allclose(output(window=3), plain)


@pytest.mark.parametrize(("chunk", "largest"), [(1, 0.0), (2, 0.0), (3, math.log(2)), (16, math.log(15))])
def test_rat_gates_start_with_the_published_time_constants(chunk, largest):
    bias = build("rat", width=256, heads=4, chunk=chunk).gate_bias
    assert bias.min() >= 0 and bias.max() <= largest + 1e-6
    assert chunk < 3 or bias.std() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sofmax", {}, "did you mean 'softmax'"),
        ("window", {"windw": 3}, "did you mean 'window'"),
        ("window", {"window": 3.5}, "window=3.5 is a float; it takes int"),
        ("window", {"window": True}, "is a bool"),
        ("window", {"window": 0}, "at least 1"),
        ("softmax", {"width": 18}, "not divisible by heads=4"),
        ("softmax", {"kv_heads": 3}, "not divisible by kv_heads=3"),
        ("softmax", {"width": 12}, "must be even"),
        ("softmax", {"rope": Rope(frequencies=(1.0,) * 9)}, "9 frequencies"),
        ("softmax", {"heads": 0}, "at least 1"),
        ("rat", {"chunk": 0}, "chunk=0 must be at least 1"),
        ("rat", {"groups": 3}, "not divisible by groups=3"),
        ("rat", {"rope": "token"}, "valid: chunk, none"),
        ("rat", {"width": 12}, "must be even"),
        ("rat", {"bias": True}, "no biases"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **{"width": 16, "heads": 4, **options})


def test_missing_options_are_named():
    with pytest.raises(ValueError, match="window needs width"):
        build("window", heads=4)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp(gated):
    mlp, x = MLP(8, 24, "silu", gated), torch.randn(3, 8)
    hidden = torch.nn.functional.silu((mlp.gate if gated else mlp.up)(x))
    expected = mlp.down(hidden * mlp.up(x) if gated else hidden)
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.flops() == 2 * 8 * 24 * (3 if gated else 2)
