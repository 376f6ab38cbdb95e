"""What blockwise operators in PyTorch write scores with: buffers that are kept, a column beside a matrix, base 2."""

from __future__ import annotations

import math

import torch

# Scores in base 2 keep their speed where they underflow: exp on CPU does not.
LOG2E = math.log2(math.e)


class Workspace:
    """Buffers by name, which all blocks of a call write in turn: they stay in the cache, and fresh memory costs a page
    fault for every 4 KB.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._like, self._kept = like, {}

    def get(self, name: str | tuple[str, int], *shape: int) -> torch.Tensor:
        """An uninitialised contiguous tensor, which the next request for the name overwrites."""
        size = math.prod(shape)
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = self._like.new_empty(size)
        return self._kept[name][:size].view(shape)


def with_column(x: torch.Tensor, column: torch.Tensor | float) -> torch.Tensor:
    """[..., C + 1]: x with a last channel, [...] or a number."""
    wider = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    wider[..., :-1] = x
    wider[..., -1] = column
    return wider
