"""Layouts as lists of segments: what every rank holds, and where documents may be cut."""

import random
from itertools import accumulate, product

import pytest
import torch

from farspan.parallel.layout import LAYOUTS, make_layout, multiple, padding, place_documents

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (2, 3), (3, 2)]
layouts = pytest.mark.parametrize(("kind", "ring", "ulysses"), [(k, *mesh) for k, mesh in product(LAYOUTS, MESHES)])


def documents(tokens: int, seed: int) -> tuple[int, ...]:
    """Lengths that fill `tokens`: mostly short ones, some of one token."""
    chance, lengths = random.Random(seed), []
    while (rest := tokens - sum(lengths)) > 0:
        lengths.append(min(rest, chance.choice((1, 1, 2, 3, 5, 8, 13, 40))))
    return tuple(lengths)


@layouts
@pytest.mark.parametrize("grid", [1, 4])
def test_segments_partition_the_row(kind, ring, ulysses, grid):
    tokens = 3 * multiple(kind, ring, ulysses, grid)
    layout = make_layout(kind, tokens, ring, ulysses)
    assert layout.ranks == ring * ulysses and layout.tokens == tokens
    assert all(sum(s.length for s in segments) == layout.local for segments in layout.segments)
    held = [token for segments in layout.segments for s in segments for token in range(s.start, s.start + s.length)]
    assert sorted(held) == list(range(tokens)) and layout.order.tolist() == held
    assert all(s.start % grid == 0 and s.length % grid == 0 for segments in layout.segments for s in segments)
    assert layout.edges == sorted(s.start for segments in layout.segments for s in segments)
    assert [token for rank in range(layout.ranks) for token in layout.own(rank).tolist()] == held


@layouts
def test_place_inverts_order(kind, ring, ulysses):
    layout = make_layout(kind, 2 * multiple(kind, ring, ulysses), ring, ulysses)
    row = torch.arange(layout.tokens)
    assert torch.equal(layout.order[layout.place], row) and torch.equal(layout.place[layout.order], row)
    assert layout.is_ordered == torch.equal(layout.order, row)
    assert layout.is_ordered == (kind == "contiguous" or ring == 1)


@layouts
def test_a_ring_slot_is_what_its_ulysses_ranks_hold_one_after_the_other(kind, ring, ulysses):
    tokens = 2 * multiple(kind, ring, ulysses)
    fine, slots = make_layout(kind, tokens, ring, ulysses), make_layout(kind, tokens, ring)
    for slot in range(ring):
        ranks = range(slot * ulysses, (slot + 1) * ulysses)
        assert torch.equal(torch.cat([fine.own(rank) for rank in ranks]), slots.own(slot))


@layouts
def test_pieces_cover_the_documents(kind, ring, ulysses):
    layout = make_layout(kind, 9 * multiple(kind, ring, ulysses), ring, ulysses)
    lengths = documents(layout.tokens, seed=1)
    starts = [0, *accumulate(lengths)]
    seen = {}
    for rank in range(layout.ranks):
        own, local = layout.own(rank), 0
        for piece in layout.pieces(rank, lengths):
            assert piece.local == local and piece.length > 0  # in the order of the rank's tokens, without a gap
            assert own[local : local + piece.length].tolist() == list(range(piece.start, piece.start + piece.length))
            assert piece.start == starts[piece.document] + piece.offset
            seen.setdefault(piece.document, []).extend(range(piece.offset, piece.offset + piece.length))
            local += piece.length
        assert local == layout.local
    assert {document: sorted(tokens) for document, tokens in seen.items()} == {
        document: list(range(length)) for document, length in enumerate(lengths)
    }


@pytest.mark.parametrize("ring", [1, 2, 3, 4])
def test_zigzag_gives_all_slots_the_same_causal_work(ring):
    layout = make_layout("zigzag", 12 * ring, ring)
    work = [int((layout.own(rank) + 1).sum()) for rank in range(ring)]
    assert len(set(work)) == 1
    if ring > 1:
        contiguous = make_layout("contiguous", 12 * ring, ring)
        assert len({int((contiguous.own(rank) + 1).sum()) for rank in range(ring)}) == ring


@layouts
def test_no_chunk_of_a_document_is_cut(kind, ring, ulysses):
    for grid, seed in product((1, 3, 4), range(4)):
        layout = make_layout(kind, 4 * multiple(kind, ring, ulysses, grid), ring, ulysses)
        lengths = documents(layout.tokens // 2, seed)
        starts, end = place_documents(lengths, layout.edges, grid)
        assert end == starts[-1] + lengths[-1] <= layout.tokens
        for start, length in zip(starts, lengths, strict=True):
            assert all((edge - start) % grid == 0 for edge in layout.edges if start < edge < start + length)
        ends = [0, *map(sum, zip(starts, lengths, strict=True))][:-1]
        gaps = [start - end_before for start, end_before in zip(starts, ends, strict=True)]
        assert all(0 <= gap < grid for gap in gaps)
        assert sum(gap > 0 for gap in gaps) <= len(layout.edges) - 1  # one for an edge inside the row, at most


@layouts
def test_padding_fills_the_row_and_crosses_no_edge(kind, ring, ulysses):
    layout = make_layout(kind, 4 * multiple(kind, ring, ulysses, 4), ring, ulysses)
    lengths = documents(layout.tokens // 2, seed=5)
    starts, _ = place_documents(lengths, layout.edges, 4)
    fill = padding(starts, lengths, layout)
    runs = sorted([*zip(starts, lengths, strict=True), *fill])
    assert [start for start, _ in runs] == [0, *accumulate(length for _, length in runs)][:-1]
    assert sum(length for _, length in runs) == layout.tokens
    assert not any(start < edge < start + length for start, length in fill for edge in layout.edges)


def test_documents_that_fit_are_not_padded():
    assert place_documents((4, 4, 4), [0, 4, 8], 4) == ((0, 4, 8), 12)
    assert place_documents((3, 1, 4), [0, 4], 4) == ((0, 3, 4), 8)  # uncut documents follow each other off the grid
    assert place_documents((1, 5), [0, 4], 4) == ((0, 4), 9)  # moved to the edge, and cut by none
    assert place_documents((1, 9), [0, 4, 8], 2) == ((0, 2), 11)


@pytest.mark.parametrize(
    ("kind", "tokens", "ring", "ulysses", "must"),
    [
        ("contiguous", 7, 2, 1, "multiple of 2"),
        ("contiguous", 6, 2, 2, "multiple of 4"),
        ("zigzag", 6, 2, 1, "multiple of 4"),
        ("zigzag", 8, 2, 3, "multiple of 12"),
        ("contiguous", 0, 2, 1, "multiple of 2"),
        ("striped", 8, 2, 1, "layout='striped' is not one of contiguous, zigzag"),
    ],
)
def test_wrong_sizes_are_refused(kind, tokens, ring, ulysses, must):
    with pytest.raises(ValueError, match=must):
        make_layout(kind, tokens, ring, ulysses)
