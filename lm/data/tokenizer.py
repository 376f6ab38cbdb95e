"""Tokenizers: trained by sentencepiece, exported so that transformers' AutoTokenizer loads them without farspan.

Text becomes tokens without loss. sentencepiece writes a space as U+2581 ("▁"), so a "▁" of the text itself would come
back as a space. It is escaped with a private-use character E = U+E000:

    encode   E -> E e,  then  ▁ -> E u,  then  space -> ▁
    decode   ▁ -> space,  then  E u -> ▁,  then  E e -> E

Why decoding inverts encoding: in encoded text every E is followed by e or u, which says whether it stands for E or for
▁, and every ▁ is a space. The first step of decoding therefore restores the spaces exactly. In the second, "E u" is
found only where encoding wrote it for a ▁: the E of an "E e" is followed by e, and an e or u of the text follows no
bare E. It inserts ▁, never E, e or u, so the third finds exactly the "E e" that stand for E. Everything else is left as
it is; what the vocabulary lacks becomes its UTF-8 bytes.

Documents are encoded by `text_encoder`, which takes "</s>" in a text for four characters. `tokenizer(...)` takes it for
the special token; where a text comes from a user (a chat), encode it with `split_special_tokens=True` and put the
special tokens around it by id.
"""

import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path

ESCAPE = "\ue000"
SPACE = "\u2581"
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # ids 0 to 3
# More text moves few pieces of a vocabulary. On two cores 16 MB take BPE 3 s, and 2 MB take unigram 15 s.
SAMPLE_BYTES = {"bpe": 16_000_000, "unigram": 2_000_000}
READ_BYTES = 2_000_000_000  # of a corpus without end, look at so much
CHUNK = 4000


def train_tokenizer(texts: Iterable[str], directory: str | Path, vocab_size: int, model: str = "bpe") -> Path:
    """Train a tokenizer and write it as a folder for AutoTokenizer (tokenizer.json, tokenizer_config.json).

    texts: documents; a sample (16 MB for bpe, 2 MB for unigram, from the first 2 GB), chosen by content, decides the
        pieces, so that neither the order of the documents nor the machine matters
    vocab_size: entries, with 4 special tokens and 256 bytes
    model: "bpe" or "unigram"

    Digits are single tokens: numbers of any length are then spelled in one way. Pieces begin with at most one space,
    or are spaces only (indentation); they may join letters and punctuation ("self.", "):\\n"), which takes 8 % fewer
    tokens on Python source than sentencepiece's split by script.

    Raises ValueError for an existing folder, no text, or more entries than the text has pieces.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        raise ValueError(f"{directory} already holds a tokenizer; delete it or choose another folder")
    proto = train_sentencepiece(texts, vocab_size, model)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _export(proto, model).save_pretrained(partial)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model: str) -> bytes:
    """A serialized sentencepiece model of `escape`d text. ValueError as `train_tokenizer`."""
    import sentencepiece

    if model not in SAMPLE_BYTES:
        raise ValueError(f"tokenizer model {model!r} is not one of {', '.join(SAMPLE_BYTES)}")
    sample = sample_chunks(texts, SAMPLE_BYTES[model])
    if not sample:
        raise ValueError("there is no text to train a tokenizer on; check the sources")
    written = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(escape(chunk).replace("\0", "") for chunk in sample),  # sentencepiece stops at a NUL
            model_writer=written,
            model_type=model,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            split_digits=True,
            byte_fallback=True,
            max_sentence_length=1 << 20,
            num_threads=8,  # fixed: the unigram sums depend on it
            minloglevel=2,
            **{key.replace("token", "piece"): piece for key, piece in SPECIAL.items()},
            **{key.replace("token", "id"): index for index, key in enumerate(SPECIAL)},
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2]  # behind the condition in the source that failed
        raise ValueError(f"sentencepiece cannot train {vocab_size} {model} pieces: {reason}") from error
    return written.getvalue()


def load_tokenizer(path: str | Path):
    """The transformers tokenizer in a folder or on the hub. ValueError where there is none, or none that is fast."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"tokenizer {path} is neither a folder with a tokenizer nor a hub name: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {path} has no fast version (tokenizer.json); convert it or take another")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {path} has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer


def encode_prompt(tokenizer, prompt: str):
    """`input_ids` and `attention_mask`, int64 [1, T], of a prompt to continue, as the tokenizer's own batch.

    A space at the end is left for the model to write: pieces begin with their space, so that after a space of its own a
    model has only ever seen what no piece covers (in a small vocabulary of code, digits).
    """
    return tokenizer(prompt.rstrip(" ") or prompt, return_tensors="pt")


def tokenizer_hash(path: str | Path) -> str:
    """sha256 (hex) of a tokenizer: its tokenizer.json without the padding and truncation that calls leave in it.

    path: a folder, or a name on the hub
    """
    file = Path(path) / "tokenizer.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else load_tokenizer(path).backend_tokenizer.to_str()
    content = json.loads(text)
    content.pop("padding", None)
    content.pop("truncation", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def text_encoder(tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their tokens, on all cores, for which special tokens in a text are text; adds none."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def escape(text: str) -> str:
    return text.replace(ESCAPE, f"{ESCAPE}e").replace(SPACE, f"{ESCAPE}u")


def sample_chunks(texts: Iterable[str], limit: int) -> list[str]:
    """Chunks of texts, 4,000 to 8,000 characters, at most `limit` bytes: those with the smallest hashes, in that order.

    A uniform sample in bounded memory that depends on the set of chunks alone.
    """
    heap: list[tuple[int, bytes]] = []
    held = 0
    for chunk in _chunks(texts):
        content = chunk.encode("utf-8")
        priority = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        heapq.heappush(heap, (-priority, content))
        held += len(content)
        while held > limit and len(heap) > 1:
            held -= len(heapq.heappop(heap)[1])
    return [content.decode("utf-8") for _, content in sorted(heap, reverse=True)]


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Runs of lines of 4,000 to 8,000 characters; a longer line is cut."""
    read = 0
    for text in texts:
        start = 0
        while start < len(text):
            line_end = text.find("\n", start + CHUNK) + 1 or len(text)
            stop = min(line_end, start + 2 * CHUNK)
            yield text[start:stop]
            start = stop
        read += len(text)
        if read > READ_BYTES:
            return


def _export(proto: bytes, model: str):
    """The transformers tokenizer that encodes as a sentencepiece model does (tests hold the ids equal)."""
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    # No piece has a space behind another character, so cutting a text before its runs of spaces changes no token, and
    # the work on a long document stays linear.
    splits = [pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")]
    if model == "bpe":
        core = models.BPE(*_bpe_merges(pieces), unk_token=SPECIAL["unk_token"], byte_fallback=True)
    else:
        entries = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
        core = models.Unigram(entries, unk_id=pieces.unk_id(), byte_fallback=True)
        # Unlike sentencepiece, Unigram finds the names of bytes and of special tokens in a text: cut them behind "<".
        names = "|".join(token[1:] for token in SPECIAL.values())
        splits.insert(0, pre_tokenizers.Split(Regex(f"<(?=0x[0-9A-F]{{2}}>|{names})"), "merged_with_previous"))
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(ESCAPE, f"{ESCAPE}e"),
            normalizers.Replace(SPACE, f"{ESCAPE}u"),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(SPACE, " "),
            decoders.Replace(f"{ESCAPE}u", SPACE),
            decoders.Replace(f"{ESCAPE}e", ESCAPE),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def _bpe_merges(pieces) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a sentencepiece BPE model: every way to join two pieces to a third, best score first."""
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    # Bytes and special tokens are no results of merges: "<0x41>" in a text stays six characters.
    normal = {
        piece: i
        for piece, i in vocabulary.items()
        if not (pieces.is_byte(i) or pieces.is_control(i) or pieces.is_unknown(i))
    }
    merges = [
        (-pieces.get_score(index), normal[piece[:cut]], normal[piece[cut:]], piece[:cut], piece[cut:])
        for piece, index in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return vocabulary, [(left, right) for *_, left, right in sorted(merges)]
