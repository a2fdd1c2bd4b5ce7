"""The command: `python -m engine.audit module:adapter --processes 2`."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

import orjson
import torch

from engine.audit import CASES, audit

PROGRAM = "python -m engine.audit"


def main(arguments: list[str]) -> int:
    """Audit one adapter; return 0 if each case is exact, 1 if one is not, 2 if nothing can be audited."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compare each optimizer.step's gradient with that of one big batch. Exits with 1 if they differ.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="a function train(job), or an Adapter, as in my_loop:train")
    parser.add_argument("--processes", type=int, default=2, help="1 to 4 (default: 2)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"some of: {', '.join(map(repr, CASES))}")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="default: float64")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for each run of a case (default: 60)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    given = parser.parse_args(arguments)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # forked processes cannot use CUDA where this one has
    torch.set_num_threads(1)  # threads do not live through a fork
    module, _, name = given.adapter.partition(":")
    try:
        adapter = getattr(import_module(module), name)
        report = audit(adapter, given.processes, given.cases, getattr(torch, given.dtype), given.seconds)
    except (ImportError, AttributeError, ValueError) as error:
        print(f"{PROGRAM}: {given.adapter}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{given.adapter} on {given.processes} processes, {given.dtype}\n\n{report.text()}")
    if given.markdown:
        given.markdown.write_text(report.markdown())
    if given.json:
        given.json.write_bytes(orjson.dumps(report.rows))
    return int(not report.exact)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
