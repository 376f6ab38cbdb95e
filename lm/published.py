"""Checkpoints that authors of the mixers published, as farspan decoders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import DecoderForCausalLM

# Names in the checkpoints of CLAIRE-Labo/RAT -> names here. The rows of the input projection (z, v, g, q, k) agree.
_RAT_NAMES = {
    r"embedding\.wte\.weight": "model.embed_tokens.weight",
    r"backbone\.layers\.(\d+)\.seq_layer\.input_norm\.weight": r"model.layers.\1.mixer_norm.weight",
    r"backbone\.layers\.(\d+)\.seq_layer\.in_proj\.weight": r"model.layers.\1.mixer.input.weight",
    r"backbone\.layers\.(\d+)\.seq_layer\.gate_bias": r"model.layers.\1.mixer.gate_bias",
    r"backbone\.layers\.(\d+)\.seq_layer\.out_proj\.weight": r"model.layers.\1.mixer.output.weight",
    r"backbone\.layers\.(\d+)\.hidden_layer\.ln\.weight": r"model.layers.\1.mlp_norm.weight",
    r"backbone\.layers\.(\d+)\.hidden_layer\.fc1\.weight": r"model.layers.\1.mlp.up.weight",
    r"backbone\.layers\.(\d+)\.hidden_layer\.fc2\.weight": r"model.layers.\1.mlp.down.weight",
    r"backbone\.ln\.weight": "model.norm.weight",
    r"head\.lm_head\.weight": "lm_head.weight",
}


def load_rat(
    checkpoint: str | Path | Mapping[str, torch.Tensor], heads: int = 16, chunk: int = 16, max_positions: int = 4096
) -> DecoderForCausalLM:
    """A decoder with the weights of a RAT published by its authors (hub repository barpitf/RAT, MIT licence).

    checkpoint: the file, read without running any code in it, or its state dict; keys may lie under `task` and carry
    the prefix `_orig_mod.` of a compiled model. heads and chunk are not in the weights: 16 and 16 in the published 1.3B
    models. Layers, width, groups and vocabulary follow from the shapes.
    Raises ValueError for weights that are not those of a RAT in every layer, naming the first that does not fit.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = {_renamed(name): value for name, value in checkpoint.get("task", checkpoint).items()}
    needed = ("model.embed_tokens.weight", "model.layers.0.mixer.input.weight", "model.layers.0.mlp.up.weight")
    for name in needed:
        if name not in state:
            raise ValueError(f"this is no checkpoint of a RAT: {name} has no counterpart in it")
    vocabulary, width = state["model.embed_tokens.weight"].shape
    head_dim = width // heads
    shared = state["model.layers.0.mixer.input.weight"].shape[0] - 3 * width
    if width % heads or shared % (2 * head_dim):
        raise ValueError(f"heads={heads} does not fit a width of {width} with {shared} rows of queries and keys")
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=state["model.layers.0.mlp.up.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers.")),
        num_attention_heads=heads,
        hidden_act="gelu",
        mlp_gated=False,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=max_positions,
        mixer_pattern=[{"mixer": "rat", "chunk": chunk, "groups": shared // (2 * head_dim)}],
        eos_token_id=2,
    )
    model = DecoderForCausalLM(config)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit a RAT of its own sizes: {error}") from None
    return model.eval()


def _renamed(name: str) -> str:
    plain = name.replace("_orig_mod.", "").removeprefix("task.")
    for pattern, ours in _RAT_NAMES.items():
        if re.fullmatch(pattern, plain):
            return re.sub(pattern, ours, plain)
    raise ValueError(f"{name} is no weight of a RAT; hybrids and other models of that repository are not read")
