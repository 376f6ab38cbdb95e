"""What ranks send, counted and by formula: every method, even and uneven heads, both layouts, two dtypes."""

import pytest
import torch

from farspan.eval import bytes_sent
from farspan.eval.bytes_sent import Sent, Sharing
from farspan.layers import Sequence, build
from farspan.layers.mixer import parse_options
from farspan.parallel import ContextParallel
from farspan.parallel.traffic import count_traffic


def counts(mesh, mixer, options, tokens, layout, attention, dtype):
    """What this rank sends in a layer, counted and by formula."""
    layer = build(mixer, width=24, **options).to(dtype)
    context = ContextParallel(mesh, layout, attention)
    sequence = Sequence.sharded(context.shard((tokens,), layer.grid))
    x = torch.randn(1, sequence.tokens, 24, dtype=dtype, requires_grad=True)
    with count_traffic() as forward:
        y = layer(x, sequence).output
    with count_traffic() as backward:
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    sharing = Sharing(tokens, layout, context.ring, context.ulysses, attention)
    formula = bytes_sent.bytes_sent(mixer, layer.options, sharing, dtype, mesh.context.rank)
    return Sent(forward.total, backward.total), formula


EVEN, SHARED, UNEVEN = {"heads": 4}, {"heads": 4, "kv_heads": 1}, {"heads": 6, "kv_heads": 3}
CASES = [
    ((1, 2), "softmax", EVEN, "gather"),
    ((1, 4), "softmax", SHARED, "gather"),  # every rank gets a copy of the one key head
    ((1, 4), "softmax", UNEVEN, "gather"),  # ranks of 2, 2, 1 and 1 query heads
    ((2, 1), "softmax", EVEN, "gather"),
    ((4, 1), "softmax", SHARED, "gather"),
    ((2, 1), "softmax", EVEN, "ring"),
    ((4, 1), "softmax", SHARED, "ring"),
    ((2, 2), "softmax", EVEN, "gather"),
    ((2, 2), "softmax", UNEVEN, "gather"),  # keys are repeated where queries read them unevenly
    ((2, 2), "softmax", SHARED, "ring"),
    ((4, 1), "window", {"heads": 4, "kv_heads": 2, "window": 9}, "gather"),
    ((4, 1), "window", {"heads": 4, "window": 40}, "gather"),  # longer than a shard: several hops
    ((2, 2), "window", {"heads": 4, "window": 9}, "gather"),
    ((4, 1), "window", {"heads": 4, "window": 1}, "gather"),
    ((4, 1), "rat", {"heads": 4, "chunk": 4}, "gather"),
    ((2, 1), "rat", {"heads": 6, "groups": 3, "chunk": 2}, "gather"),
    ((4, 1), "cca", {"heads": 4, "kv_heads": 2, "group": 4, "window": 8}, "gather"),
    ((2, 2), "cca", {"heads": 4, "kv_heads": 2, "group": 2, "window": 21, "core_heads": "kv"}, "gather"),
    ((1, 4), "softplus", UNEVEN, "gather"),
    ((4, 1), "softplus", SHARED, "gather"),
    ((2, 2), "softplus", UNEVEN, "gather"),
    ((2, 2), "softplus", {"heads": 4, "window": 9}, "gather"),
    ((1, 4), "routing", {"heads": 6, "local_heads": 2, "window": 9}, "gather"),
    ((4, 1), "routing", {"heads": 4, "local_heads": 1, "window": 9}, "gather"),
    ((2, 2), "routing", {"heads": 4, "window": 9, "commitment": 0.0}, "gather"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("ranks", "mixer", "options", "attention"), CASES)
def test_ranks_send_what_the_formula_says(run_distributed, ranks, mixer, options, attention, layout, dtype):
    results = run_distributed(counts, ranks, mixer, options, 64, layout, attention, dtype)
    assert [counted for counted, _ in results] == [formula for _, formula in results]
    assert sum(counted.forward for counted, _ in results) > 0 or options.get("window") == 1


# KiB per token, bf16, channels 128: (heads, key heads, ranks) to Ulysses, ring or gathered forward, ring backward.
PER_TOKEN = {
    (32, 32, 8): (28, 112, 368),
    (32, 32, 32): (31, 496, 1520),
    (32, 8, 8): (17.5, 28, 92),
    (32, 8, 32): (31, 124, 380),
    (64, 8, 8): (31.5, 28, 92),
    (64, 8, 32): (46.5, 124, 380),
    (16, 2, 4): (7.5, 3, 11),
    (16, 2, 8): (10.5, 7, 23),
}


@pytest.mark.parametrize("shape", PER_TOKEN, ids=str)
def test_formulas_against_known_values(shape):
    heads, key_heads, ranks = shape
    options = parse_options("softmax", {"width": heads * 128, "heads": heads, "kv_heads": key_heads})
    tokens = 1024 * ranks  # a KiB per token of a rank is 2^20 bytes

    def sent(ring, ulysses, attention="gather"):
        sharing = Sharing(tokens, "contiguous", ring, ulysses, attention)
        found = {bytes_sent.bytes_sent("softmax", options, sharing, torch.bfloat16, rank) for rank in range(ranks)}
        (same,) = found
        return same.forward / 2**20, same.backward / 2**20

    by_heads, forward, backward = PER_TOKEN[shape]
    assert sent(1, ranks) == (by_heads, by_heads)
    assert sent(ranks, 1)[0] == sent(ranks, 1, "ring")[0] == forward
    assert sent(ranks, 1, "ring")[1] == backward


def test_rat_sends_its_chunk_times_less_than_a_ring():
    rat = parse_options("rat", {"width": 64, "heads": 4, "chunk": 16})
    softmax = parse_options("softmax", {"width": 64, "heads": 4})
    sharing = Sharing(1024, "contiguous", 4, 1, "ring")
    less = bytes_sent.bytes_sent("rat", rat, sharing, torch.float32, 0)
    more = bytes_sent.bytes_sent("softmax", softmax, sharing, torch.float32, 0)
    assert more.forward == 16 * less.forward
