"""Checkpoint folders that are whole or not there.

`step-N` is made as `.step-N.partial`, closed by a manifest of sizes and SHA-256 sums, and renamed: a run that is killed
at any moment leaves its earlier checkpoints as they were. The ranks agree on success through one file in it, since a
rename needs no space on a full disk: `.writing` becomes `.failed-ERRNO@HOST` when any of them fails.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from farspan.lm.train import faults

FORMAT = 1
MANIFEST = "manifest.json"
_WRITING = ".writing"
_FAILED = ".failed-"
# `.replaced` is an older checkpoint of the same step; it counts until the new one has taken its name.
_NAME = re.compile(r"step-(\d+)|\.step-(\d+)\.replaced")


def save(
    directory: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    barrier: Callable[[], None],
    is_main: bool,
    keep: int,
) -> Path:
    """Writes checkpoint `directory/step-N`; every rank calls it, and the directory is one that all ranks see.

    `write(path)` puts this rank's files into the existing folder `path`; if it communicates, it must do so in step with
    the other ranks whatever happens (see `hold_errors`). `barrier()` waits for all ranks; each calls it equally often.
    Only the main rank makes, renames and deletes folders. The `keep` newest whole checkpoints stay.

    Returns the finished folder. Raises OSError on all ranks if one could not write: nothing partial stays behind and
    the earlier checkpoints are untouched. An error of another kind is raised as it is on its own rank.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would leave no checkpoint; keep at least 1")
    faults.reach("before_save", step)
    final, partial = directory / f"step-{step}", directory / f".step-{step}.partial"

    error = _attempt(lambda: _prepare(directory, partial), partial) if is_main else None
    barrier()
    prepared = partial.is_dir()
    if prepared:
        error = _attempt(lambda: _write(write, partial, step), partial)
    barrier()
    if is_main and _failure(partial) is None:
        error = _attempt(lambda: _finish(partial, final, step), partial)
    barrier()
    if not prepared or _names(partial) or MANIFEST not in _names(final):
        failed = _failure(partial)
        barrier()
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise _explained(error, failed, directory, step) from error
    if is_main:
        _prune(directory, final, keep)
    faults.reach("after_save", step)
    return final


def latest(directory: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `directory`, or None. Sizes and checksums of all its files are verified.

    Each newer folder that is truncated, changed or without manifest is reported by `warn` in one line. Reads every byte
    of what it returns: call it on one rank and tell the others.
    """
    for path in sorted(_checkpoints(directory), key=step_of, reverse=True):
        found = problem(path)
        if found is None:
            return path
        warn(f"checkpoint {path} is not usable ({found}); trying the one before it")
    return None


def problem(path: Path, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if it is whole. Reads all of it for `checksums`."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        sizes = {name: (path / name).stat().st_size for name in expected}
        for name, size in sizes.items():
            if size != expected[name]["size"]:
                return f"{name} has {size} bytes instead of {expected[name]['size']}"
        if checksums:
            with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                found = pool.map(lambda name: _describe(path / name), expected)
                for name, entry in zip(expected, found, strict=True):
                    if entry != expected[name]:
                        return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name. Raises ValueError for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint folder; their names are step-N")
    return int(match[1] or match[2])


@contextmanager
def hold_errors(writer: Any) -> Iterator[None]:
    """Inside, `writer.save(...)` and `writer.makedirs(...)` (a DeepSpeed checkpoint engine) hold their errors back.

    DeepSpeed synchronises the ranks several times within one `save_checkpoint`; a rank that left it in the middle, on a
    full disk, would leave the others waiting. The first error is raised at the end.
    """
    held: list[Exception] = []

    def holding(method: Callable[..., Any]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            try:
                method(*arguments, **options)
            except Exception as error:
                held.append(error)

        return call

    writer.save, writer.makedirs = holding(writer.save), holding(writer.makedirs)
    try:
        yield
    finally:
        del writer.save, writer.makedirs  # the class's own methods show again
    if held:
        raise held[0]


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    for replaced in directory.glob(".step-*.replaced"):
        if _is_whole(directory / f"step-{step_of(replaced)}", checksums=False):
            shutil.rmtree(replaced)
    partial.mkdir()
    try:
        (partial / _WRITING).touch()
    except OSError:
        partial.rmdir()  # without the folder, no rank starts to write
        raise


def _write(write: Callable[[Path], None], partial: Path, step: int) -> None:
    write(partial)
    faults.reach("mid_save", step)


def _finish(partial: Path, final: Path, step: int) -> None:
    """Files to the disk, then the manifest, then the name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != _WRITING)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        entries = list(pool.map(lambda path: _describe(path, sync=True), files))
    names = [path.relative_to(partial).as_posix() for path in files]
    manifest = {"format": FORMAT, "step": step, "files": dict(zip(names, entries, strict=True))}
    with open(partial / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in {path.parent for path in files} | {partial}:
        _sync_folder(folder)

    replaced = final.with_name(f".{final.name}.replaced")
    (partial / _WRITING).unlink()
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(directory: Path, newest: Path, keep: int) -> None:
    """Deletes what is older than the `keep` newest whole checkpoints up to `newest`, broken ones too."""
    older = [path for path in _checkpoints(directory) if step_of(path) < step_of(newest)]
    kept = 1
    for path in sorted(older, key=step_of, reverse=True):
        if kept < keep:
            kept += _is_whole(path, checksums=False)
            continue
        gone = path.with_name(f".step-{step_of(path)}.partial")  # a half-deleted checkpoint must not look like one
        with suppress(OSError):  # what cannot be deleted now is deleted at the next save
            path.rename(gone)
            shutil.rmtree(gone)


def _attempt(action: Callable[[], None], partial: Path) -> Exception | None:
    """Runs `action`; an error is returned, after the folder has been marked so that the other ranks know."""
    try:
        action()
    except Exception as error:
        error = _as_oserror(error, partial.parent)
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        with suppress(OSError):  # another rank was first, or the file is gone: a failure all the same
            (partial / _WRITING).rename(partial / f"{_FAILED}{code}@{socket.gethostname()}")
        return error
    return None


def _as_oserror(error: Exception, directory: Path) -> Exception:
    """torch.save reports a failed write as a RuntimeError of its archive writer, without the system's error number."""
    if not (
        isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container|basic_filebuf", str(error))
    ):
        return error
    full = directory.exists() and shutil.disk_usage(directory).free < 2**24
    code = errno.ENOSPC if full else errno.EIO
    return OSError(code, os.strerror(code))


def _failure(partial: Path) -> tuple[int, str] | None:
    """(error number, host) of the failure that the folder is marked with; None while it is good."""
    names = _names(partial)
    for name in names:
        if name.startswith(_FAILED):
            code, _, host = name.removeprefix(_FAILED).partition("@")
            return int(code), host
    return None if _WRITING in names else (errno.EIO, "")


def _names(folder: Path) -> list[str]:
    """What is in a folder, if it exists. A listing is fresh on network file systems, where a look-up may be cached."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _explained(error: Exception | None, failed: tuple[int, str] | None, directory: Path, step: int) -> Exception:
    if error is not None and not isinstance(error, OSError):
        return error
    code, host = failed or (errno.EIO, "")
    reason = os.strerror(code)
    if error is not None:
        code, reason = error.errno or code, error.strerror or str(error)
    where = f" on {host}" if host and error is None else ""
    advice = (
        "make room or lower train.keep_checkpoints, then resume" if code == errno.ENOSPC else "earlier ones are intact"
    )
    return OSError(code, f"checkpoint of step {step} was not written to {directory}: {reason}{where}; {advice}")


def _checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []


def _is_whole(path: Path, checksums: bool) -> bool:
    return problem(path, checksums) is None


def _describe(path: Path, sync: bool = False) -> dict[str, int | str]:
    """{"size": bytes, "sha256": hex}; with `sync` the file is on the disk on return."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
