"""Documents from Python source, text, JSONL, Parquet and the hub, without duplicates, divided into the two splits."""

import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from farspan.lm.data.demonstrations import Demonstration, question_and_answer
from farspan.lm.data.spec import Source

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
_HEAD = 100  # documents looked at before the first is passed on, to make sure that some are held out


def documents(source: Source) -> Iterator[str]:
    """Texts of a source, in an order that depends on the names of its files (or its records) alone.

    Raises FileNotFoundError where no file matches, ValueError for an unknown package, text that is not UTF-8, a damaged
    file, a missing field, or a hub that does not answer.
    """
    readers = {"python": _python, "text": _text, "jsonl": _local_records, "parquet": _local_records, "hub": _hub}
    return islice(readers[source.kind](source), source.limit_documents)


def size_in_bytes(source: Source) -> int | None:
    """Bytes of text in a source, or None where that is not known without reading it."""
    if source.limit_documents is not None or source.kind not in ("python", "text"):
        return None
    files = _python_files(source.location) if source.kind == "python" else _matching_files(source.location)
    return sum(file.stat().st_size for file in files)


def distinct(texts: Iterable[str], seen: set[bytes]) -> Iterator[tuple[bytes, str]]:
    """(digest, text) of the texts that are not blank and, up to white space, not in `seen`, which is filled."""
    for text in texts:
        digest = hashlib.blake2b(" ".join(text.split()).encode("utf-8"), digest_size=16).digest()
        if digest not in seen and text and not text.isspace():
            seen.add(digest)
            yield digest, text


def divide(digested: Iterable[tuple[bytes, str]], validation: float) -> Iterator[tuple[str, str]]:
    """("train" or "validation", text). A document is held out by the hash of its content: adding others moves none.

    Two exceptions serve small corpora, as long as validation > 0. A single document is cut in two at a line end, its
    tail is held out. Where none of the first 100 would be held out, the one with the smallest hash is.
    """
    digested = iter(digested)
    head = list(islice(digested, _HEAD))
    if len(head) == 1 and validation > 0 and not isinstance(head[0][1], Demonstration):
        yield from _cut(head[0][1], validation)
        return
    limit = int(validation * 2**64)
    smallest = min((_position(digest) for digest, _ in head), default=0)
    for digest, text in chain(head, digested):
        position = _position(digest)
        held_out = validation > 0 and (position < limit or position == smallest)
        yield ("validation" if held_out else "train"), text


def _position(digest: bytes) -> int:
    return int.from_bytes(digest[:8])


def _cut(text: str, validation: float) -> Iterator[tuple[str, str]]:
    place = max(int(len(text) * (1 - validation)), 1)
    place = text.rfind("\n", 0, place) + 1 or place
    yield "train", text[:place]
    if text[place:]:
        yield "validation", text[place:]


def _python(source: Source) -> Iterator[str]:
    for file in _python_files(source.location):
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # tests of encodings, in the standard library
            continue


def _python_files(name: str) -> list[Path]:
    """The .py files of the standard library or of an installed package, ordered by their path within it."""
    roots = [Path(sysconfig.get_path("stdlib"))] if name == "stdlib" else _package_roots(name)
    found = []
    for root in roots:
        files = [root] if root.is_file() else _walk(root)
        found += [(file.relative_to(root.parent).as_posix(), file) for file in files]
    if not found:
        raise FileNotFoundError(f"python source {name!r} has no .py files in {', '.join(map(str, roots))}")
    return [file for _, file in sorted(found)]


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]  # not entered: they may be large
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _package_roots(name: str) -> list[Path]:
    """Folders or the module of a package, given its import name or the name it is installed by. Runs no code of it."""
    names = [name]
    try:
        files = importlib.metadata.files(name) or []
        names += sorted({file.parts[0].removesuffix(".py") for file in files if file.suffix == ".py"})
    except importlib.metadata.PackageNotFoundError:
        pass
    for candidate in names:
        spec = importlib.util.find_spec(candidate) if candidate.isidentifier() else None
        if spec is not None and spec.submodule_search_locations:
            return [Path(folder) for folder in spec.submodule_search_locations]
        if spec is not None and spec.has_location and spec.origin.endswith(".py"):
            return [Path(spec.origin)]
    raise ValueError(f"python source {name!r} is neither 'stdlib' nor an installed package; try `pip install {name}`")


def _text(source: Source) -> Iterator[str]:
    for file in _matching_files(source.location):
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 (byte {error.start:,}); convert it, e.g. with iconv") from None


def _matching_files(pattern: str) -> list[Path]:
    files = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [file for file in files if file.is_file()]
    if not files:
        hint = f"; it is a folder, name its files: {pattern.rstrip('/')}/**/*" if Path(pattern).is_dir() else ""
        raise FileNotFoundError(f"no file matches {pattern!r} (in {Path.cwd()}){hint}")
    return files


def _local_records(source: Source) -> Iterator[str]:
    builder = {"jsonl": "json", "parquet": "parquet"}[source.kind]
    return chain.from_iterable(
        _field(source, f"{source.kind} file {file}", builder, data_files=[str(file.absolute())], split="train")
        for file in _matching_files(source.location)
        if file.stat().st_size > 0
    )


def _hub(source: Source) -> Iterator[str]:
    return _field(source, f"data set {source.location}", source.location, name=source.subset, split=source.split)


def _field(source: Source, name: str, /, *arguments, **options) -> Iterator[str]:
    """The text of each record of a data set, streamed; records where it is null are left out."""
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # its errors are raised as well
    try:
        records = iter(datasets.load_dataset(*arguments, streaming=True, **options))
    except Exception as error:
        raise _unreadable(name, error) from error
    for number in range(1, 2**63):
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(name, error) from error
        text = _document(source, record, name, number)
        if text is not None:
            yield text


def _document(source: Source, record: dict, name: str, number: int) -> str | None:
    """The text of one record, a `Demonstration` where the source says so; None where a field of it is null."""
    for option, field in (("field", source.field), ("prompt", source.prompt)):
        if field is not None and field not in record:
            raise ValueError(f"{name} has no field {field!r}; set `{option}` to one of: {', '.join(record)}")
    where = f"{name}, record {number}"
    text = record[source.field]
    if source.chat and source.prompt is None:
        return None if text is None else _messages(text, f"{where}: field {source.field!r}")
    question = "" if source.prompt is None else record[source.prompt]
    if text is None or question is None:
        return None
    for field, value in ((source.field, text), (source.prompt, question)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {field!r} is {type(value).__name__}, not a string")
    return text if source.prompt is None else question_and_answer(question, text, source.chat)


def _messages(value: object, where: str) -> Demonstration:
    try:
        turns = tuple((message["role"], message["content"]) for message in value)
    except (TypeError, KeyError):
        turns = ()
    if not turns or not all(isinstance(part, str) for turn in turns for part in turn):
        raise ValueError(f"{where} is no list of messages with a role and a content each; set `prompt` and `field`")
    if "assistant" not in dict(turns):
        raise ValueError(f"{where} has no message of the role assistant, so nothing of it is learned; leave it out")
    return Demonstration(turns, chat=True)


def _unreadable(name: str, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"cannot read {name}: {lines[0]}")
