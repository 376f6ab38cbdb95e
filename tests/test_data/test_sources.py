"""Where documents come from, what is left out, and which are held out."""

import json
import sys

import pytest

from farspan.lm.data.sources import distinct, divide, documents, size_in_bytes
from farspan.lm.data.spec import DataSpec, Source, TokenizerSpec, validated


def read(**options) -> list[str]:
    return list(documents(Source(**options)))


def split_of(texts, validation=0.2, seen=None) -> dict[str, str]:
    return {text: split for split, text in divide(distinct(texts, set() if seen is None else seen), validation)}


def test_text_files_are_documents_in_order_of_their_names(tmp_path):
    for name, content in {"b.txt": "two\r\n", "a.txt": "one", "c.md": "no", "deep/d.txt": "three é"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    assert read(text=f"{tmp_path}/*.txt") == ["one", "two\r\n"]
    assert read(text=f"{tmp_path}/**/*.txt") == ["one", "two\r\n", "three é"]
    assert read(text=f"{tmp_path}/*.txt", limit_documents=1) == ["one"]
    assert size_in_bytes(Source(text=f"{tmp_path}/*.txt")) == 8


def test_jsonl_and_parquet_records_are_documents(tmp_path):
    import datasets

    records = [{"body": "one", "n": 1}, {"body": None, "n": 2}, {"body": "two\n", "n": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "b.jsonl").write_text('{"other": 1, "body": "three"}\n')
    (tmp_path / "c.jsonl").write_text("")
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    assert read(jsonl=f"{tmp_path}/*.jsonl", field="body") == ["one", "two\n", "three"]
    assert read(parquet=f"{tmp_path}/*.parquet", field="body") == ["one", "two\n"]
    assert read(jsonl=f"{tmp_path}/*.jsonl", field="body", limit_documents=2) == ["one", "two\n"]


def test_python_standard_library_and_packages(tmp_path, monkeypatch):
    names = [document for document in documents(Source(python="stdlib", limit_documents=30))]
    assert len(names) == 30 and any("class " in document for document in names)
    package = tmp_path / "toy_package"
    for name, content in {"b.py": b"b = 1", "a/__init__.py": b"a = 1", "a/bad.py": b"\xff", "x.txt": b"no"}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(content)
    (package / "__init__.py").write_text("raise RuntimeError('preparing must not run a package')")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "c.py").write_text("c = 1")
    (tmp_path / "toy_module.py").write_text("single = True")
    monkeypatch.syspath_prepend(tmp_path)
    init = (package / "__init__.py").read_text()
    assert read(python="toy_package") == [init, "a = 1", "b = 1"]
    assert read(python="toy_module") == ["single = True"]
    assert "toy_package" not in sys.modules
    assert any("yaml" in document for document in documents(Source(python="PyYAML", limit_documents=3)))


def test_hub_documents_are_streamed_and_an_absent_hub_is_one_line(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **options):
        asked.update(options, dataset=path)
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(hub="someone/corpus", subset="en", split="test") == ["one", "two"]
    assert asked == {"dataset": "someone/corpus", "name": "en", "split": "test", "streaming": True}

    def offline(path, **options):
        raise ConnectionError("Couldn't reach 'someone/corpus' on the Hub\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"^cannot read data set someone/corpus: Couldn't reach [^\n]*$"):
        read(hub="someone/corpus")


def test_documents_equal_up_to_white_space_and_blank_ones_are_left_out():
    texts = ["a b", "", " \n", "a  b\n", "c", "a b", "ab"]
    seen = set()
    assert [text for _, text in distinct(texts, seen)] == ["a b", "c", "ab"]
    assert [text for _, text in distinct(["c ", "d"], seen)] == ["d"]


def test_adding_documents_moves_none_between_the_splits():
    texts = [f"document {number}" for number in range(400)]
    few, many = split_of(texts[:300]), split_of(texts)
    assert all(many[text] == split for text, split in few.items())
    assert split_of(reversed(texts)) == many
    assert 50 < sum(split == "validation" for split in many.values()) < 110


def test_small_corpora_have_something_held_out():
    assert list(divide(distinct(["one\ntwo\nthree\nfour\n"], set()), 0.25)) == [
        ("train", "one\ntwo\nthree\n"),
        ("validation", "four\n"),
    ]
    assert list(split_of([f"d{number}" for number in range(5)], 1e-9).values()).count("validation") == 1
    assert set(split_of([f"d{number}" for number in range(5)], 0.0).values()) == {"train"}
    assert list(divide(distinct(["only"], set()), 0.0)) == [("train", "only")]
    assert list(divide([], 0.1)) == []


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"text": "*.txt"}, r"no file matches '.*/\*\.txt' \(in .*\)$"),
        ({"d/x.txt": b"x"}, {"text": "d"}, r"it is a folder, name its files: .*/d/\*\*/\*$"),
        ({"x.txt": b"ab\xff"}, {"text": "x.txt"}, r"x\.txt is not UTF-8 \(byte 2\); convert it"),
        (
            {"x.jsonl": b'{"text": oops}\n'},
            {"jsonl": "x.jsonl"},
            r"^cannot read jsonl file .*x\.jsonl: JSON parse",
        ),
        (
            {"x.jsonl": b'{"a": "b"}\n'},
            {"jsonl": "x.jsonl"},
            r"x\.jsonl has no field 'text'; set `field` to one of: a",
        ),
        ({"x.jsonl": b'{"text": 3}\n'}, {"jsonl": "x.jsonl"}, r"record 1: field 'text' is int, not a string"),
        ({"x.parquet": b"PAR"}, {"parquet": "x.parquet"}, r"^cannot read parquet file .*x\.parquet: [^\n]+$"),
    ],
)
def test_errors_name_the_file(tmp_path, files, options, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(**{kind: f"{tmp_path}/{location}" for kind, location in options.items()})


def test_unknown_package_says_how_to_get_it():
    with pytest.raises(ValueError, match="'no_such_package' is neither 'stdlib' nor an installed package; try `pip"):
        read(python="no_such_package")


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        (Source, {}, "exactly one of python, text, jsonl, parquet, hub; this one has none"),
        (Source, {"text": "a", "python": "stdlib"}, "this one has python and text"),
        (
            Source,
            {"text": "a", "field": "b"},
            "field means nothing for a text source; it belongs to",
        ),
        (Source, {"text": "a", "colour": 1}, "colour: Extra inputs"),
        (Source, {"text": "a", "weight": 0}, "weight: Input should be greater than 0"),
        (DataSpec, {"path": "p", "sources": []}, "data needs a path and at least one source, or a task"),
        (
            DataSpec,
            {"path": "p", "sources": [{"text": "a"}], "validation": 1},
            "validation: Input should be less than 1",
        ),
        (DataSpec, {"path": "p", "sources": [{"text": "a", "weight": 1}, {"text": "b"}]}, "give a weight to each"),
        (TokenizerSpec, {"path": "p", "model": "wordpiece"}, "model: Input should be 'bpe' or 'unigram'"),
    ],
)
def test_ill_specs_are_errors(spec, values, message):
    with pytest.raises(ValueError, match=message):
        validated(spec, **values)
