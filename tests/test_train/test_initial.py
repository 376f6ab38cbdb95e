"""Runs that start from given weights: what is copied, what is new, what is frozen, and one line for each mistake."""

import json
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from farspan.lm import initial
from farspan.lm.config import DecoderConfig
from farspan.lm.load import checkpoint_weights
from farspan.lm.recipe import StartSpec, load_recipe
from farspan.lm.train.estimate import estimate

SIZES = {
    "vocab_size": 512,  # of the tokenizer in conftest.py
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # attention that matters: with small weights any mixer computes nearly the same
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LINEAR)
WINDOW = [{"mixer": "window", "window": 9}]


def given(config, folder, **options):
    """A random model of this configuration, saved in `folder`; norms and biases at random too."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder, **options)
    return model


def decoder(weights, trainable="all", **fields):
    """(decoder, the line about it), of the fields of the weights and these; unwritten memory is NaN."""
    config = DecoderConfig(**{**initial._fields(str(weights)), **fields})
    model = initial.unwritten(config, torch.float32)
    poison(model)
    initial.freeze(model, trainable)
    line = initial.fill(model, StartSpec(weights=str(weights), trainable=trainable))
    return model.eval(), line


@torch.no_grad()
def poison(model):
    for parameter in model.parameters():
        parameter.fill_(torch.nan)


def same_logits(model, other):
    ids = torch.randint(512, (2, 33))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=1e-5)


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    given(LLAMA, folder)
    return folder


# What is copied


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, head_dim=16, rope_parameters=YARN),
        MistralConfig(**SIZES, sliding_window=5),
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        Qwen3Config(**SIZES, head_dim=16),
    ],
    ids=["llama", "llama-tied-biased", "mistral-window", "qwen2-tied", "qwen2-window", "qwen3"],
)
def test_the_same_mixers_compute_the_same(config, tmp_path):
    peer = given(config, tmp_path)
    model, line = decoder(tmp_path)
    tensors = len(peer.state_dict()) - config.tie_word_embeddings
    assert line.startswith(f"started from {tmp_path}: {tensors} of {tensors} tensors")
    assert ("new: 2 (model.layers.0.mixer.projections.output.bias, " in line) == (config.model_type == "qwen2")
    same_logits(model, peer)


@pytest.mark.parametrize("form", ["parts", "torch", "torch parts", "hub"])
def test_forms_of_weights(form, tmp_path, monkeypatch):
    name = folder = tmp_path
    if form == "hub":  # as the hub's library keeps what it has downloaded
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        name, repository = "some/llama", tmp_path / "models--some--llama"
        folder = repository / "snapshots" / ("0" * 40)
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    peer = given(LLAMA, folder, **({"max_shard_size": "40kB"} if form == "parts" else {}))
    if form.startswith("torch"):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of transformers before 4.32
        (folder / "model.safetensors").unlink()
        parts = {"pytorch_model.bin": weights}
        if form == "torch parts":
            names = sorted(weights)
            parts = {"a.bin": {n: weights[n] for n in names[:5]}, "b.bin": {n: weights[n] for n in names[5:]}}
            index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in parts.items():
            torch.save(part, folder / file)
    model, line = decoder(name)
    assert line == f"started from {name}: 21 of 21 tensors"
    same_logits(model, peer)


def test_cca_takes_the_weights_of_attention(tmp_path):
    """Groups of one token are full attention: what is exchanged is the mixer, and nothing else."""
    peer = given(LLAMA, tmp_path)
    model, line = decoder(tmp_path, mixer_pattern=[{"mixer": "cca", "group": 1, "window": 4}])
    assert line == f"started from {tmp_path}: 21 of 21 tensors"
    same_logits(model, peer)


def test_tied_weights_may_be_untied(tmp_path):
    peer = given(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path)
    model, _ = decoder(tmp_path, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    same_logits(model, peer)


def test_new_parameters_of_mixers_begin_as_random_ones_do(tmp_path):
    given(LLAMA, tmp_path)
    model, line = decoder(tmp_path, mixer_pattern=["rat", "softmax"])
    new = [name for name, _ in model.named_parameters() if name.startswith("model.layers.0.mixer.")]
    assert f"17 of 21 tensors; new: {len(new)} ({new[0]}, {new[1]}" in line
    assert "left out: 4 (model.layers.0.mixer.projections." in line
    fresh = type(model)(model.config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if name in new:
            expected = fresh.get_parameter(name)
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.3, abs=1e-6), name
            assert parameter.mean().item() == pytest.approx(expected.mean().item(), abs=0.3), name


def test_keys_of_another_shape_are_new(tmp_path):
    given(LLAMA, tmp_path)
    model, line = decoder(tmp_path, num_key_value_heads=4)
    assert "17 of 21 tensors; new: 4 (model.layers.0.mixer.projections.key.weight, " in line
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_another_vocabulary_than_that_of_the_weights(tmp_path):
    given(LLAMA, tmp_path)
    with pytest.raises(ValueError, match=r"the vocabulary has 600 entries, but 512 in .*; use the tokenizer or"):
        decoder(tmp_path, vocab_size=600)


def test_bfloat16_is_the_given_weight_rounded(tmp_path):
    peer = given(LLAMA, tmp_path)
    model = initial.unwritten(DecoderConfig(**initial._fields(str(tmp_path))), torch.bfloat16)
    initial.fill(model, StartSpec(weights=str(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, peer.lm_head.weight.bfloat16())


# The recipe


@pytest.fixture
def start_file(recipe_file, tmp_path):
    """`start_file(weights, sections, ..., hidden_size=...)`: the tiny recipe, of whose model nothing else is said."""

    def write(weights, *sections, trainable="all", name="tiny", **model):
        path = recipe_file(*sections, name=name)
        values = yaml.safe_load(path.read_text())
        values["start"] = {"weights": str(weights), "trainable": trainable}
        values["model"] = model
        values["optimizer"]["lr"] = 1e-3
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_sizes_come_from_the_weights(start_file, llama):
    recipe = load_recipe(start_file(llama, mixer_pattern=WINDOW))
    config = recipe.decoder_config()
    for name, value in {**SIZES, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "mixer_pattern": WINDOW}.items():
        assert getattr(config, name) == value, name
    assert config.rope_parameters == LLAMA.rope_parameters
    assert config.mixers()[0][1].rope.frequencies[0] == 0.25  # scaled by 4
    assert load_recipe(start_file(llama)).decoder_config().mixer_pattern == ["softmax"]


def test_what_the_recipe_states_wins(start_file, llama):
    theta = {"rope_type": "default", "rope_theta": 500_000.0}
    config = load_recipe(start_file(llama, rope_parameters=theta, rms_norm_eps=1e-5)).decoder_config()
    assert (config.rope_parameters, config.rms_norm_eps) == (theta, 1e-5)


def test_positions_grow_unless_frequencies_depend_on_them(start_file, tmp_path):
    long = {"batch": {"tokens": 256, "sequence_length": 128}}
    for rope, expected in ((LINEAR, 128), ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 64)):
        given(LlamaConfig(**SIZES, rope_parameters=rope), tmp_path / "llama")
        assert load_recipe(start_file(tmp_path / "llama", long)).decoder_config().max_position_embeddings == expected


def test_a_recipe_that_states_all_asks_for_nothing(start_file, llama, tmp_path):
    """As the recipe.yaml of a run does, so that a run can be read without the weights it started from."""
    recipe = load_recipe(start_file(llama, trainable="qkv"))
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    shutil.rmtree(llama)
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    with pytest.raises(ValueError, match="there is no folder"):
        load_recipe(start_file(llama))


def test_the_plan_counts_what_is_trained(command, start_file, llama):
    recipe = start_file(llama, mixer_pattern=WINDOW, trainable="qkv")
    status, out, _ = command("train", recipe, "--dry-run")
    words = " ".join(out.split())
    assert status == 0 and f"weights of {llama}; 4.1k parameters are trained (start.trainable=qkv)" in words
    memory = [dict(estimate(load_recipe(recipe, [f"start.trainable={kind}"]), 1)) for kind in ("all", "qkvo", "qkv")]
    sums = [float(rows["memory of a device: optimizer"].split()[0]) for rows in memory]
    assert sums[0] > sums[1] > sums[2]
    assert len({rows["parameters"] for rows in memory}) == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["start.weights=absent/folder/x"], "there is no folder absent/folder/x"),
        (["start.weights=some/name"], "the configuration of some/name cannot be read"),
        (["start.weights=gpt2"], "gpt2 is a gpt2; start.weights takes farspan, llama, mistral, qwen2 or qwen3"),
        (["start.weights=biased"], "biased cannot be a decoder here: it has biases in its MLPs"),
        (["start.trainable=head"], "start.trainable='head': input should be 'all', 'qkv' or 'qkvo'"),
        (["start.weight=x"], "unknown key start.weight; the nearest valid key is start.weights"),
        (["start.weights=small"], "model.vocab_size=100 is less than the 512 entries of tokenizer"),
        (["start.weights=small"], "use the tokenizer of start.weights"),
        (["start.weights=small", "tokenizer.vocab_size=512"], "tokenizer.vocab_size=512, but small has 100 entries"),
        (["model.vocab_size=600"], "model.vocab_size=600, but llama has 512 entries"),
        (["start.weights=lettered"], "; use the model's tokenizer (tokenizer.path=lettered)"),
        (["start.weights=empty"], "empty holds no weights: none of model.safetensors, "),
        (["start.weights=torn"], "torn/model.safetensors is no file of safetensors"),
        (["start.weights=partial"], "partial lacks b.safetensors, which its model.safetensors.index.json names"),
        (["model.intermediate_size=64"], "mlp.gate.weight is [64, 32] in this recipe and [48, 32] in llama; leave"),
        (["model.num_hidden_layers=3"], "layers.2.mixer_norm.weight is [32] in this recipe and absent from llama"),
        (["model.tie_word_embeddings=true"], "tie_word_embeddings=true, but llama has an output table of its own"),
        (["model.mixer_pattern=[rat]", "start.trainable=qkv"], "start.trainable=qkv never trains it; use qkvo or all"),
    ],
)
def test_mistakes_are_one_line(command, start_file, llama, corpus, tmp_path, changes, line):
    weights = changes[0].partition("start.weights=")[2]
    kinds = {
        "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=512),
        "biased": LlamaConfig(**SIZES, mlp_bias=True),
        "small": LlamaConfig(**SIZES | {"vocab_size": 100}),
    }
    if weights in kinds:
        kinds[weights].save_pretrained(tmp_path / weights)
    elif weights in ("lettered", "empty", "torn", "partial"):
        shutil.copytree(llama, tmp_path / weights)
        file = tmp_path / weights / "model.safetensors"
        if weights == "lettered":  # the same size, another order
            tokenizer = json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())
            vocabulary = tokenizer["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            (tmp_path / weights / "tokenizer.json").write_text(json.dumps(tokenizer))
            shutil.copy(corpus / "tokenizer" / "tokenizer_config.json", tmp_path / weights)
        elif weights == "torn":
            file.write_bytes(file.read_bytes()[:100])
        else:
            file.unlink()
        if weights == "partial":
            index = {"weight_map": {"model.norm.weight": "b.safetensors"}}
            (tmp_path / weights / "model.safetensors.index.json").write_text(json.dumps(index))
    status, _, err = command("train", start_file("llama"), *changes)
    assert status == 2 and err.count("\n") == 1
    assert line in err
    assert not (tmp_path / "runs").exists()


# Runs


def exported(tmp_path, name="run"):
    return load_file(tmp_path / "runs" / name / "hf" / "model.safetensors")


def test_the_first_step_sees_the_given_model(run, start_file, llama, records, tmp_path):
    """With the same mixers it is the Llama that is trained; with others, one that learns."""
    assert run(start_file(llama, {"train": {"steps": 1}}, {"optimizer": {"lr": 1e-3}}), name="same") == [0]
    from farspan.lm.train.inputs import open_inputs

    recipe = load_recipe(start_file(llama))
    batch = open_inputs(recipe).loader(recipe).batch(0, 0, 1, 1)[0]
    peer = AutoModelForCausalLM.from_pretrained(llama)
    rows = zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True)
    ids, labels = batch.input_ids.flatten(), batch.shift_labels.flatten()
    with torch.no_grad():
        logits = torch.cat([peer(ids[None, first:last]).logits[0] for first, last in rows])
    assert records("same")[0]["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)
    assert run(start_file(llama, {"train": {"steps": 12}}, mixer_pattern=WINDOW), name="window") == [0]
    losses = [record["loss"] for record in records("window")]
    assert sum(losses[-3:]) < sum(losses[:3])
    log = (tmp_path / "runs" / "window" / "logs" / "rank-0.log").read_text()
    assert f"started from {llama}: 21 of 21 tensors" in log


@pytest.mark.parametrize(
    ("zero", "trainable", "precision", "ranks"),
    [
        (1, "qkv", "fp32", 1),
        (1, "qkvo", "bf16", 2),
        (2, "qkvo", "fp32", 2),
        (3, "qkv", "fp32", 2),
        (3, "all", "bf16", 2),
    ],
)
def test_frozen_stay_and_resume_is_exact(
    run, start_file, llama, records, tmp_path, monkeypatch, zero, trainable, precision, ranks
):
    """Killed and resumed against uninterrupted, with memory that nobody writes full of NaN, and with other weights in
    the folder by then: the checkpoint wins.
    """
    unwritten = initial.unwritten

    def poisoned(*arguments):
        model = unwritten(*arguments)
        poison(model)
        return model

    monkeypatch.setattr(initial, "unwritten", poisoned)
    parallel = {"zero": zero, "precision": precision, "checkpointing": True}
    recipe = start_file(llama, {"parallel": parallel}, mixer_pattern=WINDOW, trainable=trainable)
    assert run(recipe, ranks=ranks, name="whole") == [0] * ranks
    killed = [{"point": "after_backward", "step": 4, "do": "kill"}]
    assert run(recipe, ranks=ranks, faults=killed) == [-signal.SIGKILL] * ranks
    given_weights = load_file(llama / "model.safetensors")
    save_file(
        {name: 2 * weight for name, weight in given_weights.items()}, llama / "model.safetensors", {"format": "pt"}
    )
    assert run(recipe, ranks=ranks, resume=True) == [0] * ranks
    losses = [[record["loss"] for record in records(name)] for name in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and all(losses[0])

    resumed, whole = exported(tmp_path), exported(tmp_path, "whole")
    trained = 0
    for name, weight in given_weights.items():
        from farspan.lm.llama import renamed

        name = renamed(name)
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=1e-6)
        is_trained = trainable == "all" or (".mixer." in name and (trainable == "qkvo" or ".output." not in name))
        trained += is_trained * weight.numel()
        assert torch.equal(resumed[name], weight.to(resumed[name].dtype)) != is_trained, name
    files = tmp_path / "runs" / "run" / "checkpoints" / "step-6" / "deepspeed"
    states = [torch.load(file, weights_only=False) for file in files.glob("*optim_states.pt")]
    assert sum(moments(state["optimizer_state_dict"]) for state in states) in range(trained, trained + 64 * ranks)
    from_checkpoint = checkpoint_weights(files.parent)
    for name, weight in resumed.items():
        torch.testing.assert_close(from_checkpoint[name].to(weight.dtype), weight, rtol=0, atol=0)


def moments(state):
    """Entries of AdamW's first moments, wherever DeepSpeed keeps them."""
    if isinstance(state, dict):
        own = state.get("exp_avg")
        return (own.numel() if own is not None else 0) + sum(map(moments, state.values()))
    return sum(map(moments, state)) if isinstance(state, list | tuple) else 0


def test_a_checkpoint_of_bf16_at_zero_1_is_read(run, recipe_file, tmp_path):
    """Tied weights and all, from the shards of two ranks."""
    recipe = recipe_file({"parallel": {"precision": "bf16"}, "train": {"steps": 2}})
    assert run(recipe, ranks=2) == [0, 0]
    weights = checkpoint_weights(tmp_path / "runs" / "run" / "checkpoints" / "step-2")
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, weight in exported(tmp_path).items():
        torch.testing.assert_close(weights[name].bfloat16(), weight, rtol=0, atol=0)


def test_runs_and_checkpoints_are_weights(run, start_file, recipe_file, tmp_path):
    """A run of farspan's own, continued with other mixers: from its folder, its export, and a checkpoint."""
    assert run(recipe_file(), name="first") == [0]
    first = tmp_path / "runs" / "first"
    steps = {"train": {"steps": 1}, "optimizer": {"weight_decay": 0.0}}
    for index, weights in enumerate((first, first / "hf", first / "checkpoints" / "step-6")):
        recipe = start_file(weights, steps, mixer_pattern=WINDOW, trainable="qkv", name=f"next{index}")
        assert run(recipe, name=f"next{index}") == [0]
        for name, weight in exported(tmp_path, "first").items():
            frozen = ".mixer." not in name or ".output." in name
            assert torch.equal(exported(tmp_path, f"next{index}")[name], weight) == frozen, name


def test_all_ranks_hear_what_the_main_rank_found(run, start_file, llama, monkeypatch):
    """Weights that have changed since they were checked."""
    monkeypatch.setattr("farspan.lm.initial.check_start", lambda *arguments: None)
    assert run(start_file(llama, intermediate_size=64), ranks=2) == [2, 2]
    assert len(run.errors) == 2 and len(set(run.errors)) == 1
    assert "is [64, 32] in this recipe and [48, 32] in" in run.errors[0]


@pytest.mark.parametrize("zero", [1, 3])
def test_muon_leaves_frozen_weights_alone(run, start_file, llama, tmp_path, zero):
    muon = {"optimizer": {"name": "muon", "adam_lr": 1e-3}, "parallel": {"zero": zero}, "train": {"steps": 2}}
    assert run(start_file(llama, muon, trainable="qkvo")) == [0]
    for name, weight in decoder(llama)[0].state_dict().items():
        assert torch.equal(exported(tmp_path)[name], weight) == (".mixer." not in name), name
