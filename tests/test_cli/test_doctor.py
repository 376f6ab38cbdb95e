"""doctor tells the truth about this machine, and about one where something is missing."""

from importlib import metadata

import pytest

from farspan.cli import doctor


def test_here_the_core_works(farspan):
    status, out, _ = farspan("doctor")
    assert status == 0
    for name in (*doctor.USES, "python", "CUDA", "g++", "cores", "memory", "disk"):
        assert name in out
    assert metadata.version("torch") in out


def without(monkeypatch, missing):
    version = metadata.version

    def lookup(name):
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("farspan.cli.doctor.metadata.version", lookup)


def finding(name):
    return next(found for found in doctor.examine() if found.name == name)


@pytest.mark.parametrize("name, status", [("transformers", 1), ("datasets", 0)])
def test_a_missing_package_says_what_to_install(farspan, monkeypatch, name, status):
    without(monkeypatch, name)
    found = finding(name)
    assert found.status == doctor.MISSING and f'pip install "{name}>=' in found.note
    assert farspan("doctor")[0] == status


def test_a_wrong_version_is_named(monkeypatch):
    monkeypatch.setattr("farspan.cli.doctor._requirements", lambda: {"matplotlib": "<3,>=2"})
    found = finding("matplotlib")
    assert found.status == doctor.BROKEN and "<3,>=2" in found.note and found.version.startswith("3.")


def test_requirements_come_from_the_package_itself():
    requirements = doctor._requirements()
    assert requirements["torch"] and requirements["trl"]
    assert set(doctor.USES) <= set(requirements)


def test_a_core_package_that_does_not_import_is_broken(monkeypatch):
    def refuse(name):
        raise RuntimeError("no\nlibrary")

    monkeypatch.setattr("farspan.cli.doctor.importlib.import_module", refuse)
    found = finding("torch")
    assert found.status == doctor.BROKEN and found.note == "does not import: no library"


def test_a_check_that_fails_is_a_finding():
    def _disk():
        raise OSError("no disk")

    assert doctor._guarded(_disk) == doctor.Finding("disk", "", doctor.BROKEN, "no disk")
