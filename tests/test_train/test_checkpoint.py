"""Checkpoints are whole or not there, whatever dies in between."""

import errno
import json
import os
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from farspan.lm.train import faults
from farspan.lm.train.checkpoint import hold_errors, latest, save, step_of


@pytest.fixture(autouse=True)
def no_faults():
    yield
    faults.install(None)


def content(rank=0):
    def write(path):
        (path / "state").mkdir(exist_ok=True)
        (path / "state" / f"rank{rank}.pt").write_bytes(bytes(range(256)) * 40 + bytes([rank]))

    return write


def save_one(directory, step, keep=3, write=None):
    return save(directory, step, write or content(), barrier=lambda: None, is_main=True, keep=keep)


def save_on_ranks(directory, step, writes, keep=3):
    """Runs `save` on one thread per rank with a real barrier that breaks instead of hanging; returns what each gave."""
    barrier = threading.Barrier(len(writes), timeout=10)

    def rank(i):
        try:
            return save(directory, step, writes[i], barrier=barrier.wait, is_main=i == 0, keep=keep)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(writes)) as pool:
        return list(pool.map(rank, range(len(writes))))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def warned(directory):
    lines = []
    return latest(directory, lines.append), lines


def test_saved_checkpoint_is_found_and_described(tmp_path):
    paths = save_on_ranks(tmp_path, 7, [content(0), content(1)])
    assert paths == [tmp_path / "step-7"] * 2 and step_of(paths[0]) == 7
    manifest = json.loads((paths[0] / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["format"] == 1
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        "state/rank0.pt": 10241,
        "state/rank1.pt": 10241,
    }
    assert sorted(path.name for path in paths[0].iterdir()) == ["manifest.json", "state"]
    assert warned(tmp_path) == (paths[0], [])


def test_no_checkpoint_is_none(tmp_path):
    assert warned(tmp_path) == (None, [])
    assert warned(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: faults.corrupt(path / "state" / "rank0.pt", "truncate"), "5120 bytes instead of 10241"),
        (lambda path: faults.corrupt(path / "state" / "rank0.pt", "flip"), "does not match its checksum"),
        (lambda path: (path / "state" / "rank0.pt").unlink(), "rank0.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: faults.corrupt(path / "manifest.json", "truncate"), "manifest.json is damaged"),
    ],
)
def test_damaged_checkpoint_falls_back_with_one_warning(tmp_path, damage, reason):
    before, newest = save_one(tmp_path, 5), save_one(tmp_path, 10)
    damage(newest)
    found, lines = warned(tmp_path)
    assert found == before
    assert len(lines) == 1 and reason in lines[0] and "step-10" in lines[0]


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (9, 10):
        save_one(tmp_path, step)
    assert warned(tmp_path)[0].name == "step-10"


def test_keeps_the_newest_and_counts_only_whole_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save_one(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-3", "step-4"]
    faults.corrupt(tmp_path / "step-4" / "state" / "rank0.pt", "truncate")
    save_one(tmp_path, 5, keep=2)
    assert "step-3" in names(tmp_path) and "step-5" in names(tmp_path)
    with pytest.raises(ValueError, match="keep=0"):
        save_one(tmp_path, 6, keep=0)


def test_same_step_again_replaces(tmp_path):
    save_one(tmp_path, 3)
    faults.corrupt(tmp_path / "step-3" / "state" / "rank0.pt", "flip")
    assert warned(tmp_path)[0] is None
    assert save_one(tmp_path, 3) == warned(tmp_path)[0]
    assert names(tmp_path) == ["step-3"]


def full(path):
    content(1)(path)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_full_disk_on_any_rank_is_an_oserror_on_all(tmp_path, failing):
    save_one(tmp_path, 5)
    writes = [full if rank == failing else content(rank) for rank in range(3)]
    for error in save_on_ranks(tmp_path, 10, writes):
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        assert "step 10" in str(error) and "No space left" in str(error) and "\n" not in str(error)
    assert names(tmp_path) == ["step-5"] and warned(tmp_path)[0].name == "step-5"


def test_failure_of_the_main_rank_to_prepare_or_finish(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    errors = save_on_ranks(tmp_path / "file" / "checkpoints", 1, [content(0), content(1)])
    assert all(isinstance(error, OSError) for error in errors)

    def broken(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("farspan.lm.train.checkpoint.json.dump", broken)
    for error in save_on_ranks(tmp_path / "checkpoints", 1, [content(0), content(1)]):
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
    assert names(tmp_path / "checkpoints") == []


def test_a_bug_keeps_its_own_type_and_hangs_nobody(tmp_path):
    def bug(path):
        raise KeyError("wrong")

    first, second = save_on_ranks(tmp_path, 1, [content(0), bug])
    assert isinstance(first, OSError) and isinstance(second, KeyError)


def test_fault_points_inside_save(tmp_path):
    faults.install([{"point": "mid_save", "step": 2, "do": "full"}])
    save_one(tmp_path, 1)
    with pytest.raises(OSError, match="No space left"):
        save_one(tmp_path, 2)
    assert names(tmp_path) == ["step-1"]


def in_child(action):
    """Runs `action` in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("point", ["before_save", "mid_save", "after_save"])
def test_killed_while_saving(tmp_path, point):
    save_one(tmp_path, 5)

    def killed():
        faults.install([{"point": point, "step": 10, "do": "kill"}])
        save_one(tmp_path, 10)

    assert os.WTERMSIG(in_child(killed)) == signal.SIGKILL
    assert warned(tmp_path) == (tmp_path / ("step-10" if point == "after_save" else "step-5"), [])
    save_one(tmp_path, 12)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_torch_save_on_a_full_disk_is_an_oserror(tmp_path):
    """torch raises a RuntimeError of its archive writer there; a file size limit stands in for the disk."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_one(tmp_path, 1, write=lambda path: torch.save(torch.zeros(100_000), path / "big.pt"))
        except OSError as error:
            os._exit(40 + ("step 1 was not written" in str(error)))
        os._exit(1)

    assert os.waitstatus_to_exitcode(in_child(limited)) == 41
    assert names(tmp_path) == []


def test_hold_errors_raises_at_the_end(tmp_path):
    class Writer:
        saved = 0

        def save(self, state, path):
            self.saved += 1
            if path == "bad":
                raise OSError(errno.ENOSPC, "full")

        def makedirs(self, path, exist_ok=False):
            pass

    writer = Writer()
    reached = False
    with pytest.raises(OSError, match="full"), hold_errors(writer):
        writer.save({}, "bad")
        writer.save({}, "good")
        reached = True
    assert reached and writer.saved == 2
    with pytest.raises(OSError):
        writer.save({}, "bad")


def test_step_of_refuses_other_names(tmp_path):
    with pytest.raises(ValueError, match="step-N"):
        step_of(tmp_path / "global_step7")
