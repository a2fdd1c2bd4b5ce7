"""Run the benchmarks, and write what they print, and a plot of it, into the pages of docs/ that tell of it.

    python tests/benchmarks/run.py [NAME ...]

Without names all of them, one after the other: it takes a while, on a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.plot import plot

FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parents[1] / "docs"
PAGES = {
    **dict.fromkeys(
        ("gpt2", "overhead", "datasets", "in_memory", "memory", "start", "wire", "checkpoints"), "benchmarks.md"
    ),
    "scale": "scale.md",
    "strategies": "strategies.md",
    "faults": "reliability.md",
    "noise_scale": "noise-scale.md",
}
"""Scripts beside this one, and the page on which their output stands, between markers of that name."""


def output(name: str) -> str:
    print(f"{name} ...", flush=True)
    return subprocess.run([sys.executable, FOLDER / f"{name}.py"], stdout=subprocess.PIPE, text=True, check=True).stdout


def publish(name: str, text: str, page_name: str) -> None:
    """Write `text` between the markers `<!-- name -->` and `<!-- /name -->` of a page of the docs."""
    page = DOCS / page_name
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no `{begin.strip()}` with a `{end.strip()}` after it.")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PAGES))
    names = parser.parse_args().names
    if unknown := set(names) - set(PAGES):
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(PAGES)}")
    for name in names or PAGES:
        text = output(name)
        publish(name, text, PAGES[name])
        if name == "overhead" and "Instructions per" in text:
            (DOCS / "images" / "overhead.svg").write_text(plot(text.partition("CPU time")[0]))


if __name__ == "__main__":
    main()
