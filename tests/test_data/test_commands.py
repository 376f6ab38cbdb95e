"""`farspan data` and `farspan tokenizer` as a user types them."""

import pytest
from typer.testing import CliRunner

from farspan.cli import data, tokenizer
from farspan.lm.data.corpus import Corpus


def run(app, *arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def library(texts, tmp_path):
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_train_prepare_and_inspect(library, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    texts = library / "*.txt"
    printed = run(tokenizer.app, "train", "--text", texts, "--vocab-size", 512, "--output", library / "tokenizer")
    assert "bytes per token" in printed and "AutoTokenizer" in printed
    printed = run(data.app, "prepare", "--text", texts, "--output", library / "c", "--tokenizer", library / "tokenizer")
    corpus = Corpus(library / "c")
    assert "120 documents" in printed and "bytes per token" in printed
    printed = run(data.app, "inspect", library / "c")
    assert f"{len(corpus.tokens):,}" in printed and "quantiles: 5% " in printed and "# document" in printed
    assert "</s>" in printed and corpus.fingerprint[:12] in printed
    printed = run(data.app, "inspect", library / "c", "--row", 2, "--sequence-length", 300)
    assert "row 2: 300 tokens" in printed and "pieces, identifier" in printed


def test_options_that_do_not_fit_are_errors(library):
    texts = library / "*.txt"
    with pytest.raises(ValueError, match="name a recipe, or sources: --text"):
        run(data.app, "prepare", "--output", library / "c", "--vocab-size", 512)
    with pytest.raises(ValueError, match="name the folder to write: --output"):
        run(data.app, "prepare", "--text", texts, "--vocab-size", 512)
    with pytest.raises(ValueError, match=r"give either --tokenizer .*, or --vocab-size"):
        run(data.app, "prepare", "--text", texts, "--output", library / "c")
    with pytest.raises(ValueError, match=r"r\.yaml says what to prepare; leave out --text --output, or the recipe"):
        run(data.app, "prepare", "r.yaml", "--text", texts, "--output", library / "c")
    with pytest.raises(ValueError, match="vocab_size: Input should be greater than or equal to 264"):
        run(data.app, "prepare", "--text", texts, "--output", library / "c", "--vocab-size", 5)
    with pytest.raises(FileNotFoundError, match=r"no recipe at nothing\.yaml"):
        run(data.app, "prepare", "nothing.yaml")
    with pytest.raises(FileNotFoundError, match="no prepared corpus at"):
        run(data.app, "inspect", library / "nothing")


@pytest.mark.parametrize(("app", "command"), [(data.app, "prepare"), (data.app, "inspect"), (tokenizer.app, "train")])
def test_help_shows_an_example(app, command):
    assert f"farspan {'tokenizer' if app is tokenizer.app else 'data'} {command} " in run(app, command, "--help")
