"""The fused kernels of core-context-aware attention against the definition, in Triton's interpreter; on a GPU in bf16
against the chunked form.
"""

from itertools import pairwise

import pytest
import torch

from farspan.kernels.cca import Piece, chunked, fused, fused_tiles, pool
from farspan.kernels.cca.fused import core_attention_fused, pool_fused
from farspan.kernels.cca.fused_plan import Plan
from farspan.kernels.cca.pieces import check_pieces, prefix_needed
from farspan.kernels.cca.reference import core_attention_reference, pool_reference, visible
from farspan.kernels.launch import Tile

ATTENTION = ("o", *(f"gradient of {name}" for name in ("q", "k", "v", "core_k", "core_v")))
POOL = ("core_k", "core_v", *(f"gradient of {name}" for name in ("q_end", "k", "v", "pooled_keys")))

# of the largest value: float32 rounding of sums of up to 300 terms
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is read before it is written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many blocks per document: 16 by 16 in float32, which halves the table's."""
    monkeypatch.setitem(fused_tiles.TILES, (80, 64), (Tile(32, 32, 4, 1),) * 3)


def documents(lengths, group, window):
    """Pieces of whole documents one after the other, each with all of its cores."""
    pieces = []
    for length in lengths:
        key = sum(piece.length for piece in pieces)
        core = sum(piece.length // group for piece in pieces)
        pieces.append(Piece(length, 0, 0, key, core))
    return tuple(pieces)


def make(pieces, group, heads, key_heads, core_heads, dim, keys=None, cores=None, dtype=torch.float32, device="cpu"):
    """q, k, v, core_k, core_v for pieces, with as many rows of keys and cores as these reach unless told."""
    keys = max(p.key + p.prefix + p.length for p in pieces) if keys is None else keys
    cores = max(p.core + (p.offset + p.length) // group for p in pieces) if cores is None else cores
    rows = ((sum(p.length for p in pieces), heads), *((keys, key_heads),) * 2, *((cores, core_heads),) * 2)
    return [torch.randn(1, *shape, dim).to(device, dtype).requires_grad_() for shape in rows]


def run(function, inputs, *arguments):
    """Every result and every gradient, for fixed random gradients of every result."""
    results = function(*inputs, *arguments)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in results)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*results, *gradients)]


def wide(inputs):
    return [None if x is None else x.detach().double().requires_grad_() for x in inputs]


def compare(names, expected, found, tolerance=TOLERANCE):
    for name, one, other in zip(names, expected, found, strict=True):
        error = (other.double() - one).abs().max() if one.numel() else 0.0
        allowed = tolerance * max(1.0, float(one.abs().max())) if one.numel() else 0.0
        assert error <= allowed, f"{name}: {error} > {allowed}"


def check(inputs, pieces, group, window, bias=0.0, parts="both"):
    check_pieces(pieces, *(inputs[i].shape[1] for i in (0, 1, 3)), group, window)
    arguments = (pieces, group, window, bias, inputs[0].shape[-1] ** -0.5, parts)
    expected = run(core_attention_reference, wide(inputs), *arguments)
    compare(ATTENTION, expected, run(core_attention_fused, inputs, *arguments))


# length, group, window
SIZES = [(50, 1, 6), (64, 4, 8), (61, 4, 7), (33, 16, 16), (10, 16, 4), (37, 5, 3), (5, 4, 1), (40, 8, 100), (1, 1, 1)]


@pytest.mark.parametrize(("length", "group", "window"), SIZES)
@pytest.mark.parametrize(("heads", "key_heads", "core_heads"), [(4, 2, 4), (4, 2, 2)])
def test_attention_equals_the_definition(length, group, window, heads, key_heads, core_heads, small_tiles):
    pieces = documents((length,), group, window)
    check(make(pieces, group, heads, key_heads, core_heads, 16), pieces, group, window, bias=0.7)


@pytest.mark.parametrize(("group", "window", "dim"), [(4, 6, 24), (3, 20, 16)])
def test_packed_documents(group, window, dim, small_tiles):
    pieces = documents((21, 1, 38, 1, 2, 57), group, window)
    check(make(pieces, group, 2, 1, 2, dim), pieces, group, window)


def test_tiles_as_shipped():
    """Blocks that are larger than the documents, and documents that are larger than the blocks."""
    pieces = documents((150, 3), 4, 9)
    check(make(pieces, 4, 2, 1, 1, 64), pieces, 4, 9)


def shared_pieces(group, window):
    """Four parts of one document that read the same cores, with another document in between whose first tokens came
    earlier. The second part reads the keys of the first, the others their own copies; the last one's prefix is longer
    than it needs, and its keys overlap with other positions of the part before.
    """
    return (
        Piece(20, 0, 0, 3, 2),
        Piece(21, 20, 20, 3, 2),
        Piece(9, 30, prefix_needed(30, group, window), 46, 20),
        Piece(17, 41, prefix_needed(41, group, window), 90, 2),
        Piece(5, 58, prefix_needed(58, group, window) + 2, 95, 2),
    )


@pytest.mark.parametrize(("group", "window", "core_heads"), [(4, 8, 1), (3, 7, 2), (5, 2, 1), (1, 3, 2)])
def test_pieces_that_share_keys_and_cores(group, window, core_heads, small_tiles):
    pieces = shared_pieces(group, window)
    check(make(pieces, group, 2, 1, core_heads, 16, keys=140, cores=90), pieces, group, window, bias=0.3)


@pytest.mark.parametrize("parts", ["cores", "raw"])
def test_one_part_alone(parts, small_tiles):
    """A query that sees no core has a zero from the cores, and no gradient."""
    pieces = (*documents((37, 3), 4, 6), Piece(9, 30, 30, 0, 0))
    inputs = make(pieces, 4, 2, 1, 2, 16)
    check(inputs, pieces, 4, 6, bias=0.4, parts=parts)
    if parts == "cores":
        found = run(core_attention_fused, inputs, pieces, 4, 6, 0.4, 0.25, parts)
        assert not found[0][:, :9].any()
        assert found[0][:, 9:37].all()
        assert not found[1][:, :9].any()


def test_queries_split_among_programs(small_tiles):
    pieces = (*documents((290, 20), 8, 16), Piece(30, 0, 0, 0, 0))
    inputs = make(pieces, 8, 1, 1, 1, 16)
    plan = Plan(pieces, 8, 16, torch.device("cpu"))
    assert plan.columns(True, inputs[3].shape[1], 1, 16, 16).splits == 2
    check(inputs, pieces, 8, 16)


def test_rows_that_nobody_reads_may_hold_anything(small_tiles):
    """NaN in keys and cores of no piece, and in cores that no query sees yet, reaches nothing; gradients are zero."""
    pieces = (Piece(30, 0, 0, 5, 3), Piece(12, 40, 13, 50, 3))
    inputs = make(pieces, 4, 2, 1, 1, 16, keys=90, cores=24)
    group, window = 4, 9
    seen = [torch.zeros(rows, dtype=torch.bool) for rows in (90, 24)]
    for piece in pieces:
        cores = (piece.offset + piece.length - window) // group
        seen[0][piece.key : piece.key + piece.prefix + piece.length] = True
        seen[1][piece.core : piece.core + cores] = True
    with torch.no_grad():
        for x, rows in zip(inputs[1:], (seen[0], seen[0], seen[1], seen[1]), strict=True):
            x[:, ~rows] = torch.nan
    found = run(core_attention_fused, inputs, pieces, group, window, 0.0, 0.25, "both")
    for gradient, rows in zip(found[2:], (seen[0], seen[0], seen[1], seen[1]), strict=True):
        assert not gradient[:, ~rows].any()
    clean = [torch.nan_to_num(x.detach()).requires_grad_() for x in inputs]
    compare(ATTENTION, run(core_attention_reference, wide(clean), pieces, group, window, 0.0, 0.25, "both"), found)


def test_queries_and_keys_as_slices_of_one_projection(small_tiles):
    """q, k, v may be views into one tensor, and the cores into another; so may the gradient of o."""
    pieces, dim = documents((37, 4), 4, 6), 16
    heads, rows = (4, 2, 2), 41
    joined = torch.randn(1, rows, sum(heads) * dim, requires_grad=True)
    cores = torch.randn(1, 10, 2 * 2 * dim, requires_grad=True)

    def result(function, joined, cores):
        q, k, v = (x.unflatten(-1, (-1, dim)) for x in joined.split([n * dim for n in heads], dim=-1))
        core_k, core_v = (x.unflatten(-1, (-1, dim)) for x in cores.chunk(2, dim=-1))
        o = function(q, k, v, core_k, core_v, pieces, 4, 6, 0.0, 0.25, "both")
        weights = torch.randn(1, rows, 5 * dim, generator=torch.Generator().manual_seed(1)).to(o)
        o = torch.cat([o.flatten(2), q[:, :, 0]], dim=-1) * weights
        return [x.detach() for x in (o, *torch.autograd.grad(o.sum(), (joined, cores)))]

    expected = result(core_attention_reference, *(x.detach().double().requires_grad_() for x in (joined, cores)))
    compare(("o", "joined", "cores"), expected, result(core_attention_fused, joined, cores))


def make_pool(groups, group, heads, key_heads, dim, pooled, dtype=torch.float32, device="cpu"):
    """Inputs of pooling up to starts; groups in another order than rows, with rows between them that are in none."""
    gaps = torch.arange(groups) % 3
    starts = (torch.arange(groups) * group + gaps.cumsum(0)).flip(0).to(device)
    rows = groups * group + int(gaps.sum()) + 2
    shapes = [(groups, heads), (rows, key_heads), (rows, key_heads), (rows, key_heads)]
    data = [torch.randn(1, *shape, dim).to(device, dtype).requires_grad_() for shape in shapes]
    return [*data[:3], data[3] if pooled else None], starts


@pytest.mark.parametrize(("group", "groups", "dim"), [(1, 9, 16), (4, 7, 24), (5, 5, 16), (16, 3, 64), (40, 2, 16)])
@pytest.mark.parametrize(("key_heads", "core_heads"), [(4, "q"), (2, "q"), (2, "kv"), (1, "kv")])
@pytest.mark.parametrize("pooled", [False, True])
def test_pooling_equals_the_definition(group, groups, dim, key_heads, core_heads, pooled, monkeypatch):
    """Groups of 40 tokens go in blocks of 32."""
    monkeypatch.setattr(fused, "ELEMENTS", 512)
    inputs, starts = make_pool(groups, group, 4, key_heads, dim, pooled)
    arguments = (starts, group, core_heads, 0.7)
    expected = run(pool_reference, wide(inputs), *arguments)
    compare(POOL[: len(expected)], expected, run(pool_fused, inputs, *arguments))


def test_pooling_with_the_shipped_tile():
    inputs, starts = make_pool(5, 16, 2, 1, 64, False)
    expected = run(pool_reference, wide(inputs), starts, 16, "q", 0.125)
    compare(POOL[:-1], expected, run(pool_fused, inputs, starts, 16, "q", 0.125))


def test_pooling_no_group():
    inputs, starts = make_pool(0, 4, 2, 1, 16, True)
    found = run(pool_fused, inputs, starts, 4, "q", 0.25)
    assert [x.shape[1] for x in found] == [0, 0, 0, 2, 2, 2]
    assert not any(x.any() for x in found)


def test_rows_in_no_group_may_hold_anything():
    inputs, starts = make_pool(7, 4, 2, 1, 16, True)
    used = torch.zeros(inputs[1].shape[1], dtype=torch.bool)
    used[(starts[:, None] + torch.arange(4)).flatten()] = True
    with torch.no_grad():
        for x in inputs[1:]:
            x[:, ~used] = torch.nan
    found = run(pool_fused, inputs, starts, 4, "q", 0.25)
    assert all(not x[:, ~used].any() for x in found[3:])
    compare(POOL, run(pool_reference, wide(inputs), starts, 4, "q", 0.25), found)


def test_far_scores_do_not_overflow():
    """Scores of a group and of a query in the thousands: the weights are a maximum's."""
    inputs, starts = make_pool(4, 5, 2, 1, 16, False)
    expected = run(pool_reference, wide(inputs), starts, 5, "q", 300.0)
    found = run(pool_fused, inputs, starts, 5, "q", 300.0)
    compare(POOL[:2], expected[:2], found[:2], tolerance=1e-3)
    assert all(x.isfinite().all() for x in found)


def test_pool_and_attention_together():
    """The golden values: d = 1, scale 1, g = 2, s = 2, all queries 1."""
    k = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0]).log().reshape(1, 6, 1, 1)
    v, q = torch.arange(1.0, 7.0).reshape(1, 6, 1, 1), torch.ones(1, 6, 1, 1)
    cores = pool_fused(q[:, 1::2], k, v, None, torch.tensor([0, 2, 4]), 2, "q", 1.0)
    o = core_attention_fused(q, k, v, *cores, (Piece(6, 0, 0, 0, 0),), 2, 2, 0.0, 1.0, "both")
    expected = torch.tensor([1, 5 / 3, 2, 3.15811739, 3.43772426, 3.78288180])
    torch.testing.assert_close(o.flatten(), expected, rtol=1e-6, atol=1e-6)


def check_half(inputs, chunk_function, function, *arguments):
    """Errors in half precision are at most twice those of the chunked form, both against it in fp32."""
    exact = [None if x is None else x.detach().float().requires_grad_() for x in inputs]
    truth = run(chunk_function, exact, *arguments)
    eager = run(chunk_function, inputs, *arguments)
    found = run(function, inputs, *arguments)
    for index, (right, one, other) in enumerate(zip(truth, eager, found, strict=True)):
        size = right.norm() + 1e-6
        allowed = 2 * (one.float() - right).norm() / size + 1e-5
        assert (other.float() - right).norm() / size <= allowed, f"result {index}"


def test_half_precision():
    """fp16, because the interpreter does not multiply bf16."""
    pieces = documents((120, 3), 4, 9)
    inputs = make(pieces, 4, 4, 2, 4, 16, dtype=torch.float16)
    check_half(inputs, chunked.core_attention_chunked, core_attention_fused, pieces, 4, 9, 0.0, 0.25, "both")
    inputs, starts = make_pool(6, 8, 4, 2, 16, True, torch.float16)
    for core_heads in ("q", "kv"):
        check_half(inputs, pool.pool_chunked, pool_fused, starts, 8, core_heads, 0.25)


def test_same_bits_again(small_tiles):
    pieces = (*documents((29,), 4, 8), Piece(7, 20, 20, 0, 0))
    inputs = make(pieces, 4, 2, 1, 1, 16)
    arguments = (pieces, 4, 8, 0.0, 0.25, "both")
    for one, other in pairwise([run(core_attention_fused, inputs, *arguments) for _ in range(2)]):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_registered_as_operators():
    """The fake tensors and the autograd formulas agree with the kernels."""
    pieces = documents((9, 4), 3, 4)
    numbers = [number for piece in pieces for number in piece]
    pooling = [(*inputs, starts, 3, 0.25) for inputs, starts in (make_pool(3, 3, 2, 2, 16, x) for x in (False, True))]
    calls = [
        (
            torch.ops.farspan.cca_attention_fused_forward,
            (*make(pieces, 3, 2, 1, 2, 16), numbers, 3, 4, 0.0, 0.25, "both"),
        ),
        *((torch.ops.farspan.cca_pool_fused_forward, arguments) for arguments in pooling),
    ]
    for operator, arguments in calls:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator.default, arguments, test_utils=tests)


@pytest.mark.parametrize(("group", "window"), [(4, 40), (3, 7), (16, 5), (1, 35)])
@pytest.mark.parametrize("cores", [False, True])
def test_every_query_meets_every_key_that_it_sees_once(group, window, cores):
    """The tables against the definition: pairs of queries and keys (or cores), and which tiles need no mask."""
    pieces = (*documents((300, 1, 90), group, window), Piece(333, 57, 57, 0, 0))
    rows, block, query_block = 430, 16, 8
    columns = Plan(pieces, group, window, torch.device("cpu")).columns(cores, rows, 1, block, query_block)
    met = torch.zeros(rows, sum(piece.length for piece in pieces), dtype=torch.int64)
    written = torch.zeros(columns.splits, rows, dtype=torch.int64)
    for row, count, first, end, split in columns.blocks.T.tolist():
        written[split, row : row + count] += 1
        for index, begin, position, stop, left, whole in columns.segments[:, first:end].T.tolist():
            t, r = position + torch.arange(stop - begin), index + torch.arange(count)[:, None]
            c = (t + 1 - window).clamp(min=0) // group
            sees = r < c if cores else (r <= t) & (r >= group * c)
            met[row : row + count, begin:stop] += sees
            tiles = [tile.shape[1] == query_block and bool(tile.all()) for tile in sees.split(query_block, dim=1)]
            assert [left <= tile < left + whole for tile in range(len(tiles))] == tiles
    assert (written == 1).all()
    start, expected = 0, torch.zeros_like(met)
    for piece in pieces:
        sees = visible(piece, group, window, met.device)[0 if cores else 1]
        first = piece.core if cores else piece.key
        expected[first : first + sees.shape[1], start : start + piece.length] += sees.T
        start += piece.length
    assert torch.equal(met, expected)


@pytest.mark.parametrize(("dim", "dtype"), [(257, torch.float32), (16, torch.float64)])
def test_refuses_what_it_does_not_compute(dim, dtype):
    pieces = documents((3,), 2, 1)
    inputs = make(pieces, 2, 1, 1, 1, dim, dtype=dtype)
    with pytest.raises(ValueError, match="head dims up to 256"):
        core_attention_fused(*inputs, pieces, 2, 1, 0.0, 1.0, "both")
    with pytest.raises(ValueError, match="backend='chunked'"):
        pool_fused(inputs[0][:, :1], *inputs[1:3], None, torch.tensor([0]), 2, "q", 1.0)


def test_refuses_mixed_dtypes():
    pieces = documents((3,), 2, 1)
    inputs = make(pieces, 2, 1, 1, 1, 16)
    inputs[3:] = [x.half() for x in inputs[3:]]
    with pytest.raises(ValueError, match="float16, float32"):
        core_attention_fused(*inputs, pieces, 2, 1, 0.0, 1.0, "both")


@pytest.fixture
def compiled_kernels():
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 is set; run with TRITON_INTERPRET=0")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("core_heads", ["q", "kv"])
@pytest.mark.parametrize(
    ("lengths", "group", "window"),
    [
        ((1,), 16, 1024),
        ((4099, 1, 900, 16, 17), 16, 256),
        ((9001, 500), 16, 1000),
        ((3001,), 5, 3),
        ((70_001,), 16, 64),
    ],
)
def test_bf16_errs_at_most_twice_as_much_as_chunked(lengths, group, window, core_heads, dim, compiled_kernels):
    pieces = documents(lengths, group, window)
    inputs = make(pieces, group, 4, 2, 4 if core_heads == "q" else 2, dim, dtype=torch.bfloat16, device="cuda")
    arguments = (pieces, group, window, 0.0, dim**-0.5, "both")
    check_half(inputs, chunked.core_attention_chunked, core_attention_fused, *arguments)
    inputs, starts = make_pool(sum(lengths) // group, group, 4, 2, dim, core_heads == "kv", torch.bfloat16, "cuda")
    check_half(inputs, pool.pool_chunked, pool_fused, starts, group, core_heads, dim**-0.5)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(compiled_kernels):
    """The last document of a row of 2^31 elements has the results and gradients of the document alone."""
    last, heads, dim, group, window = 5000, 16, 128, 16, 64
    lengths = (2**31 // (heads * dim), last)
    pieces = documents(lengths, group, window)
    inputs = make(pieces, group, heads, heads, heads, dim, dtype=torch.bfloat16, device="cuda")
    sizes = [last] * 3 + [last // group] * 2

    def results(inputs, pieces):
        o = core_attention_fused(*inputs, pieces, group, window, 0.0, dim**-0.5, "both")
        gradients = torch.autograd.grad(o[:, -last:].sum(), inputs)
        return [x[:, -size:] for x, size in zip((o.detach(), *gradients), (last, *sizes), strict=True)]

    own = [x.detach()[:, -size:].clone().requires_grad_() for x, size in zip(inputs, sizes, strict=True)]
    alone = results(own, documents((last,), group, window))
    for one, other in zip(alone, results(inputs, pieces), strict=True):
        torch.testing.assert_close(other, one)  # up to the order in which parts are summed
