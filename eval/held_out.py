"""Segments of held-out text, long enough for a length.

- Where at least two documents are long enough, the segments are the beginnings of documents.
- Else the documents, in the order of the corpus and with their end-of-text tokens, are read as ONE document, and the
  segments are cut from it at even distances. What lies further back is then often another document, which is of little
  use as context: a flat loss is the most that a model can show there.
"""

from dataclasses import dataclass

import numpy as np

from farspan.lm.data.corpus import Corpus


@dataclass(frozen=True)
class Text:
    """Held-out tokens. segments: [length + 1] each, the longest length and the token that follows it.

    source: where they come from, for a person. rule: how they were chosen. bytes_per_token: of the source, on average.
    """

    source: str
    rule: str
    segments: tuple[np.ndarray, ...]
    bytes_per_token: float | None


def corpus_text(corpus: Corpus, length: int, most: int) -> Text:
    """Segments of a split of a corpus; ValueError where it has less than one."""
    source, needed = f"{corpus.split} split of {corpus.directory}", length + 1
    long = np.flatnonzero(corpus.lengths >= needed)
    if len(long) >= 2:
        chosen = long[_evenly(len(long), most)]
        rule = f"beginnings of {len(chosen)} of the {len(long)} documents that are long enough"
        return Text(source, rule, tuple(corpus.document(i)[:needed] for i in chosen), corpus.bytes_per_token)
    segments = _cut(corpus.tokens, source, length, most)
    joined = f"{corpus.documents:,} documents joined with their end-of-text tokens, read as one document"
    rule = joined if corpus.documents > 1 else "one document"
    return Text(source, rule, segments, corpus.bytes_per_token)


def plain_text(ids: np.ndarray, size: int, source: str, length: int, most: int) -> Text:
    """Segments of one document of `ids` [T] that was `size` bytes of text; ValueError where it has less than one."""
    return Text(source, "one document", _cut(ids, source, length, most), size / max(1, len(ids)))


def _cut(tokens: np.ndarray, source: str, length: int, most: int) -> tuple[np.ndarray, ...]:
    needed = length + 1
    room = len(tokens) // needed
    if room == 0:
        raise ValueError(
            f"{source} has {len(tokens):,} tokens, a segment of length {length:,} needs {needed:,} (one follows); "
            "use shorter --lengths or more text"
        )
    return tuple(tokens[i * needed : (i + 1) * needed] for i in _evenly(room, most))


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of range(count), at even distances."""
    chosen = min(count, most)
    return [i * count // chosen for i in range(chosen)]
