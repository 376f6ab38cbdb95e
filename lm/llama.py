"""Models of the Llama family as transformers stores them: what their fields and parameters are called here."""

from typing import Any

from transformers import PreTrainedConfig

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
)
# Parts of parameter names, there and here.
_PARTS = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "mixer.projections.query_norm",
    "self_attn.k_norm": "mixer.projections.key_norm",
    "self_attn.q_proj": "mixer.projections.query",
    "self_attn.k_proj": "mixer.projections.key",
    "self_attn.v_proj": "mixer.projections.value",
    "self_attn.o_proj": "mixer.projections.output",
    "_proj": "",
}


def renamed(name: str) -> str:
    """The name here of a parameter of such a model."""
    for theirs, ours in _PARTS.items():
        name = name.replace(theirs, ours)
    return name


def decoder_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the `DecoderConfig` that computes what a model of the family with this configuration does.

    Its mixers are `softmax`, and `window` where the model has sliding windows. Qwen2 has biases in queries, keys and
    values alone; here the output has one too, which starts at zero. ValueError for biases in the MLP.
    """
    given, kind = config.to_dict(), config.model_type
    if given.get("mlp_bias"):
        raise ValueError("it has biases in its MLPs (mlp_bias), which the decoder has not")
    return {
        **{name: given[name] for name in _SAME},
        "head_dim": given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"],
        "mlp_gated": True,
        "attention_bias": kind == "qwen2" or bool(given.get("attention_bias")),
        "rope_parameters": dict(given["rope_parameters"]),
        "mixer_pattern": _pattern(kind, given),
    }


def _pattern(kind: str, given: dict[str, Any]) -> list[str | dict[str, Any]]:
    own = {"qk_norm": True} if kind == "qwen3" else {}
    full = {"mixer": "softmax", **own} if own else "softmax"
    sliding = {"mixer": "window", "window": given.get("sliding_window"), **own}
    if kind == "mistral":
        return [full if sliding["window"] is None else sliding]
    layers = [sliding if layer == "sliding_attention" else full for layer in given.get("layer_types") or ["full"]]
    return layers if any(layer != layers[0] for layer in layers) else layers[:1]
