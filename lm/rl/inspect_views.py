"""Views of an inspected response: text coloured by WAAD, by FAI and by credit, for a terminal and as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from farspan.lm.rl.inspect import Inspection

if TYPE_CHECKING:
    from rich.console import RenderableType

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """One way to colour the text. values: by token, None where undefined; marked: the tokens that stand out, and `mark`
    what they are. color: of values from `full` on, fading to nothing at `lowest`.
    """

    name: str
    meaning: str
    values: list[float | None]
    lowest: float
    full: float
    marked: list[bool]
    mark: str
    color: Color

    def strength(self, index: int) -> float:
        """0 to 1."""
        value = self.values[index]
        if value is None or self.full <= self.lowest:
            return 0.0
        return min(1.0, max(0.0, (value - self.lowest) / (self.full - self.lowest)))


def layers_of(inspection: Inspection) -> list[Layer]:
    """WAAD, FAI and credit."""
    credit = inspection.credit
    low, high = credit.fai_horizon
    chosen = [bool(sum(sets)) for sets in zip(inspection.preplan, inspection.anchor, strict=True)]
    return [
        Layer(
            "WAAD",
            f"how far back local heads look, up to {credit.waad_window} tokens; it rises where a phrase opens",
            *(list(inspection.waad), *_range(inspection.waad)),
            *(inspection.waad_peaks, "peak", (66, 133, 244)),
        ),
        Layer(
            "FAI",
            f"how much tokens {low} to {high} later come back to it, in global heads",
            *(inspection.fai, *_range(inspection.fai)),
            *(inspection.fai_peaks, "peak", (245, 124, 0)),
        ),
        Layer(
            "credit",
            f"weight of the token's advantage, strategy {credit.strategy}",
            *(list(inspection.gamma), 1.0, max([*inspection.gamma, credit.gamma_amp])),
            *(chosen, "chosen", (46, 150, 80)),
        ),
    ]


def summary(inspection: Inspection) -> list[tuple[str, str]]:
    """What to know beside the colours."""
    near, far = (inspection.distance_of(heads) for heads in (inspection.local_heads, inspection.global_heads))
    lines = [
        ("response", f"{len(inspection.tokens)} tokens"),
        ("layers", ", ".join(map(str, inspection.layers)) + f" (from 0), {len(inspection.pool)} heads"),
        ("local heads", f"{_heads(inspection, inspection.local_heads)}: {near:.3g} tokens back on average"),
        ("global heads", f"{_heads(inspection, inspection.global_heads)}: {far:.3g} tokens back on average"),
        ("weighted", f"{sum(g > 1 for g in inspection.gamma)} tokens, mean weight {_mean(inspection.gamma):.3f}"),
    ]
    rhythm = inspection.rhythm()
    if rhythm is not None:
        lines.append(
            ("rhythm", f"{rhythm[0]:.0%} of FAI peaks at or right after a WAAD peak; {rhythm[1]:.0%} by chance")
        )
    return lines


def strongest(inspection: Inspection, count: int = 8) -> Iterator[tuple[Layer, list[tuple[int, str, float]]]]:
    """Of WAAD and FAI, the highest marked tokens: (index from 1, text, value)."""
    for layer in layers_of(inspection)[:2]:
        marked = [index for index, mark in enumerate(layer.marked) if mark]
        marked.sort(key=lambda index, layer=layer: -layer.values[index])
        yield layer, [(index + 1, inspection.tokens[index], layer.values[index]) for index in marked[:count]]


def terminal(inspection: Inspection) -> RenderableType:
    """Everything for a console of rich; without colours the tables of peaks remain."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in summary(inspection):
        facts.add_row(Text(name, style="dim"), Text(value))
    parts.append(facts)
    for layer in layers_of(inspection):
        title = Text(f"\n{layer.name}", style=_style(layer.color))
        title.append(f"  {layer.meaning}; underlined: {layer.mark}", style="dim")
        parts += [title, _colored(inspection, layer)]
    peaks = Table(box=None, padding=(0, 3, 0, 0), title_justify="left")
    for name in ("WAAD peaks", "", "FAI peaks", ""):
        peaks.add_column(Text(name, style="dim"))
    columns = [found for _, found in strongest(inspection)]
    for row in range(max(map(len, columns))):
        cells: list[Text] = []
        for found in columns:
            known = row < len(found)
            cells.append(Text(f"{found[row][0]:>4}  {found[row][1]!r}" if known else ""))
            cells.append(Text(f"{found[row][2]:.3g}" if known else ""))
        peaks.add_row(*cells)
    return Group(*parts, Text(), peaks)


def page(inspection: Inspection, title: str) -> str:
    """A self-contained HTML page: the text in each colouring, two curves, and each token's numbers under the mouse."""
    views = "\n".join(_view(inspection, layer) for layer in layers_of(inspection))
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in summary(inspection))
    return PAGE.format(
        title=escape(title),
        prompt=escape(inspection.prompt),
        facts=facts,
        curves=_curves(inspection),
        views=views,
    )


def _colored(inspection: Inspection, layer: Layer):
    from rich.text import Text

    text = Text()
    for index, piece in enumerate(inspection.tokens):
        strength = layer.strength(index)
        style = "underline " if layer.marked[index] else ""
        if strength > 0.02:
            color = tuple(round(255 + (channel - 255) * strength) for channel in layer.color)
            style += f"black on rgb({color[0]},{color[1]},{color[2]})"
        text.append(piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"), style=style or None)
    return text


def _style(color: Color) -> str:
    return f"bold rgb({color[0]},{color[1]},{color[2]})"


def _view(inspection: Inspection, layer: Layer) -> str:
    spans = []
    for index, piece in enumerate(inspection.tokens):
        alpha = layer.strength(index)
        marked = " class=m" if layer.marked[index] else ""
        shown = escape(piece).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        style = f"background:rgba({','.join(map(str, layer.color))},{alpha:.2f})"
        spans.append(f'<span{marked} style="{style}" title="{_numbers(inspection, index)}">{shown}</span>')
    swatch = f'<i style="background:rgb({",".join(map(str, layer.color))})"></i>'
    scale = f"{layer.lowest:.3g} to {layer.full:.3g} and more"
    head = f"<h2>{swatch}{layer.name} <small>{escape(layer.meaning)}; {scale}; underlined: {layer.mark}</small></h2>"
    return f"<section>{head}<p class=text>{''.join(spans)}</p></section>"


def _numbers(inspection: Inspection, index: int) -> str:
    fai = inspection.fai[index]
    roles = [
        name
        for name, member in (
            ("preplan", inspection.preplan),
            ("anchor", inspection.anchor),
            ("dominated by its context", inspection.dominated),
            ("introduces an anchor", inspection.introduces),
        )
        if member[index]
    ]
    number = f"token {index + 1}: WAAD {inspection.waad[index]:.2f}, "
    number += f"FAI {'undefined' if fai is None else format(fai, '.4f')}, weight {inspection.gamma[index]:.2f}"
    return escape(", ".join([number, *roles]), quote=True)


def _curves(inspection: Inspection, width: int = 1000, height: int = 150) -> str:
    """WAAD and FAI over the tokens, each on its own scale, peaks as dots."""
    count, drawn = len(inspection.tokens), []
    for layer in layers_of(inspection)[:2]:
        points = [
            (width * (index + 0.5) / count, 8 + (height - 16) * (1 - layer.strength(index)), layer.marked[index])
            for index in range(count)
            if layer.values[index] is not None
        ]
        color = f"rgb({','.join(map(str, layer.color))})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        drawn.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{path}"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y, marked in points if marked]
    return f'<svg viewBox="0 0 {width} {height}">{"".join(drawn)}</svg>'


def _heads(inspection: Inspection, heads: list[int], shown: int = 6) -> str:
    names = [f"{layer}.{head}" for layer, head in (inspection.pool[index] for index in heads)]
    return " ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _range(values: list[float | None]) -> tuple[float, float]:
    """The smallest value and the one that a twentieth exceeds, so that a single token does not make the rest pale."""
    defined = sorted(value for value in values if value is not None)
    return (defined[0], defined[int(0.95 * (len(defined) - 1))]) if defined else (0.0, 0.0)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #1d1d1f;
  background: #fff }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1rem; margin: 1.6rem 0 .3rem }} small {{ font-weight: 400; color: #666 }}
i {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }}
.text {{ font-family: ui-monospace, monospace; font-size: 15px; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0 }}
.text span {{ border-radius: 2px; padding: 2px 0 }} .m {{ border-bottom: 2px solid #1d1d1f }}
.prompt {{ color: #666; white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace }}
th {{ text-align: left; font-weight: 400; color: #666; padding-right: 1.5em; vertical-align: top }}
table {{ font-size: .9rem; line-height: 1.5 }} svg {{ width: 100%; margin-top: 1rem }}
</style>
<h1>{title}</h1>
<p class="prompt">{prompt}</p>
<table>{facts}</table>
{curves}
{views}
</html>
"""
