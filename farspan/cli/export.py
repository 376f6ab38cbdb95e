"""`farspan export`: a trained model as a folder that transformers loads."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from farspan.lm.console import console


def export(
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint folder.")],
    directory: Annotated[Path, typer.Argument(help="The folder to make; it must be new or empty.")],
) -> None:
    """Write a trained model as safetensors with its configuration and tokenizer.

    The folder loads with `AutoModelForCausalLM.from_pretrained` after `import farspan`.

    Example: `farspan export runs/quickstart exported`
    """
    from farspan.lm.load import load
    from farspan.lm.train.report import count

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty folder; name a new one")
    model, tokenizer = load(run, device="cpu", dtype="auto")
    aside = directory.with_name(f".{directory.name}.partial")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.replace(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in directory.iterdir())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"{directory}: {count(parameters)} parameters, {model.dtype}, {count(size)}B", markup=False)
