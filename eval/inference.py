"""Any causal model on rows of equal length: scores of what follows a context, and generation. Nothing is ever padded.

A recurrent state or a memory takes padding for text, so that a padded batch would change its answers. A batch is
therefore made of prompts with exactly as many tokens; what has no partner runs alone.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from farspan.lm.cache import DecoderCache, select
from farspan.lm.decoder import DecoderForCausalLM

Tokens = Sequence[int]


class Inference:
    """A model with what is known of its cache.

    batch_tokens: of a batch, contexts and continuations together; a longer row runs alone.
    prefill_chunk: tokens of a row per forward pass, where the model can go on from its cache.

    A transformers model whose state is not only keys and values (Mamba, Qwen3-Next, ...) forgets that state when it is
    continued by more than one token, so it gets every row whole. It is continued token by token, or, where it returns
    no cache under the usual name (Mamba), runs on the whole row for every token: right, and slow.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int, prefill_chunk: int) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model, self.batch_tokens, self.prefill_chunk = model, batch_tokens, prefill_chunk
        self.own = isinstance(model, DecoderForCausalLM)
        self.keeps = "logits_to_keep" in parameters
        self.steps = "past_key_values" in parameters
        self.resumes = self.steps and not model._is_stateful

    @torch.no_grad()
    def score(
        self, requests: Sequence[tuple[Tokens, Tokens]], done: Callable[[int], None] = lambda _: None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is what greedy decoding writes) of each request.

        requests: (context, continuation), neither empty. A context that several requests share runs once, and its
        cache is forked; so does one that is too long for one pass. `done` is told how many requests a batch answered.
        """
        sharing = defaultdict(list)
        for index, (context, _) in enumerate(requests):
            sharing[tuple(context)].append(index)
        whole, forked = [], []
        for context, indices in sharing.items():
            longest = len(context) + max(len(requests[index][1]) for index in indices) - 1
            alone = len(indices) == 1 and longest <= self.prefill_chunk
            (whole if alone or not self.resumes else forked).append(indices)
        results: list[Any] = [None] * len(requests)
        rows = [index for indices in whole for index in indices]
        for batch in self._batches(rows, lambda index: sum(map(len, requests[index])) - 1):
            self._score_rows([(index, *requests[index]) for index in batch], results)
            done(len(batch))
        for batch in self._batches(forked, lambda indices: len(requests[indices[0]][0])):
            self._score_forks([[(index, *requests[index]) for index in indices] for indices in batch], results)
            done(sum(map(len, batch)))
        return results

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tokens],
        limit: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
        finished: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """What the model writes after each prompt: at most `limit` tokens, the one it finished with among them.

        prompts: of one length. choose: logits [rows, vocabulary] -> tokens, int64 [rows]. A row that is finished, as
        `finished` says of the tokens that it has written, leaves the batch.
        """
        if not self.resumes and len(prompts) > 1:  # a foreign state may not let rows leave
            return [self.generate([prompt], limit, choose, finished)[0] for prompt in prompts]
        ids = self._ids(prompts)
        logits, cache = self._prefill(ids, limit)
        written: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        for step in range(1, limit + 1):
            tokens = choose(logits)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                written[row].append(token)
            going = [place for place, row in enumerate(rows) if not finished(written[row])]
            if not going or step == limit:
                break
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                kept = torch.tensor(going, device=ids.device)
                tokens = tokens[kept]
                cache.batch_select_indices(kept)
            ids = torch.cat([ids, tokens[:, None]], dim=1) if cache is None else tokens[:, None]
            logits, cache = self._forward(ids, 1, cache)
            logits = logits[:, -1]
        return written

    def batches(self, rows: Sequence[Tokens], room: int = 0) -> Iterator[list[int]]:
        """Indices of rows of one length each, the longest first, as many as fit with `room` more tokens for each."""
        yield from self._batches(range(len(rows)), lambda index: len(rows[index]), room)

    def _batches(self, items: Sequence, length: Callable[[Any], int], room: int = 0) -> Iterator[list]:
        buckets = defaultdict(list)
        for item in items:
            buckets[length(item)].append(item)
        for tokens in sorted(buckets, reverse=True):  # what does not fit in memory fails at once
            size = max(1, self.batch_tokens // (tokens + room))
            for start in range(0, len(buckets[tokens]), size):
                yield buckets[tokens][start : start + size]

    def _score_rows(self, batch: list[tuple[int, Tokens, Tokens]], results: list) -> None:
        """Contexts with their continuations, one pass."""
        ids = self._ids([[*context, *continuation][:-1] for _, context, continuation in batch])
        logits, _ = self._forward(ids, max(len(continuation) for *_, continuation in batch), use_cache=False)
        for row, (index, _, continuation) in zip(logits, batch, strict=True):
            total, greedy = _scores(row[None, -len(continuation) :], self._ids([continuation]))
            results[index] = (total.item(), greedy.item())

    def _score_forks(self, batch: list[list[tuple[int, Tokens, Tokens]]], results: list) -> None:
        """Contexts of one length, one pass in pieces; then their continuations, those of one length together."""
        context = batch[0][0][1]
        longest = max(len(continuation) for requests in batch for *_, continuation in requests)
        logits, cache = self._prefill(self._ids([requests[0][1] for requests in batch]), longest)
        forks = [
            (row, index, continuation) for row, requests in enumerate(batch) for index, _, continuation in requests
        ]
        for some in self._batches(forks, lambda fork: len(fork[2]), room=len(context)):
            rows = torch.tensor([row for row, *_ in some])
            targets = self._ids([continuation for *_, continuation in some])
            total, greedy = _scores(logits[rows, None], targets[:, :1])
            last = len(some) == len(forks) == len(batch)  # a single continuation each: nobody else needs the cache
            continued = cache if last or targets.shape[1] == 1 else fork(cache, rows.to(targets.device))
            for start in range(1, targets.shape[1], self.prefill_chunk):
                following = targets[:, start : start + self.prefill_chunk]
                before = targets[:, start - 1 : start - 1 + following.shape[1]]
                predicted, continued = self._forward(before, before.shape[1], continued)
                more, also = _scores(predicted, following)
                total, greedy = total + more, greedy & also
            for (_, index, _), *result in zip(some, total.tolist(), greedy.tolist(), strict=True):
                results[index] = tuple(result)

    def _prefill(self, ids: torch.Tensor, room: int = 0) -> tuple[torch.Tensor, Cache | None]:
        """ids: [B, T]. Returns the logits after the last token, [B, vocabulary], and the cache."""
        cache = self.model.model.new_cache(len(ids), ids.shape[1] + room) if self.own else None
        for piece in ids.split(self.prefill_chunk if self.resumes else ids.shape[1], dim=1):
            logits, cache = self._forward(piece, 1, cache)
        return logits[:, -1], cache

    def _forward(
        self, ids: torch.Tensor, keep: int, cache: Cache | None = None, use_cache: bool = True
    ) -> tuple[torch.Tensor, Cache | None]:
        """ids: [B, T], after what the cache holds. Returns logits of the last `keep` positions and the cache."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self.keeps else {}
        if self.steps:
            options |= {"past_key_values": cache, "use_cache": use_cache}
        output = self.model(input_ids=ids, **options)
        return output.logits[:, -keep:], output.get("past_key_values")

    def _ids(self, rows: Sequence[Tokens]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.model.device)


def fork(cache: Cache, rows: torch.Tensor) -> Cache:
    """A cache of its own with the rows `rows`, int64, of `cache`, which stays as it is."""
    if isinstance(cache, DecoderCache):
        forked = DecoderCache(select(cache.states, rows))
        forked.columns = cache.columns
        return forked
    forked = copy.deepcopy(cache)
    forked.batch_select_indices(rows)
    return forked


def _scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits: [B, n, vocabulary]; targets: int64 [B, n]. Returns sums of log-probabilities, fp64 [B], and whether each
    target is the likeliest token, bool [B].
    """
    logits = logits.float()
    chosen = logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(2)
    return chosen.double().sum(1), (logits.argmax(2) == targets).all(1)
