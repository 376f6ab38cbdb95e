"""Weights to start a run from, in place of random ones: a pretrained model whose mixers may be exchanged.

What the decoder of a recipe shares with the given model, by name and shape, is copied. Its mixers may have parameters
without a counterpart, which begin as random ones do. One tensor is read at a time, by the main rank alone: DeepSpeed
gives the parameters to the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.lm.load import checkpoint_recipe, checkpoint_weights, is_checkpoint, locate
from farspan.lm.weights import Stored, in_memory, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from farspan.lm.config import DecoderConfig
    from farspan.lm.decoder import DecoderForCausalLM
    from farspan.lm.recipe import Recipe, StartSpec

# A recipe that states these, which fix every shape and what is computed with it, asks the weights for nothing.
_WHOLE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "mlp_gated", "max_position_embeddings", "mixer_pattern"),
    *("rope_parameters", "attention_bias", "rms_norm_eps", "tie_word_embeddings"),
)
_NOT_OF_WEIGHTS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
# RoPE whose frequencies do not depend on max_position_embeddings.
_FREE_OF_LENGTH = ("default", "linear")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OLD_BUFFER = "rotary_emb.inv_freq"  # transformers stored it in every layer once


def model_fields(recipe: Recipe) -> dict[str, Any]:
    """The `model` section of a recipe with a `start`: what it states; the weights' configuration for the rest.

    Where it states all that matters nothing is looked up. max_position_embeddings is at least the recipe's
    sequence_length, unless the frequencies of rope depend on it. Raises ValueError, one line, for weights that are not
    there or of another architecture, and for another vocabulary than theirs.
    """
    stated, name = recipe.model, recipe.start.weights
    if all(field in stated for field in _WHOLE):
        return stated
    fields = _fields(name)
    theirs = fields["vocab_size"]
    asked = {
        "model.vocab_size": stated.get("vocab_size"),
        "tokenizer.vocab_size": recipe.tokenizer and recipe.tokenizer.vocab_size,
        "data.task.vocab_size": recipe.data.task and recipe.data.task.vocab_size,
    }
    for key, size in asked.items():  # tables are often padded to more entries than the tokenizer has
        if size is not None and (size != theirs if key == "model.vocab_size" else size > theirs):
            raise ValueError(f"{key}={size}, but {name} has {theirs} entries; {_use_theirs(name)}")
    if fields["rope_parameters"].get("rope_type", "default") in _FREE_OF_LENGTH:
        longest = max(fields["max_position_embeddings"], recipe.batch.sequence_length)
        fields["max_position_embeddings"] = longest
    return fields | stated


def check_start(recipe: Recipe, tokenizer: Any, vocab_size: int) -> None:
    """ValueError, one line, if a run of this recipe cannot start from its weights; reads no tensors.

    For a shape that has no counterpart, as in `fill`, and for a tokenizer that gives other numbers to tokens than the
    one that the weights know, if they have one; tokens beyond theirs may be new.
    """
    import torch

    from farspan.lm.decoder import DecoderForCausalLM

    source = locate(recipe.start.weights, tell=False)
    if tokenizer is not None:
        _check_tokens(recipe, tokenizer, _their_tokenizer(source))
    with torch.device("meta"):
        model = DecoderForCausalLM(recipe.decoder_config(tokenizer, vocab_size))
    freeze(model, recipe.start.trainable)
    _match(model, recipe.start, *_open(source, recipe.start.weights, shapes_alone=True))


def freeze(model: nn.Module, trainable: str) -> None:
    """Leaves gradients to what `start.trainable` says: "all", "qkvo" (the mixers) or "qkv" (all of them but what
    projects their output back).
    """
    for name, parameter in model.named_parameters():
        mixer = ".mixer." in name and (trainable == "qkvo" or ".output." not in name)
        parameter.requires_grad_(trainable == "all" or mixer)


def unwritten(config: DecoderConfig, dtype: torch.dtype) -> DecoderForCausalLM:
    """A decoder whose weights nobody has written yet, for `fill`, DeepSpeed or a checkpoint to do so.

    What its constructor computes is there. Linux gives memory room when it is written, so that 7 billion weights take
    none on the ranks that get them from another.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    import farspan.lm.decoder  # noqa: F401 - registers the decoder

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # was left out with the initialisation
    return model


def fill(model: DecoderForCausalLM, spec: StartSpec) -> str:
    """Writes every weight of a decoder from `unwritten`: those of the given model, and random ones for what is new.

    Returns a line for a person. Raises ValueError, one line, where a parameter outside the mixers has no counterpart of
    its shape, or a new matrix would stay random because it is frozen.
    """
    import torch

    source = locate(spec.weights, tell=False)
    config, given = _open(source, spec.weights)
    common, new, left = _match(model, spec, config, given)
    with torch.no_grad():
        for index, mixer in enumerate(model.mixers()):
            if any(key.startswith(f"model.layers.{index}.mixer.") for key in new):
                mixer.apply(model._init_weights)
        for key, parameter in common.items():
            parameter.copy_(given[key].read())
    line = f"started from {source}: {len(common)} of {len(common) + len(left)} tensors"
    line += f"; new: {_summary(new)}" if new else ""
    return line + (f"; left out: {_summary(left)}" if left else "")


def _match(
    model: DecoderForCausalLM, spec: StartSpec, config: PreTrainedConfig, given: dict[str, Stored]
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """(tensors of the model that are given, names of those that are not, names of what is left of the given ones).

    A tied head is not counted; where only the given model ties it, `given` gets one.
    """
    wanted = model.state_dict(keep_vars=True)
    if config.tie_word_embeddings:
        given.pop(_HEAD, None)
    if model.config.tie_word_embeddings:
        if not config.tie_word_embeddings:
            raise ValueError(
                f"model.tie_word_embeddings=true, but {spec.weights} has an output table of its own; leave it out"
            )
        del wanted[_HEAD]
    elif config.tie_word_embeddings:
        given[_HEAD] = given[_EMBEDDING]
    new = [key for key in wanted if key not in given or given[key].shape != tuple(wanted[key].shape)]
    for key in new:
        shape = list(wanted[key].shape)
        theirs = f"{list(given[key].shape)} in" if key in given else "absent from"
        if key == _EMBEDDING and key in given and shape[1:] == list(given[key].shape[1:]):
            raise ValueError(
                f"the vocabulary has {shape[0]} entries, but {given[key].shape[0]} in {spec.weights}; "
                f"{_use_theirs(spec.weights)}"
            )
        if ".mixer." not in key:
            raise ValueError(
                f"{key} is {shape} in this recipe and {theirs} {spec.weights}; leave sizes that come from the weights "
                "out of `model`"
            )
        if not wanted[key].requires_grad and wanted[key].ndim > 1:
            raise ValueError(
                f"{key} is {shape} in this recipe and {theirs} {spec.weights}, so that it starts at random, and "
                f"start.trainable={spec.trainable} never trains it; use qkvo or all"
            )
    common = {key: tensor for key, tensor in wanted.items() if key not in set(new)}
    return common, new, [key for key in given if key not in common]


def _open(source: Path | str, name: str, shapes_alone: bool = False) -> tuple[PreTrainedConfig, dict[str, Stored]]:
    """The configuration of a model, and its tensors by their names here."""
    if is_checkpoint(source):
        return _open_checkpoint(source, shapes_alone)
    config = _config(source, name)
    given = {key: tensor for key, tensor in stored_tensors(source).items() if not key.endswith(_OLD_BUFFER)}
    if config.model_type != "farspan":
        from farspan.lm.llama import renamed

        given = {renamed(key): tensor for key, tensor in given.items()}
    return config, given


def _open_checkpoint(path: Path, shapes_alone: bool) -> tuple[PreTrainedConfig, dict[str, Stored]]:
    """As `_open`. A checkpoint is put together as a whole, so that its shapes alone are those of its recipe."""
    import torch

    from farspan.lm.decoder import DecoderForCausalLM

    config = _checkpoint_config(path)
    if not shapes_alone:
        return config, in_memory(checkpoint_weights(path))
    with torch.device("meta"):
        return config, in_memory(DecoderForCausalLM(config).state_dict())


def _checkpoint_config(path: Path) -> DecoderConfig:
    from farspan.lm.data.tokenizer import load_tokenizer

    recipe = checkpoint_recipe(path)
    tokenizer = recipe.tokenizer and load_tokenizer(recipe.tokenizer.path)
    return recipe.decoder_config(vocab_size=tokenizer and len(tokenizer))


def _fields(name: str) -> dict[str, Any]:
    """The fields of the DecoderConfig of MODEL."""
    from farspan.lm.config import DecoderConfig
    from farspan.lm.llama import decoder_fields

    source = locate(name)
    config = _checkpoint_config(source) if is_checkpoint(source) else _config(source, name)
    if config.model_type != "farspan":
        try:
            return decoder_fields(config)
        except ValueError as error:
            raise ValueError(f"{name} cannot be a decoder here: {error}") from None
    return {name: getattr(config, name) for name in DecoderConfig.__annotations__ if name not in _NOT_OF_WEIGHTS}


def _config(source: Path | str, name: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    from farspan.lm.config import DecoderConfig
    from farspan.lm.llama import FAMILY

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the configuration of {name} cannot be read: {reason}") from None
    kinds = (DecoderConfig.model_type, *FAMILY)
    if config.model_type not in kinds:
        raise ValueError(f"{name} is a {config.model_type}; start.weights takes {', '.join(kinds[:-1])} or {kinds[-1]}")
    return config


def _check_tokens(recipe: Recipe, tokenizer: Any, path: str | None) -> None:
    from farspan.lm.data.tokenizer import load_tokenizer

    if path is None or path == recipe.tokenizer.path:
        return
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (tokenizer, load_tokenizer(path)))
    wrong = next((index for index in sorted(ours.keys() & theirs.keys()) if ours[index] != theirs[index]), None)
    if wrong is not None:
        raise ValueError(
            f"token {wrong} is {ours[wrong]!r} in tokenizer {recipe.tokenizer.path}, but {theirs[wrong]!r} to "
            f"{recipe.start.weights}; {_use_theirs(recipe.start.weights)}"
        )


def _their_tokenizer(source: Path | str) -> str | None:
    """Where the tokenizer of MODEL is; None for a model that has none."""
    if is_checkpoint(source):
        recipe = checkpoint_recipe(source)
        return recipe.tokenizer and recipe.tokenizer.path
    return str(source) if isinstance(source, str) or any(source.glob("tokenizer*")) else None


def _use_theirs(name: str) -> str:
    """What to do about another vocabulary."""
    path = _their_tokenizer(locate(name, tell=False))
    if path is None:
        return "use the tokenizer or the task that it was trained with"
    return f"use the model's tokenizer (tokenizer.path={path}) and leave vocab_size out"


def _summary(names: list[str]) -> str:
    """`240 (model.layers.0.mixer.gate_bias, ...)`"""
    return f"{len(names)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
