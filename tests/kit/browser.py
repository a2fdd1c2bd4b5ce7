"""A real headless Chromium, and the pages to open in it. Without one, tests are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium: `apt-get install chromium-headless-shell`, or `playwright install chromium-headless-shell`"


class NoBrowserError(RuntimeError):
    """There is no Chromium on this machine."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Run the Chromium of this machine, or the one that playwright has installed. Raises NoBrowserError."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = next((found for name in NAMES if (found := shutil.which(name))), playwright.chromium.executable_path)
        if not Path(path).exists():
            raise NoBrowserError(MISSING)
        browser = playwright.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, file: Path, theme: str = "light", width: int = 1100) -> Iterator[Any]:
    """Open a file, offline; fail afterwards if it has asked for anything else, or complained."""
    context = browser.new_context(
        color_scheme=theme, viewport={"width": width, "height": 900}, has_touch=width < 600, offline=True
    )
    page, troubles = context.new_page(), []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url == file.as_uri() else troubles.append(request.url))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert not troubles, troubles


def check_readable(page: Any, width: int) -> None:
    """Every plot is drawn, its lines and texts stand out from their ground, and nothing needs sideways scrolling."""
    plots = page.locator(".plot")
    for place in range(plots.count()):
        assert plots.nth(place).locator(".scatterlayer .trace path").count(), f"plot {place} is empty"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, card = (page.evaluate(f"colour('{name}')") for name in ("--ground", "--card"))
    for name, least in (("--text", 7.0), ("--quiet", 4.5), ("--alarm", 3.0), *((f"--c{n}", 3.0) for n in range(8))):
        ink = page.evaluate(f"colour('{name}')")
        assert min(contrast(ink, ground), contrast(ink, card)) >= least, f"{name} is too close to its ground"


def hover(page: Any, plot: str, along: float) -> str:
    """Return what a plot tells where the mouse is; `along` is the share of its width, from the left."""
    area = page.locator(f'[id="plot {plot}"] .nsewdrag').first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(0, 0)
    page.locator(".hoverlayer text").first.wait_for(state="detached")
    page.mouse.move(box["x"] + along * box["width"], box["y"] + box["height"] / 2)
    page.locator(f'[id="plot {plot}"] .hoverlayer text').first.wait_for()
    return str(page.locator(f'[id="plot {plot}"] .hoverlayer').text_content())


def contrast(ink: str, ground: str) -> float:
    """Return the contrast ratio of two colours (WCAG 2.2), as #rrggbb."""
    light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
