"""Runs as one HTML page that needs nothing else: style, data, plots and the library that draws them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from itertools import pairwise
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.report.facts import TITLES, duration, facts, flat, history, is_constant, time_split
from engine.report.reading import VALIDATION, Column, Run, number

BINS = 1000  # a plot is about so many pixels wide
PLACES = ("update", "samples", "epoch")
MEASURED = "Within updates, by process 0's clock; the wait for data is measured at one micro-batch of each window."
BESIDE = ("noise_scale_low", "noise_scale_high", "weight")  # what the plot of the noise scale shows too
STEPS = ("accumulate_grad_batches", "effective_batch", "skipped")  # values that change in steps, and are drawn as steps
LONG, WIDE = 60, ' class="wide"'  # a tile with more letters has a row to itself
LEAST = 0.0005  # the smallest share of the time that has a row


def page(runs: Sequence[Run]) -> str:
    """Return the page of one run, or one that compares several. Raises ImportError if plotly is missing."""
    from plotly.offline import get_plotlyjs

    names = Counter(run.name for run in runs)
    runs = [run if names[run.name] == 1 else replace(run, name=str(run.path)) for run in runs]
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    notes = [f'<p class="note">{escape(f"{run.name}: {note}")}</p>' for run in runs for note in run.notes]
    histories = [_history(run) for run in runs if run.events]
    return Template(_file("page.html")).substitute(
        title=escape(title),
        style=_file("page.css"),
        body="\n".join([*notes, _facts(runs), _plots(runs), _split(runs), *histories, _configurations(runs)]),
        data=json.dumps(_data(runs), separators=(",", ":")).replace("<", "\\u003c"),  # no HTML can hide in it
        plotly=get_plotlyjs(),
        script=_file("page.js"),
    )


def _file(name: str) -> str:
    return (files("engine.report") / name).read_text()


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what page.js draws: losses and validations, and what changes within a run or between runs."""
    columns = [{**run.updates, **run.validations} for run in runs]
    names = dict.fromkeys(name for own in columns for name in own if name not in PLACES)
    validations = [name for name in names if name.startswith(VALIDATION)]

    def is_drawn(name: str) -> bool:
        values = np.concatenate([own[name] for own in columns if name in own])
        return name == "loss" or name in validations or not is_constant(values)

    candidates = [name for name in dict.fromkeys(["loss", *validations, *TITLES, *names]) if name in names]
    order = [name for name in candidates if name not in BESIDE[:2] and is_drawn(name)]
    beside = BESIDE if "noise_scale" in order else ()
    if all(np.array_equal(run.updates.get("weight", []), run.updates.get("effective_batch", [])) for run in runs):
        order = [name for name in order if name != "weight"]
    ends = {x: max([1.0, *(float(np.nanmax(run.updates[x], initial=1.0)) for run in runs)]) for x in PLACES[:2]}
    return {
        "end": ends,
        "plots": [
            {
                "name": name,
                "title": TITLES.get(name, name.replace(VALIDATION, "Validation ")),
                "steps": name in STEPS,
                "beside": beside if name == "noise_scale" else (),
            }
            for name in order
        ],
        "runs": [{"name": run.name, "series": _series(run, [*order, *beside]), "marks": _marks(run)} for run in runs],
    }


def _series(run: Run, names: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return series of a run as x by updates, x by samples, and y; thinned."""
    series = {}
    for name in names:
        table = run.updates if name in run.updates else run.validations
        if (column := table.get(name)) is not None:
            series[name] = _points(table, thin(column), column[thin(column)])
            if name not in STEPS and len(column) > 2 * BINS:
                series[f"median {name}"] = _points(table, *medians(column))
    return series


def _points(table: dict[str, Column], places: NDArray[np.intp], y: Column) -> dict[str, list[Any]]:
    return {"y": _numbers(y)} | {x: _numbers(table[x][places], digits=15) for x in PLACES[:2]}


def _marks(run: Run) -> list[dict[str, Any]]:
    """Return where updates were skipped, and where the run stopped and resumed."""
    skips = np.diff(np.nan_to_num(run.updates.get("skipped", np.zeros(0))), prepend=0.0) > 0
    some = np.flatnonzero(skips)[:: -(-int(skips.sum()) // (2 * BINS)) or 1]
    places = {x: run.updates[x][some] for x in PLACES[:2]}
    stops: dict[float, dict[str, Any]] = {}  # a stop and the resume after it are at one place
    for event in run.happened("resume", "interrupt", "fail"):
        stop = stops.setdefault(event["update"], {**event, "text": f"update {event['update']:,.0f}:"})
        stop["text"] += f" {event['event']} {event.get('reason', '')}".rstrip()
    stopped = {x: np.array([number(stop.get(x)) for stop in stops.values()]) for x in PLACES[:2]}
    texts = {
        "skipped": (places, [f"update {update:,.0f} skipped" for update in places["update"]]),
        "stop": (stopped, [stop["text"] for stop in stops.values()]),
    }
    return [
        {"kind": kind, "text": text} | {x: _numbers(column, digits=15) for x, column in where.items()}
        for kind, (where, text) in texts.items()
    ]


def _facts(runs: Sequence[Run]) -> str:
    tables = [facts(run) for run in runs]
    if len(runs) == 1:
        rows = [(escape(name), escape(value)) for name, value in tables[0].items()]
        tiles = [f"<div{WIDE * (len(value) > LONG)}><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows]
        return f"<dl>{''.join(tiles)}</dl>"
    return _compared(runs, tables, _names(tables))


def _plots(runs: Sequence[Run]) -> str:
    longest = max(run.length for run in runs)
    if not longest:
        return '<p class="note">No update is on record yet.</p>'
    if longest <= 2 * BINS:
        return _file("plots.html")
    return (
        f"{_file('plots.html')}<p>Of {longest:,} updates each plot shows the lowest and the highest of {BINS:,} "
        "stretches, so that no extreme is missing, and a stronger line through their medians.</p>"
    )


def _split(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        split = time_split(run)
        total = sum(split.values()) or 1.0
        rows = "".join(
            f'<tr><th>{escape(name)}</th><td class="bar"><i style="width:{100 * seconds / total:.1f}%"></i></td>'
            f"<td>{duration(seconds)}</td><td>{100 * seconds / total:.1f} %</td></tr>"
            for name, seconds in split.items()
            if seconds >= LEAST * total
        )
        heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts += [f'{heading}<div class="wide"><table class="split">{rows}</table></div>'] if rows else []
    return f"<h2>Where the time went</h2>{''.join(parts)}<p>{escape(MEASURED)}</p>" if parts else ""


def _history(run: Run) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in history(run))
    return f'<h2>History of {escape(run.name)}</h2><div class="wide"><table class="history">{rows}</table></div>'


def _configurations(runs: Sequence[Run]) -> str:
    tables = [flat(run.config) for run in runs]
    names = _names(tables)
    others = [name for name in names if len({table.get(name) for table in tables}) > 1]
    shown = f"<h2>Settings that differ</h2>{_compared(runs, tables, others)}" if others else ""
    return f"{shown}<details><summary>All settings</summary>{_compared(runs, tables, names)}</details>"


def _names(tables: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _compared(runs: Sequence[Run], tables: Sequence[dict[str, str]], names: Sequence[str]) -> str:
    """Return a table with a row for each name and a column for each run."""
    head = "".join(f'<th><i class="swatch c{place % 8}"></i>{escape(run.name)}</th>' for place, run in enumerate(runs))
    rows = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(t.get(name, '-'))}</td>" for t in tables) + "</tr>"
        for name in names
    )
    return f'<div class="wide"><table><tr><td></td>{head if len(runs) > 1 else ""}</tr>{rows}</table></div>'


def _numbers(column: Column, digits: int = 6) -> list[float | None]:
    """Return what JSON can hold: null for NaN, and no more digits than anybody reads."""
    return [None if value != value else float(f"{value:.{digits}g}") for value in column.tolist()]


def thin(values: NDArray[np.float64], bins: int = BINS) -> NDArray[np.intp]:
    """Return the places of the points to keep, in order; all of them if they are at most `2 * bins`.

    Otherwise the first, the last, and the lowest and highest of each of `bins` stretches; a gap of NaN keeps one.
    """
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    is_gap = np.isnan(values)
    edges = np.linspace(0, len(values), bins + 1).astype(np.intp)
    lowest = _per_bin(np.where(is_gap, np.inf, values), edges)
    highest = _per_bin(np.where(is_gap, np.inf, -values), edges)
    return np.unique([0, *lowest, *highest, len(values) - 1])


def medians(values: NDArray[np.float64], bins: int = BINS // 4) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the middle places of `bins` stretches, and the median of each; NaN for one of nothing else."""
    edges = np.linspace(0, len(values), bins + 1).astype(np.intp)
    parts = [values[start:end] for start, end in pairwise(edges)]
    finite = [part[~np.isnan(part)] for part in parts]
    return (edges[:-1] + edges[1:]) // 2, np.array([np.median(part) if len(part) else np.nan for part in finite])


def _per_bin(values: NDArray[np.float64], edges: NDArray[np.intp]) -> list[int]:
    """Return where each stretch is lowest."""
    return [int(start + values[start:end].argmin()) for start, end in pairwise(edges)]
