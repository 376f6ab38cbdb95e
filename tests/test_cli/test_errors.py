"""What a user can mend is one line and exit status 2; help shows an example everywhere."""

import os
import re
import subprocess
import sys

import pytest
import typer

from farspan.cli import app, one_line

HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "matplotlib",
    "lm_eval",
    "sentencepiece",
    "trl",
    "pandas",
    "wandb",
    "tensorboard",
)


def commands(group=None, path=()):
    """The words of every command."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", [(), *commands()], ids=" ".join)
def test_every_help_shows_an_example_of_itself(farspan, path):
    status, out, _ = farspan(*path, "--help")
    assert status == 0
    assert " ".join(["farspan", *path]) in re.split("Examples?: ", out)[1].split("Options")[0]


@pytest.mark.parametrize("group", ["data", "tokenizer", "bench"])
def test_groups_list_their_commands(farspan, group):
    status, out, _ = farspan(group, "--help")
    assert status == 0
    assert all(name in out for first, name in (path for path in commands() if len(path) == 2) if first == group)


def test_the_promised_commands_exist():
    found = {" ".join(path) for path in commands()}
    promised = {"train", "generate", "chat", "export", "doctor", "data prepare", "data inspect", "tokenizer train"}
    assert promised | {"bench train"} <= found


@pytest.mark.parametrize(
    "arguments, nearest",
    [
        (["trian"], "'train'"),
        (["data", "prepar"], "'prepare'"),
        (["bench", "tran"], "'train'"),
        (["generate", "model", "prompt", "--token", 3], "--tokens"),
    ],
)
def test_a_mistyped_command_or_option_names_the_nearest(farspan, arguments, nearest):
    status, _, err = farspan(*arguments)
    assert status == 2 and nearest in err


ERRORS = [
    (ValueError("width=7 is odd;\n  use 8"), "width=7 is odd; use 8"),
    (OSError(28, "No space left on device"), "No space left on device"),
    (FileNotFoundError(2, "No such file or directory", "x.yaml"), "x.yaml: No such file or directory"),
    (OSError("some\nwhere"), "some where"),
    (ValueError(), "ValueError"),
]


@pytest.mark.parametrize("error, line", ERRORS)
def test_an_error_is_one_line(error, line):
    assert one_line(error) == line


def fail(monkeypatch, error):
    def raising(*arguments, **options):
        raise error

    monkeypatch.setattr("farspan.lm.load.load", raising)


@pytest.mark.parametrize("error, line", ERRORS)
def test_user_errors_exit_2_without_traceback(farspan, monkeypatch, error, line):
    fail(monkeypatch, error)
    assert farspan("generate", "model", "prompt") == (2, "", f"error: {line}\n")


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(farspan, monkeypatch, place):
    fail(monkeypatch, ValueError("width=7 is odd"))
    arguments = ["generate", "model", "prompt"]
    arguments.insert(place, "--debug")
    status, _, err = farspan(*arguments)
    assert status == 2 and "Traceback" in err and err.endswith("error: width=7 is odd\n")


def test_what_follows_a_double_dash_is_left_alone(farspan, monkeypatch):
    seen = []
    monkeypatch.setattr("farspan.lm.load.load", lambda model: seen.append(model) or fail_with(ValueError("x")))
    status, _, err = farspan("generate", "--", "--debug", "prompt")
    assert seen == ["--debug"] and status == 2 and "Traceback" not in err


def fail_with(error):
    raise error


def test_interrupt_is_130_and_bugs_are_tracebacks(farspan, monkeypatch):
    fail(monkeypatch, KeyboardInterrupt())
    assert farspan("generate", "model", "prompt")[0] == 130
    fail(monkeypatch, KeyError("bug"))
    with pytest.raises(KeyError):
        farspan("generate", "model", "prompt")


def test_the_command_line_starts_without_what_it_may_not_need(tmp_path):
    program = f"import sys, farspan.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
