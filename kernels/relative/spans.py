"""Which queries meet which keys: runs of both, and where each run begins in its document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """`length` queries from row `query` on meet `keys` keys from row `key` on, all of one document.

    query_position, key_position: of the first query and the first key in the document. A query sees the keys at its
    own position and before, with a window the last ones of these.
    """

    query: int
    length: int
    key: int
    keys: int
    query_position: int
    key_position: int

    @property
    def base(self) -> int:
        """Distance from the first key to the first query."""
        return self.query_position - self.key_position


def document_spans(lengths: Iterable[int], prefixes: Iterable[int], first: int = 0) -> tuple[Span, ...]:
    """Of packed documents of `lengths`, with `prefixes` earlier keys in front of each one's own; the first of these at
    position `first` of its document.
    """
    spans, query, key = [], 0, 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        spans.append(Span(query, length, key, prefix + length, first + prefix, first))
        query, key = query + length, key + prefix + length
    return tuple(spans)


def flat(spans: Iterable[Span]) -> list[int]:
    """Their numbers in one list, as a custom operator takes them; `unflat` inverts it."""
    return [number for span in spans for number in span]


def unflat(numbers: list[int]) -> tuple[Span, ...]:
    return tuple(Span(*numbers[first : first + 6]) for first in range(0, len(numbers), 6))
