"""Tasks of lm-eval by name: where their data comes from, loading it with clear errors, and running them."""

from __future__ import annotations

import difflib
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farspan.lm.console import console

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

FILE_FORMATS = ("arrow", "csv", "json", "parquet", "text", "webdataset", "xml")  # dataset_path of local files
NOTHING = "nothing"
PROBE_SECONDS = 5
BOOTSTRAPS = 100  # of metrics whose standard error has no closed form


@dataclass(frozen=True)
class Found:
    """manager: lm-eval's index. names: of tasks, groups, tags, in order. downloads: of each single task, in words."""

    manager: TaskManager
    names: list[str]
    downloads: dict[str, str]


def find_tasks(patterns: list[str], include: Path | None = None) -> Found:
    """The tasks, groups and tags of lm-eval that `patterns` name (* stands for anything).

    include: a folder of task files, which is looked at first: lm-eval's own 14,000 take 15 s and are left alone where
    they are not needed. Raises ValueError in one line for a folder without tasks and for a name that is not there, with
    the nearest.
    """
    from lm_eval.tasks import TaskManager

    if not patterns:
        raise ValueError("--tasks names no task; give at least one, e.g. --tasks arc_easy")
    folder = None if include is None else str(include)
    manager = None
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not manager.all_tasks:
            raise ValueError(f"{folder} holds no task: no .yaml file with `task:` or `group:` could be read there")
    if manager is None or not _complete(manager, patterns):
        manager = TaskManager(include_path=folder)
    names = []
    for pattern in patterns:
        matches = manager.match_tasks([pattern])
        if not matches:
            close = difflib.get_close_matches(pattern, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`--include` adds a folder of tasks"
            raise ValueError(f"unknown task {pattern!r}; {hint}")
        names += [name for name in matches if name not in names]
    downloads, owners = {}, {}
    for name in names:
        for task, config in _tasks(manager, name):
            if owners.setdefault(task, name) != name:  # lm-eval refuses it too, after it has loaded everything
                raise ValueError(f"task {task} belongs to {owners[task]} and to {name}; ask for one of them")
            downloads[task] = _source(config)
    return Found(manager, names, downloads)


def load_tasks(found: Found) -> TaskDict:
    """The tasks with their data, which is downloaded unless it is cached.

    Raises ValueError in one line that names the data that cannot be had; the hub is asked once whether it is there.
    """
    online = all(source == NOTHING for source in found.downloads.values()) or _reach_hub()
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in found.names:
        try:
            some = found.manager.load([name])
        except (OSError, ValueError, ImportError) as error:  # some need packages of their own
            needed = ", ".join(f"{task} ({found.downloads[task]})" for task, _ in _tasks(found.manager, name))
            why = (
                ""
                if online or isinstance(error, ImportError)
                else "; the hub cannot be reached, and what is cached does not hold it"
            )
            raise ValueError(f"the data of {needed} cannot be loaded{why}: {error}") from error
        for kind, entries in some.items():
            loaded[kind] |= entries
    return loaded


def run_tasks(adapter: LM, tasks: TaskDict, limit: int | None = None) -> dict[str, Any]:
    """Results as JSON takes them: `rows` of task, metric, value, stderr, documents; `truncated` prompts; versions.

    What `lm_eval.simple_evaluate` does, with its seeds, without its report on the machine: that takes seconds, and
    writes git's complaints to the terminal.
    """
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results = lm_eval.evaluate(adapter, tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    counts = {name: samples["effective"] for name, samples in results["n-samples"].items()}
    rows = []
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                    "value": value,
                    "stderr": stderr if isinstance(stderr, int | float) else None,
                    "documents": counts.get(name),
                }
            )
    return {
        "lm_eval": lm_eval.__version__,
        "rows": rows,
        "truncated": adapter.truncated,
        "task_versions": results["versions"],
        "shots": results["n-shot"],
    }


def _complete(manager: TaskManager, patterns: list[str]) -> bool:
    """Whether the index has all that is asked for, and all that its groups consist of."""
    names = [manager.match_tasks([pattern]) for pattern in patterns]
    return all(names) and all(
        config is not None for some in names for name in some for _, config in _tasks(manager, name)
    )


def _tasks(manager: TaskManager, name: str, changes: dict[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, configuration) of the single tasks behind a name; a configuration that the index lacks is None."""
    entry = manager.task_index.get(name)
    changes = changes or {}
    if entry is None:
        yield name, changes if "dataset_path" in changes or "custom_dataset" in changes else None
    elif entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _tasks(manager, task, changes)
    elif entry.kind.name == "GROUP":
        yield from _members(manager, entry.cfg["task"], changes)
    else:
        yield name, {**entry.cfg, **changes}


def _members(manager: TaskManager, members: Any, changes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """`_tasks` of the members of a group, among which there may be groups that are defined in their place."""
    for member in members if isinstance(members, list) else []:
        own = member if isinstance(member, dict) else {"task": member}
        if isinstance(own.get("task"), list):
            shared = {key: value for key, value in own.items() if key not in ("task", "group")}
            yield from _members(manager, own["task"], {**changes, **shared})
        else:
            yield from _tasks(manager, own.get("task") or own.get("group", "a task without a name"), {**changes, **own})


def _source(config: dict[str, Any] | None) -> str:
    """What a task downloads, in words."""
    if config is None:
        return "what its group does not say"
    if function := config.get("custom_dataset"):
        return f"what its function {Path(str(function)).name} asks for"
    if "class" in config:
        return f"what its class {Path(str(config['class'])).name} asks for"
    path, name = config.get("dataset_path"), config.get("dataset_name")
    if path in FILE_FORMATS:
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        remote = [file for file in _flat(files) if "://" in file]
        return ", ".join(remote) if remote else NOTHING
    if path is None or Path(path).exists():
        return NOTHING
    return f"{path} ({name}) from the hub, unless cached" if name else f"{path} from the hub, unless cached"


def _flat(files: Any) -> list[str]:
    if isinstance(files, dict):
        return [file for value in files.values() for file in _flat(value)]
    return [str(file) for file in files] if isinstance(files, list) else [] if files is None else [str(files)]


def _reach_hub() -> bool:
    """Whether the hub answers; where it does not, no library asks it again, and what is cached is used.

    Without this every file of every data set is asked for five times, with pauses.
    """
    import datasets
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a friendly one
    except OSError:
        console.print(f"{constants.ENDPOINT} does not answer; going on with what is cached", style="yellow")
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False
    return True
