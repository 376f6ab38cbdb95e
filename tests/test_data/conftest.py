"""A small tokenizer, and corpora of random tokens that are written without one."""

import json
import random

import numpy as np
import pytest

from farspan.lm.data.corpus import FORMAT, Corpus, offset_file, token_file
from farspan.lm.data.tokenizer import train_tokenizer

EOS, PAD = 2, 3


def _texts(count: int) -> list[str]:
    """Distinct documents that look like code, with indentation, digits, accents and empty lines."""
    draw = random.Random(0)
    syllables = ["re", "tur", "naï", "ve", "sel", "f_", "über", "漢", "字", "li", "st", "for", "ra", "nge", "pri", "nt"]
    words = ["".join(draw.choices(syllables, k=draw.randrange(1, 5))) for _ in range(400)]
    words += ["(a, b):", "==", "12", "345", "", "#"]

    def line() -> str:
        return "    " * draw.randrange(4) + " ".join(draw.choices(words, k=draw.randrange(9)))

    return ["\n".join([f"# document {number}", *(line() for _ in range(12))]) + "\n" for number in range(count)]


@pytest.fixture(scope="session")
def texts():
    return _texts(120)


@pytest.fixture(scope="session")
def tokenizer_folder(texts, tmp_path_factory):
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "bpe", vocab_size=512)


@pytest.fixture(scope="session")
def unigram_folder(texts, tmp_path_factory):
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "unigram", vocab_size=512, model="unigram")


@pytest.fixture
def make_corpus(tmp_path):
    """make_corpus(name, lengths) writes a corpus of documents of these lengths, and opens its training split."""

    def make(name: str, lengths: list[int], seed: int = 0, tokenizer_hash: str = "0" * 64) -> Corpus:
        folder = tmp_path / name
        folder.mkdir()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.random.default_rng(seed).integers(4, 60_000, offsets[-1]).astype(np.uint16)
        tokens[offsets[1:] - 1] = EOS
        counts = {}
        for split in ("train", "validation"):
            tokens.tofile(token_file(folder, split))
            np.save(offset_file(folder, split), offsets)
            size = offset_file(folder, split).stat().st_size
            counts[split] = {"documents": len(lengths), "tokens": len(tokens), "bytes": 3 * len(tokens)}
            counts[split]["offsets_file_bytes"] = size
        metadata = {"format": FORMAT, "splits": counts, "dtype": "uint16", "vocab_size": 60_000, "fingerprint": name}
        metadata |= {"tokenizer_hash": tokenizer_hash, "eos_token_id": EOS, "pad_token_id": PAD}
        (folder / "metadata.json").write_text(json.dumps(metadata))
        return Corpus(folder)

    return make
