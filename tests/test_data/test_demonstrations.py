"""Demonstrations: which tokens are learned, and rows that hold them whole."""

import json

import numpy as np
import pytest

from farspan.lm.data.corpus import Corpus
from farspan.lm.data.demonstrations import Demonstration, begins_with_bos, demonstration_encoder, question_and_answer
from farspan.lm.data.loader import Loader, validation_batches
from farspan.lm.data.prepare import prepare
from farspan.lm.data.spec import DataSpec, TokenizerSpec, validated
from farspan.lm.data.tokenizer import load_tokenizer, text_encoder

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def corpus(tokenizer_folder, tmp_path):
    """Forty questions with answers of different lengths."""
    file = tmp_path / "pairs.jsonl"
    lines = [{"q": f"count to {n}:", "a": " ".join(map(str, range(n)))} for n in range(1, 41)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSpec(
        path=str(tmp_path / "c"), sources=({"jsonl": str(file), "prompt": "q", "field": "a"},), validation=0.2
    )
    prepare(data, TokenizerSpec(path=str(tokenizer_folder)), progress=False)
    return tmp_path / "c"


def test_the_answer_and_its_end_are_learned(tokenizer):
    encode = demonstration_encoder(tokenizer, text_encoder(tokenizer))
    ((ids, learned),) = encode([question_and_answer("one two", " three")])
    answer = tokenizer(" three")["input_ids"]
    assert not begins_with_bos(tokenizer)
    assert ids == [*tokenizer("one two")["input_ids"], *answer, tokenizer.eos_token_id]
    assert learned == [0] * (len(ids) - len(answer) - 1) + [1] * (len(answer) + 1)


def test_of_a_conversation_the_assistants_turns_are_learned(tokenizer):
    tokenizer.chat_template = TEMPLATE
    encode = demonstration_encoder(tokenizer, text_encoder(tokenizer))
    turns = (("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ((ids, learned),) = encode([Demonstration(turns, chat=True)])
    messages = [{"role": role, "content": text} for role, text in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == list(whole)
    taught = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert tokenizer.decode(taught) == "b</s>d</s>"


def test_conversations_need_a_template(tokenizer):
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        demonstration_encoder(tokenizer, text_encoder(tokenizer))([question_and_answer("a", "b", chat=True)])
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        demonstration_encoder(tokenizer, text_encoder(tokenizer))([Demonstration(turns, chat=True)])


def test_rows_hold_whole_demonstrations(corpus):
    opened = Corpus(corpus)
    loader = Loader([opened], [1.0], sequence_length=160, rows=2, seed=0)
    documents = {opened.document(d).tobytes() for d in range(opened.documents)}
    seen = []
    for step in range(-(-loader._streams[0].rows_per_epoch // 2)):
        (batch,) = loader.batch(step)
        assert batch.input_ids.shape == (1, 320) and loader.valid_tokens(step) == batch.valid_tokens
        assert batch.valid_tokens == int((batch.shift_labels != -100).sum())
        for piece, labels in zip(
            batch.input_ids[0].tensor_split(batch.cu_seqlens[1:-1].long()),
            batch.shift_labels[0].tensor_split(batch.cu_seqlens[1:-1].long()),
            strict=True,
        ):
            tokens = piece.numpy().astype(opened.tokens.dtype)
            if (labels == -100).all():
                assert (tokens == opened.metadata["pad_token_id"]).all()
                continue
            assert tokens.tobytes() in documents
            seen.append(tokens.tobytes())
            kept = labels[labels != -100]
            assert kept[-1] == opened.eos_token_id and (kept == piece[-len(kept) :]).all()
    assert set(seen) == documents


def test_epochs_visit_the_rows_in_another_order(corpus):
    loader = Loader([Corpus(corpus)], [1.0], sequence_length=160, rows=1, seed=0)
    count = loader._streams[0].rows_per_epoch
    first, second = ([loader.identifier(step) for step in range(e * count, (e + 1) * count)] for e in (0, 1))
    assert first != second and set(first) == set(second)


def test_validation_rows(corpus):
    batches = validation_batches(Corpus(corpus, "validation"), 160, rows=1, limit_tokens=10_000)
    assert all(batch.valid_tokens > 0 for batch in batches)


def test_a_row_that_is_too_short(corpus):
    with pytest.raises(ValueError, match="are longer than rows of 32 tokens, the longest"):
        Loader([Corpus(corpus)], [1.0], sequence_length=32, rows=1, seed=0)


def test_learned_tokens_lie_beside_the_corpus(corpus):
    opened = Corpus(corpus)
    assert len(opened.learned) == len(opened.tokens)
    assert np.isin(opened.learned, (0, 1)).all() and 0 < opened.learned.mean() < 1
    file = corpus / "train.learned.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or damaged"):
        Corpus(corpus)


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"a": "x"}, {"prompt": "q", "field": "a"}, "has no field 'q'; set `prompt` to one of: a"),
        ({"m": "x"}, {"chat": True, "field": "m"}, "is no list of messages"),
        ({"m": [{"role": "user", "content": "x"}]}, {"chat": True, "field": "m"}, "no message of the role assistant"),
    ],
)
def test_records_that_do_not_fit(tokenizer_folder, tmp_path, record, options, message):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record) + "\n")
    data = DataSpec(path=str(tmp_path / "c"), sources=({"jsonl": str(file), **options},))
    with pytest.raises(ValueError, match=message):
        prepare(data, TokenizerSpec(path=str(tokenizer_folder)), progress=False)


def test_demonstrations_are_not_mixed_into_other_text():
    sources = ({"jsonl": "a", "prompt": "q"}, {"text": "b"})
    with pytest.raises(ValueError, match="give every source a weight"):
        validated(DataSpec, path="c", sources=sources)
