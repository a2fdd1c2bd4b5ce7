"""The docs as a site: it builds without a warning, asks for nothing from elsewhere, and fits screens of any width."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pytest

from tests.kit import ROOT
from tests.kit.browser import NoBrowserError, chromium

pytestmark = [pytest.mark.xdist_group("site"), pytest.mark.slow, pytest.mark.timeout(300)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, which is built and served here."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(  # with --quiet, --strict hears no warning
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("theme", "width"), [("light", 1400), ("dark", 1400), ("light", 390)])
def test_pages_in_a_browser(site: str, theme: str, width: int) -> None:
    pytest.importorskip("playwright")
    asked, complaints = [], []
    try:
        with chromium() as browser:
            page = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900}).new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            for name in ("", "tutorial/", "accumulation/", "architecture/", "reference/trainer/"):
                page.goto(site + name, wait_until="networkidle")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
                scheme = page.locator("body").get_attribute("data-md-color-scheme")
                assert scheme == {"light": "default", "dark": "slate"}[theme]
                formulas = page.locator("math")
                assert (formulas.count() > 0) == (name == "accumulation/")
                assert all(formulas.nth(place).bounding_box()["height"] > 5 for place in range(formulas.count()))
    except NoBrowserError as missing:
        pytest.skip(str(missing))
    assert [url for url in asked if not url.startswith((site, "data:", "blob:"))] == []
    assert complaints == []


def test_the_reference_says_what_the_docstrings_say(site: str) -> None:
    for page, words in {
        "trainer": ("effective_batch_size", "Trains a", "keep_best"),
        "task": ("configure_model", "A sum of losses and its weight"),
        "own-loop": ("Cuts data into windows",),
        "callbacks": ("GradientAccumulationScheduler", "on_update_end", "EarlyStopping"),
        "strategies": ("accumulation_context", "FSDPStrategy", "PipelineStrategy", "resolve"),
        "loggers": ("TrackerLogger",),
        "adapters": ("CausalLM", "Lightning"),
        "exit-statuses": ("EXIT_STATUS", "75"),
    }.items():
        with urlopen(f"{site}reference/{page}/") as answer:
            text = answer.read().decode()
        assert [word for word in words if word not in text] == [], page
