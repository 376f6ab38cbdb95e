"""`farspan eval`: what a model can do with a long context, and with the tasks of lm-eval."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from farspan.cli import eval_extrapolation, eval_in_context_regression, eval_needle, eval_recall, eval_regression
from farspan.cli.generate import Model
from farspan.lm.console import console

app = typer.Typer(no_args_is_help=True)
app.command()(eval_needle.needle)
app.command()(eval_recall.recall)
app.command()(eval_extrapolation.extrapolation)
app.command()(eval_regression.regression)
app.command()(eval_in_context_regression.in_context_regression)


@app.callback()
def group() -> None:
    """Evaluate a model.

    Example: `farspan eval lm runs/quickstart --tasks lambada_openai,arc_easy --limit 100`
    """


@app.command()
def lm(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Tasks, groups, tags or patterns of lm-eval, separated by commas.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task; all of them if not given.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with task files (.yaml) of your own.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("evaluations"),
    max_length: Annotated[int | None, typer.Option(min=1, help="Most tokens of prompt and answer.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch; a longer prompt runs alone.")] = 16_384,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long on the left.")] = False,
) -> None:
    """Run tasks of lm-eval (EleutherAI's evaluation harness) on a model.

    What each task downloads is shown first. A prompt that is too long is an error unless `--truncate` cuts it.
    With `--include`, tasks that this folder holds start at once; the index of lm-eval's own takes about 15 s.

    Example: `farspan eval lm runs/quickstart --tasks arc_easy,lambada_openai --limit 100`
    """
    _quiet()
    from farspan.eval.adapter import decoder_lm
    from farspan.eval.harness import find_tasks, load_tasks, run_tasks
    from farspan.eval.report import write_json
    from farspan.lm.load import load

    with console.status("indexing the tasks of lm-eval (about 15 s)"):
        found = find_tasks([name.strip() for name in tasks.split(",") if name.strip()], include)
    for name, source in found.downloads.items():
        console.print(f"{name} downloads {source}", style="dim", markup=False, highlight=False)
    with console.status("loading the data of the tasks"):
        loaded = load_tasks(found)
    decoder, tokenizer = load(model)
    adapter = decoder_lm(decoder, tokenizer, max_length, batch_tokens, allow_truncation=truncate)
    result = {
        "model": model,
        "limit": limit,
        "max_length": adapter.max_length,
        **run_tasks(adapter, loaded, limit),
    }
    _show(result)
    path = output / f"lm-{Path(model).name}.json"
    write_json(path, result)
    console.print(f"written to {path}", style="dim", markup=False, highlight=False)


def _quiet() -> None:
    """No notes of lm-eval on task files, and no progress bars in logs and pipes; before tqdm is imported."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{result['model']}, lm-eval {result['lm_eval']}", title_justify="left")
    for column in ("task", "metric", "value", "± stderr", "documents"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for row in result["rows"]:
        stderr = "" if row["stderr"] is None else f"{row['stderr']:.3g}"
        count = "" if row["documents"] is None else f"{row['documents']:,}"
        table.add_row(row["task"], row["metric"], f"{row['value']:.3g}", stderr, count)
    console.print(table)
    if result["truncated"]:
        console.print(f"{result['truncated']} prompts were longer than {result['max_length']} tokens and were cut")
