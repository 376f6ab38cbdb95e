"""The contract of a layer's attention map that is never written out: effective weights of source tokens on outputs.

For every head, a[t, s] >= 0 says how much token s enters the output of token t. A mixer with such weights offers its
row moments and any rectangle of the map; everything in this folder is computed from these two:

    mass_t = sum_s a[t, s]          distance_t = sum_s a[t, s] (t - s) / mass_t         a[rows, keys]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

# A row with less mass than this says nothing about where it looks: it counts as distance 0.
DEAD_MASS = 1e-6


class Moments(NamedTuple):
    """distance: [T, H], 0 in rows without mass; mass: [T, H], or None where every row has mass 1."""

    distance: torch.Tensor
    mass: torch.Tensor | None


class EffectiveMap(ABC):
    """Weights of one layer on a packed row of documents; everything in fp32, or float64 for float64 inputs.

    documents: tokens of each. heads: of queries. reads: a token weighs only tokens of its own document, up to itself.
    """

    documents: tuple[int, ...]
    heads: int
    device: torch.device

    @abstractmethod
    def moments(self) -> Moments:
        """Mass and mean backward distance of every row, in memory linear in the tokens."""

    @abstractmethod
    def block(self, rows: slice, keys: slice) -> torch.Tensor:
        """a[rows, keys], [H, rows, keys], not divided by the mass and 0 where nothing is seen.

        The slices count tokens of the packed row. A fresh tensor, which the caller may change.
        """

    @property
    def tokens(self) -> int:
        return sum(self.documents)


def first_tokens(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int64 [T]: where the document of each token of a packed row begins."""
    lengths = torch.tensor(lengths)
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths).to(device)


def moments_of(numerator: torch.Tensor, mass: torch.Tensor) -> Moments:
    """Of sums over s of a (t - s) and of a, both [T, H]."""
    dead = mass < DEAD_MASS
    return Moments((numerator / mass.masked_fill(dead, 1.0)).masked_fill(dead, 0.0), mass)
