"""`farspan rl inspect`: what it says of a response, in a terminal and on a page."""

import re

import pytest
import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from farspan.cli.rl_inspect import credit_of
from farspan.cli.rl_inspect import inspect as command
from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import DecoderForCausalLM
from farspan.lm.rl.inspect import inspect, peaks, pieces
from farspan.lm.rl.inspect_views import layers_of, page, terminal
from farspan.lm.rl.statistics import attention_statistics

TEXT = 'if a < b:\n    print("ü & more")  # ' + "and so on, " * 12


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def policy(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return DecoderForCausalLM(
        DecoderConfig(**sizes, initializer_range=0.3, eos_token_id=1, pad_token_id=0, **options)
    ).eval()


@pytest.fixture
def saved(tmp_path, tokenizer):
    policy().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def look(tokenizer, *overrides):
    prompt, response = (tokenizer(text)["input_ids"] for text in ("a question ", TEXT))
    return inspect(policy(), tokenizer, prompt, response, credit_of(list(overrides)))


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_numbers_are_those_of_the_statistics(tokenizer):
    found = look(tokenizer, "waad_window=5")
    prompt, response = (tokenizer(text)["input_ids"] for text in ("a question ", TEXT))
    ids = torch.tensor([prompt + response])
    mask = (torch.arange(ids.shape[1]) >= len(prompt))[None]
    expected = attention_statistics(policy(), ids, torch.ones_like(ids), mask, window=5)
    assert found.waad == expected.waad[0, len(prompt) :].tolist()
    assert [x or 0.0 for x in found.fai] == expected.fai[0, len(prompt) :].tolist()
    assert all(x is None for x in found.fai[-10:]) and found.fai[-11] is not None
    assert len(found.tokens) == len(response) and "".join(found.tokens).count("and so on") == 12
    assert found.layers == [1, 2] and len(found.local_heads) == 2
    assert found.distance_of(found.local_heads) < found.distance_of(found.global_heads)
    assert found.gamma != [1.0] * len(response) and all(1 <= g <= 1.75 for g in found.gamma)
    share, chance = found.rhythm()
    assert 0 <= share <= 1 and 0 < chance < 1


@pytest.mark.parametrize("strategy", ["uniform", "random", "entropy", "local", "anchor"])
def test_every_strategy(tokenizer, strategy):
    found = look(tokenizer, f"strategy={strategy}")
    weighted = sum(g > 1 for g in found.gamma)
    assert weighted == 0 if strategy == "uniform" else weighted > 20
    assert any(found.preplan) == (strategy == "local") and any(found.anchor) == (strategy == "anchor")


def test_pieces_are_the_text_with_its_spaces(tokenizer):
    ids = tokenizer("a  b\n c")["input_ids"]
    assert pieces(tokenizer, ids) == ["a", " ", " ", "b", "\n", " ", "c"]
    assert "\N{REPLACEMENT CHARACTER}" in "".join(pieces(tokenizer, tokenizer("ü")["input_ids"]))


def test_peaks_are_local_maxima_among_the_highest():
    assert peaks([0, 5, 0, 3, 3, 0, 1, 0]) == [False, True, False, True, False, False, False, False]
    assert peaks([None, None]) == [False, False] and peaks([2.0, 1.0, None, 0.5])[0]


def test_the_page_shows_every_token_three_times(tokenizer):
    found = look(tokenizer)
    html = page(found, "a <title>")
    spans = re.findall(r'<span[^>]*title="token (\d+): WAAD', html)
    assert len(spans) == 3 * len(found.tokens)
    assert "a &lt;title&gt;" in html and "<title> " not in html and "&quot;" in html and "&amp;" in html
    assert html.count("<polyline") == 2 and "http" not in html
    for layer in layers_of(found):
        strengths = [layer.strength(index) for index in range(len(found.tokens))]
        assert min(strengths) == 0 and max(strengths) == 1


def test_the_terminal_view(tokenizer):
    console = Console(width=100, record=True, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(terminal(look(tokenizer)))
    shown = capture.get()
    assert "48;2;66;133;244" in shown and "48;2;245;124;0" in shown  # the full colours, as backgrounds
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    for word in ("WAAD peaks", "FAI peaks", "local heads", "strategy coupled", "by chance"):
        assert word in plain


def test_the_command(saved, tmp_path):
    done = run(
        saved, "a question", "strategy=anchor", "--tokens", 40, "--seed", 1, "--html", tmp_path / "new" / "page.html"
    )
    assert done.exit_code == 0, done.output
    assert "strategy anchor" in done.output and (tmp_path / "new" / "page.html").read_text().startswith(
        "<!doctype html>"
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]
    done = run(saved, "a question", "--response", TEXT)
    assert done.exit_code == 0 and f"{len(TEXT) + 1} tokens" in done.output


def test_errors_are_one_line(saved, tmp_path, tokenizer):
    for overrides, words in (
        (["strategy=best"], "strategy='best'"),
        (["stratgy=local"], "did you mean 'strategy'"),
        (["fai_horizon=[9,3]"], "ends before it begins"),
        (["waad_window=[1"], "not YAML"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            credit_of(overrides)
        assert "\n" not in str(error.value)
    assert "0 tokens" in str(run(saved, "a question", "--response", "").exception)
    memory = policy(mixer_pattern=[{"mixer": "titans", "variant": "memory"}])
    memory.save_pretrained(tmp_path / "memory")
    tokenizer.save_pretrained(tmp_path / "memory")
    error = run(tmp_path / "memory", "a question").exception
    assert isinstance(error, ValueError) and "titans (memory) layers has no attention statistics" in str(error)
