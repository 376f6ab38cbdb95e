"""A tiny model and a tiny run on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """An exported folder: a decoder of two layers with random weights, and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from farspan.lm.config import DecoderConfig
    from farspan.lm.decoder import DecoderForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DecoderForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of four steps with checkpoints at 2 and 4, made by the command itself; its working folder."""
    folder = tmp_path_factory.mktemp("work")
    library = Path(os.__file__).parent
    for name in ("ast", "bisect", "calendar", "copy", "csv", "glob", "heapq"):
        (folder / f"{name}.txt").write_bytes((library / f"{name}.py").read_bytes())
    (folder / "recipe.yaml").write_text(
        """
        name: tiny
        tokenizer: {path: corpora/tokenizer, vocab_size: 512}
        data: {path: corpora/text, sources: [{text: "*.txt"}], validation: 0.3}
        model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}
        optimizer: {name: muon, lr: 0.02}
        batch: {tokens: 256, sequence_length: 64}
        train: {steps: 4, checkpoint_every: 2}
        evaluation: {tokens: 128, sample_tokens: 4}
        """
    )
    program = Path(sys.executable).with_name("farspan")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in ("data prepare recipe.yaml", "train recipe.yaml"):
        done = subprocess.run([program, *command.split()], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder
