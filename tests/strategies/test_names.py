"""Strategies by name and by class path; and an engine that knows none of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import strategies
from engine import Trainer
from strategies import SingleDeviceStrategy, Strategy, find
from tests.kit import ROOT

CONCRETE = {
    name
    for name, value in vars(strategies).items()
    if isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy
}
OFFERED = {
    "Strategy",
    "Buffers",
    "MESSAGE_MAXIMA",
    "MicroBatch",
    "Optimizers",
    "PendingRows",
    "UserError",
    "check_count",
    "find",
    "parts_of",
    "resolve",
    "sum_of_bits",
    "user_name",
    "with_modes",
}
"""What the engine may import from `strategies`."""


@pytest.fixture
def their_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_backend.py").write_text(
        "from strategies import SingleDeviceStrategy\n"
        "class Theirs(SingleDeviceStrategy):\n    name = 'theirs'\n"
        "class NotOne: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("their_backend")
def test_a_class_path_is_a_name() -> None:
    assert Trainer("their_backend.Theirs", max_epochs=1).strategy.name == "theirs"
    assert find("strategies.single.SingleDeviceStrategy") is SingleDeviceStrategy


@pytest.mark.usefixtures("their_backend")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fsdpp", r"Did you mean 'fsdp'\?"),
        (7, ""),
        ("their_backend.NotOne", r"NotOne'> is not a subclass of strategies.Strategy"),
        ("their_backend.Their", "could not be imported: module 'their_backend' has no attribute 'Their'"),
        ("my.ddp", "could not be imported: No module named 'my'"),
        ("strategies.Strategy", "does not define accumulation_context, effective_batch, supports_variable_windows"),
    ],
)
def test_what_cannot_be_found_lists_the_names_and_the_way_out(name: object, reason: str) -> None:
    message = f"strategy={name!r}: expected one of auto, single, dp, ddp.*, a Strategy or its class path.*{reason}"
    with pytest.raises(ValueError, match=message):
        Trainer(name, max_epochs=1)  # type: ignore[arg-type]


def strategies_named_in(source: str) -> list[str]:
    """Where a source asks which strategy it has: names a concrete one, tests a type, or imports past the interface."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            names = [part for part in _names(node.args[1]) if part.endswith("Strategy")]
        elif isinstance(node, ast.Name | ast.Attribute):
            names = [part for part in _names(node) if part in CONCRETE]
        elif isinstance(node, ast.ImportFrom) and node.module == "strategies":
            names = [alias.name for alias in node.names if alias.name not in OFFERED]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("strategies."):
            names = [] if node.module in ("strategies.environment", "strategies.errors") else [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "strategies"]
        elif isinstance(node, ast.Compare) and any("strategy.name" in ast.unparse(part) for part in ast.walk(node)):
            names = [ast.unparse(node)]
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


def _names(node: ast.AST) -> list[str]:
    return [getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)]


@pytest.mark.parametrize("path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_engine_asks_no_strategy_what_class_it_has(path: Path) -> None:
    assert strategies_named_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(self.strategy, DDPStrategy)",
        "isinstance(self.strategy, (int, strategies.DPStrategy))",
        "issubclass(type(strategy), Strategy)",
        "type(strategy) is SingleDeviceStrategy",
        "from strategies import DDPStrategy",
        "from strategies.ddp.strategy import DDPStrategy as D",
        "import strategies.ddp.strategy as d",
        "if trainer.strategy.name == 'ddp': pass",
    ],
)
def test_asking_would_be_seen(source: str) -> None:
    assert strategies_named_in(source)
