"""What mixers with states of their own make share: where rows begin anew, and entries brought up to date."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from farspan.layers.mixer import State


def new_rows(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """bool [documents]: which have seen nothing yet."""
    return torch.tensor([offset == 0 for offset in offsets], device=device)


def where_new(new: torch.Tensor, initial: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Rows of `initial` (batch 1 or that of `new`) where the bool [documents] says so, of `known` elsewhere."""
    return torch.where(new.view(-1, *[1] * (known.ndim - 1)), initial, known)


def store(state: State, new: Mapping[str, torch.Tensor]) -> None:
    """Bring entries up to date: in place, unless gradients are recorded; then the tensors are replaced."""
    for name, value in new.items():
        old = state[name]
        if torch.is_grad_enabled() and (value.requires_grad or old.requires_grad):
            state[name] = value.to(old.dtype)
        elif value is not old:
            old.copy_(value)
