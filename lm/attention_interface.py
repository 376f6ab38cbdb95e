"""Softplus attention for model classes of transformers: `attn_implementation="farspan_softplus"`.

transformers hands an attention function the queries and keys of a padded batch, and a mask function what it takes to
describe that batch. Here the mask stays two-dimensional (which slots hold real tokens, up to the last query), and the
padding is taken out before the operator runs, so that N counts real keys only.

Importing this module registers both; after `import farspan` that happens when transformers' models are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from farspan.kernels.softplus import Config, attend, normalise, softplus_step

NAME = "farspan_softplus"

# Arguments of other models' attention that change the scores of softmax and mean nothing here.
UNDEFINED = ("softcap", "s_aux", "position_bias", "cache")


def softplus_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' signature. query: [B, H, q, D]; key, value: [B, Hk, n, D], n >= q: the queries are
    the last of the keys. attention_mask: bool [B, up to n] from `real_tokens`, or None where every slot is real.

    Without padding and cache, rows of `position_ids` [B, q] that start again hold several documents, as does a single
    row with `cu_seq_lens_q`. Options (fields of `kernels.softplus.Config`, and `backend`) are the dict
    `softplus_attention` of the module's config; the window is the smaller of theirs and the model's. `scaling` is not
    used: the scores are cosines with a scale of their own. Returns o [B, q, H, D], 0 at padding, and None for weights.
    Raises ValueError for what softplus attention does not define.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse(query, value, attention_mask, dropout, causal, others)
    config, backend = _options(module, sliding_window)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is not None:
        k, v = (x[:, : attention_mask.shape[1]] for x in (k, v))
    if config.qk_norm:
        q, k = normalise(q), normalise(k)
    if q.shape[1] == 1 and attention_mask is None:
        seen = k.shape[1] if config.window is None else min(k.shape[1], config.window)
        counts = torch.full((len(q),), seen, device=q.device)
        return softplus_step(q, *(x[:, -seen:].transpose(1, 2) for x in (k, v)), counts, config), None
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, config, backend), None
    if k.shape[1] == q.shape[1]:
        lengths = _documents(q, position_ids, cu_seq_lens_q)
        prefixes = (0,) * len(lengths)
    else:
        lengths, prefixes = (q.shape[1],) * len(q), (k.shape[1] - q.shape[1],) * len(q)
    o = _packed(*(x.flatten(0, 1) for x in (q, k, v)), lengths, prefixes, config, backend)
    return o.view(q.shape), None


def real_tokens(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """transformers' mask function: bool [B, slots], the real tokens up to the last query; None where all slots are.

    attention_mask: bool [B, tokens so far]. Slots beyond the last query, which a static cache has, are cut off.
    Raises ValueError for a model whose mask is not causal, whole or of a sliding window.
    """
    if use_vmap or getattr(config, "attention_chunk_size", None):
        raise ValueError(f"{NAME} takes causal masks, whole or of a sliding window; the model has a mask of its own")
    first = int(q_offset)
    at = torch.arange(first, first + q_length - 1, device=device)
    if len(at) and mask_function(0, 0, at, at + 1).any():
        raise ValueError(f"{NAME} is causal; the model's mask shows tokens what comes after them")
    slots = first - kv_offset + q_length
    if attention_mask is None:
        return None if slots == kv_length else torch.ones(batch_size, slots, dtype=torch.bool, device=device)
    if attention_mask.shape[1] < kv_offset + slots:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} tokens, the queries end at token {kv_offset + slots}; "
            "it covers the tokens of the cache too"
        )
    attention_mask = attention_mask[:, kv_offset : kv_offset + slots]
    return None if slots == kv_length and attention_mask.all() else attention_mask


def _options(module: torch.nn.Module, sliding_window: int | None) -> tuple[Config, str]:
    """Options of the operator and its backend for one layer: what its model's config says, and its own window."""
    values = dict(getattr(module.config, "softplus_attention", None) or {})
    backend = values.pop("backend", "auto")
    try:
        config = Config(**values)
    except TypeError as error:
        raise ValueError(f"softplus_attention={values} in the model's config: {error}") from None
    if sliding_window is not None:
        window = sliding_window if config.window is None else min(config.window, sliding_window)
        config = replace(config, window=window)
    return config, backend


def _refuse(query, value, attention_mask, dropout, causal, others) -> None:
    if dropout:
        raise ValueError(f"{NAME} has no dropout on its weights; set attention_dropout=0, not {dropout}")
    if not causal:
        raise ValueError(f"{NAME} is causal; this module is not (is_causal=False)")
    given = [name for name in UNDEFINED if others.get(name) is not None]
    if given:
        raise ValueError(f"{NAME} does not define {', '.join(given)}, which the model passes to its attention")
    if others.get("output_attentions"):
        raise ValueError(f"{NAME} does not return weights; leave out output_attentions")
    if query.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"{NAME} takes queries and values of one head dim, not {query.shape[-1]} and {value.shape[-1]}"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(f"{NAME} takes a mask [batch, tokens] of the padding, not {list(attention_mask.shape)}")


def _documents(q: torch.Tensor, position_ids: torch.Tensor | None, cu_seq_lens: torch.Tensor | None) -> tuple[int, ...]:
    """Lengths of the documents in rows without padding, one row after the other."""
    batch, length = q.shape[:2]
    if cu_seq_lens is not None:
        ends = cu_seq_lens.tolist()
        if batch != 1 or ends[-1] != length:
            raise ValueError(
                f"cu_seq_lens_q ends at {ends[-1]}, the batch has {batch} rows of {length} tokens; pack one row"
            )
        return tuple(end - start for start, end in pairwise(ends) if end > start)
    if position_ids is None or position_ids.ndim != 2:
        return (length,) * batch
    starts = torch.ones(batch, length, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    begins = starts.flatten().nonzero()[:, 0].tolist()
    return tuple(end - start for start, end in zip(begins, [*begins[1:], batch * length], strict=True))


def _padded(q, k, v, real: torch.Tensor, config: Config, backend: str) -> torch.Tensor:
    """o [B, q, H, D] where only the slots `real` [B, n] hold tokens; 0 for the queries of the others."""
    asked = real[:, -q.shape[1] :]
    counts = torch.stack([asked.sum(1), real.sum(1)]).tolist()
    if not all(counts[0]):  # keys of a row without queries have no reader
        real = real & asked.any(1, keepdim=True)
    pairs = [(queries, keys) for queries, keys in zip(*counts, strict=True) if queries]
    o = q.new_zeros(q.shape)
    if pairs:
        lengths, prefixes = zip(*((queries, keys - queries) for queries, keys in pairs), strict=True)
        o[asked] = _packed(q[asked], k[real], v[real], lengths, prefixes, config, backend)
    return o


def _packed(q, k, v, lengths, prefixes, config: Config, backend: str) -> torch.Tensor:
    """o [T, H, D] of documents whose keys, prefix and own, follow each other in k and v."""
    state = None
    if any(prefixes):
        totals = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        pieces = [x.split(totals) for x in (k, v)]
        state = tuple((keys[:n], values[:n]) for keys, values, n in zip(*pieces, prefixes, strict=True))
        k, v = (torch.cat([x[n:] for x, n in zip(side, prefixes, strict=True)]) for side in pieces)
    return attend(q[None], k[None], v[None], lengths, config, state, backend)[0]


AttentionInterface.register(NAME, softplus_attention_forward)
AttentionMaskInterface.register(NAME, real_tokens)
