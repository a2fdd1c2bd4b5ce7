"""A preview as text: a table, or a few lines for each stage if the table is too wide."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.preview.forecast import StageForecast
from engine.preview.preview import Preview

UNKNOWN = "?"
SHOWN = 20
"""Stages, and warnings, that are shown from the start and from the end."""
T = TypeVar("T")
Cell = Callable[[StageForecast], str]  # returns the cell of a column for a stage


def print_plan(preview: Preview, console: Console | None = None) -> None:
    """Print the run stage by stage, and the warnings."""
    console = console or Console(highlight=False, soft_wrap=False)
    columns = _columns(preview)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    shown, between = _ends(preview.stages)
    for forecast in shown:
        table.add_row(*(cell(forecast) for cell in columns.values()))

    console.print(Text(preview.describe(), style="bold"))
    console.print(Text(_header(preview)), end="\n\n")
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
        console.print()
    else:
        for forecast in shown:
            lines = Table.grid(padding=(0, 2))
            for name, cell in columns.items():
                lines.add_row(name.replace("-\n", "-").replace("\n", " "), cell(forecast))
            console.print(lines)
            console.print()
    console.print(Text(" ".join([*_updates(preview), *_bytes(preview)])))
    warnings, others = _ends(preview.warnings())
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    if between or others:
        console.print(Text(f"Left out: {between:,} stages and {others:,} warnings, between the first and the last."))


def _ends(items: Sequence[T]) -> tuple[Sequence[T], int]:
    """Return what is shown of many items, the first and the last, and the number of the others."""
    return (items, 0) if len(items) <= 2 * SHOWN else ([*items[:SHOWN], *items[-SHOWN:]], len(items) - 2 * SHOWN)


def size(count: int) -> str:
    """Return bytes in decimal units: 999 B, 1.5 MB."""
    value, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.5 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def _columns(preview: Preview) -> dict[str, Cell]:
    sent, unit = preview.strategy.bytes_to_reduce(preview.model), preview.layout.schedule.unit
    columns: dict[str, Cell] = {} if unit == "epoch" else {f"from\n{unit}": lambda s: f"{s.stage.first:,}"}
    columns |= {
        "epochs": lambda s: _span(s.epochs),
        "K": lambda s: str(s.stage.accumulate_grad_batches),
        "effective\nbatch": lambda s: _batch(preview, s),
        "updates": lambda s: _number(s.updates),
        "micro-\nbatches": lambda s: _number(s.micro_batches),
        "last\nwindow": lambda s: _number(s.last_window),
        "first\nLR": lambda s: _number(s.lr[0], ".2g"),
        "last\nLR": lambda s: _number(s.lr[1], ".2g"),
    }
    if sent:
        columns["reduced"] = lambda s: UNKNOWN if s.updates is None else size(s.updates * sent)
        columns["saved"] = lambda s: _saved(s.updates, s.turns)
    return columns


def _header(preview: Preview) -> str:
    plan, strategy, settings = preview.layout.plan, preview.strategy, preview.settings
    P = strategy.data_parallel_size
    processes = "1 process" if P == 1 else f"{P} processes"
    epochs = "" if settings.max_epochs is None else f", {settings.max_epochs:,} epochs"
    if plan is None:
        return f"{strategy.name}: {processes}, streams of ready micro-batches{epochs}"
    what = "samples" if not preview.is_grouped else "groups of samples"
    return f"{strategy.name}: {processes}, N {settings.N}, {plan.samples:,} {what} per epoch{epochs}"


def _updates(preview: Preview) -> Iterator[str]:
    total, at_most = preview.layout.total_updates, preview.settings.max_updates
    if preview.is_stream:
        known = "" if total is None else f"{total:,} updates in all. "
        known = known or ("" if at_most is None else f"At most {at_most:,} updates. ")
        yield f"{known}A stream has no length: what is marked {UNKNOWN} cannot be known before it has ended."
    else:
        yield f"{total:,} updates in all, of {sum(s.samples or 0 for s in preview.stages):,} samples."


def _bytes(preview: Preview) -> Iterator[str]:
    strategy = preview.strategy
    sent = strategy.bytes_to_reduce(preview.model)
    if sent is None:
        yield f"What strategy {strategy.name!r} sends is not known before it is set up."
    elif not sent:
        yield "One process reduces nothing."
    elif preview.is_stream:
        yield f"Each update reduces {size(sent)} on each process."
    else:
        updates, turns = (sum(getattr(s, name) or 0 for s in preview.stages) for name in ("updates", "turns"))
        yield (
            f"Each reduces {size(sent)} on each process, {size(updates * sent)} in all; with a reduction at each "
            f"micro-batch it would be {size(turns * sent)}: deferring saves {_saved(updates, turns)}."
        )


def _batch(preview: Preview, forecast: StageForecast) -> str:
    if preview.is_stream:
        return UNKNOWN
    if preview.is_grouped and forecast.samples and forecast.updates:
        return f"~{forecast.samples / forecast.updates:,.0f}"
    return f"{forecast.stage.effective_batch:,}"


def _span(epochs: tuple[int, int] | None) -> str:
    if epochs is None:
        return UNKNOWN
    return str(epochs[0]) if epochs[0] == epochs[1] else f"{epochs[0]}-{epochs[1]}"


def _number(value: float | None, shape: str = ",") -> str:
    return UNKNOWN if value is None else format(value, shape)


def _saved(updates: int | None, turns: int | None) -> str:
    return UNKNOWN if not updates or not turns else f"{1 - updates / turns:.0%}"
