"""Demonstrations: questions with answers, of which the answers alone are learned, packed whole into rows.

A demonstration is the text of its turns, and knows which of them are answers. Its tokens are those that generation
would see: a question encoded by itself and then its answer, or a conversation in the tokenizer's chat template. Beside
the corpus's tokens lies one byte for each: 1 where the token is learned.

No row cuts a demonstration, since an answer without its question teaches nothing. Rows are filled in a shuffled order
that stays; each epoch visits them in another. What a row has no room for is padding, a document of its own without
labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from farspan.lm.data.corpus import Corpus
from farspan.lm.data.rows import IGNORED, Row, Slice, Stream, random_words

Turn = tuple[str, str]  # role and text
_ANSWERS = "assistant"


class Demonstration(str):
    """turns: (role, text) in order, roles as in chat templates. chat: whether the tokenizer's template applies."""

    turns: tuple[Turn, ...]
    chat: bool

    def __new__(cls, turns: tuple[Turn, ...], chat: bool) -> Demonstration:
        made = super().__new__(cls, ("\n" if chat else "").join(text for _, text in turns))
        made.turns, made.chat = turns, chat
        return made


def question_and_answer(question: str, answer: str, chat: bool = False) -> Demonstration:
    return Demonstration((("user", question), (_ANSWERS, answer)), chat)


def demonstration_encoder(
    tokenizer, text_encoder: Callable[[list[str]], list[list[int]]]
) -> Callable[[list[Demonstration]], list[tuple[list[int], list[int]]]]:
    """A function from demonstrations to (tokens, 1 for each that is learned), the end-of-text token included.

    ValueError, one line, for a conversation without a chat template, or with one that rewrites earlier turns.
    """
    start = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []

    def encode(batch: list[Demonstration]) -> list[tuple[list[int], list[int]]]:
        return [_conversation(tokenizer, one) if one.chat else plain(one) for one in batch]

    def plain(one: Demonstration) -> tuple[list[int], list[int]]:
        ids, learned = list(start), [0] * len(start)
        for (role, _), piece in zip(one.turns, text_encoder([text for _, text in one.turns]), strict=True):
            ids += piece
            learned += [int(role == _ANSWERS)] * len(piece)
        return [*ids, tokenizer.eos_token_id], [*learned, 1]

    return encode


def begins_with_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a begin-of-text token before a prompt by itself."""
    ids = tokenizer("")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _conversation(tokenizer, one: Demonstration) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "a source with chat=true needs a tokenizer with a chat template; set chat=false, or take another"
        )
    messages = [{"role": role, "content": text} for role, text in one.turns]
    ids: list[int] = []
    learned: list[int] = []
    for index, (role, _) in enumerate(one.turns):
        if role != _ANSWERS:
            continue
        asked = _render(tokenizer, messages[:index], True)
        answered = _render(tokenizer, messages[: index + 1], False)
        if asked[: len(ids)] != ids or answered[: len(asked)] != asked:
            raise ValueError(
                "the tokenizer's chat template rewrites earlier turns, so that what is learned is not what is "
                "generated; split conversations into single questions and answers"
            )
        learned += [0] * (len(asked) - len(ids)) + [1] * (len(answered) - len(asked))
        ids = answered
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids, learned = [*ids, tokenizer.eos_token_id], [*learned, 1]
    return ids, learned


def _render(tokenizer, messages: list[dict[str, str]], ask: bool) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True, return_dict=False))


class DemonstrationStream(Stream):
    """Rows of whole demonstrations, addressed like those of `Stream`.

    Raises ValueError where one is longer than a row.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: tuple[int, ...] | None):
        lengths = np.asarray(corpus.lengths)
        if (over := int((lengths > sequence_length).sum())) > 0:
            raise ValueError(
                f"{over} of {len(lengths)} demonstrations in {corpus.directory} are longer than rows of "
                f"{sequence_length} tokens, the longest {lengths.max()}; raise batch.sequence_length, or leave them out"
            )
        order = np.arange(len(lengths))
        if seed is not None:
            order = np.argsort(random_words((*seed, 0, 0), len(lengths)), kind="stable")
        self._filled = _fill(order, lengths, sequence_length)
        self._padding = corpus.metadata["pad_token_id"]
        super().__init__(corpus, sequence_length, seed)

    def slice(self, row: int) -> Slice:
        epoch, row = divmod(row, self.rows_per_epoch)
        documents = self._filled[self._epoch(epoch)[row]]
        starts, lengths = self.corpus.offsets[documents], self.corpus.lengths[documents]
        # The first token of a document is never a label, whatever its byte says.
        valid = sum(int(self.corpus.learned[a + 1 : a + n].sum()) for a, n in zip(starts, lengths, strict=True))
        return Slice(starts, lengths, np.ones(len(documents), bool), valid)

    def read(self, piece: Slice) -> Row:
        used = int(piece.lengths.sum())
        begins = np.cumsum(piece.lengths) - piece.lengths
        index = np.repeat(piece.starts - begins, piece.lengths) + np.arange(used)
        tokens = np.full(self.sequence_length, self._padding, np.int64)
        tokens[:used] = self.corpus.tokens[index]
        labels = np.full(self.sequence_length, IGNORED)
        learned = self.corpus.learned[index[1:]].astype(bool)
        labels[: used - 1][learned] = tokens[1:used][learned]
        labels[begins + piece.lengths - 1] = IGNORED  # what follows is another document's
        left = self.sequence_length - used
        lengths = np.append(piece.lengths, left) if left else piece.lengths
        digest = hashlib.blake2b(tokens.tobytes() + lengths.tobytes(), digest_size=16).digest()
        return Row(tokens, labels, lengths, digest, piece.valid_tokens)

    def _rows_of(self, total: int) -> int:
        return len(self._filled)

    def _shuffle(self, epoch: int) -> np.ndarray:
        rows = np.arange(self.rows_per_epoch)
        return rows if self.seed is None else np.argsort(random_words((*self.seed, epoch, 1), len(rows)), kind="stable")


def stream_of(corpus: Corpus, sequence_length: int, seed: tuple[int, ...] | None) -> Stream:
    """The rows of a corpus: of whole demonstrations where it holds such, else of a stream of tokens."""
    return (Stream if corpus.learned is None else DemonstrationStream)(corpus, sequence_length, seed)


def _fill(order: np.ndarray, lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Documents in this order into rows, a new row where the next does not fit."""
    rows, current, used = [], [], 0
    for document in order.tolist():
        length = int(lengths[document])
        if used + length > room:
            rows.append(np.array(current))
            current, used = [], 0
        current.append(document)
        used += length
    return [*rows, np.array(current)]
