"""Deep memories on real text: gradients that do not explode with the row, training in bf16 that stays bounded.

Run as a program it trains at the size that docs/titans.md reports.
"""

import argparse
import itertools
import math
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from farspan.layers import build


class Reader(nn.Module):
    """Predicts the next byte: embedding, one mixer on the residual stream, output."""

    def __init__(self, width: int, heads: int, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.mixer = build("titans", width=width, heads=heads, **options)
        self.output = nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """text: [1, T + 1], bytes. Returns the mean loss over T, and the mixer's metrics."""
        x = self.embedding(text[:, :-1])
        mixed = self.mixer(self.norms[0](x))
        logits = self.output(self.norms[1](x + mixed.output))
        return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()), mixed.metrics


def rows(tokens: int):
    """Rows of tokens + 1 bytes of the standard library: its keys repeat, which is what makes inner steps add up."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_bytes()
        for start in range(0, len(text) - tokens, tokens):
            yield torch.tensor(list(text[start : start + tokens + 1]))[None]


def train(tokens: int, steps: int, report=None, **options) -> list[dict[str, float]]:
    """`steps` of AdamW on weights in fp32, each on a row of `tokens` with a model rounded to bf16, as on a GPU:
    activations, so q, k and v, are bf16 too.
    """
    torch.manual_seed(0)
    model = Reader(width=32, heads=2, variant="memory", depth=4, decay_to="init", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    history = []
    for step, text in enumerate(itertools.islice(rows(tokens), steps), 1):
        rounded = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
        loss, metrics = functional_call(model, rounded, text)
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values = {"loss": loss, "gradient": gradient, **metrics}
        history.append({name: float(value.detach()) for name, value in values.items()})
        if report is not None:
            report(step, history[-1])
    assert len(history) == steps
    return history


def check(history: list[dict[str, float]]) -> None:
    """Finite throughout, learning, and no norm of the memory on its way up. Gradients have single high steps."""
    for values in history:
        assert all(math.isfinite(value) for value in values.values()), values
    norms = [values["memory/weight_norm"] for values in history]
    assert max(norms) < 3 * norms[0]
    tenth = max(1, len(history) // 10)
    means = [sum(values["loss"] for values in part) / tenth for part in (history[:tenth], history[-tenth:])]
    assert means[1] < means[0] - 0.5


@pytest.mark.parametrize(("depth", "refresh"), [(1, 1), (2, 16), (3, 64), (4, 64)])
def test_gradients_do_not_grow_with_the_row(depth, refresh):
    """Weights that decay to zero shrink what a norm at the end divides by: depth 2 then has 119 here, depth 4 4e11."""
    torch.manual_seed(0)
    model = Reader(width=32, heads=2, variant="memory", depth=depth, refresh=refresh, decay_to="init")
    loss, _ = model(next(rows(1024)))
    loss.backward()
    assert nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]) < 10


def test_a_deep_memory_in_bf16_stays_bounded():
    check(train(tokens=384, steps=30, refresh=64))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a four-layer memory on long rows and prints its norms")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--refresh", type=int, default=64)
    arguments, start = parser.parse_args(), time.perf_counter()

    def line(step: int, values: dict[str, float]) -> None:
        if step == 1 or step % 10 == 0:
            print(
                f"{step:4d}  {time.perf_counter() - start:5.0f} s ",
                *(f"{k} {v:.3g}" for k, v in values.items()),
                flush=True,
            )

    check(train(arguments.tokens, arguments.steps, line, refresh=arguments.refresh))
