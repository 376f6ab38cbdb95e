"""The needle evaluation of a model: scores of a plain loop, cells that are kept, and what cannot be asked."""

import json
from dataclasses import replace

import pytest
import torch

from farspan import DecoderConfig, DecoderForCausalLM
from farspan.eval.adapter import decoder_lm
from farspan.eval.needle.cells import read_csv
from farspan.eval.needle.generate import documents
from farspan.eval.needle.run import count, evaluate
from farspan.eval.needle.score import score_generation, target
from farspan.eval.needle.tasks import task


def decoder(vocabulary):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixer_pattern=[{"mixer": "rat", "chunk": 4}, {"mixer": "window", "window": 9}],
        initializer_range=0.3,
        eos_token_id=None,
    )
    return DecoderForCausalLM(config).eval()


@pytest.fixture
def bpe(tokenizers):
    return tokenizers["bpe"]


def small(name, **changes):
    return task(name, **{"lengths": (256,), "depths": (0.0, 100.0), "samples": 3, **changes})


def test_generation_equals_a_plain_loop(bpe, tmp_path):
    """Sample by sample what `generate` gives for the same prompts, one at a time."""
    model, spec = decoder(len(bpe)), small("needle_s1")
    evaluate(model, bpe, [spec], tmp_path, "tiny")
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    adapter = decoder_lm(model, bpe)
    expected = []
    for depth in spec.depths:
        cell = list(documents(spec, bpe, 256, depth))
        most = max(document["gen_tokens"] for document in cell)
        for document in cell:
            ids = adapter.tok_encode(document["input"] + document["gen_prefix"])
            assert len(ids) == document["prompt_tokens"]
            prompt = torch.tensor([ids])
            tokens = model.generate(prompt, max_new_tokens=most, do_sample=False)[0, len(ids) :]
            text = bpe.decode(tokens).split("\n")[0]
            expected.append((text, score_generation(document, text)["recall"]))
    assert [(sample["prediction"], sample["recall"]) for sample in found] == expected


def test_teacher_forcing_equals_one_forward(bpe, tmp_path):
    model, spec = decoder(len(bpe)), small("needle_s2_tf")
    evaluate(model, bpe, [spec], tmp_path, "tiny")
    found = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    adapter = decoder_lm(model, bpe)
    cells = [document for depth in spec.depths for document in documents(spec, bpe, 256, depth)]
    for document, sample in zip(cells, found, strict=True):
        prompt = document["input"] + document["gen_prefix"]
        whole, start = adapter.tok_encode(prompt + target(document)), len(adapter.tok_encode(prompt))
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)[start - 1 : -1]
        answer = torch.tensor(whole[start:])
        assert sample["nll"] == pytest.approx(-float(log_p.gather(1, answer[:, None]).mean()), abs=1e-4)
        assert sample["tf_exact"] == float((log_p.argmax(-1) == answer).all())


def test_choices_and_ids(bpe, tmp_path):
    specs = [
        small("needle_mk2_mc", samples=2),
        small("needle_tok", lengths=(40,)),
        small("needle_tok_tf", lengths=(40,)),
    ]
    specs += [small("needle_tok_mc", lengths=(40,))]
    result = evaluate(decoder(max(64, len(bpe))), bpe, specs, tmp_path, "tiny")
    assert list(result["tasks"]) == ["needle_mk2_mc mc", "needle_tok gen", "needle_tok_tf tf", "needle_tok_mc mc"]
    means = [result["tasks"][name]["mean"] for name in ("needle_tok gen", "needle_tok_tf tf")]
    assert means[0] == means[1]  # one token: to generate it and to force it are the same


def test_finished_cells_are_kept(bpe, tmp_path, monkeypatch):
    """A second evaluation with one more length asks for that alone; the files equal those of one evaluation."""
    from farspan.eval.needle import run

    asked, measure = [], run._measure
    monkeypatch.setattr(
        run, "_measure", lambda spec, length, *rest: asked.append(length) or measure(spec, length, *rest)
    )
    model, first = decoder(len(bpe)), small("needle_s1_tf")
    both = replace(first, lengths=(256, 320))
    evaluate(model, bpe, [first], tmp_path / "a", "tiny")
    assert asked == [256, 256]
    evaluate(model, bpe, [both], tmp_path / "a", "tiny")
    assert asked == [256, 256, 320, 320] and count([both]) == 4
    evaluate(model, bpe, [both], tmp_path / "b", "tiny")
    for name in ("samples.jsonl", "cells.csv", "heatmap_needle_s1_tf.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_length_that_holds_nothing_is_no_score(bpe, tmp_path):
    result = evaluate(decoder(len(bpe)), bpe, [small("needle_s1_tf", lengths=(20, 256))], tmp_path, "tiny")
    missing = result["tasks"]["needle_s1_tf tf"]["not_available"]
    assert [(cell["length"], cell["depth"]) for cell in missing] == [(20, 0.0), (20, 100.0)]
    assert [cell.n for cell in read_csv(tmp_path / "cells.csv")] == [0, 0, 3, 3]


def test_a_model_without_tokenizer_takes_ids_alone(tmp_path):
    model = decoder(64)
    with pytest.raises(ValueError, match="no tokenizer, so it can only take needle_tok; leave out needle_s1"):
        evaluate(model, None, [small("needle_s1"), small("needle_tok")], tmp_path, "tiny")
    result = evaluate(model, None, [small("needle_tok", lengths=(40,))], tmp_path, "tiny")
    assert 0 <= result["tasks"]["needle_tok gen"]["mean"] <= 1
