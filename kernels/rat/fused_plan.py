"""How packed documents map to the programs of the fused RAT kernels: host tables, built once per step.

The kernels see no document boundaries, only tables: which tokens a program owns and which summaries they may read. A
tile never crosses a document, so no length has to be a multiple of anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from farspan.kernels.launch import expand

# A chunk longer than this is scanned in pieces side by side: one loop over it would leave the device idle.
PIECE = 256

# Programs that keep a device busy: four for each of the 132 multiprocessors of an H100 or H200. A constant, so that
# sums are split alike, and results the same, on every device.
PROGRAMS = 528


@dataclass(frozen=True)
class Plan:
    """Tables for documents of `lengths` tokens, of which `offsets` came earlier, in chunks of `chunk` tokens.

    A row is a piece of a chunk of at most `slots` tokens (the whole chunk where `slots == chunk`). Summaries lie in one
    array for all documents, earlier and new ones of a document together. Tables are int64, one field after another.
    """

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    chunk: int
    piece: int
    device: torch.device

    @property
    def slots(self) -> int:
        """Tokens per row at most."""
        return min(self.chunk, self.piece)

    @property
    def pieced(self) -> bool:
        return self.piece < self.chunk

    @cached_property
    def _documents(self) -> dict[str, torch.Tensor]:
        """Per document: tokens, tokens before, first token, summaries before, finished now, first summary."""
        length, offset = torch.tensor(self.lengths), torch.tensor(self.offsets)
        before, after = offset // self.chunk, (offset + length) // self.chunk
        return {
            "length": length,
            "offset": offset,
            "start": length.cumsum(0) - length,
            "before": before,
            "finished": after - before,
            "key": after.cumsum(0) - after,
        }

    @property
    def summaries(self) -> int:
        """Summaries of all documents, earlier and new."""
        return int((self._documents["before"] + self._documents["finished"]).sum())

    @property
    def new(self) -> int:
        """Chunks that these tokens finish."""
        return int(self._documents["finished"].sum())

    @cached_property
    def known_index(self) -> torch.Tensor:
        """int64: where the earlier summaries lie among all."""
        d = self._documents
        _, index = expand(d["before"], d["key"])
        return index.to(self.device)

    @cached_property
    def new_index(self) -> torch.Tensor:
        """int64: where the new summaries lie among all."""
        d = self._documents
        _, index = expand(d["finished"], d["key"] + d["before"])
        return index.to(self.device)

    @cached_property
    def _pieces(self) -> dict[str, torch.Tensor]:
        """Per row: document, chunk within it, and its first position within the document."""
        d, per_chunk = self._documents, -(-self.chunk // self.slots)
        chunks = (d["offset"] + d["length"] - 1) // self.chunk - d["before"] + 1
        document, chunk = expand(chunks * per_chunk, d["before"] * per_chunk)
        position = (chunk // per_chunk) * self.chunk + (chunk % per_chunk) * self.slots
        end = torch.minimum(position + self.slots, (chunk // per_chunk + 1) * self.chunk)
        last = torch.minimum(end, (d["offset"] + d["length"])[document])
        kept = (last > torch.maximum(position, d["offset"][document])).nonzero()[:, 0]
        fields = {"document": document, "chunk": chunk // per_chunk, "position": position, "end": end, "last": last}
        return {name: field[kept] for name, field in fields.items()}

    @property
    def rows(self) -> int:
        return len(self._pieces["chunk"])

    @cached_property
    def row_table(self) -> torch.Tensor:
        """int64 [7, rows]: token of slot 0 (also where that slot is empty), first and end of the slots that hold
        tokens, chunk within the document, summary that the row finishes, document that it ends, document whose running
        state it continues (-1: none, three times).
        """
        d, p = self._documents, self._pieces
        document, offset = p["document"], d["offset"][p["document"]]
        total = offset + d["length"][document]
        ends_chunk = p["last"] == (p["chunk"] + 1) * self.chunk
        fields = [
            d["start"][document] + p["position"] - offset,
            (offset - p["position"]).clamp(min=0),
            p["last"] - p["position"],
            p["chunk"],
            torch.where(ends_chunk, d["key"][document] + p["chunk"], -1),
            torch.where(p["last"] == total, document, -1),
            torch.where(self._first_piece & (offset % self.chunk > 0), document, -1),
        ]
        return torch.stack(fields).to(self.device)

    @cached_property
    def _first_piece(self) -> torch.Tensor:
        """bool [rows]: whether the row is the first one of its document in this call."""
        document = self._pieces["document"]
        first = torch.ones_like(document, dtype=torch.bool)
        first[1:] = document[1:] != document[:-1]
        return first

    @cached_property
    def chunk_table(self) -> torch.Tensor:
        """int64 [3, chunks]: first row of each chunk, its rows, the document whose running state it continues or -1."""
        document, chunk = self._pieces["document"], self._pieces["chunk"]
        starts = torch.ones_like(chunk, dtype=torch.bool)
        starts[1:] = (document[1:] != document[:-1]) | (chunk[1:] != chunk[:-1])
        first = starts.nonzero()[:, 0].to(self.device)
        rows = torch.diff(first, append=first.new_tensor([self.rows]))
        return torch.stack([first, rows, self.row_table[6, first]])

    @lru_cache(maxsize=32)  # noqa: B019 (plans live in a small cache themselves)
    def query_table(self, block: int) -> torch.Tensor:
        """int64 [4, tiles]: first token, tokens, position of the first one, first summary of the document.

        The tiles that see most come first: they take longest.
        """
        d = self._documents
        document, tile = expand(-(-d["length"] // block))
        start = tile * block
        position = d["offset"][document] + start
        count = (d["length"][document] - start).clamp(max=block)
        table = torch.stack([d["start"][document] + start, count, position, d["key"][document]])
        return table[:, (position // self.chunk).argsort(descending=True, stable=True)].contiguous().to(self.device)

    @lru_cache(maxsize=32)  # noqa: B019
    def key_table(self, block: int, query_block: int, heads: int) -> tuple[torch.Tensor, int]:
        """int64 [8, entries] and the number of splits: first summary, summaries, index of the first one in its
        document, first token that may see it, its position, end of the tokens, where all of the block is seen, split.

        Where there are few summaries, their queries are split so that the device has enough programs.
        """
        d = self._documents
        document, tile = expand(-(-(d["before"] + d["finished"]) // block))
        index = tile * block
        count = (d["before"] + d["finished"])[document].sub(index).clamp(max=block)
        shift = d["start"][document] - d["offset"][document]  # token = position + shift
        end = d["start"][document] + d["length"][document]
        first = torch.maximum((index + 1) * self.chunk, d["offset"][document]) + shift
        first = torch.minimum(first, end)
        full = (index + count) * self.chunk + shift
        queries = int((end - first).max()) if len(first) else 0
        wanted = -(-PROGRAMS // 2 // max(1, len(first) * heads))
        splits = max(1, min(wanted, queries // (8 * query_block)))
        share = -(-(end - first) // (splits * query_block)) * query_block
        parts = []
        for split in range(splits):
            begin = torch.minimum(first + split * share, end)
            stop = torch.minimum(begin + share, end)
            fields = [d["key"][document] + index, count, index, begin, begin - shift, stop, full]
            parts.append(torch.stack([*fields, torch.full_like(index, split)]))
        table = torch.cat(parts, dim=1)
        order = (table[5] - table[3]).argsort(descending=True, stable=True)
        return table[:, order].contiguous().to(self.device), splits


@lru_cache(maxsize=16)
def make_plan(lengths: tuple[int, ...], offsets: tuple[int, ...], chunk: int, piece: int, device: torch.device) -> Plan:
    """The plan of a step, made once and shared by all layers with this chunk size."""
    return Plan(lengths, offsets, chunk, piece, device)
