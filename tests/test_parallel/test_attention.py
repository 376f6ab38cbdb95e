"""Keys round a ring or gathered: outputs and gradients of softmax attention over a whole row."""

import itertools

import pytest
import torch

from farspan.kernels.softmax import softmax_attention
from farspan.layers import Sequence
from farspan.layers.sharded_attention import DocumentAttention
from farspan.parallel import ContextParallel, attention
from farspan.parallel.attention import Merged, gathered_attention, ring_attention

HEADS, CHANNELS = 4, 8
DOCUMENTS = {"one": (30,), "ragged": (1, 2, 13, 1, 7, 5, 1)}

ranks = pytest.mark.parametrize("ranks", [2, 4])
methods = pytest.mark.parametrize("method", ["ring", "gather"])
layouts = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
documents = pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)


def tensors(tokens: int, key_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output of a row, on unit scale."""
    generator = torch.Generator().manual_seed(tokens + key_heads)
    heads = (HEADS, key_heads, key_heads, HEADS)
    return [torch.randn(1, tokens, n, CHANNELS, generator=generator, dtype=torch.float64).to(dtype) for n in heads]


def reference(q, k, v, do, lengths) -> list[torch.Tensor]:
    """o, dq, dk, dv in float64, by one softmax over a masked matrix."""
    q, k, v, do = (x.double() for x in (q, k, v, do))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(HEADS // x.shape[2], dim=2) for x in (k, v))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    visible = (document[:, None] == document).tril()
    scores = torch.einsum("bthd,bshd->bhts", q, k) * CHANNELS**-0.5
    o = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def on_one_rank(q, k, v, do, lengths) -> list[torch.Tensor]:
    """o, dq, dk, dv of the operator that a single rank runs."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, _ = softmax_attention(*leaves, lengths, Sequence.packed(lengths).cu_seqlens)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def on_shards(mesh, layout, method, inputs, lengths) -> list[torch.Tensor]:
    """o, dq, dk, dv of the row, put together from all ranks; the gradient that comes in is a transposed one."""
    shard = ContextParallel(mesh, layout).shard(lengths)
    *leaves, do = (shard.take(x) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    attend = DocumentAttention(shard, CHANNELS**-0.5)
    if method == "ring":
        o = ring_attention(*leaves, attend, mesh.ring)
    else:
        o = gathered_attention(*leaves, attend, shard.layout, mesh.ring)
    gradients = torch.autograd.grad(o.transpose(1, 3), leaves, do.transpose(1, 3).contiguous())
    assert [x.dtype for x in (o, *gradients)] == [x.dtype for x in (o, *leaves)]
    return [shard.whole(x.detach()) for x in (o, *gradients)]


def largest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """NaN if there is any, which Python's max would lose."""
    return float(torch.stack([(a.double() - b).abs().max() for a, b in zip(found, expected, strict=True)]).max())


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """The norm of each tensor's error, relative to the tensor's."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


# Merging blocks


def blocks(dtype: torch.dtype, gap: float) -> tuple[Merged, list, torch.Tensor, torch.Tensor]:
    """An empty merge; the blocks of one softmax over 12 keys, each `gap` above the one before; its output and lse.

    Of 6 queries, block 2 has no key for the first three: lse = -inf, and whatever output a kernel leaves there.
    """
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(1, 6, HEADS, 4, 3, generator=generator, dtype=torch.float64)
    scores += gap * torch.arange(4.0, dtype=torch.float64)[:, None]
    values = torch.randn(1, 4, 3, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    scores[:, :3, :, 2] = float("-inf")
    lse = scores.logsumexp(-1)
    o = torch.einsum("bthks,bkshd->kbthd", scores.softmax(-1), values)
    o[2][:, :3] = 0
    parts = [(slice(None), o[i].to(dtype), lse[..., i].to(dtype)) for i in range(4)]
    whole = torch.einsum("bths,bshd->bthd", scores.flatten(3).softmax(-1), values.flatten(1, 2))
    return Merged(torch.zeros(1, 6, HEADS, CHANNELS, dtype=dtype)), parts, whole, scores.flatten(3).logsumexp(-1)


@pytest.mark.parametrize("gap", [0.0, 200.0, -200.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_merged_blocks_are_one_softmax_in_any_order(dtype, tolerance, gap):
    """Also with a block without keys, and with gaps at which exp overflows fp32."""
    for order in itertools.permutations(range(4)):
        merged, parts, o, lse = blocks(dtype, gap)
        for block in order:
            merged.add(*parts[block])
        assert merged.o.dtype == merged.lse.dtype == dtype
        assert (merged.o - o).abs().max() <= tolerance
        assert (merged.lse - lse).abs().max() <= tolerance * max(1.0, float(lse.abs().max()))


def test_nothing_merged_is_nothing():
    """Queries that see no key at all: zeros and -inf, never NaN; and rows that a block leaves out stay."""
    merged, (block, *_), _, _ = blocks(torch.float32, 0.0)
    empty = torch.full_like(block[2][:, :2], float("-inf"))
    merged.add(slice(0, 2), torch.zeros_like(block[1][:, :2]), empty)
    assert torch.equal(merged.o, torch.zeros_like(merged.o)) and torch.equal(merged.lse[:, :2], empty)
    merged.add(slice(2, 4), block[1][:, 2:4], block[2][:, 2:4])
    assert torch.equal(merged.o[:, 2:4], block[1][:, 2:4]) and torch.equal(merged.lse[:, 2:4], block[2][:, 2:4])
    assert not merged.o[:, :2].any() and not merged.o[:, 4:].any()


def test_half_precision_is_merged_in_fp32():
    merged = Merged(torch.zeros(1, 2, HEADS, CHANNELS, dtype=torch.bfloat16))
    assert merged.o.dtype == merged.lse.dtype == torch.float32


# Over ranks


def errors(mesh, layout, method, key_heads, lengths):
    inputs = tensors(sum(lengths), key_heads, torch.float64)
    return largest(on_shards(mesh, layout, method, inputs, lengths), reference(*inputs, lengths))


@ranks
@methods
@layouts
@documents
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_outputs_and_gradients_equal_one_softmax(run_distributed, ranks, method, layout, lengths, key_heads):
    wrong = run_distributed(errors, (ranks, 1), layout, method, key_heads, lengths)
    assert all(error <= 1e-12 for error in wrong)


def errors_in_groups(mesh, layout, lengths, heads_at_once):
    one_head = 2 * sum(lengths) * CHANNELS * 8
    before, attention.GATHERED_BYTES = attention.GATHERED_BYTES, heads_at_once * one_head + one_head // 2
    try:
        return errors(mesh, layout, "gather", HEADS, lengths)
    finally:
        attention.GATHERED_BYTES = before


@layouts
@pytest.mark.parametrize("heads_at_once", [0, 1, 2, 3])
def test_keys_gathered_a_few_heads_at_a_time(run_distributed, layout, heads_at_once):
    """4 key heads as 1 + 1 + 1 + 1 (also where one is more than the limit), 2 + 2 and 3 + 1."""
    lengths = (1, 2, 13, 1, 7, 7, 1)  # 32 tokens, which 4 ranks share without padding
    wrong = run_distributed(errors_in_groups, (4, 1), layout, lengths, heads_at_once)
    assert all(error <= 1e-12 for error in wrong)


def rounding(mesh, dtype, key_heads, lengths):
    """Errors against float64 of one rank and of the shards (the worst of layouts and methods), and the largest."""
    inputs = tensors(sum(lengths), key_heads, dtype)
    expected = reference(*inputs, lengths)
    one = on_one_rank(*inputs, lengths)
    shards = [
        on_shards(mesh, layout, method, inputs, lengths)
        for layout in ("contiguous", "zigzag")
        for method in ("ring", "gather")
    ]
    worst = torch.tensor([relative(found, expected) for found in shards]).amax(0).tolist()
    return relative(one, expected), worst, largest(one, expected), max(largest(found, expected) for found in shards)


@pytest.mark.parametrize("lengths", [(120,), (1, 8, 55, 1, 31, 20, 4)], ids=DOCUMENTS)
@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_one_rank_and_does_not_grow(run_distributed, dtype, key_heads, lengths):
    """Blocks are merged, and gradients added up on their way, in fp32: no tensor's error grows with the ranks.

    Errors are norms over rows of 120 tokens, long enough for ratios that do not depend on the seed: 1.23 at most.
    """
    alone, two, most, most_of_two = run_distributed(rounding, (2, 1), dtype, key_heads, lengths)[0]
    _, four, _, most_of_four = run_distributed(rounding, (4, 1), dtype, key_heads, lengths)[0]
    assert all(shards <= 1.5 * one for one, shards in zip(alone, two, strict=True))
    assert all(shards <= 1.5 * one for one, shards in zip(alone, four, strict=True))
    assert all(b <= 1.25 * a for a, b in zip(two, four, strict=True))
    if dtype == torch.float32:
        assert max(most, most_of_two, most_of_four) <= 5e-6 and max(most_of_two, most_of_four) <= 1.5 * most
