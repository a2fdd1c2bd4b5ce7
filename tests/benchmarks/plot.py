"""A plot of overhead.py's table, readable on light and on dark pages."""

from __future__ import annotations

import re

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.K1 { fill: #8c959f } .K8 { fill: #0969da } .base { stroke: #cf222e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .K1 { fill: #6e7681 } .K8 { fill: #58a6ff } .base { stroke: #ff7b72 }
}
"""
LEFT, UNIT, ROW, TOP = 180, 60, 42, 40
"""Pixels: where the bars begin, a ratio of 1, a contender, the legend."""


def plot(table: str) -> str:
    """Return an SVG of the instructions in overhead.py's table, over the textbook's loop."""
    cells = r"^\| (.+?) \| [\d,]+ \(([\d.]+)\) \| [\d,]+ \(([\d.]+)\) \|$"
    found = re.findall(cells, table, re.MULTILINE)
    rows = [(name, K, ratios[i]) for i, K in enumerate("18") for name, *ratios in found]
    names = list(dict.fromkeys(name for name, _, _ in rows))
    places = {K: (13 * i, f"K{K}") for i, K in enumerate(dict.fromkeys(K for _, K, _ in rows))}
    height, width = TOP + len(names) * ROW, LEFT + 60 + UNIT * max(float(ratio) for *_, ratio in rows)
    parts = [f'<path class="base" d="M{LEFT + UNIT} {TOP - 6}V{height - 8}" stroke-dasharray="3"/>']
    for name, K, ratio in rows:
        y, length = TOP + names.index(name) * ROW + places[K][0], float(ratio) * UNIT
        parts.append(f'<rect class="{places[K][1]}" x="{LEFT}" y="{y}" width="{length:.0f}" height="12"/>')
        parts.append(f'<text x="{LEFT + length + 5:.0f}" y="{y + 11}">{ratio}</text>')
    for i, name in enumerate(names):
        parts.append(f'<text x="{LEFT - 8}" y="{TOP + i * ROW + 17}" text-anchor="end">{name}</text>')
    for i, (K, (_, of_K)) in enumerate(places.items()):
        parts.append(f'<rect class="{of_K}" x="{LEFT + 80 * i}" y="10" width="12" height="12"/>')
        parts.append(f'<text x="{LEFT + 80 * i + 18}" y="21">K = {K}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">'
        f"<title>Instructions per micro-batch, over the textbook loop's</title><style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )
