"""The statistics' Triton kernels against whole maps in float64, in the interpreter; on a GPU in half precision too."""

import pytest
import torch

from farspan.kernels.attention_statistics import attention_statistics, fused
from farspan.kernels.launch import Tile

RAGGED = (1, 45, 2, 20, 1)
LIMITS = {"distance": 1e-4, "waad": 5e-5, "fai": 1e-6}


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is read before it is written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles within a document, so that whole ones and all kinds of edges occur."""
    monkeypatch.setitem(fused.TILES, (4, 64), (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)))


def make(lengths, heads=4, kv_heads=2, dim=8, dtype=torch.float32, device="cpu", share=0.6):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, sum(lengths), n, dim, generator=generator) for n in (heads, kv_heads))
    rows = torch.cat([torch.arange(n) >= int((1 - share) * n) for n in lengths])
    rows &= torch.rand(len(rows), generator=generator) > 0.1
    return (2 * q).to(device, dtype), k.to(device, dtype), rows.to(device)


def check(q, k, rows, lengths, limits=LIMITS, **options):
    expected = attention_statistics(q.double(), k.double(), rows, lengths, backend="reference", **options)
    found = attention_statistics(q, k, rows, lengths, backend="fused", **options)
    for name, limit in limits.items():
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == torch.float32
        worst = (ours - theirs).abs().max().item()
        assert worst <= limit, f"{name}: {worst}"
    assert torch.equal(found.count, expected.count)
    lse = (found.lse - expected.lse)[rows].abs()
    assert not len(lse) or lse.max() < 1e-5
    assert found.lse[~rows].isinf().all()


@pytest.mark.parametrize(
    ("window", "horizon"), [(None, (10, 100)), (None, (0, 30)), (None, (3, 10**6)), (5, (2, 9)), (33, (10, 100))]
)
def test_against_the_definition(small_tiles, window, horizon):
    q, k, rows = make(RAGGED)
    check(q, k, rows, RAGGED, window=window, horizon=horizon)


@pytest.mark.parametrize(("kv_heads", "waad_window"), [(1, 1), (4, 10), (2, 40)])
def test_grouped_heads_and_other_windows(small_tiles, kv_heads, waad_window):
    q, k, rows = make((75,), kv_heads=kv_heads, dim=24)
    check(q, k, rows, (75,), waad_window=waad_window, horizon=(0, 9))


def test_soft_caps_scales_pieces_and_shipped_tiles():
    q, k, rows = make((60, 45))
    scale = torch.tensor([0.1, 0.3, 0.5, 1.0])
    check(q, k, rows, (60, 45), scale=scale, softcap=1.5, horizon=(2, 30))
    check(q, k, rows, (32, 28, 32, 13), documents=(60, 45), horizon=(2, 30))


def test_other_layouts_in_memory(small_tiles):
    q, k, rows = make((50,))
    wide = torch.randn(1, 50, 3, 4, 8)
    wide[:, :, 1] = q
    check(wide[:, :, 1], k.transpose(1, 2).contiguous().transpose(1, 2), rows, (50,), horizon=(2, 30))


def test_no_rows_and_single_tokens(small_tiles):
    q, k, rows = make((40, 1, 1))
    check(q, k, torch.zeros_like(rows), (40, 1, 1))
    check(q, k, torch.ones_like(rows), (40, 1, 1), horizon=(0, 0))


def test_what_is_refused():
    q, k, rows = make((10,), dim=8)
    with pytest.raises(ValueError, match="float64"):
        attention_statistics(q.double(), k.double(), rows, (10,), backend="fused")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; benchmarks/gpu.sh runs these")
class TestOnGpu:
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_against_the_definition(self, dim, dtype):
        lengths = (1, 700, 2, 370, 129)
        for window in (None, 65):
            q, k, rows = make(lengths, heads=8, dim=dim, dtype=dtype, device="cuda")
            limits = {"distance": 1e-2, "waad": 1e-3, "fai": 1e-5}
            check(q / dim**0.25, k / dim**0.25, rows, lengths, limits, window=window)

    def test_beyond_65536_tokens_and_2_to_the_31_elements(self):
        tokens, heads, dim = 131_200, 128, 128
        q = torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(1, tokens, 1, dim, device="cuda", dtype=torch.bfloat16)
        rows = torch.zeros(tokens, dtype=torch.bool, device="cuda")
        rows[-300:] = True
        found = attention_statistics(q, k, rows, (tokens - 2000, 2000))
        alone = attention_statistics(q[:, -2000:], k[:, -2000:], rows[-2000:], (2000,))
        for name in ("distance", "waad", "fai"):
            torch.testing.assert_close(getattr(found, name)[-2000:], getattr(alone, name), atol=1e-3, rtol=1e-4)
