"""Run folders, checkpoints, weights and options of strangers write nothing outside and never hang."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import disk
from engine.cli.main import main, parse
from engine.report.__main__ import main as report
from tests.kit.commands import python
from tests.kit.run_folders import fit

pytestmark = pytest.mark.timeout(40)

NAMES = [
    ".lock",
    "config.json",
    "metrics.jsonl",
    "events.jsonl",
    "model.safetensors",
    "config.yaml",
    "metrics.csv",
    "tensorboard",
    "anything",
    "checkpoints/latest",
    "checkpoints/.latest.part",
    "checkpoints/update-00000012/manifest.json",
    "checkpoints",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "run"
    fit(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "run")


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def endless(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [link, pipe, endless], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_link_or_device_in_a_run_folder_is_refused(
    name: str, make: Callable[[Path, Path], None], folder: Path, tmp_path: Path
) -> None:
    path, outside = folder / name, tmp_path / "outside"
    outside.mkdir() if path.is_dir() else outside.write_text("precious")
    (shutil.rmtree if path.is_dir() else os.remove)(path) if path.exists() else None
    make(path, outside)
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=f"found a link or device: {name}. Remove it, or use a new folder"):
        fit(folder, max_epochs=2)
    assert sorted(os.listdir(folder)) == before
    assert not os.listdir(outside) if outside.is_dir() else outside.read_text() == "precious"


def test_an_empty_folder_with_a_foreign_lock_is_refused(tmp_path: Path) -> None:
    for make in (link, pipe):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "run").mkdir()
        make(tmp_path / "run" / ".lock", tmp_path / "outside")
        for resume in ("auto", "never"):
            with pytest.raises(ValueError, match=r"found a link or device: \.lock"):
                fit(tmp_path / "run", resume=resume)
    assert not (tmp_path / "outside").exists()


def test_a_file_that_has_another_name_elsewhere_stays_as_it_is_there(folder: Path, tmp_path: Path) -> None:
    for path in [path for path in folder.iterdir() if path.is_file() and path.name != "events.jsonl"]:
        os.link(path, tmp_path / f"outside-{path.name}")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("outside-*")}
    assert fit(folder, max_epochs=2).update == 24
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("outside-*")}
    os.link(folder / "events.jsonl", tmp_path / "outside")
    with pytest.raises(ValueError, match=r"found a link or device: events\.jsonl"):
        fit(folder, max_epochs=3)


def test_a_line_without_end_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(disk, "LONGEST", 1 << 16)
    os.truncate(folder / "metrics.jsonl", 1 << 40)  # a hole: no bytes on disk
    with pytest.raises(OSError, match=r"expected lines of at most 65536 bytes\. Move the file away"):
        fit(folder, max_epochs=2)
    with pytest.raises(SystemExit):
        report([str(folder)])
    assert "expected lines of at most 65536 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "summary.json", "events.jsonl"])
def test_a_report_waits_for_no_pipe(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert report([str(folder)]) == 0
    assert stat.S_ISFIFO((folder / name).stat().st_mode)


def test_a_report_follows_no_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("precious")
    for name in ("report.html", "report.html.part", ".report.html.part"):
        (folder / name).symlink_to(tmp_path / "outside")
    (folder / "config.json").write_text('{"a run of Tally": ' + '{"a": ' * 900 + "1" + "}" * 901)
    assert report([str(folder)]) == 0
    assert (tmp_path / "outside").read_text() == "precious"


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change state.json of the newest checkpoint, and the manifest to it."""
    path = folder / "checkpoints" / "update-00000012"
    state, manifest = json.loads((path / "state.json").read_text()), json.loads((path / "manifest.json").read_text())
    change(state)
    data = json.dumps(state).encode()
    (path / "state.json").write_bytes(data)
    manifest["files"]["state.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def at(*position: int) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update(positions=[{"$tuple": list(position)}])


def stream(**other: Any) -> Callable[[dict[str, Any]], Any]:
    place = {"epoch": 0, "seed_index": 12, "taken": 12, "has_ended": False, "state": None}
    return lambda state: state.update(positions=[{**place, **other}])


@pytest.mark.parametrize(
    "change",
    [
        at(0, -1),
        at(-1, 0),
        at(2, 0),
        at(1, 24),
        at(0, 10**30),
        stream(taken=10**12),
        stream(taken=-1),
        stream(seed_index=-1),
        stream(epoch=2),
        lambda state: state["run"].update(update=2**63),
        lambda state: state["run"].update(samples=10**400),
        lambda state: state["run"].update(seconds={"$float": "nan"}),
        lambda state: state["run"].update(weight={"$float": "inf"}),
        lambda state: state["run"].update(metrics={"loss": "x"}),
        lambda state: state["schedule"].update(effective_batches={"$pairs": [[0, 10**30]]}),
    ],
)
def test_an_impossible_position_is_refused(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    forge(folder, change)
    with pytest.raises(ValueError, match="has invalid content"):
        fit(folder, max_epochs=2)


def test_weights_that_are_not_numbers_are_refused(good: Path, tmp_path: Path) -> None:
    weights = load_file(good / "model.safetensors")
    weights["0.bias"][3] = torch.nan
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights=.*: expected numbers, found NaN in 0\.bias\. Use another file"):
        fit(tmp_path / "run", weights=str(tmp_path / "weights.safetensors"))
    weights["0.bias"][3] = -torch.inf  # as masks have it
    save_file(weights, tmp_path / "weights.safetensors")
    fit(tmp_path / "run", weights=str(tmp_path / "weights.safetensors"))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TOO_DEEP = "expected options, found brackets or aliases nested too deeply. Write the options out."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), TOO_DEEP),
        (b"a: &a [*a]", TOO_DEEP),
        (b"trainer: " + b"[" * 20_000 + b"]" * 20_000, TOO_DEEP),
        (b"x = " + b"[" * 20_000 + b"]" * 20_000, TOO_DEEP),
        (b"\xbc\xff" * 100, "expected UTF-8 text"),
        (b"trainer: []", "trainer: expected options by name. Use trainer.NAME=VALUE."),
        (b"task:", "task=None: expected a Task. Use --task=module.Class."),
        (None, "options.yaml: expected a file, found a pipe or device. Use a file."),
    ],
    ids=["aliases", "alias of itself", "deep YAML", "deep TOML", "bytes", "no options", "no task", "pipe"],
)
def test_an_option_file_is_read_or_refused_in_a_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "options.yaml"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    assert main([f"--config={path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == ["options.yaml"]


def test_an_option_file_may_have_aliases(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(
        "task: launch.recipes.digits.Digits\ntrainer:\n  max_updates: &n 3\n  save_every_n_updates: *n\n"
    )
    _, config = parse([f"--config={tmp_path / 'options.yaml'}"])
    assert config.trainer.save_every_n_updates == 3


PEERS = """
import os, subprocess, sys
import torch.distributed as dist

sockets = subprocess.run(["find", "/proc/%d/fd" % os.getppid(), "-lname", "socket:*", "-printf", "%l "], stdout=-1)
inodes = {link[8:-1] for link in sockets.stdout.decode().split()}
lines = [line.split() for line in open("/proc/net/tcp").readlines()[1:] + open("/proc/net/tcp6").readlines()[1:]]
ports = {int(words[1].split(":")[1], 16) for words in lines if words[3] == "0A" and words[9] in inodes}
keys = []
for port in ports:
    keys += dist.TCPStore("127.0.0.1", port, is_master=False).list_keys()
print(len(ports), [key for key in keys if "rendezvous" in key], os.environ.get("GLOO_SOCKET_IFNAME"))
"""
"""A worker that lists what a stranger finds in the stores of the agent."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "module", [pytest.param(module, marks=pytest.mark.slow) for module in ("launch.start", "torch.distributed.run")]
)
def test_alone_on_a_host_no_store_holds_what_an_agent_unpickles(module: str, tmp_path: Path) -> None:
    (tmp_path / "peers.py").write_text(PEERS)
    done = python("-m", module, "--standalone", "--nproc_per_node=1", "peers.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    is_ours = module == "launch.start"
    assert ("[]" in done.stdout, "lo" in done.stdout.split()) == (is_ours, is_ours)
    assert not done.stdout.startswith("0 ")
