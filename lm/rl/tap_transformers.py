"""The attention of any model of transformers, through its attention interface: `attn_implementation="farspan_tap"`.

While a model is tapped, its implementation is this one, which calls the one it had before (flash attention, whose mask
is of another kind, is replaced by SDPA) and hands over the queries and keys that go into it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from farspan.kernels.softplus import normalise
from farspan.layers.attention_tap import MapWeights, SoftmaxWeights, Weights, recomputing
from farspan.lm import attention_interface

NAME = "farspan_tap"

# What a model may pass that is part of its scores and not known here.
UNKNOWN = ("position_bias", "cache")


@dataclass
class _Tap:
    implementation: str
    listener: Callable[[nn.Module, Callable[[], Padded]], None]


@dataclass(frozen=True)
class Padded:
    """The attention of one layer on a padded batch.

    q: [B, T, H, D]; k: [B, T, Hk, D]. The rest as in `SoftmaxWeights`; softplus: options, for that attention.
    """

    q: torch.Tensor
    k: torch.Tensor
    window: int | None
    scale: float | None
    softcap: float | None
    softplus: Any = None

    def packed(self, mask: torch.Tensor) -> Weights:
        """Of the tokens that are no padding; mask: bool [B, T]."""
        documents = tuple(n for n in mask.sum(1).tolist() if n)
        q, k = self.q[mask][None], self.k[mask][None]
        if self.softplus is not None:
            from farspan.kernels.attention_statistics.softplus import SoftplusMap

            return MapWeights(SoftplusMap(q, k, documents, self.softplus))
        return SoftmaxWeights(q, k, documents, window=self.window, scale=self.scale, softcap=self.softcap)


_TAP: _Tap | None = None


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The causal self-attention of each layer, by its index. Raises ValueError where it cannot be tapped."""
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise ValueError(f"the attention of {name} cannot be tapped: it does not use transformers' attention interface")
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        raise ValueError(f"the attention of {name} cannot be tapped: its chunked mask is not known here")
    found = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and getattr(module, "is_causal", False) and hasattr(module, "config"):
            found[index] = module
    if not found:
        raise ValueError(f"the attention of {name} cannot be tapped: none of its layers is causal self-attention")
    return dict(sorted(found.items()))


@contextmanager
def tapped(model: PreTrainedModel, listener: Callable[[nn.Module, Callable[[], Padded]], None]) -> Iterator[None]:
    """Inside the block, forward passes hand the attention of every layer to `listener`, with (module, build)."""
    global _TAP
    configs = {id(module.config): module.config for module in attention_modules(model).values()}
    configs |= {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    if _TAP is not None:
        raise RuntimeError("attention is listened to already; leave the first block before the second one begins")
    before = {key: config._attn_implementation for key, config in configs.items()}
    implementation = next(iter(before.values()))
    if implementation is None or "flash" in implementation or "flex" in implementation:
        implementation = "sdpa" if model._supports_sdpa else "eager"
    _TAP = _Tap(implementation, listener)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _TAP = None


def tapped_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with transformers' signature: what the model had before, and a word to the listener.

    query: [B, H, q, D]; key, value: [B, Hk, n, D].
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(_TAP.implementation, eager)
    _hand_out(module, query, key, scaling, others)
    return run(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)


@torch.compiler.disable
@torch.no_grad()
def _hand_out(module, query, key, scaling, others) -> None:
    if getattr(module, "is_causal", False) and not recomputing():
        _TAP.listener(module, lambda: _padded(module, query, key, scaling, others))


def tapped_mask(*arguments: Any, **options: Any) -> Any:
    """The mask that the model's own implementation takes."""
    return ALL_MASK_ATTENTION_FUNCTIONS[_TAP.implementation](*arguments, **options)


def _padded(module, query, key, scaling, others) -> Padded:
    unknown = [name for name in UNKNOWN if others.get(name) is not None]
    if unknown:
        raise ValueError(f"attention statistics do not know {', '.join(unknown)}, which the model adds to its scores")
    if query.shape[2] != key.shape[2]:
        raise ValueError("attention statistics need whole sequences; call the model without past_key_values")
    q, k = (x.transpose(1, 2) for x in (query, key))
    window, softplus = others.get("sliding_window"), None
    if _TAP.implementation == attention_interface.NAME:
        softplus, _ = attention_interface._options(module, window)
        if softplus.qk_norm:
            q, k = normalise(q), normalise(k)
    return Padded(q, k, window, scaling, others.get("softcap"), softplus)


AttentionInterface.register(NAME, tapped_attention_forward)
AttentionMaskInterface.register(NAME, tapped_mask)
