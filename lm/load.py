"""A model and its tokenizer from whatever names them: a run, a checkpoint, an exported folder, or the hub."""

import contextlib
import io
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.lm.console import console
from farspan.lm.train import checkpoint

if TYPE_CHECKING:
    from farspan.lm.recipe import Recipe

_ENGINE = "deepspeed"  # the folder of its files in a checkpoint
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) of MODEL as the command line takes it; see `locate` for what that may be.

    device: of torch; None is CUDA where there is one, else the CPU
    dtype: of the weights, by its name in torch, or "auto" to keep the stored one; None is bfloat16 on CUDA and float32
        on the CPU

    A checkpoint's weights are its fp32 master weights. Checkpoints are unpickled: load those of your own runs only.
    Raises ValueError or OSError in one line that says what is missing, a tokenizer too.
    """
    model, tokenizer = load_any(name, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer: it was trained on a task, not on text; see `farspan eval recall`")
    return model, tokenizer


def load_any(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """As `load`, with None for the tokenizer of a model that was trained on a task."""
    import torch

    _quiet()
    source = locate(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    model, tokenizer = _checkpoint(source, dtype) if is_checkpoint(source) else _pretrained(str(source), dtype)
    return model.to(device).eval(), tokenizer


def locate(name: str, tell: bool = True) -> Path | str:
    """What MODEL means: a folder with `config.json`, a checkpoint folder, or a name on the hub.

    A run folder stands for its export `hf/`, or for its newest whole checkpoint if that is newer or the only one; which
    is printed if `tell`. Raises ValueError for a folder that is none of these.
    """
    path = Path(name)
    if not path.exists():
        if path.is_absolute() or not _HUB_NAME.fullmatch(name) or name.startswith("runs/"):
            raise ValueError(
                f"there is no folder {name}; give a run folder, a checkpoint, an exported folder or a hub name"
            )
        if tell:
            console.print(f"{name} is no folder here; asking the hub", style="dim", markup=False)
        return name
    if (path / "config.json").is_file():
        return path
    if is_checkpoint(path):
        return _within(path, verify=True)
    if not (path / "recipe.yaml").is_file():
        raise ValueError(
            f"{name} holds no model: an exported folder has config.json, a run folder has recipe.yaml, a checkpoint is "
            "the folder step-N in checkpoints/ of a run"
        )
    return _of_run(path, tell)


def _of_run(run: Path, tell: bool) -> Path:
    exported = run / "hf" / "config.json"
    manifests = [path.stat().st_mtime for path in run.glob(f"checkpoints/step-*/{checkpoint.MANIFEST}")]
    if exported.is_file() and exported.stat().st_mtime >= max(manifests, default=0.0):
        return exported.parent
    newest = checkpoint.latest(run / "checkpoints", warn=lambda line: console.print(line, style="yellow", markup=False))
    if newest is None and not exported.is_file():
        raise ValueError(f"run {run} has neither a whole checkpoint nor an export in hf/; train it first")
    chosen = newest or exported.parent
    if tell:
        console.print(f"using {chosen}", style="dim", markup=False)
    return _within(chosen)


def _within(path: Path, verify: bool = False) -> Path:
    """What to load of a checkpoint: of an RL run's, the folder of transformers that is in it."""
    names = ("config.json", "adapter_config.json")
    inner = next((file.parent for name in names for file in path.glob(f"checkpoint-*/{name}")), None)
    if inner is not None and verify and (found := checkpoint.problem(path)):
        raise ValueError(f"checkpoint {path} is not usable ({found}); take another of the same run")
    return inner or path


def is_checkpoint(path: Path | str) -> bool:
    return isinstance(path, Path) and (path / checkpoint.MANIFEST).is_file()


def _quiet() -> None:
    """No progress bars in logs and pipes, no word on each attempt to reach the hub, nor on DeepSpeed's device."""
    import torch
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _pretrained(name: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import farspan  # noqa: F401 - registers the decoder

    folder = Path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        if folder.is_dir() and not any(folder.glob("tokenizer*")):
            return model, None
        return model, AutoTokenizer.from_pretrained(name)
    except OSError as error:
        if Path(name).exists():
            raise
        raise ValueError(f"{name} is neither a folder here nor a model that the hub gives: {error}") from error


def _checkpoint(path: Path, dtype: str) -> tuple[Any, Any]:
    import torch

    from farspan.lm.data.tokenizer import load_tokenizer
    from farspan.lm.decoder import DecoderForCausalLM

    recipe = checkpoint_recipe(path)
    tokenizer = None if recipe.tokenizer is None else load_tokenizer(recipe.tokenizer.path)
    weights = checkpoint_weights(path)
    model = DecoderForCausalLM(recipe.decoder_config(tokenizer, weights["model.embed_tokens.weight"].shape[0]))
    model.load_state_dict(weights)
    return model.to(torch.float32 if dtype == "auto" else getattr(torch, dtype)), tokenizer


def checkpoint_recipe(path: Path) -> "Recipe":
    """The recipe of the run that saved a checkpoint. ValueError for a checkpoint that is damaged or in no run."""
    from farspan.lm.recipe import load_recipe

    if found := checkpoint.problem(path):
        raise ValueError(f"checkpoint {path} is not usable ({found}); take another of the same run")
    recipe_file = path.resolve().parent.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise ValueError(
            f"{path} is not in checkpoints/ of a run, whose recipe.yaml describes the model; put it back there"
        )
    return load_recipe(recipe_file)


def checkpoint_weights(path: Path) -> dict[str, Any]:
    """The fp32 master weights of any ZeRO stage by name, put together on the host; frozen weights, which have none, as
    they were trained with.
    """
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = path / _ENGINE
    weights = _bf16_master_weights(folder)
    if weights is None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it narrates
            weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_ENGINE)
    model = folder / "mp_rank_00_model_states.pt"
    if model.is_file():  # ZeRO 1 and 2; at ZeRO 1 DeepSpeed's function finds no frozen weights
        saved = torch.load(model, map_location="cpu", weights_only=False, mmap=True)
        weights |= {tied: weights[name] for tied, name in saved["shared_params"].items() if name in weights}
        weights |= {name: tensor.float() for name, tensor in saved["module"].items() if name not in weights}
    return weights


def _bf16_master_weights(folder: Path) -> dict[str, Any] | None:
    """Those of ZeRO 1 in bf16, whose optimizer is another, which DeepSpeed's own function does not read; None for all
    else.
    """
    import torch

    files = sorted(folder.glob("bf16_zero_pp_rank_*_optim_states.pt"), key=lambda file: int(file.name.split("_")[4]))
    parts: dict[str, list[torch.Tensor]] = {}
    for file in files:
        state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)["optimizer_state_dict"]
        if "param_slice_mappings" not in state or "zero_stage" in state:
            return None
        for flat, pieces in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, piece in pieces.items():
                parts.setdefault(name, []).append(flat[piece.start : piece.start + piece.numel])
    if not parts:
        return None
    saved = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False, mmap=True)
    return {name: torch.cat(pieces).view(saved["module"][name].shape) for name, pieces in parts.items()}
