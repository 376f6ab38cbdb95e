"""The tasks of the needle evaluation: what each one asks, in which haystack, by which protocol.

`task("needle_s1")` is generated and scored by text, `needle_s1_tf` by teacher forcing, `needle_s1_mc` (tasks with one
value) by choice among four values. The tasks resemble those of RULER (arXiv 2404.06654, table 2) in construction; their
wording and their data are their own.
"""

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

# Of wording, words, seeding and placement: documents of different versions are never averaged.
VERSION = 1

HAYSTACKS = ("noise", "prose", "needle", "file")
KINDS = ("word", "number", "uuid")
PROTOCOLS = ("gen", "tf", "mc")
FAMILIES = ("needle", "vt", "cwe", "fwe", "qa", "tok")
CHOICES = 4  # of a multiple-choice document: chance is 1/4


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    name: of the results, with the protocol's suffix
    family: who builds the documents: needle, vt (variable tracing), cwe (common words), fwe (frequent coded words),
        qa (questions on passages of a local file), tok (token ids without text)
    haystack: noise (five fixed short sentences a line), prose (sentences of a grammar, none twice), needle (each unit
        is a needle with another key and value), file (sentences of a local text)
    key, value: word (adjective-noun), number (7 digits), uuid
    n_keys, n_values, n_asked: keys inserted, values of each asked key, keys asked for
    gen_tokens: tokens kept free for the answer; None: as many as the references may take (`answer_tokens`)
    lengths: tokens of prompt and answer together
    depths: percent of the haystack before the first asked needle; (None,) where depth has no meaning
    samples: documents per (length, depth)
    protocol: gen (text), tf (teacher forced), mc (multiple choice)
    metric: all (share of the references found), part (1 where any is found)
    file: local text of a `file` haystack, or JSON lines of qa

    Raises ValueError for values that do not go together.
    """

    name: str
    family: str = "needle"
    haystack: str = "prose"
    key: str = "word"
    value: str = "number"
    n_keys: int = 1
    n_values: int = 1
    n_asked: int = 1
    gen_tokens: int | None = None
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    depths: tuple[float | None, ...] = tuple(float(d) for d in range(0, 101, 10))
    samples: int = 5
    protocol: str = "gen"
    metric: str = "all"
    seed: int = 0
    file: str | Path | None = None

    def __post_init__(self) -> None:
        allowed = {"family": FAMILIES, "haystack": HAYSTACKS, "key": KINDS, "value": KINDS, "protocol": PROTOCOLS}
        for name, values in (allowed | {"metric": ("all", "part")}).items():
            if getattr(self, name) not in values:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)!r} is not one of {', '.join(values)}")
        for name in ("n_keys", "n_values", "n_asked", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name}={getattr(self, name)} must be at least 1")
        if self.n_keys < self.n_asked:
            raise ValueError(
                f"{self.name}: n_asked={self.n_asked} keys cannot be asked for when n_keys={self.n_keys} are inserted"
            )
        if not self.lengths or not self.depths:
            raise ValueError(f"{self.name}: lengths and depths need at least one value each")
        for depth in self.depths:
            if (depth is None) != (not self.has_depth):
                expected = "a number of percent" if self.has_depth else "None, this task has no needle"
                raise ValueError(f"{self.name}: depth {depth} must be {expected}")
            if depth is not None and not 0 <= depth <= 100:
                raise ValueError(f"{self.name}: depth {depth} is not between 0 and 100 percent")
        if self.protocol == "mc" and not self.has_choices:
            raise ValueError(f"{self.name}: protocol mc needs a task with one value; use gen or tf")

        if self.protocol == "mc" and self.haystack != "needle" and self.n_keys < CHOICES:
            raise ValueError(f"{self.name}: protocol mc needs n_keys={CHOICES} or more, not {self.n_keys}")
        if self.family == "vt" and self.haystack not in ("noise", "prose"):
            raise ValueError(f"{self.name}: haystack={self.haystack!r} does not suit vt; use noise or prose")

    @property
    def has_depth(self) -> bool:
        return self.family not in ("cwe", "fwe")

    @property
    def has_choices(self) -> bool:
        return self.family in ("needle", "tok") and self.n_values == self.n_asked == 1

    @property
    def needs_file(self) -> bool:
        """Whether it cannot be built before `file` is given."""
        return self.file is None and (self.family == "qa" or self.haystack == "file")

    @property
    def seed_name(self) -> str:
        """The task in the seed: generation and teacher forcing get the same documents."""
        return self.name.removesuffix("_tf")


_NO_DEPTH: dict[str, Any] = {"depths": (None,)}
_SHIPPED = {
    spec.name: spec
    for spec in (
        TaskSpec("needle_s1", haystack="noise"),
        TaskSpec("needle_s2"),
        TaskSpec("needle_s3", value="uuid"),
        TaskSpec("needle_mk1", n_keys=4),
        TaskSpec("needle_mk2", haystack="needle"),
        TaskSpec("needle_mk3", haystack="needle", key="uuid", value="uuid"),
        TaskSpec("needle_mv", n_values=4),
        TaskSpec("needle_mq", n_keys=4, n_asked=4),
        TaskSpec("needle_vt", family="vt", haystack="noise"),
        TaskSpec("needle_cwe", family="cwe", **_NO_DEPTH),
        TaskSpec("needle_fwe", family="fwe", **_NO_DEPTH),
        TaskSpec("needle_qa", family="qa", metric="part"),
        TaskSpec("needle_tok", family="tok"),
    )
}
GROUPS = {
    "needle_core": ("needle_s1", "needle_s2", "needle_mk2", "needle_mq"),
    "needle_all": tuple(_SHIPPED),
}


def task_names() -> list[str]:
    """Every name that `task` takes, groups left out."""
    return [name + suffix for name, spec in _SHIPPED.items() for suffix in _suffixes(spec)]


def task(name: str, **changes: Any) -> TaskSpec:
    """The shipped task of this name, with `changes` to its fields.

    A multiple-choice task in prose or noise gets four needles, because its three wrong choices have to occur in the
    context. Depths are not changed where depth has no meaning.
    Raises ValueError, naming the nearest names, for one that is not shipped.
    """
    if name not in task_names():
        raise ValueError(_unknown(name))
    base, suffix = _parted(name)
    protocol = suffix[1:]
    spec = _SHIPPED[base]
    unknown = sorted(set(changes) - {field.name for field in fields(TaskSpec)})
    if unknown:
        raise ValueError(f"a task has no field {unknown[0]!r}; it has {', '.join(f.name for f in fields(TaskSpec))}")
    if not spec.has_depth:
        changes.pop("depths", None)
    if protocol == "mc" and spec.haystack != "needle":
        changes = {"n_keys": max(spec.n_keys, CHOICES), **changes}
    return replace(spec, **{"name": name, "protocol": protocol or "gen", **changes})


def tasks(names: list[str], **changes: Any) -> list[TaskSpec]:
    """The tasks of names and groups (`needle_core`, `needle_all`, also with suffix _tf or _mc), each once.

    A group with a suffix leaves out the tasks that lack it. Raises ValueError as `task`.
    """
    found: dict[str, TaskSpec] = {}
    for name in names:
        group, suffix = _parted(name)
        members = [m + suffix for m in GROUPS[group] if suffix in _suffixes(_SHIPPED[m])] if group in GROUPS else [name]
        found |= {member: task(member, **changes) for member in members}
    return list(found.values())


def _parted(name: str) -> tuple[str, str]:
    """A name without its protocol's suffix, and the suffix ("" for generation)."""
    return next((name.removesuffix(end), end) for end in ("_tf", "_mc", "") if name.endswith(end))


def _suffixes(spec: TaskSpec) -> tuple[str, ...]:
    return ("", "_tf", "_mc") if spec.has_choices else ("", "_tf")


def _unknown(name: str) -> str:
    known = [*task_names(), *GROUPS]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or [*_SHIPPED, *GROUPS]
    return f"unknown needle task {name!r}; the nearest names are {', '.join(close)}"
