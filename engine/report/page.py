"""Runs as one HTML page that needs nothing else: style, data, plots and the library that draws them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.report.facts import differing, duration, facts, flat, history, time_split
from engine.report.reading import VALIDATION, Column, Run, number
from engine.report.thinning import BINS, medians, thin

# The plots, in their order; validations come after the loss, and other fields of a record by their own names
TITLES = {
    "loss": "Training loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "accumulate_grad_batches": "K: micro-batches per process and update",
    "effective_batch": "Effective batch: samples per update",
    "samples_per_second": "Throughput: samples per second",
    "weight": "Weight of an update",
    "skipped": "Updates skipped so far",
}

PLACES = ("update", "samples", "epoch")
MEASURED = "Within updates as process 0's clock tells: of the wait for data it looks at one micro-batch of each window."
STEPS = ("accumulate_grad_batches", "effective_batch", "skipped")  # values that change in steps, and are drawn as steps


def page(runs: Sequence[Run]) -> str:
    """Return the page of one run, or one that compares several. Raises ImportError where plotly is missing."""
    from plotly.offline import get_plotlyjs

    names = Counter(run.name for run in runs)
    runs = [run if names[run.name] == 1 else replace(run, name=str(run.path)) for run in runs]
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="note">{escape(f"{run.name}: {note}")}</p>' for run in runs for note in run.notes),
        _facts(runs),
        _plots(runs),
        _split(runs),
        *(_history(run) for run in runs if run.events),
        _configurations(runs),
    ]
    here = files("engine.report")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data: blob:; '
            "script-src 'unsafe-inline'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)} · Tally</title>",
            f"<style>{(here / 'page.css').read_text()}</style></head><body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{_json(_data(runs))}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{(here / 'page.js').read_text()}</script>",
            "</body></html>\n",
        ]
    )


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what page.js draws."""
    drawn = [_drawn(run) for run in runs]
    names = dict.fromkeys(name for series in drawn for name in series if not name.startswith("median "))
    validations = [name for name in names if name.startswith(VALIDATION)]
    order = dict.fromkeys(["loss", *validations, *TITLES, *names])
    ends = {
        x: max((float(run.updates[x][np.isfinite(run.updates[x])].max(initial=1.0)) for run in runs), default=1.0)
        for x in ("update", "samples")
    }
    return {
        "end": ends,
        "plots": [
            {"name": name, "title": TITLES.get(name, name.replace(VALIDATION, "Validation: ")), "steps": name in STEPS}
            for name in order
            if name in names
        ],
        "runs": [
            {"name": run.name, "series": series, "marks": _marks(run)} for run, series in zip(runs, drawn, strict=True)
        ],
    }


def _drawn(run: Run) -> dict[str, dict[str, list[Any]]]:
    """Return each series of a run as x by updates, x by samples, and y; thinned."""
    series = {}
    for table in (run.updates, run.validations):
        for name, column in table.items():
            is_dull = (name == "skipped" and not column[-1:].any()) or (
                name == "weight" and np.array_equal(column, run.updates.get("effective_batch", column[:0]))
            )
            if name not in PLACES and not is_dull:
                series[name] = _points(table, thin(column), column[thin(column)])
                if name not in STEPS and len(column) > 2 * BINS:
                    series[f"median {name}"] = _points(table, *medians(column))
    return series


def _points(table: dict[str, Column], places: NDArray[np.intp], y: Column) -> dict[str, list[Any]]:
    return {"y": _numbers(y)} | {x: _numbers(table[x][places], digits=15) for x in ("update", "samples")}


def _marks(run: Run) -> list[dict[str, Any]]:
    """Return where updates were skipped, and where the run stopped and resumed."""
    update, samples = run.updates["update"], run.updates["samples"]
    places = np.flatnonzero(np.diff(np.nan_to_num(run.updates.get("skipped", np.zeros(0))), prepend=0.0) > 0)
    some = places[:: -(-len(places) // (2 * BINS)) or 1]
    skipped: dict[str, Any] = {"kind": "skipped", "text": [f"update {place:,.0f} skipped" for place in update[some]]}
    skipped |= {"update": _numbers(update[some], digits=15), "samples": _numbers(samples[some], digits=15)}
    stops: dict[float, dict[str, Any]] = {}  # a stop and the resume after it are at one place
    for event in run.happened("resume", "interrupt", "fail"):
        stop = stops.setdefault(event["update"], {**event, "text": f"update {event['update']:,.0f}:"})
        stop["text"] += f" {event['event']} {event.get('reason', '')}".rstrip()
    return [
        skipped,
        {
            "kind": "stop",
            "text": [stop["text"] for stop in stops.values()],
            "update": list(stops),
            "samples": _numbers(np.array([number(stop.get("samples")) for stop in stops.values()]), digits=15),
        },
    ]


def _facts(runs: Sequence[Run]) -> str:
    tables = [facts(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(v)}</dd></div>" for name, v in tables[0].items())
        return f"<dl>{tiles}</dl>"
    return _compared(runs, tables, list(dict.fromkeys(name for table in tables for name in table)))


def _plots(runs: Sequence[Run]) -> str:
    if not any(run.length for run in runs):
        return '<p class="note">No update is on record yet.</p>'
    longest = max(run.length for run in runs)
    thinned = (
        f"<p>Of {longest:,} updates each plot shows the lowest and the highest of {BINS:,} stretches, "
        "so that no extreme is missing, and a stronger line through their medians.</p>"
        if longest > 2 * BINS
        else ""
    )
    return (
        '<form id="switches">over '
        '<label><input type="radio" name="x" value="update" checked>updates</label>'
        '<label><input type="radio" name="x" value="samples">samples</label> '
        '<label><input type="checkbox" name="log">logarithmic</label></form>'
        "<p>Drag over a stretch to see it closer, click twice to go back.</p>"
        f'<noscript><p class="note">The plots need JavaScript.</p></noscript><div id="plots"></div>{thinned}'
    )


def _split(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        split = time_split(run)
        total = sum(split.values())
        if not total:
            continue
        rows = "".join(
            f'<tr><th>{escape(name)}</th><td class="bar"><i style="width:{100 * seconds / total:.1f}%"></i></td>'
            f"<td>{duration(seconds)}</td><td>{100 * seconds / total:.1f} %</td></tr>"
            for name, seconds in split.items()
        )
        parts.append(f'{_heading(run, runs)}<div class="wide"><table class="split">{rows}</table></div>')
    if not parts:
        return ""
    return f"<h2>Where the time went</h2>{''.join(parts)}<p>{escape(MEASURED)}</p>"


def _history(run: Run) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in history(run))
    return f'<h2>What happened to {escape(run.name)}</h2><div class="wide"><table>{rows}</table></div>'


def _configurations(runs: Sequence[Run]) -> str:
    tables = [flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for table in tables for name in table))
    others = differing(tables) if len(runs) > 1 else []
    shown = f"<h2>What was configured otherwise</h2>{_compared(runs, tables, others)}" if others else ""
    return f"{shown}<details><summary>Configuration</summary>{_compared(runs, tables, names)}</details>"


def _compared(runs: Sequence[Run], tables: Sequence[dict[str, str]], names: Sequence[str]) -> str:
    """Return a table with a row for each name and a column for each run."""
    head = "".join(f'<th><i class="swatch c{place % 8}"></i>{escape(run.name)}</th>' for place, run in enumerate(runs))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(t.get(name, '-'))}</td>" for t in tables) + "</tr>"
        for name in names
    )
    return f'<div class="wide"><table><tr><td></td>{head if len(runs) > 1 else ""}</tr>{rows}</table></div>'


def _heading(run: Run, runs: Sequence[Run]) -> str:
    return f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""


def _numbers(column: Column, digits: int = 6) -> list[float | None]:
    """Return what JSON can hold: null for NaN, and no more digits than anybody reads."""
    return [None if value != value else float(f"{value:.{digits}g}") for value in column.tolist()]


def _json(value: Any) -> str:
    """Return JSON that no HTML can hide in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
