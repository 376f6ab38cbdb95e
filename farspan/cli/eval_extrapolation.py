"""`farspan eval extrapolation`: the loss of a model at and beyond the length that it was trained at."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from farspan.cli.lengths import parse_lengths
from farspan.lm.console import console

RESULTS = Path("evaluations")
# Of the training length, where no lengths are given.
DEFAULT_MULTIPLES = (0.25, 0.5, 1, 2, 4, 8)


def extrapolation(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Run, checkpoint or exported folder; several to compare.")
    ],
    lengths: Annotated[
        str | None, typer.Option(help="Tokens: 4096, 4k or 1m, separated by commas; 1/4 to 8 x the training length.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Prepared corpus, of which the held-out part is read; that of the run.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Instead of a corpus: a UTF-8 file, read as one document.")] = None,
    mode: Annotated[
        str, typer.Option(help="carried: states go on; window: sliding windows of the training length.")
    ] = "carried",
    segments: Annotated[int, typer.Option(min=1, help="Most pieces of text, each of the greatest length.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; changes speed and memory only.")] = 1024,
    name: Annotated[str, typer.Option(help="Of the files that are written.")] = "extrapolation",
    output: Annotated[Path, typer.Option(help="Folder for the JSON, the table and the picture.")] = RESULTS,
) -> None:
    """Loss by position and by length on held-out text, with states carried over the whole length.

    Memory is that of one chunk and the states. Longer documents than the model was trained on are in bold.

    Example: `farspan eval extrapolation runs/quickstart --lengths 1k,2k,4k,8k,16k`
    """
    # The profiler that counts memory warns of blocks that are older than itself; torch reads this once, when imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from farspan.eval.extrapolation import Protocol, extrapolate, picture
    from farspan.eval.report import described, write_report
    from farspan.lm.load import load

    if corpus is not None and text is not None:
        raise ValueError(f"--corpus {corpus} and --text {text} exclude each other; leave one out")
    given = None if lengths is None else parse_lengths(lengths)
    loaded = [load(model) for model in models]
    if given is None:
        trained = loaded[0][0].config.max_position_embeddings
        given = tuple(sorted({max(1, int(trained * multiple)) for multiple in DEFAULT_MULTIPLES}))
    protocol = Protocol(given, segments, mode, chunk)
    if text is not None:
        sources = [_of_file(text, tokenizer, protocol) for _, tokenizer in loaded]
    else:
        split = _corpus(corpus, models[0])
        sources = [_of_corpus(split, tokenizer, protocol) for _, tokenizer in loaded]
    total = sum(len(source.segments) * given[-1] for source in sources)
    with _progress(total) as progress:
        found = [
            extrapolate(decoder, model, source, protocol, progress)
            for model, (decoder, _), source in zip(models, loaded, sources, strict=True)
        ]
    result = {"protocol": described(protocol), "models": found}
    shown = table(result)
    write_report(output, name, result, shown, picture(result))
    console.print(shown)
    console.print(f"written to {output / name}.json, .txt and .png", style="dim", markup=False, soft_wrap=True)


def _of_file(path: Path, tokenizer: Any, protocol: Any) -> Any:
    import numpy as np

    from farspan.eval.held_out import plain_text
    from farspan.lm.data.tokenizer import text_encoder

    content = path.read_bytes()
    try:
        ids = text_encoder(tokenizer)([content.decode("utf-8")])[0]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    return plain_text(np.array(ids), len(content), str(path), protocol.lengths[-1], protocol.segments)


def _of_corpus(corpus: Any, tokenizer: Any, protocol: Any) -> Any:
    from farspan.eval.held_out import corpus_text
    from farspan.lm.data.tokenizer import tokenizer_hash

    corpus.check_tokenizer(tokenizer_hash(tokenizer.name_or_path), tokenizer.name_or_path)
    return corpus_text(corpus, protocol.lengths[-1], protocol.segments)


def _corpus(folder: Path | None, model: str) -> Any:
    """The validation split in `folder`, or of the run that `model` belongs to."""
    from farspan.lm.data.corpus import Corpus, corpus_parts
    from farspan.lm.recipe import load_recipe

    if folder is not None:
        return Corpus(folder, "validation")
    # A run, its export hf/, or one of its checkpoints/step-N.
    places = (Path(model), *Path(model).resolve().parents[:2])
    recipe = next((place / "recipe.yaml" for place in places if (place / "recipe.yaml").is_file()), None)
    if recipe is None:
        raise ValueError(f"{model} is no run, whose corpus is known; name text: --corpus FOLDER or --text FILE")
    parts = [str(part) for part, _ in corpus_parts(load_recipe(recipe).data)]
    if len(parts) > 1:
        raise ValueError(f"{model} learns from a mixture; name one of its corpora by --corpus: {', '.join(parts)}")
    return Corpus(parts[0], "validation")


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar of tokens; yields a function that takes how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def table(result: dict[str, Any]) -> Any:
    """A rich table, a row per model and length; lengths beyond the training length are bold."""
    from rich.table import Table

    sizes = ("state_bytes", "peak_tensor_bytes", "rss_increase_bytes")
    titles = ("times\ntrained", "nats\n/token", "last\nhalf", "bits\n/byte", "tokens\n/s", "state\nMB", "tensors\nMB")
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("model", justify="left", overflow="fold")
    for title in ("tokens", *titles, "RSS\nMB"):
        shown.add_column(title, justify="right", no_wrap=True)
    for model in result["models"]:
        for index, row in enumerate(model["rows"]):
            cells = [model["model"] if index == 0 else "", f"{row['length']:,}", f"{row['times_trained']:,.4g}"]
            cells += [f"{row['nats_per_token']:.3f}" + _number(row["stderr"], " ± {:.3f}")]
            cells += [f"{row['last_half_nats_per_token']:.3f}", _number(row["bits_per_byte"], "{:.3f}")]
            cells += [_number(row["tokens_per_second"], "{:,.0f}")]
            cells += [_number(row[size] and row[size] / 1e6, "{:,.1f}") for size in sizes]
            shown.add_row(*cells, style="bold" if row["times_trained"] > 1 else None)
        shown.add_section()
    text, segments = result["models"][0]["text"], result["models"][0]["text"]["segments"]
    mode = "states carried" if result["protocol"]["mode"] == "carried" else "sliding windows of the training length"
    lines = [f"{text['source']}: {text['rule']}; {segments} segment{'s' if segments > 1 else ''}, {mode}"]
    lines += ["bold: longer than trained; ±: standard error over segments; last half: of the tokens, with most context"]
    lines += ["tensors: most at once, state included; RSS: of the process, highest so far over that before the start"]
    shown.caption, shown.caption_justify, shown.caption_style = "\n".join(["", *lines]), "left", "dim"
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
