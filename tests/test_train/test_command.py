"""`farspan train`: mistakes are one line and exit code 2; several processes are one job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["optimizer.learning_rate=1"], "unknown key optimizer.learning_rate"),
        (["model.mixer_pattern=[softmx]"], "softmax"),
        (["model.num_attention_heads=3"], "is not divisible by"),
        (["data.path=absent"], "no prepared corpus at absent"),
        (["tokenizer.path=absent"], "tokenizer absent is neither a folder with a tokenizer nor a hub name"),
        (["--nproc", "3"], "use batch.tokens=192 or 384, or --nproc 1, 2 or 4"),
        (["--nproc", "0"], "--nproc 0 is not a number of processes"),
        (["model.vocab_size=100"], "model.vocab_size=100 is less than the"),
    ],
)
def test_mistakes_are_one_line(command, recipe_file, tmp_path, arguments, line):
    status, _, err = command("train", recipe_file(), *arguments)
    assert status == 2
    assert line in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_another_tokenizer_than_the_corpus(command, recipe_file, corpus, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for file in (corpus / "tokenizer").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    status, _, err = command("train", recipe_file(), f"tokenizer.path={other}")
    assert status == 2 and "does not match corpus" in err


def test_a_folder_that_is_in_the_way(command, recipe_file, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "notes.txt").touch()
    status, _, err = command("train", recipe_file())
    assert status == 2 and "exists and is not a run" in err


def test_runs_that_cannot_be_written(command, recipe_file, tmp_path):
    (tmp_path / "runs").write_text("a file, where the folder should be")
    status, _, err = command("train", recipe_file())
    assert status == 2 and "is not a folder that can be written to" in err


def test_dry_run_prints_the_plan_and_writes_nothing(command, recipe_file, tmp_path):
    status, out, _ = command("train", recipe_file(), "--dry-run")
    assert status == 0
    for part in ("hidden_size: 16", "parameters", "FLOPs per token", "optimizer", "gradient accumulation 1", "steps"):
        assert part in " ".join(out.split())  # whatever the width of the terminal
    assert not (tmp_path / "runs").exists()


def test_a_run_is_finished_refused_and_changed(run, command, recipe_file, tmp_path):
    recipe = recipe_file({"train": {"steps": 2}})
    assert run(recipe, name="tiny") == [0]
    status, _, err = command("train", recipe)
    assert status == 2 and "continue it with --resume, or choose another --name" in err
    before = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    status, out, _ = command("train", recipe, "--resume")
    assert status == 0 and "validation loss" in out
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before
    status, _, err = command("train", recipe, "--resume", "model.hidden_size=32")
    assert status == 2 and "was trained with model.hidden_size=16, this recipe has model.hidden_size=32" in err
    status, _, err = command("train", recipe, "--resume", "batch.tokens=512")
    assert status == 2 and "batch.tokens=256" in err
    assert command("train", recipe, "--resume", "train.log_every=7")[0] == 0


@pytest.mark.timeout(600)
def test_several_processes_are_one_job(recipe_file, records, tmp_path):
    """The console script with --nproc 2: a dead rank ends it with one line; --resume goes on; SIGTERM saves, exit 0."""

    def start(*arguments, faults=()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FARSPAN_FAULTS": json.dumps(list(faults))}
        script = Path(sys.executable).with_name("farspan")
        call = [
            script,
            "train",
            recipe_file({"train": {"steps": 400, "checkpoint_every": 20}}),
            "--nproc",
            "2",
            *arguments,
        ]
        return subprocess.Popen(call, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)

    job = start(faults=[{"point": "step", "step": 22, "do": "kill", "rank": 1}])
    _, err = job.communicate(timeout=200)
    assert job.returncode == 1
    lines = [line for line in err.splitlines() if line.startswith("failed:")]
    assert len(lines) == 1 and "rank 1 died of signal SIGKILL" in lines[0], err

    job = start("--resume", faults=[{"point": "step", "step": 30, "do": "hang", "seconds": 0.5}])
    deadline = time.monotonic() + 150  # two starts of three processes, on a machine that may be busy
    while len(records("tiny")) < 30 and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 0, err
    newest = max(
        int(path.name.removeprefix("step-")) for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()
    )
    assert newest == records("tiny")[-1]["step"] >= 30
    assert "loss" in (tmp_path / "runs" / "tiny" / "logs" / "rank-0.log").read_text()
