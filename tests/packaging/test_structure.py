"""The structure count, on a small tree whose numbers can be checked by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit import structure

FILES = {
    "engine/__init__.py": "",
    "engine/top.py": '"""Two\n\nlines."""\n\n# none\nfrom engine.room import a, b\nimport strategies.one\n',
    "engine/room/__init__.py": "",
    "engine/room/a.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from engine.top import Top\n",
    "engine/room/b.py": "def late():\n    from . import c\n",
    "engine/room/c.py": "from .b import late\n",
    "engine/ground.py": "from engine.room.a import x\n",
    "strategies/__init__.py": "from strategies.one import One\n",
    "strategies/one.py": "One = 1\n",
}
LAYERS = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["top | (gone)", "room", "ground"]
containers = ["engine"]
"""


def counted(root: Path, pyproject: str, capsys: pytest.CaptureFixture[str]) -> str:
    for file, text in {**FILES, "pyproject.toml": "[tool]\n" + pyproject}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    structure.main(root)
    return re.sub(" +", " ", capsys.readouterr().out)


def test_circles_decide_what_runs_back_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = counted(tmp_path, "", capsys)
    assert "\nengine 7 4 3 2 2 + 2 2 11\n" in text  # modules, rooms, arrows, back up, circles, lines
    assert "\nstrategies 2 2 1 0 - - 2\n" in text
    assert "\ntogether 9 6 5 2 2 + 2 2 13\n" in text
    assert "\nback up: engine.room -> engine.top, engine.top -> engine.room\n" in text
    assert "\ncircles (typed): [engine.room.a, engine.top], [engine.room.b, engine.room.c]\n" in text
    assert "\ncircles at run time: [engine.room.b, engine.room.c]\n" in text


def test_layers_decide_what_runs_back_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\nback up: engine.ground -> engine.room, engine.room -> engine.top\n" in counted(tmp_path, LAYERS, capsys)
