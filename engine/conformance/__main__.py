"""The command: `python -m engine.conformance module.Class --processes 2 [--option value ...]`."""

import argparse
import os
import sys
from typing import Any

import torch

from engine.conformance.backend import Backend, needs_equal_windows
from engine.conformance.processes import ProcessesFailedError
from engine.conformance.report import run_checks, table
from strategies import Strategy, find

PROGRAM = "python -m engine.conformance"


def main(arguments: list[str]) -> int:
    """Check one strategy; return 0 if every promise is kept, 1 if one is broken, 2 if none can be checked."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Run every promise that a Strategy declares, on real processes. Exits with 1 if one is broken.",
        epilog="Other options are those of the strategy's __init__, as in --bucket_cap_mb 1.",
        allow_abbrev=False,
    )
    parser.add_argument("strategy", help="a name (single, dp, ddp, ...) or a class path, as in my_backend.Mine")
    parser.add_argument("--processes", type=int, default=2, help="how many are started (default: 2)")
    parser.add_argument("--accumulate", type=int, default=4, metavar="K", help="micro-batches per window (default: 4)")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for each run of a check (default: 60)")
    parser.add_argument("--only", metavar="WORD", nargs="+", help="only the checks whose name has one of these words")
    given, rest = parser.parse_known_args(arguments)
    if given.processes < 1 or given.accumulate < 1 or not given.seconds > 0:
        return _refuse("give --processes and --accumulate of at least 1, and --seconds of more than 0.")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # forked processes cannot use CUDA where this one has
    try:
        strategy_class = find(given.strategy)
        options = _options(strategy_class, rest)
        backend = Backend(strategy_class, options, given.processes, given.accumulate, given.seconds)
        backend.strategy  # noqa: B018 - to be refused here, if it cannot be made
        backend.attempt(needs_equal_windows)  # or anything else for which it is set up
    except (ValueError, TypeError) as error:
        return _refuse(str(error))
    except ProcessesFailedError as error:
        if refused := [text for text in error.errors.values() if text.startswith(("UserError", "ValueError"))]:
            return _refuse(f"{given.strategy} cannot be set up on {given.processes} processes: {refused[0]}")
    torch.set_num_threads(1)  # threads do not live through a fork
    promises = list(run_checks(backend, given.only or [""]))
    if not promises:
        return _refuse(f"--only={' '.join(given.only)}: expected a word that is in the name of a check.")
    print(f"{given.strategy} on {backend.processes} processes, K={backend.K}\n\n{table(promises)}")
    return int(any(promise.verdict == "broken" for promise in promises))


def _options(strategy_class: type[Strategy], arguments: list[str]) -> dict[str, Any]:
    if not arguments:
        return {}
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=PROGRAM, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(strategy_class)
    try:
        return dict(parser.parse_args(arguments).as_dict())
    except argparse.ArgumentError as error:
        known = ", ".join(f"--{name}" for name in parser.get_defaults().as_dict()) or "no options"
        raise ValueError(f"{' '.join(str(error).split())}; {strategy_class.__name__} has {known}.") from None


def _refuse(message: str) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
