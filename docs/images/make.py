"""Make the pictures of the docs from a real run, and check in the browser what they show.

    python docs/images/make.py                     # minutes on two idle cores
    python docs/images/make.py --functions=1000    # a smaller run
    python docs/images/make.py --run=FOLDER        # of a run that is there

The run is `stdlib_lm` on two processes, K = 1, 2, 4 by epoch; it is interrupted after its first epoch and resumed.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLIP = {"x": 0, "y": 0, "width": 1100, "height": 1270}
"""The upper part of a page: what all is about."""

sys.path.insert(0, str(ROOT))

LAUNCH = (
    *(sys.executable, str(ROOT / "launch" / "start.py"), "--standalone", "--nproc_per_node=2"),
    str(ROOT / "engine" / "run.py"),
)
CONFIG = f"--config={ROOT / 'launch' / 'recipes' / 'stdlib_lm' / 'stdlib_lm.toml'}"
COLUMNS, ERASED = 100, b"\x1b[2K"
MOVES = re.compile(r"(?:\x1b\[[0-9;?]*[A-HJKhl])+")
"""What moves the cursor and erases."""

from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

from engine.report.__main__ import main as report  # noqa: E402
from tests.kit.browser import check_readable, chromium, hover, opened  # noqa: E402


def train(folder: Path, functions: int) -> None:
    """Train the recipe, with an interruption after the first epoch."""
    command = [*LAUNCH, CONFIG, f"--task.functions={functions}", f"--trainer.run_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    history = folder / "metrics.jsonl"
    with subprocess.Popen(command, env=environment) as first:
        while first.poll() is None and not (history.exists() and "validation/" in history.read_text()):
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
    subprocess.run(command, env=environment, check=True)


def picture_of_the_report(browser: Any, folder: Path) -> None:
    """Take the report in both themes; look at it on a phone too."""
    report([str(folder)])
    for theme in ("light", "dark"):
        with opened(browser, folder / "report.html", theme, width=1100) as page:
            check_readable(page, 1100)
            assert hover(page, "loss", 0.5).startswith("update ")
            page.screenshot(path=HERE / f"report-{theme}.png", full_page=True, clip=CLIP)
        with opened(browser, folder / "report.html", theme, width=360) as page:
            check_readable(page, 360)


def picture_of_progress(browser: Any, parent: Path) -> None:
    """Take the terminal in the middle of a run's first epoch."""
    shown = b""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    with subprocess.Popen(
        [*LAUNCH, CONFIG, f"--trainer.run_dir={parent / 'shown'}"],
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"},
    ) as run:
        while shown.count(ERASED) < 30:  # lines of earlier states
            shown += os.read(master, 65536)
        run.send_signal(signal.SIGTERM)
        while select.select([master], [], [], 0.0)[0] or run.poll() is None:  # or it would wait for a reader
            if select.select([master], [], [], 0.1)[0]:
                os.read(master, 65536)
    os.close(master)
    os.close(terminal)
    texts = MOVES.split(shown.decode().replace("\r", ""))
    banner, states = texts[0], [text for text in texts if "epoch 0" in text and "loss" in text]
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(Text.from_ansi(banner + states[-2]))
    drawn = console.export_svg(title="launch/train.sh")
    (parent / "progress.svg").write_text(re.sub(r"@font-face \{[^}]*\}", "", drawn))  # the machine's own fonts do
    with opened(browser, parent / "progress.svg", "light", width=1100) as page:
        page.locator("svg > rect").first.screenshot(path=HERE / "progress.png")


def main() -> None:
    """Make all pictures."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--functions", type=int, default=6000, help="how many samples to train on")
    parser.add_argument("--run", type=Path, help="the folder of a run to take instead of training one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent, chromium() as browser:
        folder = options.run or Path(parent) / "stdlib_lm"
        if options.run is None:
            train(folder, options.functions)
        picture_of_the_report(browser, folder)
        picture_of_progress(browser, Path(parent))


if __name__ == "__main__":
    main()
