"""Round trips, equality with sentencepiece, and loading without farspan."""

import random
import shutil
import subprocess
import sys

import pytest
import sentencepiece

from farspan.lm.data.tokenizer import (
    ESCAPE,
    SPACE,
    encode_prompt,
    escape,
    load_tokenizer,
    sample_chunks,
    text_encoder,
    tokenizer_hash,
    train_sentencepiece,
    train_tokenizer,
)

TRICKY = [
    *("", " ", "  ", " a", "a ", "\n", "\r\n", "\t x", "\0", "a\0b", "\x7f\x1b[0m", "\ufeffx", "\ufffd", "\u3000"),
    *(SPACE, f" {SPACE} {SPACE}", ESCAPE, f"{ESCAPE}e", f"{ESCAPE}u", f"{ESCAPE}{SPACE}u", f"{ESCAPE * 3}eu{SPACE}e"),
    *("<0x41>", "<0x0A><0x", "</s>", "<s>x</s>", "<pad>", "<unk>", "</s", "<<s>", "< s>", "\u0301", "e\u0301", "é"),
    *("👩‍👩‍👧‍👦🏳️‍🌈", "漢字かな", "\U0010ffff\ufdd0\ufffe", "    return x\n\n\n        y", "12345", "a" * 300),
]


def random_strings(count: int) -> list[str]:
    """Strings of tricky parts and of characters from everywhere in Unicode."""
    draw = random.Random(0)

    def part() -> str:
        if draw.random() < 0.5:
            return draw.choice(TRICKY)
        return chr(draw.choice([draw.randrange(0x300), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]))

    return ["".join(part() for _ in range(draw.randrange(1, 12))) for _ in range(count)]


def every_block() -> list[str]:
    """Each run of 64 characters of Unicode, surrogates left out."""
    return [
        "".join(map(chr, range(start, start + 64)))
        for start in [*range(0, 0xD800, 64), *range(0xE000, 0x20000, 64), *range(0x20000, 0x110000, 4096)]
    ]


@pytest.fixture(params=["bpe", "unigram"])
def folder(request, tokenizer_folder, unigram_folder):
    return {"bpe": tokenizer_folder, "unigram": unigram_folder}[request.param]


def test_any_text_comes_back(folder):
    tokenizer = load_tokenizer(folder)
    encode = text_encoder(tokenizer)
    strings = TRICKY + random_strings(1500) + every_block()
    for text, ids in zip(strings, encode(strings), strict=True):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3}, f"a special token from the text {text!r}"
    for text in TRICKY + random_strings(200):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_special_only_where_asked(folder):
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 512
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer("a</s>").input_ids[-1] == 2
    as_text = text_encoder(tokenizer)(["a</s>"])[0]
    assert 2 not in as_text
    assert tokenizer("a</s>", split_special_tokens=True).input_ids == as_text
    assert tokenizer.decode(tokenizer("a</s>").input_ids, skip_special_tokens=True) == "a"


def test_ids_are_those_of_sentencepiece(texts, tokenizer_folder, unigram_folder):
    samples = texts[:40] + [text for text in TRICKY if "<" not in text and "\0" not in text]
    bpe = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(texts, 512, "bpe"))
    ours = text_encoder(load_tokenizer(tokenizer_folder))(samples)
    assert ours == [bpe.encode(escape(text)) for text in samples]
    unigram = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(texts, 512, "unigram"))
    ours = text_encoder(load_tokenizer(unigram_folder))(texts)
    # Both find a segmentation of the best score; where two are equally good they may choose differently.
    for ids, text in zip(ours, texts, strict=True):
        expected = unigram.encode(escape(text))
        if ids != expected:
            scores = [sum(map(unigram.get_score, choice)) for choice in (ids, expected)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_cutting_a_long_document_changes_no_token(tokenizer_folder):
    """The pre-tokenizer cuts before spaces; the whole text at once gives the same."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    document = "".join(f"    def f_{i}(x,  y):\n\treturn '▁{i}'  \n" for i in range(500))
    cut = whole.encode(document).ids
    from tokenizers import pre_tokenizers

    whole.pre_tokenizer = pre_tokenizers.Sequence([])
    assert whole.encode(document).ids == cut


def test_pieces_suit_code(texts, tokenizer_folder):
    vocabulary = load_tokenizer(tokenizer_folder).get_vocab()
    assert SPACE * 4 in vocabulary  # indentation is one token
    assert not any(piece.isdigit() and len(piece) > 1 for piece in vocabulary)
    assert sum(piece.startswith("<0x") for piece in vocabulary) == 256


def test_auto_tokenizer_needs_no_farspan(tokenizer_folder, tmp_path):
    """Also beside a config.json whose model type only farspan knows, as in an exported model."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "hf")
    (folder / "config.json").write_text('{"model_type": "farspan"}')
    program = f"""
import sys
from transformers import AutoTokenizer
for folder in {[str(tokenizer_folder), str(folder)]!r}:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(" a\\u2581  </s>", add_special_tokens=False)) == " a\\u2581  </s>"
assert not any(name.split(".")[0] == "farspan" for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_streaming_gives_the_same_text(tokenizer_folder):
    """TextStreamer decodes after every token, also in the middle of a character."""
    from transformers import TextStreamer

    class Collected(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            self.parts = [*getattr(self, "parts", []), text]

    tokenizer = load_tokenizer(tokenizer_folder)
    import torch

    for text in ("a ▁ 👩‍👩‍👧‍👦 ü\ue000u ▁▁ 漢字\n  x ▁", "def f():\n    return '▁' + '\ue000'\n"):
        streamer = Collected(tokenizer)
        for token in tokenizer.encode(text):
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(streamer.parts) == text


def test_a_prompt_leaves_its_last_space_to_the_model(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert encode_prompt(tokenizer, "def ")["input_ids"].tolist() == [tokenizer("def")["input_ids"]]
    assert encode_prompt(tokenizer, "def\n")["input_ids"].tolist() == [tokenizer("def\n")["input_ids"]]
    assert encode_prompt(tokenizer, "  ")["input_ids"].shape[1] > 0


def test_training_depends_on_the_documents_alone(texts, tokenizer_folder, tmp_path):
    again = train_tokenizer(reversed(texts), tmp_path / "again", vocab_size=512)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer_folder)
    assert not list(tmp_path.glob("*.partial"))
    other = train_tokenizer(texts[:50], tmp_path / "other", vocab_size=512)
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer_folder)


def test_hash_survives_use_and_saving(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(tmp_path) == tokenizer_hash(tokenizer_folder)


def test_literal_names_of_bytes_and_special_tokens_train(texts, tmp_path):
    """A corpus full of them must neither break training nor make them pieces."""
    texts = [text + "</s> <0x0A> <s> <pad> <unk>\n" * 20 for text in texts]
    for model in ("bpe", "unigram"):
        folder = train_tokenizer(texts, tmp_path / model, vocab_size=512, model=model)
        tokenizer = load_tokenizer(folder)
        ids = text_encoder(tokenizer)([texts[3]])[0]
        assert tokenizer.decode(ids) == texts[3]
        assert not set(ids) & {0, 1, 2, 3}


def test_sample_is_bounded_and_independent_of_order(texts):
    chosen = sample_chunks(texts, 10_000)
    assert 5_000 < sum(len(chunk.encode()) for chunk in chosen) <= 10_000
    assert chosen == sample_chunks(reversed(texts), 10_000)
    document = "".join(f"line {i}\n" for i in range(5000))
    parts = sample_chunks([document], 10**9)
    assert sorted("".join(parts)) == sorted(document) and max(map(len, parts)) <= 8000
    assert all(part.endswith("\n") for part in parts)


def test_errors_say_what_to_change(texts, tokenizer_folder, tmp_path):
    with pytest.raises(ValueError, match="already holds a tokenizer; delete it"):
        train_tokenizer(texts, tokenizer_folder, vocab_size=512)
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train_tokenizer(["", ""], tmp_path / "a", vocab_size=512)
    with pytest.raises(ValueError, match=r"cannot train 60000 bpe pieces: .*too high"):
        train_tokenizer(texts, tmp_path / "a", vocab_size=60000)
    with pytest.raises(ValueError, match="'wordpiece' is not one of bpe, unigram"):
        train_tokenizer(texts, tmp_path / "a", vocab_size=512, model="wordpiece")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is neither a folder with a tokenizer nor a hub name"):
        load_tokenizer(tmp_path / "empty")
