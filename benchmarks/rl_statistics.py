"""What attention statistics and token weights add to a step of reinforcement learning, in time; and their memory.

    python benchmarks/rl_statistics.py --tokens 4096 --output benchmarks/results/DEVICE-DATE/rl-statistics

with the Python that farspan is installed in. A step without its sampling, on one prompt and response: forward, backward
and AdamW, and before them, where there are several updates to a rollout, a pass for old log-probabilities. Statistics
are collected from that pass, or where there is none from the update's own; beside it, what a pass of their own adds.
Sides take turns; on a CPU the seconds are those of the process. Memory: bytes of tensors that the statistics of one
layer hold at most, at each length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from farspan.eval.memory import peak_bytes
from farspan.eval.timing import alternate, stopwatch
from farspan.layers import Sequence, build
from farspan.layers.attention_tap import listening
from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import DecoderForCausalLM
from farspan.lm.rl.credit import weights
from farspan.lm.rl.spec import CreditSpec
from farspan.lm.rl.statistics import attention_statistics, collect

MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "window": {"window": 1025},
    "rat": {"chunk": 16},
    "cca": {"group": 16, "window": 1024},
    "softplus": {"power": 15},
    "local_linear": {},
    "titans": {"variant": "mag", "window": 512},
}
VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="softmax,llama", help="mixers, and llama, separated by commas")
    parser.add_argument("--tokens", type=int, default=4096, help="of the response; the prompt has 128")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="8192,16384,32768", help="lengths for memory, separated by commas")
    parser.add_argument("--mixers", default=",".join(MIXERS), help="for memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {**vars(arguments), "output": str(arguments.output), "steps": [], "bytes": []}
    for name in filter(None, arguments.models.split(",")):
        model = make(name, arguments.layers, arguments.width).to(device)
        row = {"model": name, **step_seconds(model, arguments.tokens, arguments.rounds, device)}
        result["steps"].append(row)
        print(
            f"{name}: step {row['step']:.3g} s, with old log-probabilities {row['step_old']:.3g} s; statistics and "
            f"weights add {row['collected']:.1%} from that pass, {row['updating']:.1%} from the update's, "
            f"{row['own_pass']:.1%} in a pass of their own",
            flush=True,
        )
    for name in filter(None, arguments.mixers.split(",")):
        lengths = [int(length) for length in arguments.memory.split(",") if length]
        found = {length: layer_bytes(name, length, device) for length in lengths}
        result["bytes"].append({"mixer": name, "bytes": found})
        per_token = ", ".join(f"{length:,}: {found[length] / length:.0f}" for length in lengths)
        print(f"{name}: bytes per token and layer of 2 heads of 64, {per_token}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "rl_statistics.json").write_text(json.dumps(result, indent=1) + "\n")


def make(name: str, layers: int, width: int) -> Any:
    """A policy with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": width // 64, "max_position_embeddings": 65536}
    if name == "llama":
        from transformers import AutoModelForCausalLM, LlamaConfig

        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, intermediate_size=4 * width))
    pattern = [{"mixer": name, **MIXERS[name]}]
    return DecoderForCausalLM(DecoderConfig(**sizes, mixer_pattern=pattern))


def step_seconds(model: Any, tokens: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step without and with a pass for old log-probabilities, and what statistics add to each."""
    ids = torch.randint(0, VOCABULARY, (1, 128 + tokens), device=device)
    mask = torch.ones_like(ids)
    response = mask.clone()
    response[:, :128] = 0
    credit, optimizer = CreditSpec(), torch.optim.AdamW(model.parameters(), lr=0.0)
    model.train()

    def log_probabilities() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 127:-1].float()
        return logits.log_softmax(-1).gather(-1, ids[:, 128:, None])[..., 0]

    def gamma_of(found: Any) -> torch.Tensor:
        values = {name: getattr(found, name) for name in ("waad", "fai", "fai_count")}
        return weights(credit, response, **values).gamma[:, 128:]

    def step(old: bool, credit_from: str = "") -> None:
        gamma: torch.Tensor | float = 1.0
        before = None

        def listen(to: str) -> Any:
            return collect(model, mask, response) if credit_from == to else nullcontext()

        if old:
            with torch.no_grad(), listen("old") as collector:
                before = log_probabilities()
            if collector:
                gamma = gamma_of(collector.statistics())
        if credit_from == "own":
            gamma = gamma_of(attention_statistics(model, ids, mask, response))
        with listen("update") as collector:
            new = log_probabilities()
        if collector:
            gamma = gamma_of(collector.statistics())
        ratio = (new - (new.detach() if before is None else before)).exp()
        (-(gamma * torch.minimum(ratio, ratio.clamp(0.8, 1.2))).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    sides: dict[str, Callable[[], None]] = {
        "step": lambda: step(old=False),
        "updating": lambda: step(old=False, credit_from="update"),
        "own_pass": lambda: step(old=False, credit_from="own"),
        "step_old": lambda: step(old=True),
        "collected": lambda: step(old=True, credit_from="old"),
    }
    sides["step"]()
    watch = stopwatch(device) if device.type == "cuda" else process_seconds
    times = alternate(sides, range(rounds), watch)

    def added(side: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[side], times[base], strict=True)) - 1

    middle = {name: statistics.median(times[name]) for name in ("step", "step_old")}
    base = {"updating": "step", "own_pass": "step", "collected": "step_old"}
    return {**middle, **{side: added(side, of) for side, of in base.items()}}


def layer_bytes(name: str, length: int, device: torch.device) -> int:
    """What the statistics of one layer of two heads of 64 hold at most, over its own inputs."""
    torch.manual_seed(0)
    mixer = build(name, width=128, heads=2, **MIXERS[name]).to(device)
    sequence = Sequence.rows(1, length, device)
    rows = torch.arange(length, device=device) >= 128
    heard: list[Any] = []
    with torch.no_grad(), listening(lambda module, build: heard.append(build())):
        mixer(torch.randn(1, length, 128, device=device), sequence)
    return peak_bytes(lambda: heard[0].statistics(rows, 10, (10, 100)))


def process_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
