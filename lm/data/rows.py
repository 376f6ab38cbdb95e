"""Rows of packed documents, addressed by number: which pieces of which documents are in row r, and their tokens.

Documents of a corpus follow each other in an order shuffled per epoch: the stream. A row is one slice of
`sequence_length` tokens of it. Row numbers are shuffled too, so that neighbouring rows come from different documents
however long documents are. The tail of the stream that fills no row is left out; another epoch has another tail. A
document that a row cuts goes on in another row as a piece of its own.

    row number   -> epoch, slice of the epoch's stream      divmod by the rows per epoch
    slice        -> pieces of documents                     searchsorted in where documents begin in the stream

Memory is O(documents + rows per epoch) of int64; the tokens stay on disk.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from farspan.lm.data.corpus import Corpus

IGNORED = -100


@dataclass(frozen=True)
class Slice:
    """One row before its tokens are read. Pieces follow each other and fill the row.

    starts: [pieces] int64, index of the piece's first token in the corpus
    lengths: [pieces] int64, at least 1
    ends: [pieces] bool, whether the piece's last token is its document's last
    valid_tokens: labels that are not -100
    """

    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    valid_tokens: int


@dataclass(frozen=True)
class Row:
    """One row: tokens and labels [sequence_length] int64, lengths of its pieces [pieces] int64, and its digest."""

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    digest: bytes
    valid_tokens: int


class Stream:
    """Rows of one corpus, addressed by a row number that counts on through the epochs.

    seed: whole numbers that name the shuffles; None keeps the order of the files
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: tuple[int, ...] | None):
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        total = int(corpus.lengths.sum())
        self.rows_per_epoch = self._rows_of(total)
        if self.rows_per_epoch == 0:
            raise ValueError(
                f"corpus {corpus.directory} has {total:,} {corpus.split} tokens, less than one row of "
                f"{sequence_length:,}; lower batch.sequence_length or add sources"
            )
        # Two: the rows of a step may lie in two epochs. More would hold memory for nothing.
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def slice(self, row: int) -> Slice:
        """The pieces of documents in row number `row`; reads no tokens."""
        epoch, row = divmod(row, self.rows_per_epoch)
        documents, begins, rows = self._epoch(epoch)
        first = int(rows[row]) * self.sequence_length
        last = first + self.sequence_length
        slots = np.arange(np.searchsorted(begins, first, "right") - 1, np.searchsorted(begins, last, "left"))
        start, stop = begins[slots], begins[slots + 1]
        low, high = np.maximum(start, first), np.minimum(stop, last)
        source = self.corpus.offsets[documents[slots]] + low - start
        lengths, ends = high - low, stop <= last
        return Slice(source, lengths, ends, valid_tokens=int(lengths.sum() - ends.sum()))

    def read(self, piece: Slice) -> Row:
        """Gather the tokens of one row and their labels."""
        begins = np.cumsum(piece.lengths) - piece.lengths
        index = np.repeat(piece.starts - begins, piece.lengths) + np.arange(self.sequence_length)
        tokens = self.corpus.tokens[index].astype(np.int64)
        labels = np.empty_like(tokens)
        labels[:-1] = tokens[1:]
        last = begins + piece.lengths - 1
        labels[last[piece.ends]] = IGNORED
        cut = last[~piece.ends]  # the row cuts this document: its next token is the label, though it is in another row
        labels[cut] = self.corpus.tokens[index[cut] + 1]
        digest = hashlib.blake2b(tokens.tobytes() + piece.lengths.tobytes(), digest_size=16).digest()
        return Row(tokens, labels, piece.lengths, digest, piece.valid_tokens)

    def _rows_of(self, total: int) -> int:
        return total // self.sequence_length

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of an epoch: documents in order [documents], where each begins [documents + 1], rows in order [rows]."""
        documents, rows = np.arange(len(self.corpus.lengths)), np.arange(self.rows_per_epoch)
        if self.seed is not None:
            documents = np.argsort(random_words((*self.seed, epoch, 0), len(documents)), kind="stable")
            rows = np.argsort(random_words((*self.seed, epoch, 1), len(rows)), kind="stable")
        return documents, np.concatenate([[0], np.cumsum(self.corpus.lengths[documents])]), rows


def random_words(seed: tuple[int, ...], count: int) -> np.ndarray:
    """uint64 [count]. Raw words of Philox, which numpy keeps stable for ever; its `permutation` may change."""
    return np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
