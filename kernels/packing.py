"""Checks and re-arrangements of packed rows that several operators share."""

from __future__ import annotations

import torch

PrefixState = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def check_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> None:
    """Raise ValueError unless q [1, T, H, D] and k, v [1, T, Hk, D] are one packed row of documents of `lengths`."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != 1:
        raise ValueError(
            f"expected packed [1, time, heads, head_dim] tensors, got q {list(q.shape)}, k {list(k.shape)}"
        )
    if k.shape != v.shape or k.shape[1] != q.shape[1] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"shapes disagree: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if sum(lengths) != q.shape[1] or min(lengths, default=0) < 1:
        raise ValueError(f"document lengths {lengths[:8]} sum to {sum(lengths)}, the row has {q.shape[1]} tokens")


def with_prefixes(
    k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], state: PrefixState | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Packed keys and values with every document's earlier keys in front of its own, and the numbers of those.

    k, v: [1, T, Hk, D]; state: per document `([n, Hk, D], [n, Hk, D])`, or None.
    Returns ([1, sum(n) + T, Hk, D], the same for v, (n, ...)).
    """
    if state is None:
        return k, v, (0,) * len(lengths)
    if len(state) != len(lengths):
        raise ValueError(f"the initial state has {len(state)} documents, the row has {len(lengths)}")
    pieces = [
        [part for document, own in zip(state, x[0].split(lengths), strict=True) for part in (document[index], own)]
        for index, x in enumerate((k, v))
    ]
    k, v = (torch.cat([part.to(k.dtype) for part in side])[None] for side in pieces)
    return k, v, tuple(keys.shape[0] for keys, _ in state)
