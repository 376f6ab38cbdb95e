"""What needs only diagonals of a map: WAAD, of the first few, and FAI, of those inside its horizon.

A block of rows is formed against the keys that its diagonals reach, over the edges of documents, whose weights are 0:

    WAAD_t = W - sum_{s > t - W} (W - (t - s)) a[t, s] / mass_t
    FAI_s = sum_{t in R, lo <= t - s <= hi} a[t, s] / mass_t / |T(s)|

That is T (hi + ROWS) scores, whatever the length of the documents.
"""

from __future__ import annotations

import torch

from farspan.kernels.attention_statistics.effective import DEAD_MASS, EffectiveMap

ROWS = 64


def band_statistics(
    effective: EffectiveMap,
    rows: torch.Tensor,
    mass: torch.Tensor | None,
    waad_window: int,
    horizon: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """WAAD [T, H], 0 outside the rows, and the sums of FAI [T, H], not yet divided by |T(s)|.

    rows: bool [T], the tokens of responses. mass: [T, H], None for 1.
    """
    tokens, heads = effective.tokens, effective.heads
    low, high = horizon[0], min(horizon[1], max(effective.documents) - 1)
    reach = max(high, waad_window - 1)
    waad = fai = None
    for start in _starts(rows):
        here = slice(start, min(start + ROWS, tokens))
        keys = slice(max(0, start - reach), here.stop)
        a = effective.block(here, keys)
        if waad is None:
            waad, fai = (a.new_zeros(heads, tokens) for _ in range(2))
        inside = rows[here].to(a.dtype)
        alive = inside
        if mass is not None:
            own = mass[here].t().to(a.dtype)
            alive = (own >= DEAD_MASS) * inside
            inside = alive / own.clamp(min=DEAD_MASS)
        distance = torch.arange(here.start, here.stop, device=a.device)[:, None] - torch.arange(
            keys.start, keys.stop, device=a.device
        )
        near = max(keys.start, start - waad_window + 1) - keys.start
        short = (waad_window - distance[:, near:]).clamp(min=0).to(a.dtype)
        waad[:, here] = alive * waad_window - inside * (a[..., near:] * short).sum(-1)
        ahead = ((distance >= low) & (distance <= high)).to(a.dtype)
        if mass is None:
            fai[:, keys] += a.mul_(ahead * inside[:, None]).sum(1)
        else:
            fai[:, keys] += torch.einsum("hmn,mn,hm->hn", a, ahead, inside)
    if waad is None:
        wide = torch.float64 if mass is not None and mass.dtype == torch.float64 else torch.float32
        waad, fai = (torch.zeros(heads, tokens, dtype=wide, device=rows.device) for _ in range(2))
    return waad.t(), fai.t()


def future_rows(rows: torch.Tensor, documents: tuple[int, ...], horizon: tuple[int, int]) -> torch.Tensor:
    """|T(s)|, int64 [T]: how many of the rows lie lo to hi tokens after s in its document; 0 where s is no row."""
    seen = torch.nn.functional.pad(rows.long().cumsum(0), (1, 0))
    lengths = torch.tensor(documents)
    end = lengths.cumsum(0).repeat_interleave(lengths).to(rows.device)
    at = torch.arange(len(rows), device=rows.device)
    first = torch.minimum(at + horizon[0], end)
    last = torch.minimum(at + min(horizon[1], len(rows)) + 1, end)
    return torch.where(rows, seen[torch.maximum(first, last)] - seen[first], 0)


def _starts(rows: torch.Tensor) -> list[int]:
    """First tokens of the blocks that hold a row."""
    padded = torch.nn.functional.pad(rows, (0, -len(rows) % ROWS))
    return (padded.view(-1, ROWS).any(1).nonzero()[:, 0] * ROWS).tolist()
