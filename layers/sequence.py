"""What a mixer knows about its tokens: one packed row, cut into documents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch

from farspan.parallel import Shard

Table = TypeVar("Table")


@dataclass(frozen=True, eq=False)
class Sequence:
    """One packed row of documents, `[1, tokens, ...]`; made once per step and shared by all layers.

    A shard of a row is a row too: its documents are the pieces that this rank holds, and what came before a piece lives
    on other ranks (`shard` says where) instead of in a state.

    lengths: tokens of each document in this row, at least 1 each; host values, so no layer waits for the device.
    offsets: tokens of each document that came before this row and live in the layers' states; zeros without states.
    cu_seqlens: int32 [documents + 1], the lengths as offsets into the row, on the device.
    positions: int64 [tokens], index of each token within its document, counted from the document's very start.
    shard: how the row is shared out over ranks, None where it is whole.
    """

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    shard: Shard | None = None
    _tables: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def packed(
        cls, lengths: Iterable[int], device: torch.device | str = "cpu", offsets: Iterable[int] | None = None
    ) -> Sequence:
        """A row of documents of the given lengths. Raises ValueError for an empty document or a negative offset."""
        lengths = tuple(lengths)
        offsets = (0,) * len(lengths) if offsets is None else tuple(offsets)
        if not lengths or min(lengths) < 1 or len(offsets) != len(lengths) or min(offsets) < 0:
            raise ValueError(f"document lengths {lengths[:8]} must be 1 or more, with one offset of 0 or more for each")
        cu_seqlens = torch.tensor([0, *accumulate(lengths)])
        shift = torch.tensor(offsets) - cu_seqlens[:-1]
        positions = torch.arange(sum(lengths)) + shift.repeat_interleave(torch.tensor(lengths))
        cu_seqlens = cu_seqlens.to(torch.int32)
        if torch.device(device).type == "cuda":
            cu_seqlens, positions = (x.pin_memory().to(device, non_blocking=True) for x in (cu_seqlens, positions))
        return cls(lengths, offsets, cu_seqlens, positions)

    @classmethod
    def rows(
        cls, batch: int, time: int, device: torch.device | str = "cpu", offsets: Iterable[int] | None = None
    ) -> Sequence:
        """A batch of `batch` rows of `time` tokens, each a document, laid end to end."""
        return cls.packed((time,) * batch, device, offsets)

    @classmethod
    def sharded(cls, shard: Shard, device: torch.device | str = "cpu") -> Sequence:
        """This rank's part of a row."""
        local = cls.packed([p.length for p in shard.pieces], device, [p.offset for p in shard.pieces])
        return replace(local, shard=shard)

    @property
    def slot(self) -> Sequence:
        """Of a shard, the part of the row that its ring slot holds: what a rank sees between Ulysses' exchanges."""
        return self.table("slot", lambda: Sequence.sharded(self.shard.ring, self.positions.device))

    @property
    def whole(self) -> Sequence:
        """Of a shard, the row that it was made of."""
        return self.table("whole", lambda: Sequence.packed(self.shard.lengths, self.positions.device))

    @property
    def tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """Length of each document so far: offset + length."""
        return tuple(offset + length for offset, length in zip(self.offsets, self.lengths, strict=True))

    @cached_property
    def fresh(self) -> bool:
        """Whether every document starts in this row."""
        return not any(self.offsets)

    @cached_property
    def single_tokens(self) -> bool:
        """Whether this is one decoding step: one token of every document."""
        return max(self.lengths) == 1

    @property
    def document_of_token(self) -> torch.Tensor:
        """int64 [tokens]: index of each token's document."""

        def build() -> torch.Tensor:
            documents = torch.arange(self.documents, device=self.positions.device)
            lengths = self.cu_seqlens.diff().long()
            return documents.repeat_interleave(lengths, output_size=self.tokens)

        return self.table("document_of_token", build)

    def table(self, key: Hashable, build: Callable[[], Table]) -> Table:
        """`build()`, computed at the first request for `key` and kept for the other layers of the step."""
        if key not in self._tables:
            self._tables[key] = build()
        return self._tables[key]
