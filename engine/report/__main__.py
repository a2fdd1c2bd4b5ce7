"""The command line: `python -m engine.report RUN [RUN ...] [--output FILE]`."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from engine.disk import replace_text
from engine.report.page import page
from engine.report.reading import NotARunError, read


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path. Return 2, after one line with the reason, if that fails."""
    parser = ArgumentParser("python -m engine.report", description="One run, or several compared, as an HTML page.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--output", metavar="FILE", help="the page; for one run report.html in its folder")
    options = parser.parse_args(arguments)
    if options.output is None and len(options.runs) > 1:
        parser.error("several runs have no folder in common: say where the page goes with --output FILE.")
    output = Path(options.output or Path(options.runs[0], "report.html"))
    try:
        html = page([read(folder) for folder in options.runs])
        replace_text(output, html.encode(errors="backslashreplace").decode())  # a name may hold half a character
    except NotARunError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "plotly":
            raise
        parser.error("the plots need plotly, which is not installed: pip install 'tally-engine[report]'.")
    except OSError as error:
        parser.error(f"the page could not be written or a run not be read: {error}. Another place: --output FILE.")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
