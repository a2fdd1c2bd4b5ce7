import gc
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share two cores

import pytest
import torch

from tests.kit import costs, selection

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a script, and so by the engine
with suppress(ImportError):  # the device tests run on machines without it
    from hypothesis import Phase, settings

    settings.register_profile("tally", deadline=None)  # no test measures time
    settings.register_profile(
        "fault", deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
    )  # red is enough
    settings.load_profile("fault" if "TALLY_FAULT" in os.environ else "tally")

if (device := os.environ.get("TALLY_TEST_DEVICE", "fake")) == "fake":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests' processes talk over gloo
elif device == "cuda":
    collect_ignore = [str(path) for path in Path(__file__).parent.rglob("test_*.py") if path.name != "test_device.py"]
else:
    raise ValueError(f"TALLY_TEST_DEVICE={device}: give cuda, or leave it out.")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the first test of each file")
    parser.addoption("--all", action="store_true", help="every case of each test, also of the whole suite")
    parser.addoption("--changed", action="store_true", help="the tests of what git says has changed")
    parser.addoption("--costs", action="store_true", help="seconds of the processor and processes started, by test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("costs"):
        config.pluginmanager.register(costs)
    if config.getoption("changed"):  # each worker chooses, too: it gets the words of the command line
        config.args = selection.select(changed := selection.changed_files())
        if not config.args:
            raise pytest.UsageError(f"no tests of {', '.join(changed)}: give them, or leave --changed out.")
        if not hasattr(config, "workerinput"):
            print("changed:", *config.args, sep="\n    ")


def _is_the_whole_suite(config: pytest.Config) -> bool:
    """Whether no file is named: the everyday tests, or the slow tests of CI."""
    names = [Path(name).name for name in config.args]
    return names == ["tests"] and config.option.markexpr in ("not slow", "slow and not campaign")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        items[:] = selection.first_of_each_file(items)
    elif _is_the_whole_suite(config) and not config.option.all:
        items[:] = selection.some_cases_of_each_test(items)


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of garbage collections: it is much, and a fork copies what they touch."""
    gc.freeze()


MAY_BE_MISSING = ("GPU", "root", "Chromium")
"""What a machine of CI may lack; a test that is skipped for another reason guards nothing there."""


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "TALLY_CI" in os.environ and reporter is not None:
        reasons = [str(report.longrepr[2]) for report in reporter.stats.get("skipped", ())]
        if missing := sorted({text for text in reasons if not any(word in text for word in MAY_BE_MISSING)}):
            print("\nskipped, which CI does not allow: " + "; ".join(missing))
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Undo what a command that ran in this process has done: it ends with its signals ignored."""
    handlers = {number: signal.getsignal(number) for number in (1, 2, 10, 15)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
