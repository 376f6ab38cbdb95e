"""Three small tokenizers of different kinds, made in the test, and how a model would read a document."""

import itertools
import json

import numpy as np
import pytest

from farspan.eval.needle import words


def byte_tokenizer():
    """A token per byte, nothing added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def bpe_tokenizer():
    """Byte-level BPE of 800 pieces, with <s> before and </s> after a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram_tokenizer(folder):
    """A unigram of sentencepiece, as farspan's recipes train and export it."""
    from transformers import PreTrainedTokenizerFast

    from farspan.lm.data.tokenizer import train_tokenizer

    path = train_tokenizer(sentences(), folder, vocab_size=512, model="unigram") / "tokenizer.json"
    # Not by AutoTokenizer, which would import every layer of farspan for its decoder.
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")


def sentences():
    rng = np.random.default_rng(7)
    return [*itertools.islice(words.prose(rng), 400), *words.NOISE, *itertools.islice(words.distinct("word", rng), 200)]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """By name: byte, bpe, unigram."""
    folder = tmp_path_factory.mktemp("needle") / "unigram"
    return {"byte": byte_tokenizer(), "bpe": bpe_tokenizer(), "unigram": unigram_tokenizer(folder)}


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A file of questions with passages of a sentence or two."""
    prose = words.prose(np.random.default_rng(3))
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    items = [
        {
            "question": f"What is kept in room {i}?",
            "answers": [f"the crown of king {i:03d}", f"crown {i:03d}"],
            "gold": [f"In room {i} they keep the crown of king {i:03d}. {next(prose)}"],
            "others": [f"{next(prose)} {next(prose)}" for _ in range(4)],
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path
