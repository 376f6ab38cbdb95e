"""Prepared folders: what is in them, that they are whole or absent, and what opening a damaged one says."""

import errno
import json
import shutil
import time

import numpy as np
import pytest

from farspan.lm.data import prepare as module
from farspan.lm.data.corpus import Corpus, open_corpora
from farspan.lm.data.loader import Loader
from farspan.lm.data.prepare import prepare
from farspan.lm.data.spec import DataSpec, TokenizerSpec
from farspan.lm.data.tokenizer import load_tokenizer, tokenizer_hash


@pytest.fixture
def library(texts, tmp_path):
    """A folder of text files, one of them twice."""
    folder = tmp_path / "library"
    folder.mkdir()
    for number, text in enumerate([*texts, texts[0]]):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def data_of(library, path, **options) -> DataSpec:
    options = {"sources": [{"text": f"{library}/*.txt"}], "validation": 0.1} | options
    return DataSpec(path=str(path), **options)


def test_a_corpus_holds_every_document_once(library, texts, tokenizer_folder, tmp_path):
    (folder,) = prepare(data_of(library, tmp_path / "c"), TokenizerSpec(path=str(tokenizer_folder)), progress=False)
    tokenizer = load_tokenizer(tokenizer_folder)
    splits = [Corpus(folder, "train"), Corpus(folder, "validation")]
    decoded = []
    for corpus in splits:
        assert corpus.tokens.dtype == np.uint16 and corpus.offsets.dtype == np.int64
        assert corpus.vocab_size == 512 and corpus.tokenizer_hash == tokenizer_hash(tokenizer_folder)
        for index in range(corpus.documents):
            *ids, end = corpus.document(index).tolist()
            assert end == corpus.eos_token_id == tokenizer.eos_token_id
            decoded.append(tokenizer.decode(ids))
        size = sum(len(text.encode()) for text in decoded[-corpus.documents :])
        assert corpus.bytes_per_token == pytest.approx(size / len(corpus.tokens))
    assert sorted(decoded) == sorted(texts)
    assert 0 < splits[1].documents < 40
    assert Loader([splits[0]], [1.0], 64, rows=2, seed=0).batch(0)[0].valid_tokens > 100


def test_preparing_is_deterministic_and_skips_what_is_done(library, tmp_path, capsys):
    fingerprints = []
    for name in ("a", "b"):
        spec = TokenizerSpec(path=str(tmp_path / name / "tokenizer"), vocab_size=512)
        prepare(data_of(library, tmp_path / name), spec, progress=False)
        fingerprints.append(Corpus(tmp_path / name).fingerprint)
    assert fingerprints[0] == fingerprints[1]
    before = (tmp_path / "b" / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    began = time.perf_counter()
    prepare(data_of(library, tmp_path / "b"), spec, progress=False)
    assert time.perf_counter() - began < 1
    assert "already prepared" in capsys.readouterr().out
    assert (tmp_path / "b" / "train.bin").stat().st_mtime_ns == before
    prepare(data_of(library, tmp_path / "b", validation=0.3), spec, progress=False)
    assert Corpus(tmp_path / "b").fingerprint != fingerprints[0]
    with pytest.raises(ValueError, match="has 512 entries, not vocab_size=600; delete its folder"):
        prepare(data_of(library, tmp_path / "b"), TokenizerSpec(path=spec.path, vocab_size=600), progress=False)


def test_a_new_tokenizer_is_a_new_corpus(library, texts, tokenizer_folder, unigram_folder, tmp_path):
    for folder in (tokenizer_folder, unigram_folder):
        prepare(data_of(library, tmp_path / "c"), TokenizerSpec(path=str(folder)), progress=False)
        assert Corpus(tmp_path / "c").tokenizer_hash == tokenizer_hash(folder)
    Corpus(tmp_path / "c").check_tokenizer(tokenizer_hash(unigram_folder), unigram_folder)
    with pytest.raises(ValueError, match=r"tokenizer .*bpe \(\w{12}\) does not match corpus .*; prepare again with"):
        Corpus(tmp_path / "c").check_tokenizer(tokenizer_hash(tokenizer_folder), tokenizer_folder)


def test_a_mixture_is_a_folder_per_source(library, tokenizer_folder, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"record {i} " * 30}) + "\n" for i in range(50)))
    shutil.copy(library / "000.txt", tmp_path / "again.txt")
    sources = [
        {"text": f"{library}/*.txt", "weight": 3},
        {"jsonl": f"{tmp_path}/x.jsonl", "weight": 1},
    ]
    data = data_of(library, tmp_path / "mix", sources=sources)
    folders = prepare(data, TokenizerSpec(path=str(tokenizer_folder)), progress=False)
    assert len(folders) == 2 and all(folder.parent == tmp_path / "mix" for folder in folders)
    corpora, weights = open_corpora(data, "train")
    assert [corpus.directory for corpus in corpora] == folders and weights == [3, 1]
    Loader(corpora, weights, 32, rows=4, seed=0).batch(0)
    with pytest.raises(FileNotFoundError, match=r"mix is a mixture; name one of its corpora: "):
        Corpus(tmp_path / "mix")
    repeated = [*sources[:1], {"text": f"{tmp_path}/again.txt", "weight": 1}]
    with pytest.raises(ValueError, match=r"the corpus is empty: text .*again.txt gave no document"):
        prepare(data_of(library, tmp_path / "m", sources=repeated), TokenizerSpec(path=str(tokenizer_folder)), False)


def test_an_interrupted_preparation_leaves_nothing_to_read(library, tokenizer_folder, tmp_path, monkeypatch):
    spec = TokenizerSpec(path=str(tokenizer_folder))
    data = data_of(library, tmp_path / "c")
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1000)

    def full_disk(tokenizer):
        encode, batches = text_encoder(tokenizer), iter(range(3))

        def encode_some(texts):
            if next(batches, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return encode(texts)

        return encode_some

    text_encoder = module.text_encoder
    monkeypatch.setattr(module, "text_encoder", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        prepare(data, spec, progress=False)
    assert list((tmp_path / "c").iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no prepared corpus at .*c; make it with `farspan data prepare"):
        Corpus(tmp_path / "c")
    monkeypatch.setattr(module, "text_encoder", text_encoder)
    prepare(data, spec, progress=False)
    fingerprint = Corpus(tmp_path / "c").fingerprint

    # Killed while the new files of another preparation move into place: the old metadata must not speak for them.
    replace = module.os.replace

    def killed(source, target):
        if str(target).endswith("metadata.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(library, tmp_path / "c", validation=0.5), spec, progress=False)
    with pytest.raises(FileNotFoundError):
        Corpus(tmp_path / "c")
    monkeypatch.setattr(module.os, "replace", replace)
    prepare(data, spec, progress=False)
    assert Corpus(tmp_path / "c").fingerprint == fingerprint


def test_opening_a_damaged_corpus_names_the_file(make_corpus):
    folder = make_corpus("c", [5, 6, 7]).directory
    tokens, offsets = folder / "train.bin", folder / "train.offsets.npy"
    whole = tokens.read_bytes(), offsets.read_bytes(), (folder / "metadata.json").read_text()
    tokens.write_bytes(whole[0][:-2])
    with pytest.raises(ValueError, match=r"train\.bin holds 34 bytes where the metadata says 36"):
        Corpus(folder)
    tokens.unlink()
    with pytest.raises(ValueError, match=r"train\.bin holds 0 bytes"):
        Corpus(folder)
    tokens.write_bytes(whole[0])
    offsets.write_bytes(whole[1][:-8])
    with pytest.raises(ValueError, match=r"train\.offsets\.npy holds"):
        Corpus(folder)
    np.save(offsets, np.array([0, 5, 11, 17]))
    with pytest.raises(ValueError, match=r"does not describe 3 documents of 18 tokens"):
        Corpus(folder)
    offsets.write_bytes(whole[1])
    (folder / "metadata.json").write_text(whole[2][:-9])
    with pytest.raises(ValueError, match=r"metadata\.json is damaged; delete"):
        Corpus(folder)
    (folder / "metadata.json").write_text(json.dumps({**json.loads(whole[2]), "format": 99}))
    with pytest.raises(ValueError, match=r"has format 99, this version reads 1"):
        Corpus(folder)
    with pytest.raises(ValueError, match=r"split 'test' is not one of train, validation"):
        (folder / "metadata.json").write_text(whole[2])
        Corpus(folder, "test")


def test_empty_corpora_are_errors(library, tokenizer_folder, tmp_path):
    spec = TokenizerSpec(path=str(tokenizer_folder))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"the corpus is empty: text .*blank\.txt gave no document"):
        prepare(data_of(library, tmp_path / "a", sources=[{"text": f"{tmp_path}/blank.txt"}]), spec, progress=False)
    with pytest.raises(ValueError, match=r"fall into the validation share of 0\.9999; lower data.validation"):
        sources = [{"text": f"{library}/00*.txt"}]
        prepare(data_of(library, tmp_path / "a", sources=sources, validation=0.9999), spec, progress=False)
    prepare(data_of(library, tmp_path / "a", validation=0.0), spec, progress=False)
    with pytest.raises(ValueError, match=r"has no validation documents; set data.validation above 0"):
        Corpus(tmp_path / "a", "validation")
