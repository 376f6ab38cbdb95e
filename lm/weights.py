"""The tensors of a stored model by name, each read when it is asked for."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# As transformers writes them, whole or in parts; the first that is there counts.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Stored:
    """A tensor that is still where it is stored."""

    shape: tuple[int, ...]
    read: Callable[[], "torch.Tensor"]


def stored_tensors(source: Path | str) -> dict[str, Stored]:
    """The tensors of an exported folder, or of a model on the hub, whose files are downloaded unless they are cached.

    safetensors, or torch's own files, of which no code is run. ValueError, one line, where there are none or they
    cannot be read.
    """
    found = {}
    for file in _files(source):
        found |= _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)
    return found


def in_memory(tensors: dict[str, "torch.Tensor"]) -> dict[str, Stored]:
    """Tensors that were read already, in the same form."""
    return {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


def _files(source: Path | str) -> list[Path]:
    for name in _FILES:
        file = _file(source, name)
        if file is None:
            continue
        if file.suffix != ".json":
            return [file]
        parts = {name: _file(source, name) for name in sorted(set(json.loads(file.read_text())["weight_map"].values()))}
        if missing := [name for name, part in parts.items() if part is None]:
            raise ValueError(f"{source} lacks {missing[0]}, which its {file.name} names")
        return list(parts.values())
    raise ValueError(f"{source} holds no weights: none of {', '.join(_FILES)} is there")


def _file(source: Path | str, name: str) -> Path | None:
    if isinstance(source, Path):
        return source / name if (source / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def _safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> "torch.Tensor":
        with safe_open(file, framework="pt") as opened:  # anew: what it has mapped counts as memory while it is open
            return opened.get_tensor(name)

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{file} is no file of safetensors: {error}") from None
    return {name: Stored(shape, partial(read, name)) for name, shape in shapes.items()}


def _torch_file(file: Path) -> dict[str, Stored]:
    import torch

    try:
        return in_memory(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is no file of tensors that can be read: {str(error).splitlines()[0]}") from None
