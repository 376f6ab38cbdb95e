"""What a recipe would train, before it is trained: `farspan train --dry-run`."""

from typing import Any

import torch

from farspan.lm.initial import freeze
from farspan.lm.recipe import Recipe, StartSpec
from farspan.lm.train.engine import runs_bf16
from farspan.lm.train.optimizer import roles
from farspan.lm.train.report import count


def estimate(recipe: Recipe, processes: int) -> list[tuple[str, str]]:
    """(what, value) rows for a table: parameters, FLOPs, memory of one device (to about a fifth), steps."""
    from farspan.lm.decoder import DecoderForCausalLM

    shares, parallelism = recipe.resolve(processes), recipe.parallelism(processes, processes)
    config = recipe.decoder_config(**_vocabulary(recipe))
    with torch.device("meta"):
        model = DecoderForCausalLM(config)
    parameters, in_matrices = sum(p.numel() for p in model.parameters()), _in_matrices(model)
    if recipe.start is not None:
        freeze(model, recipe.start.trainable)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    length = recipe.batch.sequence_length
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = runs_bf16(recipe.parallel, device)
    memory = memory_bytes(recipe, config, parameters, trained, _in_matrices(model), processes, bf16)
    flops = [model.flops_per_token(length, causal=causal) for causal in (True, False)]
    steps = recipe.steps()
    rows = [
        ("parameters", f"{count(parameters)} ({count(in_matrices)} in matrices)"),
        *([("start", _start(recipe.start, trained))] if recipe.start is not None else []),
        ("FLOPs per token", f"{count(flops[0])} causal, {count(flops[1])} full, at length {length}"),
        ("batch", f"{recipe.batch.tokens} tokens in {shares.rows} rows; {shares.reason}"),
        *([("parallel", parallelism.reason)] if shares.context > 1 else []),
        ("steps", str(steps) if steps else f"measured at the start, to fill {recipe.train.minutes} minutes"),
    ]
    if steps:
        rows.append(("tokens", count(steps * recipe.batch.tokens)))
    rows += [(f"memory of a device: {what}", f"{size / 2**30:.3g} GiB") for what, size in memory.items()]
    return [
        *rows,
        ("memory of a device: sum", f"{sum(memory.values()) / 2**30:.3g} GiB"),
        ("expected", recipe.expected),
    ]


def _start(spec: StartSpec, trained: int) -> str:
    return f"weights of {spec.weights}; {count(trained)} parameters are trained (start.trainable={spec.trainable})"


def _in_matrices(model: Any) -> int:
    """Trainable parameters in hidden matrices, which Muon takes."""
    return sum(p.numel() for p in roles(model).matrices)


def _vocabulary(recipe: Recipe) -> dict[str, int]:
    """The vocabulary of a ready tokenizer, where neither section of the recipe states its size."""
    from farspan.lm.data.tokenizer import load_tokenizer

    if recipe.tokenizer is None or recipe.tokenizer.vocab_size is not None or "vocab_size" in recipe.model:
        return {}
    return {"vocab_size": len(load_tokenizer(recipe.tokenizer.path))}


def memory_bytes(
    recipe: Recipe, config: Any, parameters: int, trained: int, matrices: int, ranks: int, bf16: bool
) -> dict[str, float]:
    """Bytes on one device. Weights, gradients and optimizer as ZeRO shares them out; activations of one micro-batch,
    roughly.

    trained: parameters that are not frozen. matrices: of these, those in hidden matrices.
    """
    zero, size = recipe.parallel.zero, 2 if bf16 else 4
    moments = 4 * (trained - matrices) * 2 + 4 * matrices * (1 if recipe.optimizer.name == "muon" else 2)
    shares = recipe.resolve(ranks)
    tokens = shares.micro_rows * recipe.batch.sequence_length // shares.context
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    one_layer = tokens * size * (10 * width + 3 * inner)  # norms, q k v o, residuals; gate, up and their product
    kept = tokens * size * width * layers + one_layer if recipe.parallel.checkpointing else one_layer * layers
    return {
        "weights": size * parameters / (ranks if zero == 3 else 1),
        "gradients": 4 * trained / (ranks if zero >= 2 else 1),
        "optimizer": (4 * trained + moments) / ranks,  # fp32 master weights and moments
        "activations": kept,
    }
