"""`farspan eval lm`: tasks of a folder run through lm-eval; what cannot run says why in one line."""

import json
import socket

import pytest

from farspan.eval import harness
from farspan.eval.adapter import decoder_lm
from farspan.lm.load import load

MAKE = """
import datasets

DOCS = [{"question": f"Which colour is thing {i}?", "answer": i % 2, "text": "red things " * (i + 1)} for i in range(5)]


def make(**_):
    return {"test": datasets.Dataset.from_list(DOCS)}
"""
CHOICE = """
task: own_choice
tag: own
dataset_path: ""
custom_dataset: !function make.make
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: ["red", "blue"]
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {version: 2}
"""
WRITE = """
task: own_write
tag: own
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/docs.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLL = """
task: own_roll
dataset_path: ""
custom_dataset: !function make.make
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
REMOTE = """
task: own_remote
dataset_path: somebody/nothing-like-it
dataset_name: small
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["red", "blue"]
doc_to_target: answer
"""
GROUP = """
group: own_group
task: [own_choice, own_roll]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "make.py").write_text(MAKE)
    docs = [{"question": f"What is {i}?", "text": "x"} for i in range(4)]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, text in {"choice": CHOICE, "write": WRITE, "roll": ROLL, "remote": REMOTE, "group": GROUP}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever looks a name up fails the test."""

    def refuse(*arguments, **_):
        pytest.fail(f"the network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_tasks_run_through_simple_evaluate(tiny_model, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    adapter = decoder_lm(*load(str(tiny_model), device="cpu"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = ["own_choice", "own_write", "own_roll"]
    results = lm_eval.simple_evaluate(adapter, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert 0 <= results["results"]["own_choice"]["acc,none"] <= 1
    assert results["results"]["own_roll"]["byte_perplexity,none"] > 1
    rows = harness.run_tasks(adapter, harness.load_tasks(harness.find_tasks(tasks, folder)))["rows"]
    assert len(rows) == 3 and all(
        row["value"] == results["results"][row["task"]][f"{row['metric']},none"] for row in rows
    )
    for sample in results["samples"]["own_choice"]:
        (context, _), _ = sample["arguments"]
        apart = [adapter.loglikelihood([ask((context, choice))], True)[0][0] for choice in (" red", " blue")]
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(apart, abs=1e-5)
        assert sample["acc"] == (apart.index(max(apart)) == sample["doc"]["answer"])
    for sample in results["samples"]["own_write"]:
        assert "e" not in sample["resps"][0][0]


def ask(arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def test_the_command_prints_a_table_and_writes_json(farspan, tiny_model, folder, tmp_path):
    options = ("--include", folder, "--output", tmp_path, "--limit", 3)
    status, out, err = farspan("eval", "lm", tiny_model, "--tasks", "own_write,own_group", *options)
    assert status == 0, err
    assert "own_choice downloads what its function make.make asks for" in out
    assert "own_write downloads nothing" in out
    written = json.loads((tmp_path / "lm-tiny.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in written["rows"]}
    choice = rows["own_choice", "acc"]
    assert choice["documents"] == 3 and 0 <= choice["value"] <= 1 and choice["stderr"] >= 0
    assert rows["own_group", "acc"]["value"] == choice["value"]
    assert ("own_write", "exact_match") in rows and ("own_roll", "byte_perplexity") in rows
    assert written["limit"] == 3 and written["truncated"] == 0 and written["task_versions"]["own_choice"] == 2
    assert str(folder) not in json.dumps(written["rows"])
    for task in ("own_choice", "own_write", "own_roll", "own_group"):
        assert any(task in line and "│" in line for line in out.splitlines())


def test_a_prompt_that_is_too_long_is_one_line_or_is_cut(farspan, tiny_model, folder, tmp_path):
    options = ("--tasks", "own_choice", "--include", folder, "--output", tmp_path, "--max-length", 10)
    status, _, err = farspan("eval", "lm", tiny_model, *options)
    assert status == 2 and "max_length is 10" in err.splitlines()[-1] and "error: " in err
    status, out, _ = farspan("eval", "lm", tiny_model, *options, "--truncate")
    assert status == 0 and "10 prompts were longer than 10 tokens and were cut" in out


def test_data_that_cannot_be_had_is_one_line(farspan, tiny_model, folder):
    """HF_HUB_OFFLINE is set for all tests."""
    status, out, err = farspan("eval", "lm", tiny_model, "--tasks", "own_remote", "--include", folder)
    assert "own_remote downloads somebody/nothing-like-it (small) from the hub, unless cached" in out
    assert status == 2 and err.count("\n") == 1
    assert "the data of own_remote (somebody/nothing-like-it (small) from the hub" in err and "cannot be reached" in err


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    import datasets
    from huggingface_hub import constants

    asked = []

    def fail(request, timeout):
        asked.append(request.full_url)
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert not harness._reach_hub() and not harness._reach_hub()
    assert asked == [constants.ENDPOINT] and datasets.config.HF_HUB_OFFLINE


@pytest.fixture
def without_defaults(monkeypatch):
    """lm-eval's own tasks take 15 s to index; here there are none."""
    from lm_eval.tasks import TaskManager

    class Small(TaskManager):
        def __init__(self, **options):
            super().__init__(**{**options, "include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Small)


@pytest.mark.usefixtures("without_defaults")
def test_an_unknown_task_names_the_nearest(farspan, tiny_model, folder):
    status, _, err = farspan("eval", "lm", tiny_model, "--tasks", "own_rol", "--include", folder)
    assert status == 2 and err.startswith("error: unknown task 'own_rol'; did you mean 'own_roll'")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("without_defaults")
def test_what_names_no_task_is_refused(farspan, tiny_model, tmp_path):
    status, _, err = farspan("eval", "lm", tiny_model, "--tasks", "x", "--include", tmp_path)
    assert status == 2 and "holds no task" in err
    status, _, err = farspan("eval", "lm", tiny_model, "--tasks", " , ")
    assert status == 2 and "--tasks names no task" in err


def test_patterns_and_groups_in_groups(folder, tmp_path):
    (tmp_path / "outer.yaml").write_text(
        "group: outer\ntask:\n"
        "  - {group: inner, task: [own_choice, {group: innermost, task: [{task: own_remote, dataset_name: large}]}]}\n"
        "  - {task: own_roll, dataset_path: json, dataset_kwargs: {data_files: 'https://there/x.json'}}\n"
    )
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="task own_choice belongs to own and to own_group; ask for one of them"):
        harness.find_tasks(["own", "own_group"], tmp_path)
    found = harness.find_tasks(["outer"], tmp_path)
    assert found.downloads["own_remote"] == "somebody/nothing-like-it (large) from the hub, unless cached"
    assert list(found.downloads) == ["own_choice", "own_remote", "own_roll"]
    assert harness.find_tasks(["own_r*"], tmp_path).names == ["own_remote", "own_roll"]


def test_a_model_without_a_tokenizer_is_one_line(farspan, tiny_model, folder, tmp_path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    status, _, err = farspan("eval", "lm", tmp_path, "--tasks", "own_choice", "--include", folder)
    assert status == 2 and "tokenizer" in err and err.count("\n") == 1
