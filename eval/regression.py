"""Test-time regression: which mixer predicts y from x best, without any training (arXiv 2510.01450, section 4).

A sequence is cut into segments, each with a linear map of its own and inputs around a centre of its own, so the whole
is piecewise linear and not stationary. Keys are the inputs and values the targets so far; the query is the next input,
and the output is the prediction of its target. No projections, no parameters: what is compared is the estimator.

    softmax    the local constant fit
    ridge      one linear map for all keys alike, without intercept: exact linear attention, as MesaNet computes it
    local      the local linear fit, `local_linear`

Each takes the best of a grid of scales (of the scores) and ridges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

from farspan.eval.report import COLORS, described
from farspan.kernels.local_linear import local_linear_attention
from farspan.kernels.softmax import softmax_attention

ESTIMATORS = ("softmax", "ridge", "local")


class Setting(NamedTuple):
    """channels: of inputs and targets. segment: tokens of a stretch with one linear map."""

    channels: int
    segment: int


# Errors of `local` over those of `softmax` by an independent implementation, on two other sequences of 1024 tokens.
EXPECTED = {Setting(16, 128): 0.336, Setting(16, 256): 0.165, Setting(16, 512): 0.043, Setting(32, 128): 0.307}
MOST_RATIO, MOST_TAIL = 0.4, 0.02  # what `local` is held to: of softmax's error, and at the end of every segment


@dataclass(frozen=True)
class Protocol:
    """settings: each a row. length: tokens of a sequence. sequences: of each setting, drawn from `seed`.

    scales, ridges: the grid; a ridge is relative to the sum of the weights, and inputs have length 1.
    """

    settings: tuple[Setting, ...] = tuple(EXPECTED)
    length: int = 1024
    sequences: int = 8
    seed: int = 0
    scales: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 40.0)
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2)

    def __post_init__(self) -> None:
        for channels, segment in self.settings:
            if channels < 1 or segment < 4:
                raise ValueError(f"setting {channels}:{segment} needs a channel or more, and segments of 4 or more")
            if self.length % segment:
                raise ValueError(f"length={self.length} is no whole number of segments of {segment}")
            if self.length <= 2 * channels:
                raise ValueError(
                    f"length={self.length} leaves nothing to score: the first 2 x {channels} tokens do not count"
                )


def draw(setting: Setting, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [length, channels], float64: inputs of length 1, targets of variance 1.

    In each segment a map W and a centre c, of entries N(0, 1): x = normalize(c + N(0, I) / 2), y = W x.
    """
    return draw_next(setting, length, torch.Generator().manual_seed(seed))


def draw_next(setting: Setting, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The next sequence of a generator, as `draw` describes it."""
    channels = setting.channels
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs, targets = [], []
    for _ in range(length // setting.segment):
        weight, centre = normal(channels, channels), normal(channels)
        x = torch.nn.functional.normalize(centre + 0.5 * normal(setting.segment, channels), dim=-1)
        inputs.append(x)
        targets.append(x @ weight.T)
    return torch.cat(inputs), torch.cat(targets)


def predictions(x: torch.Tensor, y: torch.Tensor, scales: Sequence[float], ridges: Sequence[float]) -> dict[str, Any]:
    """What each estimator says of y[1:], from what came before each: [points of its grid, length - 1, channels].

    x, y: [length, channels]. Softmax has a point for each scale, `ridge` for each ridge, `local` for each scale and,
    within it, each ridge.
    """
    keys, values, queries = x[:-1], y[:-1], x[1:]  # so causal is strictly causal
    lengths, offsets = (len(keys),), torch.tensor([0, len(keys)], dtype=torch.int32)
    packed = [z[None, :, None] for z in (keys, values)]

    def heads(count: int) -> torch.Tensor:
        return queries[None, :, None].expand(-1, -1, count, -1)

    by_scale = heads(len(scales)) * torch.tensor(scales, dtype=x.dtype)[:, None]
    softmax, _ = softmax_attention(by_scale, *packed, lengths, offsets, scale=1.0)
    points = torch.tensor(list(product(scales, ridges)), dtype=x.dtype)
    scale, ridge = points.unbind(1)
    local, _, _ = local_linear_attention(heads(len(points)), *packed, ridge, lengths, offsets, scale=scale)
    return {
        "softmax": softmax[0].transpose(0, 1),
        "ridge": torch.stack([global_ridge(queries, keys, values, ridge) for ridge in ridges]),
        "local": local[0].transpose(0, 1),
    }


def global_ridge(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ridge: float) -> torch.Tensor:
    """W q, [n, channels]; W fits the n keys and values so far, all alike: W = sum v k' (sum k k' + n ridge I)^-1."""
    count = torch.arange(1, len(keys) + 1, dtype=keys.dtype)[:, None, None]
    gram = (keys[:, :, None] * keys[:, None, :]).cumsum(0) / count
    cross = (keys[:, :, None] * values[:, None, :]).cumsum(0) / count
    weight = torch.linalg.solve(gram + ridge * torch.eye(keys.shape[1], dtype=keys.dtype), cross)
    return torch.einsum("td,tde->te", queries, weight)


@torch.no_grad()
def regress(protocol: Protocol, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Mean squared errors at the best point of each estimator's grid, a row for each setting and estimator.

    mse: over the tokens from number 2 x channels on (from 0), and its standard error over the sequences. quarters: by
    segment, of its second and of its last quarter. curve: by token, from the second one on.
    `progress` is called with a line of text for each setting and sequence.
    """
    grids = {
        "softmax": [(scale, None) for scale in protocol.scales],
        "ridge": [(None, ridge) for ridge in protocol.ridges],
        "local": list(product(protocol.scales, protocol.ridges)),
    }
    rows = []
    for setting in protocol.settings:
        errors: dict[str, list[torch.Tensor]] = {name: [] for name in ESTIMATORS}
        for number in range(protocol.sequences):
            progress(f"{setting.channels} channels, segments of {setting.segment}: sequence {number + 1}")
            x, y = draw(setting, protocol.length, protocol.seed + number)
            for name, found in predictions(x, y, protocol.scales, protocol.ridges).items():
                errors[name].append((found - y[1:]).square().mean(-1))
        for name in ESTIMATORS:
            rows.append(
                {**setting._asdict(), "estimator": name, **_best(torch.stack(errors[name]), grids[name], setting)}
            )
    return {"protocol": described(protocol), "rows": rows, "targets": targets(rows)}


def _best(errors: torch.Tensor, grid: list[tuple[float | None, float | None]], setting: Setting) -> dict[str, Any]:
    """A row from the errors [sequences, points, length - 1]."""
    scored = errors[:, :, 2 * setting.channels - 1 :].mean(-1)
    best = int(scored.mean(0).argmin())
    by_token = errors[:, best].mean(0)
    segments = torch.nn.functional.pad(by_token, (1, 0), value=float("nan")).view(-1, setting.segment)
    quarter = setting.segment // 4
    spread = scored[:, best].std().item() / len(errors) ** 0.5 if len(errors) > 1 else None
    return {
        "scale": grid[best][0],
        "ridge": grid[best][1],
        "mse": scored[:, best].mean().item(),
        "stderr": spread,
        "second_quarters": segments[:, quarter : 2 * quarter].mean(1).tolist(),
        "last_quarters": segments[:, -quarter:].mean(1).tolist(),
        "curve": [float(f"{error:.4g}") for error in by_token.tolist()],
    }


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is claimed, what was found, what an independent implementation found, and whether it holds, by setting."""
    found = []
    for setting in dict.fromkeys(_setting(row) for row in rows):
        by = {row["estimator"]: row for row in rows if _setting(row) == setting}
        softmax, ridge, local = (by[name]["last_quarters"] for name in ESTIMATORS)
        ratio = by["local"]["mse"] / by["softmax"]["mse"]
        gain = max(end / start for start, end in zip(by["local"]["second_quarters"], local, strict=True))
        claims = [
            (f"mse of local / softmax at most {MOST_RATIO}", ratio, ratio <= MOST_RATIO),
            (f"local ends every segment below {MOST_TAIL}", max(local), max(local) < MOST_TAIL),
            ("local improves within every segment: last quarter / second", gain, gain < 1),
        ]
        if later := list(zip(ridge[1:], local[1:], strict=True)):
            lost, worse = min(ridge[1:]) / ridge[0], min(other / ours for other, ours in later)
            claims += [
                ("ridge ends later segments above its first: least ratio", lost, lost > 1),
                ("ridge ends later segments above local: least ratio", worse, worse > 1),
            ]
        best = min(softmax[0], local[0]) / ridge[0]
        claims.append(("ridge ends the first segment best: best other / ridge", best, best > 1))
        for claim, value, holds in claims:
            expected = EXPECTED.get(setting) if value is ratio else None
            told = {"claim": claim, "found": value, "expected": expected, "holds": holds}
            found.append({**setting._asdict(), **told})
    return found


def _setting(row: dict[str, Any]) -> Setting:
    return Setting(row["channels"], row["segment"])


def picture(result: dict[str, Any]) -> Any:
    """Error by token, a panel for each setting, averaged over 16 tokens: a matplotlib figure."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(_setting(row) for row in result["rows"]))
    columns = min(2, len(settings))
    lines = -(-len(settings) // columns)
    figure = Figure(figsize=(6.5 * columns, 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes, setting in zip(panels, settings, strict=False):
        own = [row for row in result["rows"] if _setting(row) == setting]
        for color, row in zip(COLORS[1:], own, strict=False):
            curve = torch.tensor(row["curve"], dtype=torch.float64)
            width = min(16, len(curve))
            smooth = curve.unfold(0, width, 1).mean(1)
            at = torch.arange(len(smooth)) + 1 + width / 2
            axes.plot(at, smooth, color=color, linewidth=1.2, label=f"{row['estimator']}: {row['mse']:.3g}")
        for edge in range(setting.segment, result["protocol"]["length"], setting.segment):
            axes.axvline(edge, color="#d0d0d0", linewidth=0.8, zorder=0)
        axes.set(yscale="log", xlabel="token (grey: a new linear map)")
        axes.set_title(
            f"{setting.channels} channels, segments of {setting.segment}: squared error", loc="left", fontweight="bold"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", fontsize="small")
    return figure
