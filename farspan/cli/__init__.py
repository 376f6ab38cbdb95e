"""The command line: `farspan COMMAND`. Each command lives in its own file and imports what is heavy when it runs."""

import sys
import traceback
from typing import Annotated

import typer

from farspan.cli import bench, chat, data, doctor, eval, export, generate, rl, tokenizer, train
from farspan.cli.allocator import keep_freed_memory

app = typer.Typer(
    name="farspan",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train.train, generate.generate, chat.chat, export.export, doctor.doctor):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(bench.app, name="bench")
app.add_typer(eval.app, name="eval")
app.add_typer(rl.app, name="rl")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from; with any command.")] = False,
) -> None:
    """Train, evaluate and fine-tune long-context language models.

    Example: `farspan train recipes/quickstart.yaml`, then `farspan generate runs/quickstart "def "`
    """


def main() -> None:
    """Runs the command of `sys.argv`. What the user can mend (ValueError, OSError) is one line and exit status 2."""
    arguments = sys.argv[1:]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own
    keep_freed_memory()
    try:
        app(args=[argument for argument in own if argument != "--debug"] + arguments[len(own) :])
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"{typer.style('error:', fg='red', bold=True)} {one_line(error)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def one_line(error: Exception) -> str:
    """The message of an error as one line; the system's own errors with the file they are about."""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())
