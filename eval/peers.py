"""What is measured side by side: mixers of farspan, and the other implementations that are installed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from farspan.eval.gate import Check
from farspan.kernels.softmax import write_slots
from farspan.layers import Mixed, Sequence, build
from farspan.layers.mixer import State, parse_options
from farspan.layers.softmax import Softmax

BASELINE = "softmax"
# Tokens to check a mixer at, where its definition holds more than scores: titans' keeps a memory for every token.
MOST_CHECKED = {"titans": 256}


@dataclass(frozen=True)
class Side:
    """One row of a benchmark.

    build(): the layer as it is measured; define(): the same function by its definition, with the same parameters.
    baseline: whether it is softmax attention on a kernel of torch; ratios are against the fastest of these.
    trains, decodes: which benchmarks it takes part in. peer: not ours, and left out where it cannot run.
    most_checked: tokens that its definition can be asked for; None for as many as everybody's.
    """

    name: str
    build: Callable[[], nn.Module]
    define: Callable[[], nn.Module]
    baseline: bool = False
    trains: bool = True
    decodes: bool = True
    peer: bool = False
    most_checked: int | None = None

    def checked(self, length: int) -> int:
        """At how many tokens documents of this length are checked."""
        return min(length, self.most_checked or length)


def sides(mixers: list[str], width: int, heads: int, device: torch.device, alone: bool = False) -> list[Side]:
    """`softmax`, the named mixers, and on CUDA the peers that are installed; alone: the named mixers.

    mixers: names, each with options of its own if need be: "softplus:power=0" or "rat:chunk=64:groups=4".
    ValueError for an unknown mixer or option.
    """
    shape = {"width": width, "heads": heads}

    def ours(text: str) -> Side:
        name, options = named_options(text)
        options = {**shape, **options}
        parse_options(name, options)
        define = {**options, "backend": "reference"}
        return Side(
            text,
            lambda: build(name, **options),
            lambda: build(name, **define),
            baseline=text == BASELINE,
            most_checked=MOST_CHECKED.get(name),
        )

    found = [ours(text) for text in dict.fromkeys(mixers if alone else [BASELINE, *mixers])]
    return found + (_peers(shape) if device.type == "cuda" and not alone else [])


def named_options(text: str) -> tuple[str, dict[str, Any]]:
    """A mixer's name and the options that follow it: "rat:chunk=64" is ("rat", {"chunk": 64}); values are YAML."""
    name, *pairs = text.split(":")
    wrong = next((pair for pair in pairs if not pair.partition("=")[2]), None)
    if wrong is not None:
        raise ValueError(f"{text!r}: {wrong!r} is no option=value; write them as in rat:chunk=64:groups=4")
    return name, {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def checked(found: list[Side], check: Callable[[Side], Check]) -> tuple[dict[str, Check], dict[str, str]]:
    """The check of every side, and of the peers that cannot run here the reason instead."""
    checks, left_out = {}, {}
    for side in found:
        try:
            checks[side.name] = check(side)
        except Exception as error:
            if not side.peer:
                raise
            left_out[side.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return checks, left_out


def _peers(shape: dict[str, int]) -> list[Side]:
    """On CUDA: torch's other softmax kernels, and flash-attention and flash-linear-attention where installed."""

    def attention(name: str, attend: Callable[..., torch.Tensor], **flags: bool) -> Side:
        options = parse_options(BASELINE, shape)
        define = lambda: build(BASELINE, **shape, backend="reference")  # noqa: E731
        return Side(name, lambda: _Attention(options, attend), define, peer=True, **flags)

    found = [
        # over whole documents it is the kernel that `softmax` calls
        attention("sdpa flash", _sdpa(SDPBackend.FLASH_ATTENTION), baseline=True, trains=False),
        attention("sdpa cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), baseline=True),
    ]
    if find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        found.append(attention("flash-attn", lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal)))
    if find_spec("fla"):
        found.append(
            Side(
                "fla gated linear attention",
                lambda: _FlaLayer("chunk", **shape),
                lambda: _FlaLayer("fused_recurrent", **shape),
                decodes=False,
                peer=True,
            )
        )
    return found


class _Attention(Softmax):
    """The `softmax` layer around another kernel: attend(q, k, v, causal), all [documents, T, H, D].

    Takes documents of one length only, and a state whose rows stand at one position.
    """

    def __init__(self, options: Any, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__(options)
        self.attend = attend

    def core(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequence: Sequence, state: State | None
    ) -> torch.Tensor:
        if state is None:
            q, k, v = (x.unflatten(1, (sequence.documents, -1))[0] for x in (q, k, v))
            return self.attend(q, k, v, True).flatten(0, 1)[None]
        if not sequence.single_tokens or state["key"].shape[2] < sequence.totals[0]:
            return super().core(q, k, v, sequence, state)
        for name, new in (("key", k), ("value", v)):
            state[name] = write_slots(state[name], sequence.document_of_token, sequence.positions, new[0])
        keys, values = (state[name][:, :, : sequence.totals[0]].transpose(1, 2) for name in ("key", "value"))
        return self.attend(q.transpose(0, 1), keys, values, False).transpose(0, 1)


def _sdpa(kernel: SDPBackend) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        with sdpa_kernel(kernel):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return attend


class _FlaLayer(nn.Module):
    """flash-linear-attention's gated linear attention; its definition is its own step-by-step recurrence."""

    def __init__(self, mode: str, width: int, heads: int) -> None:
        from fla.layers import GatedLinearAttention

        super().__init__()
        self.layer = GatedLinearAttention(mode=mode, hidden_size=width, num_heads=heads)

    def forward(self, x: torch.Tensor, sequence: Sequence) -> Mixed:
        output = self.layer(x.unflatten(1, (sequence.documents, -1))[0])[0]
        return Mixed(output.flatten(0, 1)[None])
