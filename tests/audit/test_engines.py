"""Today's engines under audit: the tables in README and docs are those of figures that can be made again."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from tests.benchmarks.audits.__main__ import ENGINES, FIGURES, Engine, measure, pages
from tests.kit import ROOT

KEPT = json.loads(FIGURES.read_text())


def test_the_pages_have_the_tables() -> None:
    for name, text in pages(KEPT).items():
        assert (ROOT / name).read_text() == text, "run `python -m tests.benchmarks.audits --tables`"


def test_tally_is_exact_by_its_three_ways() -> None:
    for way in ("dataset", "stream", "own loop"):
        assert {row["verdict"] for row in KEPT[f"Tally, {way}"]["cases"]} == {"exact"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.name in KEPT], ids=lambda engine: engine.name)
def test_an_engine_does_what_the_table_says(engine: Engine) -> None:
    try:
        if version(engine.package) != KEPT[engine.name]["version"]:
            pytest.skip("another version")
        found = measure(engine)
    except ImportError as missing:
        pytest.skip(str(missing))
    was = {row["case"]: row["verdict"] for row in KEPT[engine.name]["cases"]}
    assert {row["case"]: row["verdict"] for row in found["cases"]} == was
