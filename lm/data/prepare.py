"""From sources to prepared corpora: train the tokenizer where there is none, encode every document, write the folder.

A folder is written aside, in `.preparing` within it, and its files are renamed into place, metadata last: a run that is
killed leaves no corpus rather than half of one.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from farspan.lm.console import console
from farspan.lm.data.corpus import (
    FORMAT,
    METADATA,
    SPLITS,
    corpus_parts,
    learned_file,
    offset_file,
    read_metadata,
    token_file,
)
from farspan.lm.data.demonstrations import demonstration_encoder
from farspan.lm.data.sources import distinct, divide, documents, size_in_bytes
from farspan.lm.data.spec import DataSpec, Source, TokenizerSpec
from farspan.lm.data.tokenizer import load_tokenizer, text_encoder, tokenizer_hash, train_tokenizer

_BATCH_CHARACTERS = 2_000_000  # encoded at once, on all cores; the tokenizer needs about 100 bytes per token meanwhile


def prepare(data: DataSpec, tokenizer: TokenizerSpec, progress: bool = True) -> list[Path]:
    """Prepare what is not prepared yet, and return the folders: one, or one per source of a mixture.

    progress: show a bar with rate and time left

    Raises ValueError and FileNotFoundError for sources and tokenizers that cannot be used, OSError of the file system;
    what was written aside is removed then.
    """
    parts = corpus_parts(data)
    folders = [folder for folder, _ in parts]
    recipe_hash = _recipe_hash(data)
    if all(_is_prepared(folder, recipe_hash, tokenizer) for folder in folders):
        for folder in folders:
            _say(f"{folder}: already prepared, {_summary(read_metadata(folder))}; delete it to prepare it again")
        return folders
    _train_if_missing(data, tokenizer)
    loaded = load_tokenizer(tokenizer.path)
    _check_vocabulary(tokenizer, len(loaded))
    described = {
        "tokenizer": tokenizer.path,
        "tokenizer_hash": tokenizer_hash(tokenizer.path),
        "vocab_size": len(loaded),
        "dtype": "uint16" if len(loaded) <= 1 << 16 else "uint32",
        "eos_token_id": loaded.eos_token_id,
        "pad_token_id": loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id,
        "versions": {name: importlib.metadata.version(name) for name in ("farspan", "tokenizers", "sentencepiece")}
        | {"python": platform.python_version()},
    }
    encode = text_encoder(loaded)
    encode_answers = demonstration_encoder(loaded, encode)
    seen: set[bytes] = set()
    for folder, sources in parts:
        began = time.perf_counter()
        metadata = described | {
            "recipe_hash": recipe_hash,
            "sources": [source.model_dump(exclude_defaults=True, exclude={"weight"}) for source in sources],
            "validation": data.validation,
            "demonstrations": sources[0].is_demonstrations,
        }
        texts = _tracked(_divided(sources, data.validation, seen), sources, str(folder), progress)
        metadata = _write(folder, texts, encode_answers if sources[0].is_demonstrations else encode, metadata)
        seconds = time.perf_counter() - began
        _say(f"{folder}: {_summary(metadata)}, {seconds:.1f} s, {_text_bytes(metadata) / seconds / 1e6:.1f} MB/s")
    return folders


def _train_if_missing(data: DataSpec, tokenizer: TokenizerSpec) -> None:
    if tokenizer.vocab_size is None or Path(tokenizer.path).exists():
        return
    began = time.perf_counter()
    _say(f"training a tokenizer: {tokenizer.vocab_size:,} {tokenizer.model} pieces ...")
    seen: set[bytes] = set()
    divided = (_divided(sources, data.validation, seen) for _, sources in corpus_parts(data))
    texts = (text for split, text in chain.from_iterable(divided) if split == "train")
    train_tokenizer(texts, tokenizer.path, tokenizer.vocab_size, tokenizer.model)
    _say(f"{tokenizer.path}: tokenizer of {tokenizer.vocab_size:,} entries, {time.perf_counter() - began:.1f} s")


def _check_vocabulary(tokenizer: TokenizerSpec, actual: int) -> None:
    if tokenizer.vocab_size not in (None, actual):
        raise ValueError(
            f"tokenizer {tokenizer.path} has {actual:,} entries, not vocab_size={tokenizer.vocab_size}; "
            f"delete its folder to train it again, or correct vocab_size"
        )


def _divided(sources: Iterable[Source], validation: float, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    return divide(distinct(chain.from_iterable(documents(source) for source in sources), seen), validation)


def _is_prepared(folder: Path, recipe_hash: str, tokenizer: TokenizerSpec) -> bool:
    if not (folder / METADATA).is_file():
        return False
    metadata = read_metadata(folder)
    if (Path(tokenizer.path) / "tokenizer.json").is_file():
        _check_vocabulary(tokenizer, metadata["vocab_size"])
        same_tokenizer = tokenizer_hash(tokenizer.path) == metadata["tokenizer_hash"]
    else:
        same_tokenizer = tokenizer.vocab_size is None and tokenizer.path == metadata["tokenizer"]  # a hub name
    return same_tokenizer and recipe_hash == metadata["recipe_hash"]


def _recipe_hash(data: DataSpec) -> str:
    """What decides the documents: all sources (one does not repeat what another gave) and the share held out."""
    sources = [source.model_dump(exclude={"weight"}) for source in data.sources]
    for source in sources:  # as they were written before there were demonstrations
        if source["prompt"] is None and not source["chat"]:
            del source["prompt"], source["chat"]
    return hashlib.sha256(json.dumps([FORMAT, data.is_mixture, sources, data.validation]).encode()).hexdigest()


def _write(folder: Path, texts: Iterable[tuple[str, str]], encode, metadata: dict) -> dict:
    """Write one corpus folder from (split, text); returns its whole metadata."""
    partial = folder / ".preparing"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if metadata["demonstrations"]:
            writing = encode
        else:
            writing = lambda texts: (([*ids, metadata["eos_token_id"]], None) for ids in encode(texts))  # noqa: E731
        counts, digests = _write_tokens(
            partial, texts, writing, np.dtype(metadata["dtype"]), metadata["demonstrations"]
        )
        _check_counts(counts, metadata)
        fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
        metadata = {"format": FORMAT, "fingerprint": fingerprint, "splits": counts} | metadata
        (partial / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        (folder / METADATA).unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == METADATA):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return metadata


def _write_tokens(
    folder: Path, texts, encode, dtype: np.dtype, demonstrations: bool
) -> tuple[dict[str, dict], list[str]]:
    """Token and offset files of both splits, of demonstrations what is learned; their counts, and the files' sha256."""
    lengths = {split: array("q", [0]) for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    digests = {split: hashlib.sha256() for split in SPLITS}
    files = {split: open(token_file(folder, split), "wb") for split in SPLITS}  # noqa: SIM115
    learned_files = {split: open(learned_file(folder, split), "wb") for split in SPLITS if demonstrations}  # noqa: SIM115
    learned_digests = {split: hashlib.sha256() for split in learned_files}
    try:
        for batch in _batches(texts):
            for (split, text), (ids, learned) in zip(batch, encode([text for _, text in batch]), strict=True):
                content = np.array(ids, dtype=dtype).tobytes()
                files[split].write(content)
                digests[split].update(content)
                lengths[split].append(len(ids))
                if demonstrations:
                    learned_files[split].write(bytes(learned))
                    learned_digests[split].update(bytes(learned))
                text_bytes[split] += len(text.encode("utf-8"))
    finally:
        for file in (*files.values(), *learned_files.values()):
            file.close()
    counts, hashes = {}, []
    for split in SPLITS:
        offsets = np.cumsum(np.frombuffer(lengths[split], dtype=np.int64))
        np.save(offset_file(folder, split), offsets)
        hashes += [digests[split].hexdigest(), hashlib.sha256(offsets.tobytes()).hexdigest()]
        hashes += [learned_digests[split].hexdigest()] if demonstrations else []
        counts[split] = {
            "documents": len(offsets) - 1,
            "tokens": int(offsets[-1]),
            "bytes": text_bytes[split],
            "offsets_file_bytes": offset_file(folder, split).stat().st_size,
        }
    return counts, hashes


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for split, text in texts:
        batch.append((split, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_counts(counts: dict[str, dict], metadata: dict) -> None:
    """ValueError where nothing is left to train on."""
    if counts["train"]["documents"] > 0:
        return
    held_out = counts["validation"]["documents"]
    if held_out == 0:
        names = ", ".join(str(Source(**source)) for source in metadata["sources"])
        raise ValueError(f"the corpus is empty: {names} gave no document with text that no other source gave")
    raise ValueError(
        f"all {held_out} documents fall into the validation share of {metadata['validation']}; "
        f"lower data.validation or add documents"
    )


def _tracked(texts: Iterable[tuple[str, str]], sources: tuple[Source, ...], name: str, progress: bool):
    """Pass the documents on, with a bar of the bytes read."""
    sizes = [size_in_bytes(source) for source in sources]
    total = None if None in sizes else sum(sizes)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not (progress and console.is_terminal)
    ) as bar:
        task = bar.add_task(name, total=total)
        for split, text in texts:
            yield split, text
            bar.advance(task, len(text))


def _text_bytes(metadata: dict) -> int:
    return sum(counts["bytes"] for counts in metadata["splits"].values())


def _summary(metadata: dict) -> str:
    train, validation = (metadata["splits"][split] for split in SPLITS)
    documents = train["documents"] + validation["documents"]
    tokens = train["tokens"] + validation["tokens"]
    return (
        f"{documents:,} documents ({validation['documents']:,} held out), {tokens / 1e6:.3g}M tokens, "
        f"{_text_bytes(metadata) / tokens:.3g} bytes per token"
    )


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
