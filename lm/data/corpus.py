"""A prepared corpus: the tokens of many documents in one memory-mapped file, and where each document starts.

corpora/python/
  metadata.json              written last: a folder without it is not a corpus
  train.bin                  tokens, uint16 (vocabulary up to 65,536) or uint32, one document after the
                                 other, each with its end-of-text token
  train.offsets.npy          int64 [documents + 1]; document d is tokens[offsets[d] : offsets[d + 1]]
  train.learned.bin          of demonstrations alone: uint8 [tokens], 1 where a token is learned
  validation.bin, validation.offsets.npy
"""

import json
import re
from pathlib import Path

import numpy as np

from farspan.lm.data.spec import DataSpec, Source

FORMAT = 1
SPLITS = ("train", "validation")
METADATA = "metadata.json"


class Corpus:
    """One split of a prepared folder, opened for reading; nothing is loaded into memory.

    tokens: [tokens] uint16 or uint32, memory-mapped
    offsets: [documents + 1] int64, memory-mapped
    lengths: [documents] int64, tokens of each document, at least 1 (its end-of-text token)
    learned: [tokens] uint8, memory-mapped, 1 for the tokens that carry loss; None where all do
    metadata: the folder's metadata.json

    Raises FileNotFoundError where nothing is prepared, ValueError where the split is empty or its files are not as long
    as the metadata says.
    """

    def __init__(self, directory: str | Path, split: str = "train"):
        self.directory = Path(directory)
        self.split = split
        self.metadata = read_metadata(self.directory)
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        counts = self.metadata["splits"][split]
        if counts["documents"] == 0:
            raise ValueError(f"corpus {self.directory} has no {split} documents; {_how_to_fill(split)}")
        dtype = np.dtype(self.metadata["dtype"])
        _check_size(token_file(self.directory, split), counts["tokens"] * dtype.itemsize)
        _check_size(offset_file(self.directory, split), counts["offsets_file_bytes"])
        self.tokens = np.memmap(token_file(self.directory, split), dtype=dtype, mode="r")
        self.offsets = np.load(offset_file(self.directory, split), mmap_mode="r")
        self.learned = None
        if self.metadata.get("demonstrations", False):  # not in folders from before there were any
            _check_size(learned_file(self.directory, split), counts["tokens"])
            self.learned = np.memmap(learned_file(self.directory, split), dtype=np.uint8, mode="r")
        if len(self.offsets) != counts["documents"] + 1 or self.offsets[-1] != counts["tokens"]:
            raise ValueError(
                f"{offset_file(self.directory, split)} does not describe {counts['documents']:,} documents of "
                f"{counts['tokens']:,} tokens; delete {self.directory} and prepare it again"
            )

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the folder's token and offset files: equal fingerprints are equal corpora."""
        return self.metadata["fingerprint"]

    @property
    def tokenizer_hash(self) -> str:
        return self.metadata["tokenizer_hash"]

    @property
    def vocab_size(self) -> int:
        return self.metadata["vocab_size"]

    @property
    def eos_token_id(self) -> int:
        return self.metadata["eos_token_id"]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of this split: turns nats per token into bits per byte."""
        counts = self.metadata["splits"][self.split]
        return counts["bytes"] / counts["tokens"]

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, [length] uint16 or uint32, its end-of-text token included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def check_tokenizer(self, tokenizer_hash: str, name: str | Path) -> None:
        """ValueError unless the corpus was made with this tokenizer; `name` is what the user calls it."""
        if tokenizer_hash != self.tokenizer_hash:
            raise ValueError(
                f"tokenizer {name} ({tokenizer_hash[:12]}) does not match corpus {self.directory}, which was made with "
                f"tokenizer {self.tokenizer_hash[:12]}; prepare again with `farspan data prepare RECIPE`"
            )


def open_corpora(data: DataSpec, split: str = "train") -> tuple[list[Corpus], list[float]]:
    """The prepared corpora of a recipe and what the loader mixes them by. Errors as `Corpus`."""
    weights = [source.weight for source in data.sources] if data.is_mixture else [1.0]
    return [Corpus(folder, split) for folder, _ in corpus_parts(data)], weights


def corpus_parts(data: DataSpec) -> list[tuple[Path, tuple[Source, ...]]]:
    """(folder, its sources): all sources in `data.path`, or a folder in it for each source of a mixture."""
    root = Path(data.path)
    if not data.is_mixture:
        return [(root, data.sources)]
    names = [re.sub(r"[^a-z0-9]+", "-", str(source).lower())[:40].strip("-") for source in data.sources]
    return [(root / f"{i}-{name}", (source,)) for i, (name, source) in enumerate(zip(names, data.sources, strict=True))]


def read_metadata(directory: Path) -> dict:
    """The metadata of a prepared folder. FileNotFoundError where there is none, ValueError where it cannot be used."""
    path = directory / METADATA
    if not path.is_file():
        parts = sorted(child.parent.name for child in directory.glob(f"*/{METADATA}"))
        if parts:
            raise FileNotFoundError(f"{directory} is a mixture; name one of its corpora: {', '.join(parts)}")
        raise FileNotFoundError(f"no prepared corpus at {directory}; make it with `farspan data prepare RECIPE`")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        written = metadata["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; delete {directory} and prepare it again") from None
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, this version reads {FORMAT}; prepare the corpus again")
    return metadata


def token_file(directory: Path, split: str) -> Path:
    return directory / f"{split}.bin"


def offset_file(directory: Path, split: str) -> Path:
    return directory / f"{split}.offsets.npy"


def learned_file(directory: Path, split: str) -> Path:
    return directory / f"{split}.learned.bin"


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else 0
    if actual != expected:
        raise ValueError(
            f"{path} holds {actual:,} bytes where the metadata says {expected:,}: the corpus is truncated or damaged; "
            f"delete {path.parent} and prepare it again"
        )


def _how_to_fill(split: str) -> str:
    if split == "validation":
        return "set data.validation above 0 and prepare it again"
    return "add sources to data.sources and prepare it again"
