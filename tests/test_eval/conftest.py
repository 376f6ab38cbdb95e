"""The command line in this process."""

import sys

import pytest


@pytest.fixture
def bench(monkeypatch, capsys):
    """`bench("kernels", ...)` -> (exit status, standard output, standard error) of `farspan bench kernels ...`."""

    def run(*arguments):
        from farspan.cli import main

        monkeypatch.setattr(sys, "argv", ["farspan", "bench", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as leave:
            status = leave.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run
