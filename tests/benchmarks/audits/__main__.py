"""Audit the engines on two processes in float64, and write the tables of README.md and docs/comparison.md.

    python -m tests.benchmarks.audits [NAME ...]   # audits those alone; the tables keep the others' last figures
    python -m tests.benchmarks.audits --tables     # writes the tables of the last figures

What is not installed keeps its last figures. The extra `peers` does not install DeepSpeed.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch

from engine.audit import CASES, Adapter, audit
from tests.kit import ROOT

FIGURES = Path(__file__).with_name("figures.json")
SECONDS = 60.0


class Engine(NamedTuple):
    """A row: its name, `file.function`, the package of its version, and the user's extra line."""

    name: str
    path: str
    package: str
    extra: str = ""


ENGINES = [
    Engine("textbook loop, `no_sync`", "textbook.train", "torch"),
    Engine("Accelerate", "accelerate_loop.train", "accelerate"),
    Engine(
        "Accelerate, tokens counted",
        "accelerate_tokens.train",
        "accelerate",
        "loss = loss_sum * K * P / tokens; even_batches=False",
    ),
    Engine("transformers.Trainer", "hf_trainer.train", "transformers"),
    Engine(
        "transformers.Trainer, `num_items_in_batch`",
        "hf_trainer.train_tokens",
        "transformers",
        "loss = loss_sum / num_items_in_batch; even_batches=False",
    ),
    Engine("Lightning", "lightning_trainer.train", "lightning"),
    Engine("Fabric", "fabric_loop.train", "lightning"),
    Engine("Ignite", "ignite_trainer.train", "pytorch-ignite"),
    Engine("TorchTNT", "torchtnt_unit.train", "torchtnt"),
    Engine("DeepSpeed", "deepspeed_engine.train", "deepspeed"),
    Engine("Tally, dataset", "tally_ways.dataset", "tally-engine"),
    Engine("Tally, stream", "tally_ways.stream", "tally-engine"),
    Engine("Tally, own loop", "tally_ways.own_loop", "tally-engine"),
    Engine("Tally, a bare mean over tokens", "tally_ways.bare_token_mean", "tally-engine"),
]


def measure(engine: Engine) -> dict[str, Any]:
    """Return the version, and the figures by case. Raises ImportError for what is not installed."""
    file, _, function = engine.path.partition(".")
    train = getattr(import_module(f"tests.benchmarks.audits.{file}"), function)
    report = audit(Adapter(train), processes=2, seconds=SECONDS)
    print(f"{engine.name}\n{report.text()}\n", file=sys.stderr, flush=True)
    return {"version": version(engine.package), "cases": json.loads(orjson.dumps(report.rows))}


def cell(row: dict[str, Any], details: bool) -> str:
    """Return a verdict, and the relative error of one that is not exact if it is known."""
    if row["detail"] == "a gradient is not finite":
        return "NaN"
    is_sized = details and row["verdict"] != "exact" and row["error"] is not None
    return f"{row['verdict']} ({row['error']:.0e})" if is_sized else str(row["verdict"])


def table(figures: dict[str, Any], cases: tuple[str, ...], details: bool) -> str:
    """Return a row for each engine that has figures, and a column for each case."""
    head = ["engine", *cases, *(["bytes reduced, of one gradient"] if details else [])]
    lines = [head, ["---"] * len(head)]
    for engine in ENGINES:
        if not (found := figures.get(engine.name)):
            continue
        rows = {row["case"]: row for row in found["cases"]}
        name = f"{engine.name} ({found['version']})" if details else engine.name
        traffic = f"{rows['even']['reduced_bytes'] / rows['even']['gradient_bytes']:.1f}"
        lines.append([name, *(cell(rows[case], details) for case in cases), *([traffic] if details else [])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def extra_lines() -> str:
    return "".join(f"- {engine.name}: `{engine.extra}`\n" for engine in ENGINES if engine.extra)


def pages(figures: dict[str, Any]) -> dict[str, str]:
    """Return the text of both pages with their tables."""
    short = table(figures, ("short last window", "padded tokens", "uneven processes"), False)
    whole = table(figures, CASES[:6], True) + "\n" + extra_lines()
    return {name: _between((ROOT / name).read_text(), text) for name, text in
            (("README.md", short), ("docs/comparison.md", whole))}  # fmt: skip


def _between(page: str, text: str) -> str:
    before, begin, rest = page.partition("<!-- audits -->\n")
    _, end, after = rest.partition("<!-- /audits -->\n")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for engine in ENGINES if "--tables" not in names else ():
        if not names or engine.name in names:
            try:
                figures[engine.name] = measure(engine)
            except ImportError as missing:
                print(f"{engine.name} is left out: {missing}", file=sys.stderr)
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    for name, text in pages(figures).items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(sys.argv[1:])
