"""MODEL: what it may be, and what is said where it is nothing."""

import json
import os

import pytest
import torch

from farspan.lm.load import load, locate
from farspan.lm.train import checkpoint


def save_checkpoint(run, step):
    return checkpoint.save(
        run / "checkpoints",
        step,
        lambda path: (path / "weights").write_bytes(b"weights"),
        barrier=lambda: None,
        is_main=True,
        keep=3,
    )


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "x"
    (folder / "hf").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\n")
    return folder


def export(run, age):
    path = run / "hf" / "config.json"
    path.write_text("{}")
    made = path.stat().st_mtime - age
    os.utime(path, (made, made))


def test_a_run_is_its_export_or_a_newer_checkpoint(run, capsys):
    with pytest.raises(ValueError, match="neither a whole checkpoint nor an export"):
        locate(str(run))
    newest = save_checkpoint(run, 5)
    assert locate(str(run)) == newest and "step-5" in capsys.readouterr().out
    export(run, age=-60)
    assert locate(str(run)) == run / "hf" and capsys.readouterr().out == ""
    export(run, age=60)
    assert locate(str(run)) == newest


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, capsys):
    before, newest = save_checkpoint(run, 5), save_checkpoint(run, 6)
    (newest / "weights").write_bytes(b"short")
    assert locate(str(run)) == before
    assert "5 bytes instead of 7" in capsys.readouterr().out
    with pytest.raises(ValueError, match="5 bytes instead of 7"):
        load(str(newest))


@pytest.mark.parametrize("name", ["runs/missing", "/missing/model", "a/b/c", "../model"])
def test_a_missing_folder_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"there is no folder {name};"):
        locate(name)


def test_a_folder_without_a_model_says_what_one_looks_like(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model: .*config\.json"):
        locate(str(tmp_path))


def test_a_hub_name_that_the_hub_does_not_give(farspan, monkeypatch):
    from transformers import AutoModelForCausalLM

    def offline(*arguments, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    status, _, err = farspan("generate", "someone/model", "x")
    assert status == 2 and err.count("\n") == 1
    assert (
        "someone/model is neither a folder here nor a model that the hub gives: We couldn't connect to the hub" in err
    )


def test_an_exported_folder_loads(tiny_model):
    model, tokenizer = load(str(tiny_model), device="cpu")
    assert not model.training and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"
    assert load(str(tiny_model), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_damaged_configuration_is_one_line(tiny_model, tmp_path, farspan):
    folder = tmp_path / "model"
    folder.mkdir()
    configuration = json.loads((tiny_model / "config.json").read_text()) | {"hidden_sise": 32}
    (folder / "config.json").write_text(json.dumps(configuration))
    status, _, err = farspan("generate", folder, "x")
    assert status == 2 and "hidden_sise" in err.splitlines()[-1] and "hidden_size" in err.splitlines()[-1]


def test_a_checkpoint_gives_the_weights_that_the_run_exported(tiny_run, monkeypatch, farspan, tmp_path):
    monkeypatch.chdir(tiny_run)
    exported, _ = load("runs/tiny", device="cpu")
    last, tokenizer = load("runs/tiny/checkpoints/step-4", device="cpu")
    configurations = exported.config.to_dict(), last.config.to_dict()
    differing = {name for name in configurations[0] if configurations[0][name] != configurations[1].get(name)}
    assert differing <= {"_name_or_path", "dtype", "architectures"}  # what from_pretrained adds
    for (name, one), other in zip(exported.state_dict().items(), last.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert last.lm_head.weight is last.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer("def f(x):\n")["input_ids"], skip_special_tokens=True) == "def f(x):\n"

    status, _, err = farspan("export", "runs/tiny/checkpoints/step-2", tmp_path / "before")
    assert status == 0, err
    before, _ = load(str(tmp_path / "before"), device="cpu")
    assert not torch.equal(before.model.embed_tokens.weight, last.model.embed_tokens.weight)
