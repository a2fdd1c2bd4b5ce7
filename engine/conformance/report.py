"""The pytest plugin that runs the checks and prints a table. The only module here that imports pytest."""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

import pytest

from engine.conformance import CHECKS, Backend, BrokenPromiseError, NotDeclaredError

QUIET = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
COLLECT = ["-c", os.devnull, "-o", "python_files=*.py", "-o", "python_functions=check_*", "--pyargs", *CHECKS]


class Promise(NamedTuple):
    """A promise, whether it is kept, broken, or not declared, and what was seen where it is broken."""

    name: str
    text: str
    verdict: str
    seen: str = ""


class Report:
    """A plugin: gives the checks their backend, and remembers every verdict."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.promises: list[Promise] = []

    @pytest.fixture(scope="session")
    def backend(self) -> Backend:
        """The backend that the checks run on."""
        return self._backend

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool:
        """Run one check."""
        check = pyfuncitem.obj
        name = check.__name__.removeprefix("check_").replace("_", " ")
        text = (check.__doc__ or "").splitlines()[0]
        try:
            check(self._backend)
        except NotDeclaredError as reason:
            self.promises.append(Promise(name, str(reason), "not declared"))
            pytest.skip(str(reason))
        except Exception as error:
            sentence = str(error) if isinstance(error, BrokenPromiseError) else f"{type(error).__name__}: {error}"
            self.promises.append(Promise(name, text, "broken", sentence))
            raise
        self.promises.append(Promise(name, text, "kept"))
        return True

    def table(self) -> str:
        """Return what was seen of those that are broken, all promises with their verdicts, and how many there are."""
        seen = [f"{p.name}: {p.seen}\n" for p in self.promises if p.seen]
        width = max(len(promise.name) for promise in self.promises)
        rows = [f"{p.verdict:<12}  {p.name:<{width}}  {p.text}" for p in self.promises]
        counts = Counter(p.verdict for p in self.promises)
        sums = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("kept", "broken", "not declared"))
        return "\n".join([*seen, *rows, "", f"{len(self.promises)} promises: {sums}."])


def report(backend: Backend, only: str | None = None) -> Report:
    """Run every check on `backend`, or those whose name has `only` in it (as pytest's -k), and return the report.

    Raises RuntimeError where pytest did not come to the end of them.
    """
    plugin = Report(backend)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.pop("PYTEST_ADDOPTS", None)
    status = pytest.main([*QUIET, *COLLECT, *(["-k", only] if only else [])], plugins=[plugin])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"the checks were not run to their end: pytest's status is {int(status)}.")
    return plugin
