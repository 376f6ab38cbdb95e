"""The decoder: pre-norm residual blocks around any mixer, as a transformers model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from farspan.layers.mixer import MIXERS, Mixer, MixerOptions, State
from farspan.layers.mlp import MLP
from farspan.layers.sequence import Sequence
from farspan.lm.cache import DecoderCache, check_cache, select
from farspan.lm.config import DecoderConfig
from farspan.lm.head import IGNORED, Head
from farspan.lm.packing import Packing, pack_batch
from farspan.lm.step import StaticStep
from farspan.parallel import ContextParallel
from farspan.parallel.comm import all_gather

logger = logging.get_logger(__name__)


@dataclass
class DecoderOutput(ModelOutput):
    """last_hidden_state: [B, T, width] after the final norm, zeros at padding, or the packed row if asked for.
    past_key_values: the cache, if used. hidden_states: the input of every block and the last hidden state, if asked
    for. mixer_loss: fp32 scalar, the sum of the mixers' own losses, or None. metrics: averages over layers of the
    mixers' metrics. packing: how the batch became one row.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    mixer_loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None
    packing: Packing | None = None


@dataclass
class CausalOutput(ModelOutput):
    """loss: fp32 scalar, nats per counted token plus the mixers' own losses. logits: [B, T or kept, vocabulary], None
    where a loss was computed from `shift_labels`. The rest as in DecoderOutput.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    metrics: dict[str, torch.Tensor] | None = None


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, name: str, options: MixerOptions) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[name](options)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_gated)

    def forward(
        self, x: torch.Tensor, sequence: Sequence, state: State | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
        """x: [1, tokens, width]. Returns the new x, the mixer's loss and its metrics."""
        output, loss, metrics = self.mixer(self.mixer_norm(x), sequence, state)
        x = x + output
        return x + self.mlp(self.mlp_norm(x)), loss, dict(metrics)


class DecoderPreTrainedModel(PreTrainedModel):
    """What the two models share with transformers: initialisation and capabilities."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Mixer):
            module.reset_parameters()


class Decoder(DecoderPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, name, options) for name, options in config.mixers())
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        context: ContextParallel | None = None,
        packed: bool = False,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> DecoderOutput:
        """Hidden states of a batch.

        input_ids: int64 [B, T], or inputs_embeds [B, T, width]. The documents are found as `pack_batch` says: padding
        in attention_mask, restarts in position_ids, or cu_seqlens int32 [documents + 1] of one packed row.
        context: shares the row's tokens out over ranks, which all get the same batch and, where a cache is filled, the
        same whole states. A call that continues a cache runs whole on every rank.
        packed: return last_hidden_state as the packed row, [1, tokens, width]; on a context this rank's tokens.
        output_attentions, return_dict: as peft passes them on; the first is refused, the second always true.
        """
        if output_attentions or return_dict is False:
            raise ValueError("there is no attention map in memory to return, and no output but one with named fields")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        cache = None if past_key_values is None else check_cache(past_key_values)
        if cache is None and use_cache and not self.training:
            cache = self.new_cache(given.shape[0])
        packing = pack_batch(
            *given.shape[:2],
            given.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            offsets=None if cache is None else cache.offsets,
            columns=0 if cache is None else cache.columns,
        )
        longest = max(packing.sequence.totals)
        if cache is not None and cache.capacity is not None and longest > cache.capacity:
            raise ValueError(f"the cache has room for {cache.capacity} tokens, {longest} are needed; make a larger one")
        if longest > self.config.max_position_embeddings:
            logger.warning_once(
                f"a document is longer than max_position_embeddings={self.config.max_position_embeddings}, which the "
                "model was made for: expect its loss to rise"  # the same words every time, or it warns every time
            )
        states = [None] * len(self.layers) if cache is None else cache.states
        if packing.rows is not None and cache is not None:
            states = select(cache.states, torch.tensor(packing.rows))
        if self._steps_statically(packing, cache, bool(output_hidden_states)):
            x = self.embed_tokens(given) if inputs_embeds is None else given
            cache.step = cache.step or StaticStep(self, cache, x)
            x, losses, metrics, hidden = cache.step(x), [], {}, []
        else:
            if context is not None and context.size > 1 and packing.sequence.fresh:
                packing = packing.sharded(context, self.grid)
            x = packing.pack(given)
            x = self.embed_tokens(x) if inputs_embeds is None else x
            x, losses, metrics, hidden = self.run_blocks(x, packing.sequence, states, bool(output_hidden_states))
        if cache is not None:
            cache.columns += packing.time
            if packing.rows is not None:
                cache.merge(packing.rows, states)
        return DecoderOutput(
            last_hidden_state=x if packed else packing.unpack(x),
            past_key_values=cache,
            hidden_states=tuple(packing.unpack(h) for h in hidden) or None,
            mixer_loss=sum(losses) if losses else None,
            metrics={name: torch.stack(values).mean() for name, values in metrics.items()},
            packing=packing,
        )

    def _steps_statically(self, packing: Packing, cache: DecoderCache | None, keep: bool) -> bool:
        """Whether this is a step that a cache of fixed capacity has captured, or will."""
        fixed = cache is not None and cache.capacity is not None and not torch.is_grad_enabled()
        return fixed and not keep and packing.index is None and packing.sequence.single_tokens

    @property
    def grid(self) -> int:
        """Multiple of tokens at which a document must start that a shard of its row cuts."""
        return math.lcm(*(layer.mixer.grid for layer in self.layers))

    def run_blocks(self, x: torch.Tensor, sequence: Sequence, states: list[State | None], keep: bool = False):
        """The packed row through every block and the norm; what the mixers report; the blocks' inputs if `keep`."""
        losses, metrics, hidden = [], {}, []
        for layer, state in zip(self.layers, states, strict=True):
            hidden += [x] * keep
            x, loss, reported = layer(x, sequence, state)
            losses += [] if loss is None else [loss]
            for name, value in reported.items():
                metrics.setdefault(name, []).append(value)
        x = self.norm(x)
        return x, losses, metrics, hidden + [x] * keep

    def new_cache(self, batch: int, capacity: int = 0, captured: bool = False) -> DecoderCache:
        """An empty cache for `batch` rows, with room for `capacity` tokens before it has to grow.

        captured: it never grows, and its decoding step is captured as a CUDA graph at the first token (on a CPU it runs
        with the same static shapes). For `generate(..., past_key_values=cache)`, without beams.
        """
        states = [layer.mixer.new_state(batch, capacity=capacity) for layer in self.layers]
        return DecoderCache(states, capacity if captured else None)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head: trains, generates, saves and loads as a transformers model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads the class's)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        context: ContextParallel | None = None,
    ) -> CausalOutput:
        """Logits, or a loss, of a batch [B, T]; documents as in `Decoder.forward`.

        labels: int64 [B, T], as in transformers: label t belongs to token t and is shifted inside; -100 is ignored, and
        so is every label whose token's predecessor is padding or in another document. Logits are returned too.
        shift_labels: int64 [B, T], already shifted: label t is what follows token t. No logits: only this loss never
        holds those of the whole row.
        num_items_in_batch: what the summed loss is divided by; the labels counted here when None.
        logits_to_keep: the last so many positions of each row, or their indices; 0 for all.
        cu_seq_lens_q, cu_seq_lens_k: transformers' names of cu_seqlens; max_length_q, max_length_k follow from them.
        context: as in `Decoder.forward`. The loss is then this rank's share: shares, and the gradients of parameters,
        add up over the ranks of the context. Logits are whole on every rank; gradients through them add up, too. Raises
        ValueError for output_attentions (no attention map exists) and for batches that contradict themselves.
        """
        if output_attentions:
            raise ValueError("output_attentions is not supported: no attention map exists in memory")
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels or shift_labels, not both")
        boundaries = [cu for cu in (cu_seqlens, cu_seq_lens_q, cu_seq_lens_k) if cu is not None]
        if any(not torch.equal(boundaries[0], other) for other in boundaries[1:]):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; a causal language model has one set of documents")
        if use_cache is None:
            use_cache = (
                self.config.use_cache and labels is None and shift_labels is None and not torch.is_grad_enabled()
            )
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seqlens=boundaries[0] if boundaries else None,
            context=context,
            packed=True,
        )
        packing, row = output.packing, output.last_hidden_state
        loss = logits = None
        if shift_labels is not None:
            shift_labels = packing.pack(shift_labels, IGNORED)
            loss = self._loss(self.lm_head(row, shift_labels), shift_labels, num_items_in_batch, output)
        else:
            hidden = packing.unpack(row)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        if labels is not None:
            if logits.shape[1] != hidden.shape[1]:
                raise ValueError("labels need the logits of every position; leave logits_to_keep at 0")
            shift_labels = packing.own(_shift(packing.row(labels), packing.documents), IGNORED)
            own = packing.pack(logits)[0].float()
            nll = F.cross_entropy(own, shift_labels[0], ignore_index=IGNORED, reduction="sum")
            loss = self._loss(nll, shift_labels, num_items_in_batch, output)
        if not (return_dict if return_dict is not None else self.config.return_dict):
            raise ValueError("return_dict=False is not supported: read the fields of the output")
        return CausalOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            metrics=output.metrics,
        )

    def _loss(self, nll: torch.Tensor, labels: torch.Tensor, items, output: DecoderOutput) -> torch.Tensor:
        """nll / items, plus the mixers' losses weighted by this batch's (or shard's) part of the items."""
        counted = (labels != IGNORED).sum()
        if items is None:
            shard = output.packing.sequence.shard
            total = counted if shard is None else all_gather(counted, shard.axis).sum()
            items = total.clamp(min=1)
        return (nll if output.mixer_loss is None else nll + counted * output.mixer_loss) / items

    def after_step(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let every mixer update what it learns outside the optimizer; `reduce` sums over the data-parallel ranks."""
        for mixer in self.mixers():
            mixer.after_step(reduce)

    def mixers(self) -> list[Mixer]:
        """The mixer of every layer."""
        return [layer.mixer for layer in self.model.layers]

    def flops_per_token(self, length: int, causal: bool = True) -> float:
        """Training FLOPs per token (forward and twice that for backward) on documents of `length` tokens.

        Embedding look-ups, norms and activations are not counted; the head is.
        """
        forward = 2.0 * self.lm_head.weight.numel()
        for layer in self.model.layers:
            forward += layer.mixer.flops(length, causal) + layer.mlp.flops()
        return 3 * forward

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        """Called by `generate`: our own cache, and a clear refusal of what recurrent states cannot do."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted and prompt-lookup decoding are not supported: recurrent states cannot be cut back after a "
                "rejected token; leave assistant_model and prompt_lookup_num_tokens out"
            )
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={kind!r} cannot hold the states of a farspan decoder; leave it out")
        if model_kwargs.get("past_key_values") is not None:
            check_cache(model_kwargs["past_key_values"])
        elif generation_config.use_cache:
            copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = self.model.new_cache(batch_size * copies, max_cache_length)

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers checks arguments by the signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Called by `generate` for every step; it would hand `forward` the tokenizer that stop strings need."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("tokenizer", None)
        return inputs

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> Head:
        return self.lm_head

    def set_output_embeddings(self, value: Head) -> None:
        self.lm_head = value


def _shift(labels: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Labels [1, tokens] moved one to the left; none at the end of a document."""
    shifted = labels.roll(-1, dims=1)
    return shifted.index_fill(1, sequence.cu_seqlens[1:].long() - 1, IGNORED)


AutoModel.register(DecoderConfig, Decoder)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
