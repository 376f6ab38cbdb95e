"""Training speed of a `softmax` decoder beside the same-shaped Llama of transformers, both in a plain PyTorch loop."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from farspan.eval.memory import peak_bytes
from farspan.eval.timing import alternate, stopwatch
from farspan.lm.llama import renamed

PEER = "transformers Llama"
OURS = "farspan softmax"
TOLERANCE = 1e-5
_COLORS = ("#4878b0", "#9a9a9a")


@dataclass(frozen=True)
class Shape:
    """The model and the batch of both sides."""

    vocabulary: int = 4096
    width: int = 256
    hidden: int = 704
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    length: int = 512
    rows: int = 4

    @property
    def tokens(self) -> int:
        return self.length * self.rows


def bench_train(shape: Shape, steps: int, device: str, rounds: Iterable[int]) -> dict[str, Any]:
    """Tokens/s and peak bytes of each side, and the median over the rounds of the ratio of their speeds.

    In each round both sides take `steps` AdamW steps, one side after the other, in alternating order, so that a machine
    that slows down slows both. Raises RuntimeError, before anything is timed, if the two losses differ by more than
    1e-5 with equal weights in float32.
    """
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.length), device=device, generator=generator)
    check = _check(shape, ids)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    sides = {name: build(shape).to(device=device, dtype=dtype) for name, build in ((OURS, _decoder), (PEER, _llama))}
    losses = {OURS: _decoder_loss(shape, ids), PEER: _llama_loss(ids)}
    trainers = {name: _trainer(sides[name], losses[name]) for name in sides}

    memory = {name: peak_bytes(trainer) for name, trainer in trainers.items()}
    for trainer in trainers.values():  # the first step after the profiler is slow
        trainer()
    works = {name: _repeated(trainer, steps) for name, trainer in trainers.items()}
    seconds = alternate(works, rounds, stopwatch(torch.device(device)))
    speeds = {name: [shape.tokens * steps / time for time in times] for name, times in seconds.items()}
    ratios = [ours / peer for ours, peer in zip(speeds[OURS], speeds[PEER], strict=True)]
    return {
        "shape": asdict(shape),
        "dtype": str(dtype),
        "steps_per_round": steps,
        "loss_difference": check,
        "tokens_per_second": speeds,
        "median_tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "median_ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_bytes": memory,
    }


def _trainer(model: torch.nn.Module, loss: Callable[[Any], torch.Tensor]) -> Callable[[], None]:
    """One step of a plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the moments of AdamW are there before memory is counted
    return step


def _repeated(step: Callable[[], None], steps: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(steps):
            step()

    return work


def picture(result: dict[str, Any]) -> Any:
    """The speed of each side, round by round, and its memory: a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2, width_ratios=[2, 1])
    for (name, values), color in zip(result["tokens_per_second"].items(), _COLORS, strict=True):
        speed.plot(range(1, len(values) + 1), values, "o-", color=color, label=name)
    speed.set(xlabel="round", ylabel="tokens/s")
    speed.set_ylim(0, 1.1 * max(map(max, result["tokens_per_second"].values())))
    speed.legend(frameon=False, loc="lower right")
    speed.set_title(f"median ratio {result['median_ratio']:.3f}", loc="left", fontweight="bold")
    bars = memory.bar(
        [name.replace(" ", "\n") for name in result["peak_bytes"]],
        [size / 1e6 for size in result["peak_bytes"].values()],
        color=_COLORS,
    )
    memory.bar_label(bars, fmt="{:,.0f}")
    memory.set_ylabel("peak memory of a step, MB")
    for axes in (speed, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _decoder_loss(shape: Shape, ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """Mean nats per token of the packed rows: the form in which the trainer feeds the decoder."""
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    packed = {"input_ids": ids.reshape(1, -1), "shift_labels": labels.reshape(1, -1)}
    bounds = torch.arange(0, shape.tokens + 1, shape.length, dtype=torch.int32)
    count = shape.rows * (shape.length - 1)
    return lambda model: model(**packed, cu_seqlens=bounds, num_items_in_batch=count, use_cache=False).loss


def _llama_loss(ids: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    return lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss


def _sizes(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.length,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        # Activations of unit variance: with small ones, attention hardly moves the loss and the check would be blind.
        "initializer_range": shape.width**-0.5,
    }


def _decoder(shape: Shape) -> Any:
    from farspan.lm.config import DecoderConfig
    from farspan.lm.decoder import DecoderForCausalLM

    return DecoderForCausalLM(DecoderConfig(**_sizes(shape), mixer_pattern=["softmax"]))


def _llama(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_sizes(shape), attn_implementation="sdpa"))


def _check(shape: Shape, ids: torch.Tensor) -> float:
    """The difference of the two losses in float32, with the Llama's weights in both."""
    llama, decoder = _llama(shape).to(ids.device), _decoder(shape).to(ids.device)
    decoder.load_state_dict({renamed(name): tensor for name, tensor in llama.state_dict().items()})
    with torch.no_grad():
        difference = abs(float(_decoder_loss(shape, ids)(decoder)) - float(_llama_loss(ids)(llama)))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the two models do not compute the same: their losses differ by {difference:.2g}")
    return difference
