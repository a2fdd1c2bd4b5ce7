"""Facts of a run, in words and figures, without torch."""

from itertools import chain
from typing import Any

import numpy as np

from engine.report.reading import VALIDATION, Column, Run, number

# The plots, in their order; validations come after the loss, and other fields of a record by their own names
TITLES = {
    "loss": "Training loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "micro_batch_size": "N: samples per micro-batch",
    "accumulate_grad_batches": "K: micro-batches per process and update",
    "effective_batch": "Effective batch: samples per update",
    "noise_scale": "Noise scale, its 95 % interval, and the weight of an update (dotted)",
    "samples_per_second": "Throughput: samples per second",
    "weight": "Weight per update",
    "skipped": "Updates skipped so far",
}
WINDOW = ("micro_batch_size", "accumulate_grad_batches", "effective_batch", "weight")
NOISE = ("noise_scale", "noise_scale_low", "noise_scale_high")
TOLD = ("update", "epoch", "samples", "loss", *WINDOW, "skipped", *NOISE)
Facts = dict[str, str]  # a table's rows: a name, and an amount


def status(run: Run) -> str:
    """Return the state of the run, as far as its folder tells."""
    stays = run.happened("start", "resume", "interrupt", "fail", "end")
    if not stays:
        return "finished" if run.summary else "unfinished, for an unknown reason"
    if stays[-1]["event"] in ("start", "resume"):
        return "running, or killed"
    where, what = history(run)[-1][1:]
    return "finished" if stays[-1]["event"] == "end" else f"at {where}: {what}"


def facts(run: Run) -> Facts:
    """Return a run's figures by name, as far as its folder tells them."""
    starts = run.happened("start", "resume") or [{}]
    begin = starts[-1]
    processes = np.full(run.length, np.nan)  # of each update
    for start in starts:
        processes[run.updates["update"] > start.get("update", np.inf)] = number(start.get("processes"))
    versions = run.summary.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    updates, skipped = run.length, int(_last(run.updates.get("skipped"), 0.0))
    seconds, size = sum(time_split(run).values()), run.summary.get("bytes_reduced_per_update")
    ends = {name: _last(column) for name, column in {**run.validations, **run.updates}.items()}
    last = {name: f"{value:.4g}" if np.isfinite(value) else None for name, value in ends.items()}
    constant = [name for name, column in run.updates.items() if name not in TOLD and is_constant(column)]
    told: dict[str, Any] = {
        "Status": status(run),
        "Task": str(run.config["task"]).rpartition(".")[2] if "task" in run.config else None,
        "Strategy": begin.get("strategy", run.summary.get("strategy")),
        "Processes, P": _stages(processes) or begin.get("processes", run.summary.get("processes")),
        "Micro-batch size, N": _stages(run.updates.get("micro_batch_size")) or run.config.get("micro_batch_size"),
        "Micro-batches, K": _stages(run.updates.get("accumulate_grad_batches")),
        "Effective batch": _stages(run.updates.get("effective_batch"), is_ragged=True),
        "Which batch": (run.happened("advice") or [{}])[-1].get("text"),
        "Updates": f"{updates:,}" + (f", {skipped:,} of them skipped" if skipped else ""),
        "Samples": f"{int(_last(run.updates['samples'], 0.0)):,}",
        "Last loss": last.get("loss"),
        **{name.replace(VALIDATION, "Validation "): last[name] for name in run.validations if name not in TOLD},
        **{TITLES.get(name, name): last[name] for name in constant},
        "Running time": duration(seconds) if seconds else None,
        "Resumed": len(run.happened("resume")) or None,
        "All-reduces per update": run.summary.get("all_reduces_per_update"),
        "Bytes per update": f"{size:,}" if isinstance(size, int) else size,
        "torch": begin.get("torch", versions.get("torch")),
        "Python": begin.get("python", versions.get("python")),
    }
    return {name: str(value) for name, value in told.items() if value is not None}


def time_split(run: Run) -> dict[str, float]:
    """Return the seconds by activity: by throughput, events and process 0's clock, without what was undone."""
    sizes, rates = run.updates.get("effective_batch"), run.updates.get("samples_per_second")
    if sizes is None or rates is None:
        return {}
    is_timed = (rates > 1e-9) & (sizes < 1e12)
    kept: list[dict[str, Any]] = []
    for event in run.events:
        if event.get("event") in ("start", "resume"):
            kept = [before for before in kept if before["update"] <= event["update"]]
        kept.append(event)
    with np.errstate(over="ignore"):
        split = _within_updates(kept, _seconds(float((sizes[is_timed] / rates[is_timed]).sum())))
    for kind, name in (("validation", "validation"), ("save", "saving, while training waited")):
        took = sum(_seconds(event.get("took")) for event in kept if event.get("event") == kind)
        if took:
            split[name] = took
    clocks = [_seconds(event.get("seconds")) for event in kept] or [_seconds(run.summary.get("seconds"))]
    rest = "other" if run.events else "other, with validation and saving"
    return {**split, rest: max(0.0, clocks[-1] - sum(split.values()))}


def _within_updates(events: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    """Share out the seconds of updates by what the last save of each start has `spent` since that start."""
    starts: list[dict[str, Any]] = [{}]
    for event in events:
        if event.get("event") in ("start", "resume"):
            starts.append({})
        elif isinstance(event.get("spent"), dict):
            starts[-1] = event["spent"]
    told = {what: sum(_seconds(spent.get(what)) for spent in starts) for what in dict.fromkeys(chain(*starts))}
    whole = sum(told.values())
    if not whole:
        return {"updates: data, forward, backward, reduction, step": seconds}
    return {f"updates: {what}": seconds * part / whole for what, part in told.items()}


def history(run: Run) -> list[tuple[str, str, str]]:
    """Return (when, where, what) of each start, interruption, failure and end."""
    rows = []
    for event in run.happened("start", "resume", "interrupt", "fail", "end"):
        kind, reason, undone = event["event"], event.get("reason", ""), number(event.get("undone"))
        P = event.get("processes", "?")
        processes = f"on {P} process{'es' * (P != 1)}: {event.get('strategy', '?')}"
        lost = f"; repeats {undone:,.0f} update{'s' * (undone != 1)} made after the checkpoint" if undone > 0 else ""
        what = {
            "start": f"started {processes}{lost}",
            "resume": f"resumed {processes}{lost}",
            "interrupt": f"interrupted by {reason}, and saved",
            "fail": f"failed: {reason}",
            "end": "finished",
        }[kind]
        when = str(event.get("time", "?")).replace("T", " ").replace("+00:00", " UTC")
        rows.append((when, f"update {event['update']:,.0f}", what))
    return rows


def flat(config: dict[str, Any], prefix: str = "") -> Facts:
    """Return nested options by dotted names."""
    found: Facts = {}
    for name, value in config.items():
        if f"{prefix}{name}" == "a run of Tally":
            continue
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = str(value)
    return found


def is_constant(column: Column) -> bool:
    """Whether the numbers of a column are all the same."""
    finite = column[np.isfinite(column)]
    return bool(len(finite)) and bool((finite == finite[0]).all())


def duration(seconds: float) -> str:
    """Return seconds as text, in the unit that suits them."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.3g} s"


def _stages(column: Column | None, is_ragged: bool = False) -> str | None:
    """Return the values in order of appearance; of effective batches, those that come twice in a row."""
    values = column[np.isfinite(column)] if column is not None else np.zeros(0)
    if is_ragged and len(values) > 1:
        values = values[1:][values[1:] == values[:-1]] if (values[1:] == values[:-1]).any() else values
    names = [f"{value:,.0f}" for value in values[np.flatnonzero(np.diff(values, prepend=-1))]]
    return ", ".join(names if len(names) <= 8 else [*names[:6], "…", names[-1]]) or None


def _last(column: Column | None, otherwise: float = np.nan) -> float:
    finite = column[np.isfinite(column)] if column is not None else np.zeros(0)
    return float(finite[-1]) if len(finite) else otherwise


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
