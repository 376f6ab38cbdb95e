"""A tiny corpus, recipes on it, and runs of them in forked processes (imports cost seconds, and are done once)."""

import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import yaml

# Before the fork: what a run imports on its way.
IMPORTED = ("deepspeed", "farspan.lm.train.loop", "farspan.lm.decoder", "matplotlib.figure", "transformers.generation")
IMPORTED += ("matplotlib.backends.backend_agg", "deepspeed.runtime.zero.muon.muon_optimizer")
TEXT = Path(json.__file__).parent.parent / "email" / "*.py"  # 300 kB that every Python has


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of a package of the standard library, with its tokenizer of 512 entries in `tokenizer`."""
    from farspan.lm.data.prepare import prepare
    from farspan.lm.data.spec import DataSpec, TokenizerSpec

    folder = tmp_path_factory.mktemp("data") / "corpus"
    data = DataSpec(path=str(folder), sources=({"text": str(TEXT)},), validation=0.2)
    prepare(data, TokenizerSpec(path=str(folder / "tokenizer"), vocab_size=512), progress=False)
    return folder


@pytest.fixture
def recipe_file(corpus, tmp_path):
    """`recipe_file({"optimizer": {...}}, ...)` -> the path of a tiny recipe with these sections merged in."""

    def write(*changes, name="tiny"):
        values = {
            "tokenizer": {"path": str(corpus / "tokenizer")},
            "data": {"path": str(corpus), "sources": [{"text": str(TEXT)}], "validation": 0.2},
            "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            "optimizer": {"name": "adamw", "lr": 0.01},
            "batch": {"tokens": 256, "sequence_length": 64},
            "train": {"steps": 6, "log_every": 1, "checkpoint_every": 2, "validate_every": None, "sample_every": None},
            "evaluation": {"tokens": 256, "sample_tokens": 2},
        }
        for change in changes:
            for section, content in change.items():
                values[section] = {**values.get(section, {}), **content} if isinstance(content, dict) else content
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def run(tmp_path):
    """`run(recipe_file, ranks=1, faults=(), resume=False, name=...)` trains in forked processes -> their exit codes.

    A process ends with the command line's codes (0, 1, 2), or minus the signal that killed it; the messages of
    errors are in `run.errors`.
    """
    for module in IMPORTED:
        importlib.import_module(module)

    def start(recipe, ranks=1, faults=(), resume=False, name="run"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        errors = context.SimpleQueue()
        arguments = (recipe, tmp_path, ranks, port, list(faults), resume, name, errors)
        workers = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            if worker.is_alive():
                worker.kill()
                worker.join()
        start.errors = []
        while not errors.empty():
            start.errors.append(errors.get())
        return [worker.exitcode for worker in workers]

    return start


def _rank(rank, recipe, folder, ranks, port, planned, resume, name, errors):
    log = open(folder / f"output-{name}-{rank}.txt", "a")  # noqa: SIM115 - as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.chdir(folder)
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in environment.items()})
    code = 1
    try:
        from farspan.lm.recipe import load_recipe
        from farspan.lm.train import faults
        from farspan.lm.train.inputs import open_inputs
        from farspan.lm.train.loop import train
        from farspan.lm.train.run import RunFolder
        from farspan.lm.train.stop import Stop

        faults.install(planned)
        loaded = load_recipe(recipe)
        inputs = open_inputs(loaded)
        target = RunFolder(Path("runs"), name)
        if rank == 0:
            target.check(loaded, inputs, resume)
        train(loaded, inputs, target, Stop())
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
def command(monkeypatch, farspan, tmp_path):
    """`command("train", ...)` -> (exit status, output, error output) of the command line, here, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return farspan
