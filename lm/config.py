"""The decoder's configuration: transformers' names, and one field of its own, `mixer_pattern`."""

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.generation import GenerationConfig

from farspan.layers.mixer import MixerOptions, check_type, mixer_type, nearest, parse_options
from farspan.layers.mlp import ACTIVATIONS
from farspan.layers.rotary import Rope
from farspan.lm.rope import rope_from_parameters

# What transformers itself passes besides the fields: stored by saving, or by from_pretrained.
_CARRIED = {
    "model_type",
    "torch_dtype",
    "num_labels",
    "name_or_path",
    "output_attentions",
    "attn_implementation",
    "experts_implementation",
    "rope_theta",
    "rope_scaling",
    "_commit_hash",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
}


class DecoderConfig(PreTrainedConfig):
    """A pre-norm decoder whose token mixers follow `mixer_pattern`.

    mixer_pattern: names or `{mixer: name, option: value}`, repeated to fill the layers. Options that a mixer shares
    with the configuration (heads, head_dim, kv_heads, rope, bias, eps) default to the configuration's values; `rope` is
    "none" or a dict in the form of `rope_parameters`.
    intermediate_size: 8/3 of hidden_size (4 where not `mlp_gated`), rounded up to a multiple of 64, when None.
    Raises ValueError for unknown fields, unknown mixers or options, and sizes that do not fit.
    """

    model_type = "farspan"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    mlp_gated: bool = True
    max_position_embeddings: int = 4096
    mixer_pattern: list[str | dict[str, Any]] | None = None
    rope_parameters: dict | None = None
    attention_bias: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in fields(self)}
        unknown = [key for key in kwargs if key not in known | _CARRIED | set(GenerationConfig().to_dict())]
        if unknown:
            raise ValueError(
                f"unknown field {unknown[0]!r} of the decoder; {nearest(unknown[0], DecoderConfig.__annotations__)}"
            )
        for name, hint in DecoderConfig.__annotations__.items():
            check_type(name, getattr(self, name), hint)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}; {nearest(self.hidden_act, ACTIVATIONS)}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by "
                    f"num_attention_heads={self.num_attention_heads}; use a multiple, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            ratio = 8 / 3 if self.mlp_gated else 4
            self.intermediate_size = -(-int(self.hidden_size * ratio) // 64) * 64
        if self.mixer_pattern is None:
            self.mixer_pattern = ["softmax"]
        if not self.mixer_pattern:
            raise ValueError("mixer_pattern is empty; give at least one mixer, e.g. [softmax]")
        super().__post_init__(**kwargs)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10_000.0}
        for entry in self.mixer_pattern:
            self._options(entry)

    def mixers(self) -> list[tuple[str, MixerOptions]]:
        """Name and options of the mixer of every layer."""
        options = [self._options(entry) for entry in self.mixer_pattern]
        return [options[layer % len(options)] for layer in range(self.num_hidden_layers)]

    def _options(self, entry: str | dict[str, Any]) -> tuple[str, MixerOptions]:
        given = {"mixer": entry} if isinstance(entry, str) else dict(entry)
        name = given.pop("mixer", None)
        if name is None:
            raise ValueError(f"an entry of mixer_pattern has no `mixer`: {entry}")
        taken = {field.name: field.default for field in fields(mixer_type(name).options_type)}
        values = {
            "width": self.hidden_size,
            "heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "kv_heads": self.num_key_value_heads,
            "bias": self.attention_bias,
            "eps": self.rms_norm_eps,
        }
        values = {key: value for key, value in values.items() if key in taken}
        if "width" in given:
            raise ValueError(f"{name}: width is the decoder's hidden_size; leave it out of mixer_pattern")
        if isinstance(taken.get("rope"), Rope):
            rope = given.pop("rope", self.rope_parameters)
            if isinstance(rope, dict):
                rope = rope_from_parameters(self, rope)
            given["rope"] = None if rope == "none" else rope
        return name, parse_options(name, {**values, **given})


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
