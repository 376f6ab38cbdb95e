"""Core-context-aware attention: near tokens one by one, distant ones by groups (arXiv 2412.12465).

Two functions, so that a caller can bring cores and keys from elsewhere in between: `pool_groups` makes one core key and
value of every complete group of tokens, `core_attention` attends to cores and near tokens in one softmax.
"""

from __future__ import annotations

import torch

from farspan.kernels.cca.chunked import core_attention_chunked
from farspan.kernels.cca.pieces import Piece, check_pieces, cores_seen, prefix_needed
from farspan.kernels.cca.pool import pool_chunked
from farspan.kernels.cca.reference import core_attention_reference, pool_reference
from farspan.kernels.operator import Operator, choose_backend, declare, own_precision

__all__ = ["Piece", "core_attention", "cores_seen", "pool_groups", "prefix_needed"]

POOLS = ("significance", "mean", "max")
CORE_HEADS = ("q", "kv")
PARTS = ("both", "cores", "raw")

OPERATOR = declare(
    Operator(
        "cca",
        per_head=("q_end", "q", "k", "v", "pooled_keys", "core_k", "core_v"),
        replicated=("starts", "pieces", "group", "window", "pool", "core_heads", "core_bias", "parts"),
    )
)


@own_precision
def pool_groups(
    q_end: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    group: int,
    *,
    pooled_keys: torch.Tensor | None = None,
    core_heads: str = "q",
    pool: str = "significance",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One core key and value for each group of `group` tokens, weighted by what the group's last query attends to.

    With k_r, v_r the g tokens of a group and q_e the query of its last one, per head:
        w = softmax_r(scale q_e k_r)        core_k = sum_r w_r k_r        core_v = sum_r w_r v_r

    q_end: [1, M, H, D], rotated: the last query of each of M groups; not read (None will do) for other pools.
    k, v: [1, N, Hk, D] with H a multiple of Hk; any float dtype, scores and softmax in fp32 or wider.
    starts: int64 [M] on the device: the row of k and v where each group begins. No row is in two groups; rows in none
    are left out.
    pooled_keys: [1, N, Hk, D], keys to be pooled in place of k with the weights that k gives; k itself when None.
    core_heads: "q": a core for every query head (as published); "kv": one for every key-value head, whose evaluator is
    the mean of the queries that share it.
    pool: "significance" as above, or the "mean" or element-wise "max" of the group, whose cores have Hk heads.
    scale: D ** -0.5 when None.
    Returns core_k, core_v [1, M, Hc, D], Hc = H or Hk. Differentiable in q_end, k, v and pooled_keys.
    Raises ValueError where shapes disagree or a choice is unknown. Source: arXiv 2412.12465, section 3.2.
    """
    _check_choice("pool", pool, POOLS)
    _check_choice("core_heads", core_heads, CORE_HEADS)
    if group < 1:
        raise ValueError(f"group={group} must be at least 1")
    if (
        k.ndim != 4
        or k.shape[0] != 1
        or k.shape != v.shape
        or (pooled_keys is not None and k.shape != pooled_keys.shape)
    ):
        raise ValueError(
            f"shapes disagree: k {list(k.shape)}, v {list(v.shape)}; expected two of [1, rows, heads, head_dim]"
        )
    if starts.ndim != 1 or len(starts) * group > k.shape[1]:
        raise ValueError(f"{len(starts)} groups of {group} tokens do not fit in {k.shape[1]} rows")
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_backend(OPERATOR, backend, k)
    if pool != "significance":
        return _pool_plainly(k if pooled_keys is None else pooled_keys, v, starts, group, pool)
    expected = (1, len(starts), k.shape[3])
    if (
        q_end is None
        or q_end.ndim != 4
        or (*q_end.shape[:2], q_end.shape[3]) != expected
        or q_end.shape[2] % k.shape[2]
    ):
        shape = None if q_end is None else list(q_end.shape)
        raise ValueError(f"shapes disagree: q_end {shape} for {len(starts)} groups of k {list(k.shape)}")
    if choice == "fused":
        from farspan.kernels.cca.fused import pool_fused as run
    else:
        run = {"reference": pool_reference, "chunked": pool_chunked}[choice]
    return run(q_end, k, v, pooled_keys, starts, group, core_heads, scale)


@own_precision
def core_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    core_k: torch.Tensor,
    core_v: torch.Tensor,
    pieces: tuple[Piece, ...],
    group: int,
    window: int,
    *,
    core_bias: float = 0.0,
    parts: str = "both",
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Each token attends, in one softmax, to the cores of distant groups and to the tokens after them.

    The query at position t sees the cores j < c(t) = max(0, floor((t + 1 - window) / group)) with scores
    scale q_t core_k_j + core_bias, and the tokens group c(t) <= r <= t with scores scale q_t k_r.

    q: [1, T, H, D]; k, v: [1, N, Hk, D] with H a multiple of Hk; core_k, core_v: [1, M, Hc, D], Hc = H or Hk. Any float
    dtype, softmax statistics in fp32 or wider.
    pieces: of which documents the queries are, and which rows of k, v, core_k and core_v belong to them (`Piece`).
    Pieces may share rows; rows that no piece reads are allowed.
    group: tokens of a core. window: tokens that every query sees one by one, at least. core_bias: added to the scores
    of cores; log(group) weighs a core like the tokens in it.
    parts: "both"; "cores" or "raw" for the softmax over that part alone. A query that sees no core gets zeros (and no
    gradient) from "cores".
    scale: D ** -0.5 when None.
    Returns o [1, T, H, D]. Differentiable in every tensor. Raises ValueError where shapes disagree, or where a piece
    has fewer keys or cores than its queries see. Source: arXiv 2412.12465, section 3.3.
    """
    _check_choice("parts", parts, PARTS)
    if group < 1 or window < 1:
        raise ValueError(f"group={group} and window={window} must be at least 1: a token sees itself")
    if any(x.ndim != 4 or x.shape[0] != 1 or x.shape[3] != q.shape[-1] for x in (q, k, v, core_k, core_v)):
        shapes = [list(x.shape) for x in (q, k, v, core_k, core_v)]
        raise ValueError(f"expected packed [1, rows, heads, head_dim] tensors of one head_dim, got {shapes}")
    if k.shape != v.shape or q.shape[2] % k.shape[2]:
        raise ValueError(f"shapes disagree: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    if core_k.shape != core_v.shape or core_k.shape[2] not in (q.shape[2], k.shape[2]):
        raise ValueError(f"shapes disagree: q {list(q.shape)}, k {list(k.shape)}, cores {list(core_k.shape)}")
    check_pieces(pieces, q.shape[1], k.shape[1], core_k.shape[1], group, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    choice = choose_backend(OPERATOR, backend, q)
    if choice == "fused":
        from farspan.kernels.cca.fused import core_attention_fused as run
    else:
        run = {"reference": core_attention_reference, "chunked": core_attention_chunked}[choice]
    return run(q, k, v, core_k, core_v, pieces, group, window, core_bias, scale, parts)


def _pool_plainly(keys, values, starts, group: int, pool: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean or element-wise maximum of every group: a handful of torch's operations on any device."""
    rows = (starts[:, None] + torch.arange(group, device=starts.device)).flatten()
    groups = [x.index_select(1, rows).unflatten(1, (-1, group)) for x in (keys, values)]
    return tuple(x.mean(2) if pool == "mean" else x.amax(2) for x in groups)


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}={value!r} is not known to cca; valid: {', '.join(valid)}")
