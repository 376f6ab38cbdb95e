"""The needle evaluation of one model: cell by cell through lm-eval, each finished cell kept, then tables and heat maps.

A cell is one (task, protocol, length, depth). Its samples are written in one rename under the hash of all that they
depend on, so an evaluation that is killed or extended goes on with the cells that it lacks. Text goes through the
adapter and `lm_eval.simple_evaluate`; documents of token ids (needle_tok), which have no text, straight to the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from farspan.eval.needle.cells import Cell, cells, summary, write_csv
from farspan.eval.needle.generate import documents
from farspan.eval.needle.haystack import LengthTooSmall
from farspan.eval.needle.heatmap import write_heatmap
from farspan.eval.needle.score import score_choice, score_forced, score_generation, score_token, target
from farspan.eval.needle.tasks import TaskSpec
from farspan.eval.report import renamed, write_json

Sample = dict[str, Any]


def evaluate(
    model: Any,
    tokenizer: Any,
    specs: Sequence[TaskSpec],
    folder: Path,
    name: str,
    batch_tokens: int = 16_384,
    progress: Callable[[str], None] = lambda _: None,
    trained: int | None = None,
) -> dict[str, Any]:
    """Evaluates every cell that `folder` does not hold yet, and writes what all of them say.

    tokenizer: None for a model of token ids, which takes only needle_tok. name: of the model, in titles and in the key
    of a cell. progress: called with a line of text before each cell. trained: tokens, marked in the heat maps; None for
    the model's max_position_embeddings.

    Writes samples.jsonl, cells.csv, summary.json, and for each task a heat map (.png, .svg, .csv). Returns the summary.
    Raises ValueError, one line, for a task that the model cannot take; cells that were finished are kept.
    """
    from farspan.eval.adapter import decoder_lm
    from farspan.eval.inference import Inference

    if tokenizer is None and (text := [spec.name for spec in specs if spec.family != "tok"]):
        raise ValueError(f"{name} has no tokenizer, so it can only take needle_tok; leave out {', '.join(text)}")
    longest = max(length for spec in specs for length in spec.lengths)  # beyond the trained length too: that is asked
    adapter = None if tokenizer is None else decoder_lm(model, tokenizer, longest, batch_tokens)
    inference = Inference(model, batch_tokens, prefill_chunk=8192)
    identity = {"model": name, "tokenizer": None if tokenizer is None else _fingerprint(tokenizer)}
    found: list[tuple[Cell | None, list[Sample]]] = []
    for spec, length, depth in _cells_of(specs):
        where = "" if depth is None else f" at {depth:g} %"
        progress(f"{spec.name}: {length:,} tokens{where}")
        path = folder / "cells" / f"{_key(spec, length, depth, identity)}.json"
        if not path.is_file():
            samples = _measure(spec, length, depth, tokenizer, adapter, inference)
            path.parent.mkdir(parents=True, exist_ok=True)
            with renamed(path) as aside:
                aside.write_text(json.dumps(samples) + "\n")
        samples = json.loads(path.read_text())
        found.append((None if samples else Cell(spec.name, spec.protocol, length, depth), samples))
    return _write(folder, name, model, found, trained, identity)


def _cells_of(specs: Sequence[TaskSpec]) -> list[tuple[TaskSpec, int, float | None]]:
    return [(spec, length, depth) for spec in specs for length in spec.lengths for depth in spec.depths]


def count(specs: Sequence[TaskSpec]) -> int:
    """Cells of the tasks: how often `evaluate` calls its progress."""
    return len(_cells_of(specs))


def _measure(spec: TaskSpec, length: int, depth: float | None, tokenizer, adapter, inference) -> list[Sample]:
    """The samples of a cell; none where the length cannot hold the task."""
    try:
        asked = list(documents(spec, tokenizer, length, depth))
    except LengthTooSmall:
        return []
    answered = _ask_ids(spec, asked, inference) if spec.family == "tok" else _ask_text(spec, asked, adapter, tokenizer)
    kept = ("ids", "input")
    return [
        {name: value for name, value in document.items() if name not in kept}
        | {"input_hash": _hash(document.get("input", document.get("ids")))}
        | scores
        for document, scores in zip(asked, answered, strict=True)
    ]


def _ask_ids(spec: TaskSpec, asked: list[Sample], inference: Any) -> list[dict[str, Any]]:
    """Scores of documents of ids: the answer is one token, so generating it and forcing it are the same."""
    if spec.protocol == "mc":
        requests = [(document["ids"], [choice]) for document in asked for choice in document["choices"]]
        scores = iter(inference.score(requests))
        return [score_choice(document, [next(scores)[0] for _ in document["choices"]]) for document in asked]
    if spec.protocol == "tf":
        scores = inference.score([(document["ids"], [document["answer"]]) for document in asked])
        return [score_forced([log_prob], [right]) for log_prob, right in scores]
    rows = torch.tensor([document["ids"] for document in asked], device=inference.model.device)
    at_once = max(1, inference.batch_tokens // rows.shape[1])
    with torch.no_grad():
        logits = [inference.model(part, use_cache=False).logits[:, -1] for part in rows.split(at_once)]
    return [score_token(document, int(i)) for document, i in zip(asked, torch.cat(logits).argmax(-1), strict=True)]


def _ask_text(spec: TaskSpec, asked: list[Sample], adapter: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Scores of documents of text, through lm-eval."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    kinds = {"gen": "generate_until", "tf": "loglikelihood", "mc": "multiple_choice"}
    answered: dict[int, dict[str, Any]] = {}

    def prompt(row: Sample) -> str:
        return asked[row["index"]]["input"] + asked[row["index"]]["gen_prefix"]

    def scored(row: Sample, results: list[Any]) -> dict[str, float]:
        document = asked[row["index"]]
        if spec.protocol == "gen":
            text = results[0]
            scores = score_generation(document, text, tokenizer(text, add_special_tokens=False)["input_ids"])
            answered[row["index"]] = {**scores, "prediction": text}
        elif spec.protocol == "mc":
            answered[row["index"]] = scores = score_choice(document, [log_prob for log_prob, _ in results])
        else:
            (log_prob, right) = results[0]
            lengths = [len(adapter.tok_encode(text)) for text in (prompt(row) + target(document), prompt(row))]
            scores = {"tf_exact": float(right), "nll": -log_prob / max(1, lengths[0] - lengths[1])}
            answered[row["index"]] = scores
        return {name: float(value) for name, value in scores.items()}

    metrics = {"gen": ("recall", "exact", "wrong_value", "empty", "looped"), "tf": ("tf_exact", "nll"), "mc": ("acc",)}
    config = {
        "task": spec.name,
        "dataset_path": "",
        "dataset_name": "",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"index": i} for i in range(len(asked))])},
        "test_split": "test",
        "output_type": kinds[spec.protocol],
        "doc_to_text": prompt,
        "doc_to_target": lambda row: target(asked[row["index"]]),
        "target_delimiter": "",
        "process_results": scored,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics[spec.protocol]],
        "metadata": {"version": asked[0]["version"]},
    }
    if spec.protocol == "gen":
        most = max(document["gen_tokens"] for document in asked)
        config["generation_kwargs"] = {"do_sample": False, "max_gen_toks": most, "until": ["\n"]}
    if spec.protocol == "mc":
        config["doc_to_choice"] = lambda row: [f" {choice}" for choice in asked[row["index"]]["choices"]]
        config["doc_to_target"] = lambda row: asked[row["index"]]["gold"]
    manager = TaskManager(include_defaults=False)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each of hundreds of cells
        lm_eval.simple_evaluate(
            model=adapter, tasks=[config], task_manager=manager, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
        )
    return [answered[index] for index in range(len(asked))]


def _write(folder: Path, name: str, model: Any, found, trained: int | None, identity: dict) -> dict[str, Any]:
    samples = [sample for _, own in found for sample in own]
    measured = {(cell.task, cell.protocol, cell.length, cell.depth): cell for cell in cells(samples)}
    every = []
    for missing, own in found:
        first = own[0] if own else None
        key = first and (first["task"], first["protocol"], first["max_length"], first["depth"])
        every.append(missing if missing is not None else measured[key])
    with renamed(folder / "samples.jsonl") as aside:
        aside.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    write_csv(folder / "cells.csv", every)
    trained = trained or getattr(model.config, "max_position_embeddings", None)
    for task, protocol in dict.fromkeys((cell.task, cell.protocol) for cell in every):
        group = [cell for cell in every if (cell.task, cell.protocol) == (task, protocol)]
        if any(cell.depth is not None for cell in group) and any(cell.n for cell in group):
            write_heatmap(folder, f"heatmap_{task}", group, model=name, trained=trained)
    result = {**identity, "trained_length": trained, "tasks": summary(every)}
    write_json(folder / "summary.json", result)
    return result


def _key(spec: TaskSpec, length: int, depth: float | None, identity: dict[str, Any]) -> str:
    """Of all that a cell's samples depend on: not on the task's other lengths and depths."""
    own = {name: value for name, value in asdict(spec).items() if name not in ("lengths", "depths")}
    return f"{spec.name}-{length}-{'all' if depth is None else f'{depth:g}'}-{_hash([own, length, depth, identity])}"


def _fingerprint(tokenizer: Any) -> str:
    return _hash(sorted(tokenizer.get_vocab().items()))


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).hexdigest()
