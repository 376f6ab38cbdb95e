"""generate, chat and export on a tiny model."""

import io
import sys

import pytest
import torch

from farspan.cli.chat import Conversation
from farspan.lm.load import load


@pytest.fixture
def model(tiny_model):
    return load(str(tiny_model), device="cpu")


def test_generate_prints_the_prompt_its_continuation_and_the_speed(farspan, tiny_model):
    status, out, err = farspan("generate", tiny_model, "def ", "--tokens", 8, "--greedy")
    assert status == 0 and out.startswith("def") and len(out) > len("def\n")
    assert "8 tokens, " in err and "tokens/s" in err
    assert farspan("generate", tiny_model, "def ", "--tokens", 8, "--temperature", 0)[1] == out


def test_seed_repeats_and_sampling_varies(farspan, tiny_model):
    def text(seed):
        return farspan("generate", tiny_model, "def ", "--tokens", 12, "--seed", seed)[1]

    assert text(1) == text(1) != text(2)


def test_beams(farspan, tiny_model):
    status, out, _ = farspan("generate", tiny_model, "def ", "--tokens", 6, "--beams", 3)
    assert status == 0 and out.startswith("def")
    status, _, err = farspan("generate", tiny_model, "def ", "--beams", 3, "--greedy")
    assert status == 2 and err == "error: --greedy and --beams 3 exclude each other; leave one out\n"


def test_an_empty_prompt_is_refused(farspan, tiny_model):
    status, _, err = farspan("generate", tiny_model, "")
    assert status == 2 and "no tokens" in err


def answers(model, tokenizer, turns, forget):
    conversation = Conversation(model, tokenizer)
    replies = []
    for turn in turns:
        if forget:
            conversation._cache = None
        replies.append(conversation.answer(turn, max_new_tokens=7, do_sample=False))
    return replies


def test_the_kept_state_answers_as_the_whole_conversation_does(model):
    turns = ["hello", "and then?", "why"]
    assert answers(*model, turns, forget=False) == answers(*model, turns, forget=True)


def test_later_turns_cost_only_their_own_tokens(model, monkeypatch):
    decoder, tokenizer = model
    conversation = Conversation(decoder, tokenizer)
    conversation.answer("a" * 200, max_new_tokens=4, do_sample=False)
    widths = []
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda *a, **k: widths.append(k["input_ids"].shape[1]) or forward(*a, **k))
    conversation.answer("b", max_new_tokens=4, do_sample=False)
    assert max(widths) < 40


def test_a_chat_template_is_used(model):
    decoder, tokenizer = model
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    conversation = Conversation(decoder, tokenizer)
    conversation.answer("hello", max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(conversation._ids).startswith("<user>hello<assistant>")
    conversation.answer("more", max_new_tokens=3, do_sample=False)
    assert "<user>more<assistant>" in tokenizer.decode(conversation._ids)


def test_chat_reads_lines_until_exit(farspan, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/reset\n/wrong\n\n/exit\nnever read\n"))
    status, out, _ = farspan("chat", tiny_model, "--tokens", 4)
    assert status == 0 and "no chat template" in out and "/wrong is not a command" in out
    assert sys.stdin.read() == "never read\n"


def test_chat_ends_with_its_input(farspan, tiny_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert farspan("chat", tiny_model)[0] == 0


def test_export_loads_with_transformers_and_gives_the_same_logits(farspan, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "exported"
    status, out, _ = farspan("export", tiny_model, target)
    assert status == 0 and "parameters" in out
    assert (target / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["exported"]
    ids = AutoTokenizer.from_pretrained(target)("def f(x):", return_tensors="pt")["input_ids"]
    before, after = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (tiny_model, target))
    assert torch.equal(before, after)

    status, _, err = farspan("export", tiny_model, target)
    assert status == 2 and "is not an empty folder" in err
