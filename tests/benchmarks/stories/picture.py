"""Curves as one SVG file that needs nothing else, readable on light and on dark pages; and what a story tells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tests.benchmarks.run import DOCS, publish

WIDTH, HEIGHT, LEFT, TOP, BELOW = 330, 150, 68, 66, 52
"""Of one panel and of what is around it, in pixels: its ticks at the left, title and legend above all, ticks below."""

STYLE = """
svg { --page: #fff; --ink: #1f2328; --quiet: #59636e; --grid: #d1d9e0; --band: #ffebe9;
      --c0: #54aeff; --c1: #bc4c00; --c2: #6639ba; font: 12px system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --page: #0d1117; --ink: #f0f6fc; --quiet: #9198a1; --grid: #3d444d; --band: #3c1618;
        --c0: #1f6feb; --c1: #f0883e; --c2: #d2a8ff } }
.page { fill: var(--page) } text { fill: var(--quiet) } .name { fill: var(--ink); font-weight: 600 }
.grid { stroke: var(--grid) } .band { fill: var(--band) } .curve { fill: none; stroke-linejoin: round }
.c0 { stroke: var(--c0); stroke-width: 5 } .c1 { stroke: var(--c1); stroke-width: 2 }
.c2 { stroke: var(--c2); stroke-width: 1.2; stroke-dasharray: 4 2 }
"""
"""The first curve is broad, the last thin and dashed: where they are one, all are seen."""


@dataclass(frozen=True)
class Panel:
    """One plot over updates: curves by colour (0 to 2), each of (update, value); on a `log` axis 0 is at the bottom.

    `bands` are updates to mark, from and to, `notes` texts at (share of the width, value).
    """

    title: str
    curves: Sequence[tuple[int, Sequence[tuple[float, float]]]]
    low: float
    high: float
    log: bool = False
    bands: Sequence[tuple[float, float]] = ()
    notes: Sequence[tuple[float, float, str]] = ()


def draw(title: str, legend: Sequence[str], rows: Sequence[Sequence[Panel]], band: str = "") -> str:
    """Return the picture: rows of panels, and one legend for all, of the colours and of what a `band` is."""
    width, height = LEFT // 2 + len(rows[0]) * (LEFT + WIDTH), TOP + len(rows) * (HEIGHT + BELOW) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>',
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    signs = [(f'<path class="curve c{colour}" d="M0 22h28"/>', name) for colour, name in enumerate(legend)]
    signs += [('<rect class="band" y="15" width="28" height="14"/>', band)] if band else []
    x = float(LEFT)
    for sign, name in signs:
        parts.append(f'<g transform="translate({x:.0f})">{sign}<text x="36" y="26">{escape(name)}</text></g>')
        x += 60 + 6.5 * len(name)
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            left, top = LEFT + column * (LEFT + WIDTH), TOP + row * (HEIGHT + BELOW)
            parts.append(f'<g transform="translate({left} {top})">')
            parts += _panel(panel)
            parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def tell(name: str, figures: str, picture: str) -> None:
    """Print the figures of a story, and write them and the picture into the docs."""
    print(figures)
    publish(name, figures, "stories.md")
    Path(DOCS, "images", f"{name}.svg").write_text(picture)


def _panel(panel: Panel) -> Iterator[str]:
    scale = math.log10 if panel.log else float
    low, high = scale(panel.low), scale(panel.high)
    last = max(update for _, curve in panel.curves for update, _ in curve)

    def x(update: float) -> float:
        return WIDTH * update / last

    def y(value: float) -> float:
        return HEIGHT * (1 - (scale(min(max(value, panel.low), panel.high)) - low) / (high - low))

    for start, stop in panel.bands:
        yield f'<rect class="band" x="{x(start):.1f}" width="{x(stop) - x(start):.1f}" height="{HEIGHT}"/>'
    yield f'<text class="name" y="-10">{escape(panel.title)}</text>'
    for tick in _powers(low, high) if panel.log else _round(panel.low, panel.high):
        label = f'10<tspan dy="-5" font-size="9">{math.log10(tick):.0f}</tspan>' if panel.log else f"{tick:g}"
        yield f'<path class="grid" d="M0 {y(tick):.1f}h{WIDTH}"/>'
        yield f'<text x="-8" y="{y(tick):.1f}" dy="4" text-anchor="end">{label}</text>'
    for tick in _round(0, last):
        label = f"{tick:g}" if tick else "update 0"
        yield f'<text x="{x(tick):.1f}" y="{HEIGHT + 18}" text-anchor="middle">{label}</text>'
    for colour, curve in panel.curves:
        points = " ".join(f"{x(update):.1f},{y(value):.1f}" for update, value in curve)
        yield f'<polyline class="curve c{colour}" points="{points}"/>'
    for share, value, text in panel.notes:
        yield f'<text x="{share * WIDTH:.0f}" y="{y(value):.1f}">{escape(text)}</text>'


def _round(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about four."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    size = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= (high - low) / 4)
    return [size * number for number in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Every so-manieth power of ten, about five."""
    every = max(1, math.ceil((high - low) / 5))
    return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1) if power % every == 0]
