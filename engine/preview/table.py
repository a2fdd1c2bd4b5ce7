"""A preview as text: a table, or a few lines for each stage if the table is too wide."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.preview.forecast import StageForecast
from engine.preview.preview import Preview

SHOWN = 20  # stages, and warnings, that are shown from the start and from the end
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
    console.print(Text(_totals(preview)))
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
    sent, unit = preview.strategy.bytes_to_reduce(preview.model), preview.schedule.unit
    columns: dict[str, Cell] = {} if unit == "epoch" else {f"from\n{unit}": lambda s: f"{s.stage.first:,}"}
    columns |= {
        "epochs": lambda s: "-".join(str(epoch) for epoch in dict.fromkeys(s.epochs)),
        "K": lambda s: str(s.stage.accumulate_grad_batches),
        "effective\nbatch": lambda s: _batch(preview, s),
        "updates": lambda s: f"{s.updates:,}",
        "micro-\nbatches": lambda s: f"{s.micro_batches:,}",
        "last\nwindow": lambda s: f"{s.last_window:,}",
        "first\nLR": lambda s: _rate(s.lr[0]),
        "last\nLR": lambda s: _rate(s.lr[1]),
    }
    if sent:
        columns["reduced"] = lambda s: size(s.updates * sent)
        columns["saved"] = lambda s: f"{1 - s.updates / s.turns:.0%}"
    return columns


def _header(preview: Preview) -> str:
    strategy, settings, P = preview.strategy, preview.settings, preview.strategy.data_parallel_size
    processes = "1 process" if P == 1 else f"{P} processes"
    epochs = "" if settings.max_epochs is None else f", {settings.max_epochs:,} epochs"
    what = "groups of samples" if preview.is_grouped else "samples"
    return f"{strategy.name}: {processes}, N {settings.N}, {preview.plan.samples:,} {what} per epoch{epochs}"


def _totals(preview: Preview) -> str:
    strategy, sent = preview.strategy, preview.strategy.bytes_to_reduce(preview.model)
    updates, samples, turns = (sum(getattr(s, n) for s in preview.stages) for n in ("updates", "samples", "turns"))
    text = f"{updates:,} updates in all, of {samples:,} samples."
    if sent is None:
        return f"{text} What strategy {strategy.name!r} sends is not known before it is set up."
    if not sent:
        return f"{text} One process reduces nothing."
    return (
        f"{text} Each reduces {size(sent)} on each process, {size(updates * sent)} in all; with a reduction at each "
        f"micro-batch it would be {size(turns * sent)}: deferring saves {1 - updates / turns:.0%}."
    )


def _batch(preview: Preview, forecast: StageForecast) -> str:
    if preview.is_grouped:
        return f"~{forecast.samples / forecast.updates:,.0f}"
    return f"{forecast.stage.effective_batch:,}"


def _rate(lr: float | None) -> str:
    return "?" if lr is None else f"{lr:.2g}"
