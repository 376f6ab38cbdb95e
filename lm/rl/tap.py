"""Which layers of a model hand out their attention, and what listens: mixers of farspan, attention of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from farspan.layers.attention_tap import Listener, listening
from farspan.lm.decoder import Decoder
from farspan.lm.rl.tap_transformers import attention_modules, tapped


def policy_of(model: nn.Module) -> PreTrainedModel:
    """The model inside what DDP, DeepSpeed, PEFT or torch.compile made of it. Raises ValueError if there is none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} is no model of transformers: it has no attention statistics")


def attending_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Layers whose attention can be had, and the module that it is handed out by; all of them, in order.

    Raises ValueError in one line for a model that has none.
    """
    policy = policy_of(model)
    base = policy.base_model
    if not isinstance(base, Decoder):
        return attention_modules(policy)
    found = {index: layer.mixer for index, layer in enumerate(base.layers) if layer.mixer.attends}
    if not found:
        names = ", ".join(sorted({_describe(layer.mixer) for layer in base.layers}))
        raise ValueError(f"a model of {names} layers has no attention statistics; credit.strategy: uniform needs none")
    return found


def depth(model: nn.Module) -> int:
    """Layers of the model, attention or not."""
    policy = policy_of(model)
    base = policy.base_model
    return len(base.layers) if isinstance(base, Decoder) else policy.config.get_text_config().num_hidden_layers


def sampled_layers(model: nn.Module, layers: int = 5) -> tuple[int, ...]:
    """At most `layers` layers with attention statistics, evenly spaced in the middle third of the model, from 0.

    With all L layers attending: round(lo + i (hi - lo) / (layers - 1)), lo = L // 3, hi = 2 L // 3, halves up, each
    once. Raises ValueError in one line where none of the middle third attends.
    """
    if layers < 1:
        raise ValueError(f"layers={layers} must be at least 1")
    attending, total = attending_layers(model), depth(model)
    low, high = total // 3, 2 * total // 3
    middle = [index for index in attending if low <= index <= high]
    if not middle:
        raise ValueError(
            f"no layer of the middle third ({low} to {high}) has attention statistics; layers "
            f"{', '.join(map(str, attending))} have, put one there or use credit.strategy: uniform"
        )
    last = len(middle) - 1
    at = [last / 2] if layers == 1 else [i * last / (layers - 1) for i in range(layers)]
    return tuple(dict.fromkeys(middle[math.floor(x + 0.5)] for x in at))


@contextmanager
def listen(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Inside the block, forward passes of the model hand the attention of their layers to `listener`."""
    policy = policy_of(model)
    if isinstance(policy.base_model, Decoder):
        with listening(listener):
            yield
    else:
        with tapped(policy, listener):
            yield


def _describe(mixer: nn.Module) -> str:
    variant = getattr(mixer.options, "variant", None)
    return mixer.name if variant is None else f"{mixer.name} ({variant})"
