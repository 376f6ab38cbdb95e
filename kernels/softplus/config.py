"""Options of softplus attention, and what they make of one row: its visible keys, its factor, its threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

MAPS = ("softplus", "exp", "sigmoid", "relu", "relu2", "gelu")
LENGTH_SCALES = ("log_d_log_n", "log_n", "inverse_sqrt_d")
DEAD_ROWS = ("lssa", "zero")
# A row whose largest excess over its mean is below this share of its largest score has no direction: it is dead.
DEAD = 1e-6


@dataclass(frozen=True)
class Config:
    """How softplus attention weighs the keys of a row. Values are checked; ValueError says what to use instead.

    power: of the re-weighting (LSSAR), 1 or more; 0 for none (LSSA). Published: 15 for length extrapolation, 3 best at
    the trained length.
    window: keys that a token sees, itself included; None for all earlier ones.
    free_rows: rows that see at most this many keys keep their weights unshifted.
    scale_multiplier: factor on the scores beside ln d.
    dead_row: what a row does whose scores are all equal: `lssa`, weights without the re-weighting, or `zero`, nothing.
    eps: added to both denominators; 1e-8 computes what the public reproduction does, damped rows included.

    For ablations:
    phi: the positive map of the scores (relu2 is relu squared; gelu, negative in places, is taken by its size in
    the l1 norm); a row in which no map is above 0 gives 0.
    qk_norm: scores of unit queries and keys. l1: False divides by the visible keys instead of by the sum of the maps;
    without the re-weighting only.
    length_scale: of the scores, with N visible keys: ln d * ln N, ln N, or 1 / sqrt(d).
    """

    power: float = 15.0
    window: int | None = None
    free_rows: int = 3
    scale_multiplier: float = 1.0
    dead_row: str = "lssa"
    eps: float = 0.0
    phi: str = "softplus"
    qk_norm: bool = True
    l1: bool = True
    length_scale: str = "log_d_log_n"

    def __post_init__(self) -> None:
        if self.power != 0 and not 1 <= self.power < math.inf:
            raise ValueError(
                f"power={self.power} must be 1 or more, or 0 for no re-weighting: below 1 the slope at the threshold "
                "is infinite"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 (a token sees itself), or none")
        if self.free_rows < 1:
            raise ValueError(f"free_rows={self.free_rows} must be at least 1: a single key is its own mean")
        if not 0 < self.scale_multiplier < math.inf:
            raise ValueError(f"scale_multiplier={self.scale_multiplier} must be above 0")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps={self.eps} must be 0 or more")
        for name, valid in (("phi", MAPS), ("length_scale", LENGTH_SCALES), ("dead_row", DEAD_ROWS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(valid)}")
        if not self.l1 and (self.power or self.phi == "exp"):
            raise ValueError(
                f"l1=False with power={self.power} and phi={self.phi!r}: without the l1 norm use power=0, and a map "
                "that does not overflow"
            )

    @property
    def unfused(self) -> tuple[str, ...]:
        """Names of the options in force that the Triton kernels lack."""
        names = ("eps", "phi", "qk_norm", "l1", "length_scale")
        defaults = {field.name: field.default for field in fields(self)}
        return tuple(name for name in names if getattr(self, name) != defaults[name])

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError where ln d would make every score 0."""
        if head_dim < 2 and self.length_scale == "log_d_log_n":
            raise ValueError(f"head_dim={head_dim} must be at least 2: the scores are scaled by its logarithm")

    def factors(self, head_dim: int) -> tuple[float, float]:
        """(a, b) of the row factor c = a + b ln N, for heads of `head_dim` channels."""
        if self.length_scale == "inverse_sqrt_d":
            return self.scale_multiplier * head_dim**-0.5, 0.0
        return 0.0, self.scale_multiplier * (math.log(head_dim) if self.length_scale == "log_d_log_n" else 1.0)

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """N: keys that the tokens at these positions of their documents see, int64 of the same shape."""
        counts = positions + 1
        return counts if self.window is None else counts.clamp(max=self.window)

    def row_scale(self, counts: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """c of rows that see `counts` keys, in `dtype`."""
        constant, slope = self.factors(head_dim)
        return constant + slope * counts.to(torch.float64).log().to(dtype)
