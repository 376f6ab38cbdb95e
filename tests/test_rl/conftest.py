"""A tiny policy with its tokenizer, recipes on it, and runs of them in forked processes (imports are done once)."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

# Before the fork: what a run imports on its way.
IMPORTED = ("trl", "peft", "deepspeed", "datasets", "farspan.lm.rl.loop", "matplotlib.backends.backend_agg")
IMPORTED += ("matplotlib.figure", "transformers.generation", "accelerate", "farspan.lm.decoder", "trl.models.utils")
TASK = {"name": "arithmetic", "numbers": 2, "largest": 9, "operations": "+-", "held_out": 8}


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """A folder with a random decoder of 3 layers and its tokenizer."""
    from farspan import DecoderConfig, DecoderForCausalLM
    from farspan.lm.data.tokenizer import load_tokenizer, train_tokenizer
    from farspan.lm.rl.spec import TaskSpec
    from farspan.lm.rl.tasks import examples

    folder = tmp_path_factory.mktemp("policy")
    made = examples(TaskSpec(**TASK), "train", 0, 400)
    texts = [f"{one.prompt}{one.demonstration}\n" for one in made]
    tokenizer = load_tokenizer(train_tokenizer(texts, folder / "tokenizer", vocab_size=276))
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    DecoderForCausalLM(config).save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    return folder / "hf"


@pytest.fixture
def recipe(policy):
    """`recipe(credit={...}, ...)` -> an RLRecipe of 3 steps, two updates each, with these sections merged in."""
    from farspan.lm.rl.spec import RLRecipe

    def make(**changes):
        values = {
            "name": "tiny",
            "start": str(policy),
            "task": TASK,
            "rollout": {"prompts": 4, "group": 4, "tokens": 12},
            "update": {"minibatches": 2},
            "credit": {"strategy": "coupled", "waad_window": 3, "fai_horizon": [1, 5]},
            "optimizer": {"lr": 0.01},
            "train": {"steps": 3, "validate_every": None, "checkpoint_every": None, "keep_samples": 1},
            "evaluation": {"prompts": 4},
        }
        for section, content in changes.items():
            values[section] = {**values.get(section, {}), **content} if isinstance(content, dict) else content
        return RLRecipe.model_validate(values)

    return make


def digits(text, reference):
    """A dense reward: the share of digits in the response."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


@pytest.fixture
def run(tmp_path):
    """`run(recipe, ranks=1, faults=(), resume=False, name=..., reward=digits)` -> exit codes of forked processes.

    As in test_train: the command line's codes, or minus the signal that killed a process; messages are in `run.errors`.
    """
    for module in IMPORTED:
        importlib.import_module(module)

    def start(recipe, ranks=1, faults=(), resume=False, name="run", reward=digits):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        errors = context.SimpleQueue()
        arguments = (recipe, tmp_path, ranks, port, list(faults), resume, name, reward, errors)
        workers = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(100)
            if worker.is_alive():
                worker.kill()
                worker.join()
        start.errors = []
        while not errors.empty():
            start.errors.append(errors.get())
        return [worker.exitcode for worker in workers]

    return start


def _rank(rank, recipe, folder, ranks, port, planned, resume, name, reward, errors):
    log = open(folder / f"output-{name}-{rank}.txt", "a")  # noqa: SIM115 - as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.chdir(folder)
    if ranks > 1 or recipe.parallel.zero:
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in {**environment, "MASTER_PORT": port}.items()})
    code = 1
    try:
        from farspan.lm.rl.inputs import open_rl_inputs
        from farspan.lm.rl.loop import train_rl
        from farspan.lm.train import faults
        from farspan.lm.train.run import RunFolder
        from farspan.lm.train.stop import Stop

        faults.install(planned)
        inputs, target = open_rl_inputs(recipe), RunFolder(Path("runs"), name)
        if rank == 0:
            target.check(recipe, inputs, resume)
        train_rl(recipe, inputs, target, Stop(), ranks, reward)
        code = 0
    except SystemExit as left:
        code = left.code
    except Exception as error:
        errors.put(str(error))
        code = 2 if isinstance(error, ValueError | OSError) else 1
        sys.excepthook(*sys.exc_info())
    log.flush()
    os._exit(code)


@pytest.fixture
def records(tmp_path):
    """`records("run", "train")` -> the run's records of a kind, in order."""

    def read(name="run", kind="train"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    return read


@pytest.fixture
def weights(tmp_path):
    """`weights("run")` -> the tensors of a finished run's export, by name."""

    def read(name="run"):
        from safetensors.torch import load_file

        return load_file(tmp_path / "runs" / name / "hf" / "model.safetensors")

    return read


@pytest.fixture
def told(tmp_path):
    """`told("run")` -> what the main rank of a run said."""
    return lambda name="run": (tmp_path / "runs" / name / "logs" / "rank-0.log").read_text()
