"""The report in a real headless Chromium, opened from a file, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.report.__main__ import main
from tests.kit.browser import NoBrowserError, check_readable, chromium, hover, opened
from tests.kit.hosts import until
from tests.kit.run_files import record, write

EVIL = "<b></script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright")
    try:
        with chromium() as browser:
            yield browser
    except NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    validation = {"update": 9, "epoch": 0, "validation/loss": 0.25}
    events = [
        {"event": "start", "update": 0, "samples": 0, "seconds": 0.0, "processes": 2, "strategy": "ddp: 2 x cpu, gloo"},
        {"event": "interrupt", "update": 5, "samples": 40, "seconds": 9.0, "reason": "SIGTERM"},
        {"event": "resume", "update": 5, "samples": 40, "seconds": 9.0, "processes": 2, "strategy": "ddp"},
    ]
    norms = [None if n == 7 else n for n in range(1, 11)]
    records = [record(n, skipped=int(n >= 7), grad_norm=norms[n - 1], effective_batch=n) for n in range(1, 11)]
    one = write(folder / "one", [*records, validation], events, task="a.Task")
    many = write(folder / "many", [record(n, loss=1e6 if n == 6180 else 1 / n) for n in range(1, 10_001)])
    evil = write(
        folder / EVIL.replace("/", "|"),
        [record(n, **{EVIL: n}) for n in (1, 2)],
        [],
        task=EVIL,
        **{"x" * 300: "y" * 300},
    )
    paths = {name: folder / f"{name}.html" for name in ("one", "many", "compared")}
    assert main([str(one), "--output", str(paths["one"])]) == 0
    assert main([str(many), "--output", str(paths["many"])]) == 0
    assert main([str(one), str(many), str(evil), "--output", str(paths["compared"])]) == 0
    return paths


@pytest.mark.parametrize(
    ("name", "theme", "width"),
    [
        ("one", "light", 1100),
        ("compared", "dark", 360),
        pytest.param("one", "dark", 360, marks=pytest.mark.slow),
        pytest.param("compared", "light", 1100, marks=pytest.mark.slow),
    ],
)
def test_it_is_drawn_and_readable(browser: Any, files: dict[str, Path], name: str, theme: str, width: int) -> None:
    with opened(browser, files[name], theme, width) as page:
        assert page.locator(".plot").count() >= 5
        check_readable(page, width)
        page.locator("summary").click()  # the configuration, which may have long words
        check_readable(page, width)
        assert "hacked" not in page.title()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if theme == "light" else "rgb(20, 23, 28)")


def test_hovering_tells_the_values(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["one"]) as page:
        assert hover(page, "loss", 0.4) == "update 40.25"
        assert "update 7 skipped" in hover(page, "loss", 0.7)
        assert "update 5: interrupt SIGTERM resume" in hover(page, "grad_norm", 0.5)
    with opened(browser, files["compared"]) as page:
        assert page.locator("main h1").inner_text() == "3 runs"
        assert "many" in hover(page, "loss", 0.618)
        assert "<b>" in hover(page, "loss", 0.001)  # plotly would read it as a tag


def test_the_spike_of_a_long_run_is_drawn(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["many"]) as page:
        drawn = "document.getElementById('plot loss')"
        assert page.evaluate(f"{drawn}.layout.yaxis.range[1]") > 1e6
        assert page.evaluate(f"{drawn}.data[0].x[{drawn}.data[0].y.indexOf(1e6)]") == 6180
        assert page.evaluate(f"{drawn}.data[0].x.length") <= 2002


def test_a_constant_is_drawn_in_the_middle_of_its_plot(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["one"]) as page:
        assert page.evaluate("document.getElementById('plot validation/loss').layout.yaxis.range") == [0, 0.5]


def test_the_switches_change_the_axes(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["one"]) as page:
        drawn = "document.getElementById('plot loss')"
        assert page.locator('[id="plot loss"] .xtitle').text_content() == "updates"
        page.get_by_label("samples").check()
        assert page.locator('[id="plot loss"] .xtitle').text_content() == "samples"
        assert page.evaluate(f"{drawn}.data[0].x") == [8 * n for n in range(1, 11)]
        assert hover(page, "loss", 0.4) == "after 32 samples0.25"
        assert hover(page, "validation/loss", 0.9) == "after 72 samples0.25"
        page.get_by_label("logarithmic").check()
        assert page.evaluate(f"{drawn}.layout.yaxis.type") == "log"


def test_a_theme_that_changes_is_followed(browser: Any, files: dict[str, Path]) -> None:
    with opened(browser, files["one"]) as page:
        ink = "document.querySelector('[id=\"plot loss\"] .xtitle').style.fill"
        light = page.evaluate(ink)
        page.emulate_media(color_scheme="dark")
        until(lambda: page.evaluate(ink) != light, 10, "the plots follow the theme")
