"""In-context regression: which mixer learns to predict y from x and the pairs before it (arXiv 2510.01450, section 4).

The data are those of test-time regression (`eval/regression.py`): piecewise linear, another map and another centre in
each segment. Tokens are x_0, y_0, x_1, y_1, ...; a model of two mixers, without MLPs, reads y off the token of each x
and is trained on fresh sequences. All mixers see the same sequences, from the same seed, for as many steps.

Two references are told where segments begin, which no mixer is: the mean of the segment's targets so far, and the ridge
regression on its pairs so far. Between them lies what a mixer can gain by fitting more than a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from farspan.eval.peers import named_options
from farspan.eval.regression import Setting, draw_next, global_ridge
from farspan.eval.report import COLORS, described
from farspan.layers import Sequence, build
from farspan.layers.mixer import Mixer, parse_options

LAYERS = 2
REFERENCES = ("segment mean", "segment ridge")
RIDGE = 1e-4  # of the second reference: targets have no noise
MIXERS = (
    "softmax",
    "local_linear:solver=cg",
    "rat:chunk=16",
    "titans:variant=memory:depth=2:expansion=1:refresh=8:decay_to=zero",
)


class Segments(NamedTuple):
    """x, y: float32 [rows, length, channels]."""

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Protocol:
    """settings: each trained and scored alone. length: pairs of a sequence. width, heads: of the models.

    steps of `rows` sequences each, AdamW; the rate `lr` is reached after a twentieth of the steps and falls to a tenth
    as a cosine. held_out: sequences that errors are measured on. seed: of weights and data.
    """

    settings: tuple[Setting, ...] = (Setting(4, 16), Setting(4, 32))
    length: int = 64
    width: int = 64
    heads: int = 2
    steps: int = 600
    rows: int = 16
    lr: float = 3e-3
    held_out: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for channels, segment in self.settings:
            if channels < 1 or segment < 4:
                raise ValueError(f"setting {channels}:{segment} needs a channel or more, and segments of 4 or more")
            if self.length % segment:
                raise ValueError(f"length={self.length} is no whole number of segments of {segment}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be above 0 and finite")
        if not 0 <= self.seed < 2**31:  # torch's generators take 32 bits, one of which tells training from held-out
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2^31")


class Regressor(nn.Module):
    """A linear embedding of x and of y, two residual mixers behind norms, a norm, a linear read-out."""

    def __init__(self, mixer: str, channels: int, width: int, heads: int) -> None:
        """mixer: a name and its options, as in "rat:chunk=16". ValueError where they are not known."""
        super().__init__()
        name, options = named_options(mixer)
        self.embed_x, self.embed_y = nn.Linear(channels, width), nn.Linear(channels, width)
        self.mixers = nn.ModuleList(build(name, **{"width": width, "heads": heads, **options}) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(LAYERS + 1))
        self.read = nn.Linear(width, channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers keep what they are given at the scale of their input; x and y enter with variance 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Mixer):
                module.reset_parameters()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x, y: [rows, length, channels], x of length 1. Returns what is said of y at each x, from the pairs before it
        [rows, length, channels], and the sum of the mixers' own losses, or None.
        """
        rows, length, channels = x.shape
        tokens = torch.stack([self.embed_x(x * channels**0.5), self.embed_y(y)], dim=2)
        h = tokens.reshape(1, 2 * rows * length, -1)
        sequence, losses = Sequence.rows(rows, 2 * length, x.device), []
        for mixer, norm in zip(self.mixers, self.norms, strict=False):
            mixed = mixer(norm(h), sequence)
            h = h + mixed.output
            losses += [] if mixed.loss is None else [mixed.loss]
        found = self.read(self.norms[-1](h[0, ::2]))
        return found.view(x.shape), sum(losses) if losses else None


def draws(setting: Setting, protocol: Protocol, held_out: bool) -> Callable[[int], Segments]:
    """A function that gives the next so many sequences, of the training data or of the held-out ones."""
    generator = torch.Generator().manual_seed(2 * protocol.seed + held_out)

    def following(rows: int) -> Segments:
        pairs = [draw_next(setting, protocol.length, generator) for _ in range(rows)]
        return Segments(*(torch.stack(side).float() for side in zip(*pairs, strict=True)))

    return following


def train(mixer: str, setting: Setting, protocol: Protocol, progress: Callable[[str], None]) -> Regressor:
    """A model trained on the mean squared error of y. `progress` is called with a line of text before each step."""
    with torch.random.fork_rng():
        torch.manual_seed(protocol.seed)
        model = Regressor(mixer, setting.channels, protocol.width, protocol.heads)
    following = draws(setting, protocol, held_out=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=protocol.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, protocol.steps))
    error = math.nan
    for _ in range(protocol.steps):
        progress(f"{mixer.split(':')[0]}, segments of {setting.segment}: error {error:.3f}")
        x, y = following(protocol.rows)
        found, own = model(x, y)
        loss = (found - y).square().mean()
        (loss if own is None else loss + own).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for layer in model.mixers:
            layer.after_step(lambda x: x)
        error = loss.item()
    return model


def _rate(step: int, steps: int) -> float:
    """The factor on the rate in a step, counted from 0."""
    warmup = max(1, steps // 20)
    done = (step - warmup) / max(1, steps - warmup)
    return (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * done)


@torch.no_grad()
def squared_errors(model: Regressor, data: Segments, at_once: int) -> torch.Tensor:
    """[rows, length]: the squared error of each y, averaged over channels; `at_once` rows at a time."""
    parts = zip(data.x.split(at_once), data.y.split(at_once), strict=True)
    return torch.cat([(model(x, y)[0] - y).square().mean(-1) for x, y in parts])


def reference_errors(data: Segments, segment: int) -> dict[str, torch.Tensor]:
    """[rows, length] of each reference; where a segment has no pair yet, both say 0."""
    x, y = (side.double().unflatten(1, (-1, segment)).flatten(0, 1) for side in data)
    count = torch.arange(1, segment, dtype=torch.float64)[:, None]
    fits = torch.stack([global_ridge(a[1:], a[:-1], b[:-1], RIDGE) for a, b in zip(x, y, strict=True)])
    said = dict(zip(REFERENCES, (y[:, :-1].cumsum(1) / count, fits), strict=True))
    first = y[:, :1].square().mean(-1)
    errors = {name: torch.cat([first, (found - y[:, 1:]).square().mean(-1)], 1) for name, found in said.items()}
    return {name: error.reshape(data.x.shape[:2]) for name, error in errors.items()}


def in_context_regression(
    mixers: list[str], protocol: Protocol, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Train each mixer on each setting and measure it on held-out sequences: a row for each, and for the references.

    mixers: names, each with options of its own if need be: "rat:chunk=16". ValueError, before anything is trained, for
    an unknown one. mse: over all tokens, with the standard error over sequences. quarters: of the segments, all alike.
    curve: by position in the segment. `progress` is called with a line of text before every step.
    """
    mixers = list(dict.fromkeys(mixers))
    check(mixers, protocol)
    rows = []
    for setting in protocol.settings:
        data = draws(setting, protocol, held_out=True)(protocol.held_out)
        for name, errors in reference_errors(data, setting.segment).items():
            rows.append({**setting._asdict(), "mixer": name, "parameters": None, **_summary(errors, setting)})
        for mixer in mixers:
            model = train(mixer, setting, protocol, progress)
            errors = squared_errors(model, data, protocol.rows)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            rows.append({**setting._asdict(), "mixer": mixer, "parameters": parameters, **_summary(errors, setting)})
    return {"protocol": described(protocol), "layers": LAYERS, "rows": rows}


def check(mixers: list[str], protocol: Protocol) -> None:
    """Raises ValueError, one line, for no mixer, an unknown one, or options that it does not take or cannot join."""
    if not mixers:
        raise ValueError(f"no mixer is named; name some, as in {','.join(MIXERS[:2])}")
    for mixer in mixers:
        name, options = named_options(mixer)
        parse_options(name, {"width": protocol.width, "heads": protocol.heads, **options})
    for setting in protocol.settings:
        for mixer in mixers:
            Regressor(mixer, setting.channels, protocol.width, protocol.heads)


def _summary(errors: torch.Tensor, setting: Setting) -> dict[str, Any]:
    """Of the errors [rows, length]."""
    by_row = errors.mean(1)
    by_position = errors.unflatten(1, (-1, setting.segment)).mean((0, 1))
    return {
        "mse": by_row.mean().item(),
        "stderr": by_row.std().item() / len(by_row) ** 0.5 if len(by_row) > 1 else None,
        "quarters": [part.mean().item() for part in by_position.tensor_split(4)],
        "curve": [float(f"{error:.4g}") for error in by_position.tolist()],
    }


def picture(result: dict[str, Any]) -> Any:
    """Error by position in the segment, a panel for each setting: a matplotlib figure."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((row["channels"], row["segment"]) for row in result["rows"]))
    figure = Figure(figsize=(6.5 * len(settings), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        own = [row for row in result["rows"] if (row["channels"], row["segment"]) == setting]
        colors = iter(COLORS[1:] * 9)
        for row in own:
            told = row["parameters"] is None
            style = {"color": COLORS[0], "linestyle": ":" if row["mixer"] == REFERENCES[0] else "--"}
            style = style if told else {"color": next(colors)}
            label = f"{row['mixer'].split(':')[0]}: {row['mse']:.3g}"
            axes.plot(range(len(row["curve"])), row["curve"], linewidth=1.4, label=label, **style)
        axes.set(yscale="log", ylim=(max(1e-3, axes.get_ylim()[0]), 2), xlabel="pairs of the segment before it")
        axes.set_title(f"{setting[0]} channels, segments of {setting[1]}: squared error", loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", fontsize="small")
    return figure
