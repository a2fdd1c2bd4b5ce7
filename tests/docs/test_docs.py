"""The code in README and docs runs as it stands, and pages follow the rules of language."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from engine import Trainer
from engine.cli.main import main
from strategies import find
from tests.kit import ROOT
from tests.kit.commands import RUN
from tests.kit.pages import PAGES, blocks, printed
from tests.kit.processes import on_processes
from tests.kit.reference import Regression, Watch, big_batch_run, in_order, parameters


@pytest.mark.parametrize("P", [1, 3])
def test_the_readme_s_task(tmp_path: Path, P: int) -> None:
    (tmp_path / "line.py").write_text(blocks("README.md")[0])
    lines = printed("line.py", folder=tmp_path, P=P).splitlines()
    assert len(lines) == 1
    updates, _, weight, bias = lines[0].split()
    assert int(updates) == 12 * -(-1001 // 64)  # whatever P is
    assert abs(float(weight) - 3) < 0.1
    assert abs(float(bias) - 1) < 0.1


def test_the_readme_s_task_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "line.py").write_text(blocks("README.md")[0])
    options = ["--task=line.Line", "--trainer.max_epochs=3", "--trainer.effective_batch_size=256"]
    text = printed(RUN, *options, folder=tmp_path, P=2)
    assert "window:     P 2 x N 32 x K 4 = effective batch 256" in text
    assert "done: 12 updates, 3,003 samples" in text


LOCAL_SGD, ALL_REDUCE = "docs.examples.my_local_sgd.LocalSGD", "docs.examples.my_all_reduce.AllReduce"


def backend(folder: Path, path: str) -> None:
    """Write the module of docs/own-strategy.md that holds a strategy, by its class path; docs/examples has others."""
    if path.startswith("docs."):
        return
    name = f"{path.split('.')[0]}.py"
    (source,) = (block for block in blocks("docs/own-strategy.md") if block.startswith(f"# {name}\n"))
    (folder / name).write_text(source)


@pytest.mark.parametrize("path", ["my_backend.SecondGPU", "my_hook.HalfTraffic"])
def test_a_strategy_of_the_docs_trains(tmp_path: Path, path: str) -> None:
    backend(tmp_path, path)
    options = ["--trainer.max_epochs=1", f"--trainer.strategy={path}", "--trainer.run_dir=run"]
    printed(RUN, *options, folder=tmp_path)
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("path", "options"),
    [("my_hook.HalfTraffic", {}), (LOCAL_SGD, {"every": 4}), (ALL_REDUCE, {})],
)
def test_the_strategies_of_the_docs_train_on_two_processes(tmp_path: Path, path: str, options: dict[str, int]) -> None:
    backend(tmp_path, path)

    @on_processes(2)
    def results() -> list[float]:
        sys.path.insert(0, str(tmp_path))
        watch = Watch()
        trainer = Trainer(find(path)(**options), micro_batch_size=4, max_epochs=4, callbacks=watch, shuffle=False)
        trainer.fit(Regression(44))  # short last windows
        return parameters(trainer.model).tolist()

    one, other = results
    assert one == other
    reference = big_batch_run(Regression(44), [in_order(44, 8)] * 4).tolist()
    distance = max(abs(a - b) for a, b in zip(one, reference, strict=True))
    assert distance < {"my_hook.HalfTraffic": 1e-3, LOCAL_SGD: 0.1, ALL_REDUCE: 1e-12}[path]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "kept", "not_declared"),
    [
        ("my_backend.SecondGPU --processes 1", 20, 0),
        ("my_hook.HalfTraffic --processes 2", 20, 0),
        (f"{LOCAL_SGD} --processes 2 --every 2", 12, 8),
        (f"{ALL_REDUCE} --processes 3", 20, 0),
    ],
)
def test_the_strategies_of_the_docs_keep_what_they_declare(
    tmp_path: Path, command: str, kept: int, not_declared: int
) -> None:
    path, *arguments = command.split()
    backend(tmp_path, path)
    text = printed("-m", "engine.conformance", path, *arguments, folder=tmp_path, seconds=500)
    assert text.splitlines()[-1] == f"20 promises: {kept} kept, 0 broken, {not_declared} not declared."


@pytest.mark.slow
def test_the_plan_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (ROOT / "docs/plan.md").read_text()
    options = re.findall(r"```bash\npython engine/run.py (.*)\n```", page)[0].split()
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(options) == 0
    told = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert told == re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0].splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


MODULES = [path for package in ("engine", "strategies") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_public_method_has_a_docstring_or_inherits_one(path: Path) -> None:
    if path.stem in ("__main__", "run"):
        return
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for owner in vars(module).values():
        if inspect.isclass(owner) and owner.__module__ == module.__name__ and not owner.__name__.startswith("_"):
            for name in (name for name in vars(owner) if not name.startswith("_")):
                if callable(getattr(owner, name)) or isinstance(vars(owner)[name], property):
                    assert inspect.getdoc(getattr(owner, name)), f"{owner.__name__}.{name}"


PROSE = [*PAGES, "SECURITY.md"]
GENERATED = r"^<!-- (\w+)\b[^\n]*-->$.*?^<!-- (?:/\1|end) -->$"
NOT_PROSE = rf"{GENERATED}|^```.*?^```$|^\|[^\n]*$|^#[^\n]*$|^!\[[^\n]*$|^<!--[^\n]*$|^\$\$.*?\$\$$"
"""Generated tables, code, tables, headings, pictures, marks, formulas."""
DIALECT = (
    r"\b(go|goes|going|gone|went) on\b|\b(is|are) none\b|\banew\b|\b[Ww]here there (is|are)\b|\bfor ever\b"
    r"|\bof like\b|\bof one's own\b|\b[Ll]ikewise\b|\b[Cc]alm\b|\"\"\"(What|How) "
)
"""What a stranger would have to read twice."""


def prose(page: str) -> str:
    return re.sub(NOT_PROSE, "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def sentences(page: str) -> list[str]:
    """Return the sentences of a page; code counts as one word, and a link as its text."""
    parts = re.split(r"\n\s*\n|^\s*(?:-|\d+\.) ", prose(page), flags=re.MULTILINE)
    plain = (re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "CODE", " ".join(part.split()))) for part in parts)
    return [sentence for part in plain for sentence in re.split(r"(?<=[.!?]) |(?<=[.:?]\*\*) ", part)]


@pytest.mark.parametrize("page", PROSE)
def test_a_page_is_written_to_be_read_once(page: str) -> None:
    assert [line for line in prose(page).splitlines() if len(line) > 100] == []
    assert [sentence for sentence in sentences(page) if len(sentence.split()) > 25] == []
    assert [found[0] for found in re.finditer(DIALECT, prose(page))] == []


def test_the_code_speaks_the_same_language() -> None:
    paths = [path for top in ("engine", "strategies", "launch") for path in sorted((ROOT / top).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): re.search(DIALECT, path.read_text()) for path in paths}
    assert {path: match[0] for path, match in found.items() if match} == {}
