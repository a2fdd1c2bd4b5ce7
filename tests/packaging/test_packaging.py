"""The wheel and sdist: their contents, and a run with nothing else installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from engine.signals import EXIT_STATUS
from tests.kit import ROOT
from tests.kit.hosts import Started, until

pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.slow, pytest.mark.timeout(400)]

PACKAGES = {"engine", "strategies", "launch"}
DATA = {
    "engine/py.typed",
    "strategies/py.typed",
    "launch/py.typed",
    "engine/report/page.css",
    "engine/report/page.html",
    "engine/report/page.js",
    "engine/report/plots.html",
    "launch/recipes/digits/digits.toml",
    "launch/train.sh",
    "launch/clusters/slurm.sh",
    "launch/clusters/kubernetes.yaml",
}
MINE = """
import torch
from torch import nn

from engine import Loss, Task
from strategies import DDPStrategy


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 600

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        return torch.randint(0, 9, (int(torch.randint(2, 12, (), generator=draw)),), generator=draw)


class Next(Task):
    def configure_model(self):
        return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 10))

    def configure_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    def train_data(self):
        return Words()

    def collate(self, samples):
        return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=9)

    def loss(self, model, batch):
        here, there = batch[:, :-1], batch[:, 1:]
        each = nn.functional.cross_entropy(model(here).transpose(1, 2), there, ignore_index=9, reduction="sum")
        return Loss(each, (there != 9).sum())


class Patient(DDPStrategy):
    def backward(self, loss, scale):
        import time
        time.sleep(0.02)
        super().backward(loss, scale)
"""
SETTINGS = """
[task]
class_path = "mine.Next"

[trainer]
strategy = "mine.Patient"
micro_batch_size = 4
accumulate_grad_batches = 2
max_epochs = 4
run_dir = "runs/mine"
"""
UPDATES = 4 * 38  # 600 samples in windows of 16


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, made of a copy: setuptools leaves its own files beside the sources."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "dist", "runs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    wheel = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    sdist = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"]
    for command in (wheel, sdist):
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@dataclass(frozen=True)
class Place:
    """A virtual environment with the wheel, which sees what Tally needs, but not this repository."""

    folder: Path
    python: str
    tally: str
    packages: Path

    def do(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )


@pytest.fixture
def place(built: Path, tmp_path: Path) -> Place:
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "empty").mkdir()
    return Place(tmp_path / "empty", str(python), str(python.with_name("tally")), packages)


def test_the_wheel_holds_three_packages_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
    of_pip = {name for name in names if re.match(r"tally_engine-[^/]*\.(dist-info|data)/", name)}
    ours = names - of_pip
    assert {PurePosixPath(name).parts[0] for name in ours} == PACKAGES
    assert ours >= DATA
    assert {name for name in ours if name.endswith(".py")} == {
        str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    }
    assert [name.split("/", 1)[1] for name in of_pip if ".data/" in name] == ["scripts/tally"]
    assert any(name.endswith("/licenses/LICENSE") for name in of_pip)
    assert "License-Expression: Apache-2.0" in metadata


def test_the_sdist_holds_what_the_wheel_is_made_of(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {member.name.split("/", 1)[1] for member in sdist.getmembers() if member.isfile()}
    assert names >= DATA
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert tops - PACKAGES == {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
        "tally_engine.egg-info",
    }


def test_from_an_empty_folder_to_a_resumed_run_and_its_report(place: Place) -> None:
    (place.folder / "mine.py").write_text(MINE)
    (place.folder / "mine.toml").write_text(SETTINGS)
    where = place.do(place.python, "-c", "import engine, launch, strategies; print(engine.__file__)")
    assert where.stdout.startswith(str(place.packages)), where
    planned = place.do(place.tally, "--config=mine.toml", "--plan", "--plan.processes=2")
    assert planned.returncode == 0, planned.stderr

    torchrun = [place.python, "-m", "launch.start", "--standalone", "--nproc-per-node=2", "-m", "engine.run"]
    history = place.folder / "runs" / "mine" / "metrics.jsonl"

    def start() -> Started:
        return Started([*torchrun, "--config=mine.toml"], place.folder, PYTHONPATH="")

    with start() as first:
        until(lambda: history.exists() and len(history.read_text().splitlines()) > 30, 120, "30 updates")
        first.process.send_signal(signal.SIGTERM)
        assert first.wait(120) == EXIT_STATUS, first.output
    assert 30 < len(history.read_text().splitlines()) < UPDATES
    with start() as second:
        assert second.wait(120) == 0, second.output
    records = [json.loads(line) for line in history.read_text().splitlines()]
    assert [record["update"] for record in records] == list(range(1, UPDATES + 1))
    assert records[-1]["samples"] == 4 * 600
    assert records[-1]["loss"] < records[0]["loss"]

    report = place.do(place.python, "-m", "engine.report", "runs/mine")
    assert report.returncode == 0, report.stderr
    (page,) = place.folder.rglob("*.html")
    assert "plotly" in page.read_text().lower()


@pytest.mark.campaign
def test_another_package_of_our_names_is_named(place: Place, tmp_path: Path) -> None:
    for name in PACKAGES:
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "__init__.py").write_text("")
    done = place.do(place.tally, "--print_config", PYTHONPATH=str(tmp_path / "engine"))
    assert done.returncode == 1
    assert "another package called 'engine' hides ours" in done.stderr
    assert str(tmp_path / "engine") in done.stderr
    for name in PACKAGES - {"engine"}:  # ours come first
        shutil.copytree(tmp_path / name / name, place.folder / name)
        done = place.do(place.tally, "--print_config", PYTHONPATH=str(tmp_path / name))
        assert done.returncode == 0, done.stderr

    (place.packages / "strategies" / "__init__.py").write_text("")
    done = place.do(place.tally, "--print_config")
    assert done.returncode == 1
    assert "strategies has files of another package" in done.stderr
    assert "Traceback" not in done.stderr
