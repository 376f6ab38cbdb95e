"""The loader against its definition, token by token, and the promises about ranks, resuming and mixtures."""

import threading
import time

import numpy as np
import pytest
import torch

from farspan.lm.data.corpus import Corpus
from farspan.lm.data.loader import Loader, Mixture, validation_batches
from farspan.lm.data.rows import Stream

LENGTHS = [1, 7, 40, 2, 1, 1, 16, 15, 17, 33, 5, 3, 64, 9]
SEED = (3, 0)
GOLDEN_ORDER = [0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 13, 12, 4]
FIELDS = ("input_ids", "shift_labels")


def naive_rows(corpus: Corpus, length: int, documents: np.ndarray) -> list[list[tuple[int, int, int]]]:
    """(token, label, piece) of every position of every row, written down one token at a time."""
    stream = []
    for document in documents:
        tokens = corpus.document(document).tolist()
        for place, token in enumerate(tokens):
            stream.append((token, tokens[place + 1] if place + 1 < len(tokens) else -100, document))
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


@pytest.mark.parametrize("length", [16, 32])
def test_rows_are_slices_of_the_shuffled_documents(make_corpus, length):
    corpus = make_corpus("c", LENGTHS)
    stream = Stream(corpus, length, SEED)
    for epoch in (0, 1, 5):
        documents, _, order = stream._shuffle(epoch)
        assert sorted(documents) == list(range(len(LENGTHS)))
        expected = naive_rows(corpus, length, documents)
        assert sorted(order) == list(range(len(expected))) and stream.rows_per_epoch == len(expected)
        for number, place in enumerate(order):
            row = stream.read(stream.slice(epoch * stream.rows_per_epoch + number))
            tokens, labels, pieces = zip(*expected[place], strict=True)
            starts = [0] + [i for i in range(1, length) if pieces[i] != pieces[i - 1]]
            assert row.tokens.tolist() == list(tokens)
            assert row.labels.tolist() == list(labels)
            assert (np.cumsum(row.lengths) - row.lengths).tolist() == starts
            assert row.valid_tokens == sum(label != -100 for label in labels)


def test_epochs_are_shuffled_and_seeded(make_corpus):
    corpus = make_corpus("c", LENGTHS)

    def order(seed, epoch):
        return Stream(corpus, 16, seed)._shuffle(epoch)[0].tolist()

    assert order((0, 0), 0) == order((0, 0), 0)
    assert len({tuple(order(seed, epoch)) for seed in ((0, 0), (1, 0), (0, 1)) for epoch in (0, 1)}) == 6
    # Written down: a change of numpy, or of the scheme, must not reorder the data of a run that resumes.
    assert order((0, 0), 0) == GOLDEN_ORDER


def concatenated(batches) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels and starts of pieces of micro-batches that follow each other."""
    starts, before = [], 0
    for batch in batches:
        starts += (batch.cu_seqlens[:-1] + before).tolist()
        before += batch.input_ids.shape[1]
    join = [torch.cat([getattr(batch, name) for batch in batches], dim=1)[0].tolist() for name in FIELDS]
    return *join, starts


def test_a_step_is_the_same_rows_on_any_ranks(make_corpus):
    corpora = [make_corpus("a", LENGTHS), make_corpus("b", LENGTHS[::-1], seed=1)]
    loader = Loader(corpora, [3, 1], sequence_length=16, rows=8, seed=5)
    for step in (0, 1, 17):
        whole = loader.batch(step)
        assert len(whole) == 1 and whole[0].identifier == loader.identifier(step)
        assert whole[0].valid_tokens == loader.valid_tokens(step) == int((whole[0].shift_labels != -100).sum())
        for ranks, accumulation in ((2, 1), (1, 4), (2, 2), (8, 1), (4, 2)):
            shares = [loader.batch(step, rank, ranks, accumulation) for rank in range(ranks)]
            assert all(len(share) == accumulation for share in shares)
            parts = [batch for share in shares for batch in share]
            assert concatenated(parts) == concatenated(whole)
            assert sum(part.valid_tokens for part in parts) == whole[0].valid_tokens


def test_batch_has_the_shapes_and_dtypes_of_its_docstring(make_corpus):
    batch = Loader([make_corpus("a", LENGTHS)], [1.0], sequence_length=32, rows=3, seed=0).batch(0)[0]
    assert batch.input_ids.shape == batch.shift_labels.shape == (1, 96)
    assert batch.input_ids.dtype == batch.shift_labels.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == 96
    assert {32, 64} <= set(batch.cu_seqlens.tolist())  # no document runs from one row into the next
    assert (batch.cu_seqlens.diff() > 0).all()


def test_resuming_is_asking_for_a_later_step(make_corpus):
    corpora = [make_corpus("a", LENGTHS), make_corpus("b", [50] * 9)]
    first = Loader(corpora, [1, 1], 16, rows=4, seed=0)
    seen = [first.batch(step)[0].identifier for step in range(40)]  # several epochs
    resumed = Loader(corpora, [1, 1], 16, rows=4, seed=0)
    assert [batches[0].identifier for _, batches, _ in resumed.prefetch(23, 40)] == seen[23:]
    assert len(set(seen)) == len(seen)
    assert Loader(corpora, [1, 1], 16, rows=4, seed=1).batch(0)[0].identifier != seen[0]


def test_an_epoch_visits_every_row_once_and_is_counted(make_corpus):
    corpus = make_corpus("a", [20] * 32)
    loader = Loader([corpus], [1.0], sequence_length=16, rows=4, seed=0)  # 640 tokens, 40 rows, 10 steps
    rows = [row for step in range(10) for row in loader.batch(step)[0].input_ids.view(4, 16).tolist()]
    assert len({tuple(row) for row in rows}) == 40
    assert sum(row.count(corpus.eos_token_id) for row in rows) == 32
    assert [loader.epoch(step) for step in (0, 5, 10, 25)] == [0.0, 0.5, 1.0, 2.5]


def test_neighbouring_rows_come_from_different_places(make_corpus):
    """One long document would otherwise fill many batches in a row."""
    stream = Stream(make_corpus("a", [100_000]), 16, SEED)
    starts = np.array([stream.slice(row).starts[0] for row in range(64)])
    assert (np.abs(np.diff(starts)) > 1000).mean() > 0.9


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.3], [5, 2, 1], [1 / 3, 1 / 3, 1 / 3], [997, 1, 1, 1]])
def test_mixture_is_exact_in_blocks_and_even_within(weights):
    mixture = Mixture(weights, seed=0)
    share = np.array(weights) / sum(weights)
    seen = np.zeros(len(weights), dtype=int)
    for row in range(3000):
        assert mixture.rows_before(row).tolist() == seen.tolist()
        corpus, number = mixture.locate(row)
        assert number == seen[corpus]  # the rows of a corpus are taken in order, none twice
        seen[corpus] += 1
        assert (np.abs(seen - share * (row + 1)) < 2.1 + len(weights)).all()
        if (row + 1) % 1000 == 0:
            assert (np.abs(seen - share * (row + 1)) < (row + 1) / 1000).all()


def test_validation_batches_are_fixed_and_spread(make_corpus):
    corpus = make_corpus("a", [10] * 100)
    batches = validation_batches(corpus, sequence_length=20, rows=4, limit_tokens=200)
    assert [batch.input_ids.shape[1] for batch in batches] == [80, 80, 40]
    again = validation_batches(corpus, sequence_length=20, rows=4, limit_tokens=200)
    assert [batch.identifier for batch in batches] == [batch.identifier for batch in again]
    firsts = torch.cat([batch.input_ids[0].view(-1, 20)[:, 0] for batch in batches]).tolist()
    assert firsts == corpus.tokens[0:1000:100].tolist()
    everything = validation_batches(corpus, 20, 4, limit_tokens=10**9)
    assert sum(batch.input_ids.shape[1] for batch in everything) == 1000
    short = validation_batches(make_corpus("b", [5]), sequence_length=20, rows=4, limit_tokens=200)
    assert len(short) == 1 and short[0].input_ids.shape == (1, 5)


def test_prefetch_passes_on_errors_where_they_belong(make_corpus, monkeypatch):
    loader = Loader([make_corpus("a", LENGTHS)], [1.0], 16, rows=2, seed=0)
    whole = loader.batch

    def broken(step, *arguments):
        if step == 2:
            raise OSError(5, "Input/output error", "train.bin")
        return whole(step, *arguments)

    monkeypatch.setattr(loader, "batch", broken)
    steps = []
    with pytest.raises(OSError, match="Input/output error"):
        for step, batches, waited in loader.prefetch(0, 10):
            assert batches[0].identifier == loader.identifier(step) and waited >= 0
            steps.append(step)
    assert steps == [0, 1]


def test_prefetch_is_bounded_and_stops_with_its_consumer(make_corpus, monkeypatch):
    loader = Loader([make_corpus("a", LENGTHS)], [1.0], 16, rows=2, seed=0)
    made, whole = [], loader.batch
    monkeypatch.setattr(loader, "batch", lambda *arguments: made.append(1) or whole(*arguments))
    ahead = loader.prefetch(0, 1000, depth=2)
    next(ahead)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) <= 4  # one taken, two waiting, one in hand
    ahead.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_errors_say_what_to_change(make_corpus):
    corpus = make_corpus("a", LENGTHS)
    with pytest.raises(
        ValueError, match=r"has 214 train tokens, less than one row of 1,000; lower batch.sequence_length"
    ):
        Loader([corpus], [1.0], 1000, rows=1, seed=0)
    with pytest.raises(ValueError, match=r"6 rows per step do not divide into 2 ranks x 2 micro-batches; .* of 4 rows"):
        Loader([corpus], [1.0], 16, rows=6, seed=0).batch(0, 0, 2, 2)
    with pytest.raises(ValueError, match=r"weights \[1, 0\] must be one positive number"):
        Loader([corpus, corpus], [1, 0], 16, rows=1, seed=0)
    with pytest.raises(ValueError, match=r"less than 1 row in 1000"):
        Loader([corpus, corpus], [1, 1e-6], 16, rows=1, seed=0)
    with pytest.raises(ValueError, match=r"does not match corpus .*b, which was made with"):
        Loader([corpus, make_corpus("b", LENGTHS, tokenizer_hash="1" * 64)], [1, 1], 16, rows=1, seed=0)
