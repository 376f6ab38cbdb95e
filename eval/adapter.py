"""Any causal language model as one that lm-eval can ask: farspan decoders and transformers models.

Unlike lm-eval's own wrapper it never pads (see `farspan.eval.inference`) and never cuts a prompt without being told to.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from tqdm import tqdm
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from farspan.eval.inference import Inference

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

Pair = tuple[tuple[str, str], list[int], list[int]]
BYTES_PER_CHARACTER = 4  # so many tokens may a character take, in UTF-8


def decoder_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    batch_tokens: int = 16_384,
    prefill_chunk: int = 8192,
    allow_truncation: bool = False,
    group: distributed.ProcessGroup | None = None,
) -> TemplateLM:
    """The model for `lm_eval.simple_evaluate(model=...)`.

    max_length: tokens that the model may get, prompt and answer; None for its max_position_embeddings, and no limit
        where its configuration has none
    batch_tokens: tokens of a batch; a longer prompt runs alone
    prefill_chunk: tokens of a row per forward pass; the rest follows through the cache
    allow_truncation: cut what is too long on the left, and count it in `.truncated`. Otherwise it is a ValueError
    group: data-parallel replicas, which share the documents out; with context or tensor parallelism, one rank of each

    Generation is greedy unless a task says `do_sample`. Of the model's own generation settings only the end-of-text
    tokens count, so that two models are asked in the same way.
    """
    return _decoder_lm_type()(model, tokenizer, max_length, batch_tokens, prefill_chunk, allow_truncation, group)


@functools.cache
def _decoder_lm_type() -> type:
    """Made at the first use: lm-eval takes seconds to import."""
    from lm_eval.api.model import TemplateLM

    return type("DecoderLM", (_DecoderLM, TemplateLM), {})


class _DecoderLM:
    """What lm-eval's TemplateLM leaves to a model."""

    max_gen_toks = 256  # where a task does not say; lm-eval's own default

    def __init__(self, model, tokenizer, max_length, batch_tokens, prefill_chunk, allow_truncation, group) -> None:
        for name, value in (
            ("max_length", max_length or 1),
            ("batch_tokens", batch_tokens),
            ("prefill_chunk", prefill_chunk),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json")
        super().__init__()
        config = model.config.get_text_config()
        self.tokenizer, self.inference = tokenizer, Inference(model.eval(), batch_tokens, prefill_chunk)
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)  # Mamba's has none
        self.allow_truncation, self.truncated, self.group = allow_truncation, 0, group
        self._device = model.device
        if group is not None:
            self._rank, self._world_size = group.rank(), group.size()
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @functools.cached_property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: what the tokenizer puts there, else the end of the text before."""
        start = self.tokenizer.encode("")
        return start[0] if start else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text. None adds what the tokenizer adds, except where the text (of a chat) begins with it; but no
        end of text, after which there would be nothing to go on with.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        ended = add_special_tokens and len(ids) > 0 and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if ended and not string.endswith(self.tokenizer.eos_token) else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """TemplateLM's, without its progress bar where there is no terminal."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would write it) of each continuation after its context."""
        pairs = [self._fitted(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        some = [index for index, (_, continuation) in enumerate(pairs) if continuation]
        results = [(0.0, True)] * len(requests)  # an empty continuation is certain
        with self._bar(len(some), "log-likelihoods", disable_tqdm) as bar:
            scores = self.inference.score([pairs[index] for index in some], bar.update)
        for index, score in zip(some, scores, strict=True):
            results[index] = score
        for (texts, *_), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats; one that is longer than max_length in windows that do not overlap,
        the last of which has its context filled up from the one before.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            length = self.max_length or max(1, len(tokens))
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(owner)
        with self._bar(len(windows), "windows of texts", disable_tqdm) as bar:
            scores = self.inference.score(windows, bar.update)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, scores, strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop string, the end of text or `max_gen_toks`."""
        by_options: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_options[repr(request.args[1])].append(index)
        results = [""] * len(requests)
        with self._bar(len(requests), "generations", disable_tqdm) as bar:
            for indices in by_options.values():
                limit, until, choose = self._generation(requests[indices[0]].args[1])
                prompts = [self._prompt(requests[index].args[0], limit) for index in indices]
                stop = _Stop(self._decode, until, self.ends)
                for batch in self.inference.batches(prompts, room=limit):
                    written = self.inference.generate([prompts[row] for row in batch], limit, choose, stop.finished)
                    for row, tokens in zip(batch, written, strict=True):
                        results[indices[row]] = stop.text(tokens)
                    bar.update(len(batch))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of each replica, [] -> [replicas]."""
        if self.group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor, group=self.group)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all replicas on replica `dst`, None on the others."""
        if self.group is None:
            return [obj]
        parts = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(obj, parts, group=self.group, group_dst=dst)
        return parts

    def barrier(self) -> None:
        if self.group is not None:
            distributed.barrier(self.group)

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut on the left to what may go in: all but the last token of the continuation, which is only predicted."""
        excess = self._excess(len(context) + len(continuation) - 1, "a context with its continuation")
        if excess >= len(context):
            raise ValueError(
                f"a continuation of {len(continuation)} tokens leaves no room for a context in max_length="
                f"{self.max_length}; raise max_length"
            )
        return context[excess:], continuation

    def _prompt(self, text: str, limit: int) -> list[int]:
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        excess = self._excess(len(tokens) + limit, f"a prompt with room for max_gen_toks={limit}")
        if excess >= len(tokens):
            raise ValueError(
                f"max_gen_toks={limit} leaves no room for a prompt in max_length={self.max_length}; "
                "raise max_length or lower max_gen_toks"
            )
        return tokens[excess:]

    def _excess(self, length: int, what: str) -> int:
        """Tokens too many; ValueError unless they may be cut."""
        if self.max_length is None or length <= self.max_length:
            return 0
        if not self.allow_truncation:
            raise ValueError(
                f"{what} takes {length} tokens, max_length is {self.max_length}; raise max_length, shorten the task, "
                "or allow truncation"
            )
        self.truncated += 1
        return length - self.max_length

    def _generation(self, options: dict[str, Any]) -> tuple[int, list[str], Callable[[torch.Tensor], torch.Tensor]]:
        """(most tokens, stop strings, choice of tokens) from a task's `generation_kwargs`."""
        from lm_eval.models.utils import normalize_gen_kwargs

        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        limit, until = options.pop("max_gen_toks"), options.pop("until")
        temperature, sample = options.pop("temperature", 0.0), options.pop("do_sample")
        top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
        if options.pop("num_beams", 1) != 1 or options:
            raise ValueError(
                f"generation_kwargs {', '.join(options) or 'num_beams'} of a task cannot be followed; "
                "known: until, max_gen_toks, do_sample, temperature, top_k, top_p"
            )
        return limit, [stop for stop in until or [] if stop], _chooser(sample, temperature, top_k, top_p)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _bar(self, total: int, what: str, disable: bool) -> tqdm:
        """A progress bar on a terminal, of the first replica."""
        return tqdm(total=total, desc=what, disable=True if disable or self.rank else None)


class _Stop:
    """When a generation ends, and its text. decode: of tokens. until: stop strings. ends: end-of-text tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str], until: list[str], ends: set[int]) -> None:
        self.decode, self.until, self.ends = decode, until, ends
        self.tail = BYTES_PER_CHARACTER * (max(map(len, until), default=0) + 2)

    def finished(self, tokens: list[int]) -> bool:
        if tokens[-1] in self.ends:
            return True
        # The end alone is decoded at each step, and all of it only where that has a stop string.
        return self._stops(tokens[-self.tail :]) and self._stops(tokens)

    def text(self, tokens: list[int]) -> str:
        """Up to the first stop string; without the end-of-text token."""
        text = self.decode(tokens[:-1] if tokens[-1] in self.ends else tokens)
        return text[: min((text.find(stop) for stop in self.until if stop in text), default=len(text))]

    def _stops(self, tokens: list[int]) -> bool:
        text = self.decode(tokens)
        return any(stop in text for stop in self.until)


def _chooser(
    sample: bool, temperature: float, top_k: int | None, top_p: float | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """logits [rows, vocabulary] -> tokens, int64 [rows]: the likeliest, or drawn with torch's generator."""
    if not sample:
        return lambda logits: logits.argmax(-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature or 1.0)])  # asked to sample, without saying how
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
    return lambda logits: torch.multinomial(warpers(None, logits.float()).softmax(-1), 1)[:, 0]
