"""`farspan data`: prepare corpora, and look at what is in them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Prepare corpora and look at them.", no_args_is_help=True, rich_markup_mode="markdown")

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@app.command()
def prepare(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; or leave it out and name sources below.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Glob of UTF-8 files, one document each. Repeat for more.")
    ] = None,
    jsonl: Annotated[list[str] | None, typer.Option(help="Glob of JSONL files. Repeat for more.")] = None,
    parquet: Annotated[list[str] | None, typer.Option(help="Glob of Parquet files. Repeat for more.")] = None,
    python: Annotated[list[str] | None, typer.Option(help="`stdlib` or an installed package. Repeat for more.")] = None,
    hub: Annotated[list[str] | None, typer.Option(help="Data set on the hub, streamed. Repeat for more.")] = None,
    field: Annotated[str, typer.Option(help="Field with the text, for JSONL, Parquet and hub.")] = "text",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of the documents that is held out.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer folder or hub name.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Train a tokenizer of this size from the sources.")] = None,
    model: Annotated[str, typer.Option(help="The tokenizer to train: bpe or unigram.")] = "bpe",
) -> None:
    """Turn text into a corpus: tokens, document offsets and metadata in a folder. What is prepared is left alone.

    Examples: `farspan data prepare recipes/quickstart.yaml`

    `farspan data prepare --text "books/**/*.txt" --output corpora/books --vocab-size 16384`

    `farspan data prepare --jsonl train.jsonl --field answer --output corpora/answers --tokenizer gpt2`
    """
    from farspan.lm.data.prepare import prepare as prepare_corpora

    if recipe is not None:
        options = dict(text=text, jsonl=jsonl, parquet=parquet, python=python, hub=hub, output=output)
        options |= {"tokenizer": tokenizer, "vocab-size": vocab_size, "validation": validation}
        given = [f"--{name}" for name, value in options.items() if value]
        if given:
            raise ValueError(f"{recipe} says what to prepare; leave out {' '.join(given)}, or the recipe")
        from farspan.lm.recipe import load_recipe

        loaded = load_recipe(recipe)
        if loaded.data.task is not None:
            raise ValueError(f"{recipe} trains on a task, whose rows are made as they are needed; just train it")
        prepare_corpora(loaded.data, loaded.tokenizer)
        return
    sources = sources_of(text=text, jsonl=jsonl, parquet=parquet, python=python, hub=hub, field=field)
    if output is None:
        raise ValueError("name the folder to write: --output FOLDER")
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("give either --tokenizer FOLDER_OR_HUB_NAME, or --vocab-size N to train one")
    from farspan.lm.data.spec import DataSpec, TokenizerSpec, validated

    data = validated(
        DataSpec, path=output, sources=sources, **({} if validation is None else {"validation": validation})
    )
    path = tokenizer or str(Path(output) / "tokenizer")
    prepare_corpora(data, validated(TokenizerSpec, path=path, vocab_size=vocab_size, model=model))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A prepared corpus.")],
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    row: Annotated[int | None, typer.Option(min=0, help="Show this row as the loader packs it.")] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the loader's order.")] = 0,
) -> None:
    """Show what a corpus holds: counts, lengths of its documents, an excerpt; or one row of the loader.

    Examples: `farspan data inspect corpora/python`

    `farspan data inspect corpora/python --row 17 --sequence-length 1024`
    """
    from farspan.lm.console import console
    from farspan.lm.data.corpus import Corpus
    from farspan.lm.data.tokenizer import load_tokenizer, tokenizer_hash

    corpus = Corpus(folder, split)
    tokenizer = load_tokenizer(corpus.metadata["tokenizer"])
    corpus.check_tokenizer(tokenizer_hash(corpus.metadata["tokenizer"]), corpus.metadata["tokenizer"])
    if row is None:
        console.print(_counts(corpus))
        console.print(_lengths(corpus))
        console.print(_quantiles(corpus), soft_wrap=True, highlight=False)
        pieces = [corpus.document(index) for index in range(min(3, corpus.documents))]
        title = f"the first {len(pieces)} documents of {split}"
    else:
        from farspan.lm.data.loader import Loader

        batch = Loader([corpus], [1.0], sequence_length, rows=1, seed=seed).batch(row)[0]
        pieces = batch.input_ids[0].tensor_split(batch.cu_seqlens[1:-1].long())
        title = f"row {row}: {sequence_length:,} tokens, {len(pieces)} pieces, identifier {batch.identifier}"
    console.rule(title, align="left")
    for piece in pieces:
        _show(piece.tolist(), tokenizer)


def sources_of(field: str, **locations: list[str] | None) -> list:
    """The sources that options name. ValueError where none is named."""
    from farspan.lm.data.spec import Source

    sources = []
    for kind, names in locations.items():
        option = {"field": field} if kind in ("jsonl", "parquet", "hub") else {}
        sources += [Source(**{kind: name}, **option) for name in names or []]
    if not sources:
        raise ValueError("name a recipe, or sources: --text, --jsonl, --parquet, --python, --hub")
    return sources


def _counts(corpus):
    from rich.table import Table

    table = Table(
        title=f"{corpus.directory}  (vocabulary {corpus.vocab_size:,}, {corpus.tokens.dtype})", title_justify="left"
    )
    for column in ("split", "documents", "tokens", "text", "bytes per token"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in corpus.metadata["splits"].items():
        ratio = f"{counts['bytes'] / counts['tokens']:.3g}" if counts["tokens"] else "-"
        size = f"{counts['bytes'] / 1e6:.3g} MB"
        table.add_row(split, f"{counts['documents']:,}", f"{counts['tokens']:,}", size, ratio)
    table.caption = f"fingerprint {corpus.fingerprint[:12]}, tokenizer {corpus.tokenizer_hash[:12]}"
    table.caption_justify = "left"
    return table


def _lengths(corpus):
    """A histogram of the documents' lengths over powers of two."""
    import numpy as np
    from rich.table import Table

    lengths = np.asarray(corpus.lengths)
    table = Table(title=f"tokens per document ({corpus.split}), mean {lengths.mean():,.0f}", title_justify="left")
    for column in ("from", "documents", "share of tokens", ""):
        table.add_column(column, justify="right" if column else "left")
    bins = np.log2(lengths).astype(int)
    for power in range(bins.min(), bins.max() + 1):
        chosen = bins == power
        share = lengths[chosen].sum() / lengths.sum()
        table.add_row(f"{1 << power:,}", f"{chosen.sum():,}", f"{share:.1%}", "█" * round(40 * share))
    return table


def _quantiles(corpus) -> str:
    import numpy as np

    values = np.quantile(corpus.lengths, _QUANTILES, method="nearest").tolist()
    return "quantiles: " + ", ".join(f"{share:.0%} {value:,}" for share, value in zip(_QUANTILES, values, strict=True))


def _show(ids: list[int], tokenizer) -> None:
    """The ends of a piece of a document; an end-of-text token shows as its name."""
    from rich.markup import escape

    from farspan.lm.console import console

    head, tail = (ids, []) if len(ids) <= 200 else (ids[:120], ids[-60:])
    shown = escape(tokenizer.decode(head))
    if tail:
        shown += f"[dim] ... {len(ids) - len(head) - len(tail):,} tokens ...[/dim] " + escape(tokenizer.decode(tail))
    console.print(shown, soft_wrap=True, highlight=False)
    console.rule(f"{len(ids):,} tokens", style="dim")
