"""Which tokens and cores a query sees: the partition of its past that everything in this folder shares.

With groups of g tokens and a window of s, the query at position t of its document sees

    cores 0 .. c(t) - 1      c(t) = max(0, floor((t + 1 - s) / g))
    tokens g c(t) .. t       between min(t + 1, s) and s + g - 1 of them

so every token up to t counts once, by its core or itself, whatever g and s. Conversely core j is seen from position
g (j + 1) + s - 1 on, and token r up to position g (floor(r / g) + 1) + s - 2.
"""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Consecutive queries of one document, and where what they see lies.

    length: queries, at positions `offset` .. `offset + length - 1` of the document; pieces follow each other in q.
    prefix: keys before the piece's own. Its keys are rows `key` .. `key + prefix + length - 1` of k and v; the first
    stands at position `offset - prefix`.
    core: row of the document's first core in core_k and core_v; core j of the document is row `core + j`.
    """

    length: int
    offset: int
    prefix: int
    key: int
    core: int


def cores_seen(position: int, group: int, window: int) -> int:
    """c(t): how many cores the query at `position` sees."""
    return max(0, (position + 1 - window) // group)


def prefix_needed(offset: int, group: int, window: int) -> int:
    """Tokens before position `offset` that the query there sees one by one."""
    return offset - group * cores_seen(offset, group, window)


def check_pieces(pieces: tuple[Piece, ...], queries: int, keys: int, cores: int, group: int, window: int) -> None:
    """Raise ValueError unless the pieces fill the queries and find every key and core that they see."""
    if sum(piece.length for piece in pieces) != queries or min((p.length for p in pieces), default=0) < 1:
        raise ValueError(f"pieces of {[p.length for p in pieces[:8]]} tokens do not make up {queries} queries")
    for piece in pieces:
        needed = prefix_needed(piece.offset, group, window)
        if min(piece) < 0 or piece.prefix > piece.offset:
            raise ValueError(f"{piece} is impossible: no number may be negative, nor its prefix more than its offset")
        if piece.prefix < needed:
            raise ValueError(f"{piece} needs a prefix of {needed} keys with group={group} and window={window}")
        if piece.key + piece.prefix + piece.length > keys:
            raise ValueError(f"{piece} reaches beyond the {keys} rows of keys")
        if piece.core + cores_seen(piece.offset + piece.length - 1, group, window) > cores:
            raise ValueError(f"{piece} sees cores beyond the {cores} that there are")
