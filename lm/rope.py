"""Rotary frequencies from transformers' `rope_parameters`, as the layers' `Rope`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farspan.layers.rotary import Rope

if TYPE_CHECKING:
    from farspan.lm.config import DecoderConfig


def rope_from_parameters(config: DecoderConfig, parameters: dict[str, Any]) -> Rope:
    """The `Rope` of one set of transformers' rope parameters, for heads of `config.head_dim` channels.

    Every scaling that transformers computes is known (default, linear, proportional, llama3, yarn, dynamic, longrope).
    The last two depend on the length in transformers, which makes a token's keys depend on how the prompt was cut;
    here they are fixed by `max_position_embeddings`, as inference servers do: dynamic at `factor` times as many
    positions, longrope with its long factors where it exceeds the original length.
    Raises ValueError for an unknown type or a missing parameter.
    """
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta", 10_000.0))
    turning = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
    if kind == "default":
        if turning == config.head_dim:
            return Rope(theta=theta)
        return Rope(frequencies=tuple(theta ** (-i / turning) for i in range(0, turning, 2)))

    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type={kind!r} is not known; valid: default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    length = config.max_position_embeddings
    if kind == "dynamic":
        length = int(length * parameters["factor"])
    with torch.device("cpu"):  # they are read, also where a model is made on the meta device
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](_Scaled(config, parameters), seq_len=length)
    return Rope(theta=theta, frequencies=tuple(frequencies.tolist()), scale=float(scale))


class _Scaled:
    """What transformers' functions read of a configuration, with the parameters of one layer."""

    def __init__(self, config: DecoderConfig, parameters: dict[str, Any]) -> None:
        self.rope_parameters = parameters
        self.head_dim = config.head_dim
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.max_position_embeddings = config.max_position_embeddings

    def standardize_rope_params(self) -> None:
        """Called by transformers on configurations that may hold legacy names; these never do."""
