"""`farspan tokenizer`: train one from text."""

from typing import Annotated

import typer

app = typer.Typer(help="Train tokenizers.", no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def group() -> None:
    """Train tokenizers."""


@app.command()
def train(
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write; it must not hold a tokenizer yet.")],
    vocab_size: Annotated[int, typer.Option(min=512, help="Entries, 4 special tokens and 256 bytes included.")] = 32768,
    model: Annotated[str, typer.Option(help="bpe or unigram.")] = "bpe",
    text: Annotated[list[str] | None, typer.Option(help="Glob of UTF-8 files. Repeat for more.")] = None,
    jsonl: Annotated[list[str] | None, typer.Option(help="Glob of JSONL files. Repeat for more.")] = None,
    parquet: Annotated[list[str] | None, typer.Option(help="Glob of Parquet files. Repeat for more.")] = None,
    python: Annotated[list[str] | None, typer.Option(help="`stdlib` or an installed package. Repeat for more.")] = None,
    hub: Annotated[list[str] | None, typer.Option(help="Data set on the hub, streamed. Repeat for more.")] = None,
    field: Annotated[str, typer.Option(help="Field with the text, for JSONL, Parquet and hub.")] = "text",
) -> None:
    """Train a tokenizer that AutoTokenizer loads and that gives back any text exactly.

    Example: `farspan tokenizer train --python stdlib --vocab-size 4096 --output tokenizers/python`
    """
    from itertools import chain

    from rich.table import Table

    from farspan.cli.data import sources_of
    from farspan.lm.console import console
    from farspan.lm.data.sources import distinct, documents
    from farspan.lm.data.tokenizer import load_tokenizer, text_encoder, tokenizer_hash, train_tokenizer

    sources = sources_of(text=text, jsonl=jsonl, parquet=parquet, python=python, hub=hub, field=field)

    def texts():
        return (text for _, text in distinct(chain.from_iterable(map(documents, sources)), set()))

    with console.status(f"training {vocab_size:,} {model} pieces"):
        train_tokenizer(texts(), output, vocab_size, model)
    example = next(texts())[:2000]
    ids = text_encoder(load_tokenizer(output))([example])[0]
    table = Table(show_header=False, title=output, title_justify="left")
    table.add_row("entries", f"{vocab_size:,}")
    table.add_row("model", model)
    table.add_row("hash", tokenizer_hash(output)[:12])
    table.add_row("bytes per token", f"{len(example.encode()) / len(ids):.3g} (first 2,000 characters of the text)")
    console.print(table)
    console.print(f'use it: AutoTokenizer.from_pretrained("{output}"), or tokenizer.path in a recipe', soft_wrap=True)
