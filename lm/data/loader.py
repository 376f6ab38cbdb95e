"""The resumable loader: step i of a run is the same rows on any number of ranks, found without reading earlier ones.

    step         -> row numbers of the run                  step * rows + [0, rows)
    row number   -> corpus, row number within it            a fixed block of 1,000 rows (Mixture)
    row number   -> pieces of documents, tokens             farspan.lm.data.rows

Each arrow is arithmetic on its argument, so that a resumed run asks for a later step and nothing else.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from farspan.lm.data.corpus import Corpus
from farspan.lm.data.demonstrations import stream_of
from farspan.lm.data.rows import Row, Stream, random_words

MIXTURE_BLOCK = 1000


@dataclass(frozen=True)
class Batch:
    """Packed rows, ready for the model.

    input_ids: [1, tokens] int64
    shift_labels: [1, tokens] int64, the next token of the same document, -100 after its last one
    cu_seqlens: [pieces + 1] int32, where pieces of documents start in the packed row; 0 first, `tokens` last
    identifier: short hash of the tokens, their boundaries and their order
    valid_tokens: labels that are not -100
    """

    input_ids: torch.Tensor
    shift_labels: torch.Tensor
    cu_seqlens: torch.Tensor
    identifier: str
    valid_tokens: int


class Loader:
    """Batches of `rows` rows of `sequence_length` tokens from one corpus, or from several mixed by weight.

    weights: share of the rows from each corpus, any scale; exact to 1/1000 in each block of 1,000 rows
    rows: rows of one step, over all ranks and micro-batches

    Raises ValueError where a corpus fills no row or corpora have different tokenizers.
    """

    def __init__(self, corpora: list[Corpus], weights: list[float], sequence_length: int, rows: int, seed: int):
        for corpus in corpora:
            corpus.check_tokenizer(corpora[0].tokenizer_hash, f"of {corpora[0].directory}")
        self.rows = rows
        self._streams = [stream_of(corpus, sequence_length, (seed, i)) for i, corpus in enumerate(corpora)]
        self._mixture = Mixture(weights, seed)

    def batch(self, step: int, rank: int = 0, ranks: int = 1, accumulation: int = 1) -> list[Batch]:
        """The micro-batches of one rank at one step: rank r of R has the r-th of R equal runs of the step's rows."""
        parts = ranks * accumulation
        if self.rows % parts:
            raise ValueError(
                f"{self.rows} rows per step do not divide into {ranks} ranks x {accumulation} micro-batches; "
                f"make the batch a multiple of {parts} rows"
            )
        size = self.rows // parts
        first = step * self.rows + rank * accumulation * size
        return [pack_rows([self._row(first + micro * size + i) for i in range(size)]) for micro in range(accumulation)]

    def valid_tokens(self, step: int) -> int:
        """Labels that are not -100 in the whole step, over all ranks; reads no tokens."""
        return sum(stream.slice(row).valid_tokens for stream, row in map(self._locate, self._row_numbers(step)))

    def identifier(self, step: int) -> str:
        """Identifier of the whole step, whatever the ranks: that of its one batch. Reads every row of the step."""
        return _identifier([self._row(row).digest for row in self._row_numbers(step)])

    def epoch(self, step: int) -> float:
        """Times that the most repeated corpus has been seen when `step` begins."""
        seen = self._mixture.rows_before(step * self.rows)
        return max(float(rows / stream.rows_per_epoch) for rows, stream in zip(seen, self._streams, strict=True))

    def prefetch(
        self, first_step: int, last_step: int, rank: int = 0, ranks: int = 1, accumulation: int = 1, depth: int = 2
    ) -> Iterator[tuple[int, list[Batch], float]]:
        """(step, batches, seconds waited) for first_step <= step < last_step, read ahead by a thread.

        At most `depth` steps wait in memory. An exception of the thread is raised where its step would have come.
        """
        return _ahead(lambda step: self.batch(step, rank, ranks, accumulation), range(first_step, last_step), depth)

    def _row_numbers(self, step: int) -> range:
        return range(step * self.rows, (step + 1) * self.rows)

    def _locate(self, row: int) -> tuple["Stream", int]:
        corpus, row = self._mixture.locate(row)
        return self._streams[corpus], row

    def _row(self, row: int) -> "Row":
        stream, row = self._locate(row)
        return stream.read(stream.slice(row))


def validation_batches(corpus: Corpus, sequence_length: int, rows: int, limit_tokens: int) -> list[Batch]:
    """The same packed batches at every call: rows spread evenly over the documents in the order of the files.

    limit_tokens: at most so many tokens (at least one row); the last batch may have fewer rows than `rows`. A corpus
    shorter than one row gives one shorter row.
    """
    whole = corpus.learned is not None  # a row of demonstrations has padding, a shorter one might hold none of them
    stream = stream_of(corpus, sequence_length if whole else min(sequence_length, len(corpus.tokens)), seed=None)
    count = min(max(limit_tokens // sequence_length, 1), stream.rows_per_epoch)
    chosen = np.arange(count) * stream.rows_per_epoch // count
    read = [stream.read(stream.slice(int(row))) for row in chosen]
    return [pack_rows(read[i : i + rows]) for i in range(0, count, rows)]


class Mixture:
    """Which corpus a row comes from: a stateless map from row numbers of the run to (corpus, row number within it).

    Rows come in blocks of 1,000. Corpus c has the same number n_c of rows in every block, its weight rounded by largest
    remainders. They are spread over the block with a jitter: its i-th row is placed at (i + u) / n_c, u uniform, and
    the placements of all corpora are sorted. A batch of any size thus holds close to its share of each.
    """

    def __init__(self, weights: list[float], seed: int):
        share = np.asarray(weights, dtype=np.float64)
        if len(share) == 0 or not (np.isfinite(share) & (share > 0)).all():
            raise ValueError(f"weights {list(weights)} must be one positive number per corpus")
        share = share / share.sum() * MIXTURE_BLOCK
        self.counts = np.floor(share).astype(np.int64)
        short = MIXTURE_BLOCK - self.counts.sum()
        self.counts[np.argsort(self.counts - share, kind="stable")[:short]] += 1
        if (self.counts == 0).any():
            raise ValueError(
                f"weights {list(weights)} give a corpus less than 1 row in {MIXTURE_BLOCK}; raise its weight or drop it"
            )
        owner = np.repeat(np.arange(len(share)), self.counts)
        index = np.concatenate([np.arange(count) for count in self.counts])
        jitter = random_words((seed, 0, 0, 2), MIXTURE_BLOCK) / 2.0**64
        order = np.argsort((index + jitter) / self.counts[owner], kind="stable")
        self._owner = owner[order]
        # _before[p, c]: rows of corpus c in the first p rows of a block.
        chosen = self._owner[:, None] == np.arange(len(share))
        self._before = np.concatenate([np.zeros((1, len(share)), np.int64), chosen.cumsum(axis=0)])

    def locate(self, row: int) -> tuple[int, int]:
        """Corpus of a row of the run, and the number of the row within it."""
        corpus = int(self._owner[row % MIXTURE_BLOCK])
        return corpus, int(self.rows_before(row)[corpus])

    def rows_before(self, row: int) -> np.ndarray:
        """Rows of each corpus among the first `row` rows of the run, [corpora] int64."""
        block, position = divmod(row, MIXTURE_BLOCK)
        return block * self.counts + self._before[position]


def pack_rows(rows: list[Row]) -> Batch:
    """Rows one after the other, ready for the model."""
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([row.tokens for row in rows]))[None],
        shift_labels=torch.from_numpy(np.concatenate([row.labels for row in rows]))[None],
        cu_seqlens=torch.from_numpy(np.cumsum(np.concatenate([[0], *(row.lengths for row in rows)]), dtype=np.int32)),
        identifier=_identifier([row.digest for row in rows]),
        valid_tokens=sum(row.valid_tokens for row in rows),
    )


def _identifier(digests: list[bytes]) -> str:
    return hashlib.blake2b(b"".join(digests), digest_size=6).hexdigest()


def _ahead(make, steps: range, depth: int) -> Iterator:
    """(step, make(step), seconds waited) for each step, made by a thread that is at most `depth` steps ahead."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item) -> None:
        while not stopped.is_set():  # a consumer that left does not take: look for it now and then
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                if stopped.is_set():
                    return
                put((step, make(step), None))
        except BaseException as error:
            put((None, None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            began = time.perf_counter()
            step, made, error = ready.get()
            if error is not None:
                raise error
            yield step, made, time.perf_counter() - began
    finally:
        stopped.set()
        thread.join(timeout=1)  # a read that hangs must not keep a stopped run from leaving
