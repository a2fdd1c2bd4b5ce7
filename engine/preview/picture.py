"""A preview as one SVG file that needs nothing else: K, effective batch and LR, over updates and over samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from engine.preview.preview import Preview

BUCKETS = 250
"""Of so many ranges of updates the first, the last, the least and the greatest are drawn: the extremes stay."""

WIDTH, HEIGHT, LEFT, TOP, BELOW = 340, 110, 72, 64, 52
"""Of one panel and of what is around it, in pixels: its ticks at the left, the title above all, its ticks below."""

STYLE = """
svg { --page: #fff; --ink: #1f2328; --quiet: #59636e; --grid: #d1d9e0; --line: #0969da;
      font: 12px system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --page: #0d1117; --ink: #f0f6fc; --quiet: #9198a1; --grid: #3d444d; --line: #58a6ff } }
.page { fill: var(--page) } text { fill: var(--quiet) } .name { fill: var(--ink); font-weight: 600 }
.grid { stroke: var(--grid) } .curve { stroke: var(--line); stroke-width: 1.5; fill: none }
"""


def draw(preview: Preview) -> str:
    """Return the picture. Raises ValueError for a stream, of which there is nothing to draw."""
    if preview.is_stream:
        raise ValueError("the data is a stream: its updates are not known, so there is no picture of them.")
    updates = list(preview.updates())
    ends = {
        "updates": [0.0, *(float(u.update) for u in updates)],
        "samples": [0.0, *(float(u.samples) for u in updates)],
    }
    rows = {
        "K": [float(u.stage.accumulate_grad_batches) for u in updates],
        "effective batch": [float(u.effective_batch) for u in updates],
        "learning rate": [u.lr for u in updates],
    }
    width, height = 2 * (LEFT + WIDTH) + LEFT // 2, TOP + len(rows) * (HEIGHT + BELOW)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(preview.describe())}</title><style>{STYLE}</style>',
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text class="name" x="16" y="24">{escape(preview.describe())}</text>',
    ]
    for row, (name, values) in enumerate(rows.items()):
        for column, (unit, edges) in enumerate(ends.items()):
            panel = _Panel(LEFT + column * (LEFT + WIDTH), TOP + row * (HEIGHT + BELOW), edges[-1], max(values))
            parts += panel.axes(name, unit if row == len(rows) - 1 else "")
            parts.append(f'<path class="curve" d="{panel.steps(edges, values)}"/>')
    return "\n".join([*parts, "</svg>\n"])


@dataclass(frozen=True)
class _Panel:
    """One plot: the corner of its frame, and what its axes reach from 0."""

    left: float
    top: float
    right: float
    high: float

    def x(self, value: float) -> float:
        return self.left + WIDTH * value / self.right

    def y(self, value: float) -> float:
        return self.top + HEIGHT * (1 - value / (1.08 * self.high or 1))

    def axes(self, name: str, unit: str) -> Iterator[str]:
        yield f'<text class="name" x="{self.left}" y="{self.top - 8}">{name}</text>'
        for tick in _ticks(self.high, whole=name != "learning rate"):
            y = f"{self.y(tick):.1f}"
            yield f'<path class="grid" d="M{self.left} {y}h{WIDTH}"/>'
            yield f'<text x="{self.left - 8}" y="{y}" dy="4" text-anchor="end">{_label(tick)}</text>'
        for tick in _ticks(self.right, whole=True):
            yield (
                f'<text x="{self.x(tick):.1f}" y="{self.top + HEIGHT + 16}" text-anchor="middle">{_label(tick)}</text>'
            )
        if unit:
            middle = self.left + WIDTH / 2
            yield f'<text class="name" x="{middle}" y="{self.top + HEIGHT + 34}" text-anchor="middle">{unit}</text>'

    def steps(self, edges: Sequence[float], values: Sequence[float]) -> str:
        """A path that holds each value from one edge to the next."""
        path, height = [], None
        for update in _kept(values):
            start, stop, y = self.x(edges[update]), self.x(edges[update + 1]), f"{self.y(values[update]):.1f}"
            if y != height:
                path.append(f"M{start:.1f} {y}" if height is None else f"H{start:.1f}V{y}")
                height = y
            end = f"H{stop:.1f}"
        return "".join([*path, end])


def _kept(values: Sequence[float]) -> Iterator[int]:
    """The places of the values to draw."""
    wide = max(1, math.ceil(len(values) / BUCKETS))
    for start in range(0, len(values), wide):
        places = range(start, min(start + wide, len(values)))
        least, most = min(places, key=values.__getitem__), max(places, key=values.__getitem__)
        yield from sorted({places[0], least, most, places[-1]})


def _ticks(high: float, whole: bool) -> list[float]:
    """Round numbers from 0 to `high`, about four."""
    step = 10.0 ** math.floor(math.log10(high / 4)) if high > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor >= high / 4)
    step = max(step, 1.0) if whole else step
    return [step * number for number in range(int(high / step * 1.0001) + 1)]


def _label(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * unit or (value >= unit and value % unit == 0):
            return f"{value / unit:g}{name}"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
