"""Checkpoints on disk: whole or absent, whatever stops the writer; refused, and never executed, where damaged."""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import Callback, Trainer
from engine.checkpoint import files as checkpoint
from engine.checkpoint import tree
from engine.checkpoint.files import FILES, MANIFEST, STATE, TENSORS
from engine.checkpoint.find import Checkpoint
from engine.checkpoint.writer import CheckpointWriter
from engine.errors import CheckpointError
from engine.records.run_folder import MARK, RunFolder
from tests.kit.reference import Regression


@pytest.fixture(autouse=True)
def does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk shows nothing here; `save_and_die` notes what was forced to it."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def contents(update: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and state as of `update`, with something of its own in each file."""
    weights = {"none": torch.empty(0, 2), "w": torch.full((2, 3), update / 3).T, "zero": torch.tensor(-0.0).bfloat16()}
    return {"extra": {"calls": update}, **weights}, {"run": {"update": update}, "average": torch.tensor([update])}


def write(folder: Path, update: int) -> Path:
    return checkpoint.write(folder, update, *contents(update))


def save(saver: CheckpointWriter, update: int, is_best: bool = False) -> None:
    saver.save(update, *contents(update), float(update) if is_best else None)
    saver.wait()
    if saver.error is not None:
        raise saver.error


def is_of(path: Path, update: int) -> bool:
    model, state = checkpoint.read(path)
    return exact([dict(sorted(model.items())), state]) == exact([*contents(update)])


def exact(value: Any) -> str:
    """All that there is about a value: types, order, and each bit of a tensor."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.contiguous().flatten().view(torch.uint8).tolist()}"
    items = list(value.items()) if isinstance(value, dict) else value
    if isinstance(items, list | tuple):
        return f"{type(value).__name__}{[exact(item) for item in items]}"
    return float.__repr__(value) if isinstance(value, float) else repr(value)


VALUES: list[Any] = [1.5, -0.0, [], [[0.1, torch.nan], [torch.inf, 3.0]]]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SOME = st.sampled_from([torch.tensor(value).to(dtype) for value in VALUES for dtype in DTYPES]).map(torch.clone)
MARKS = [tree.TENSOR, tree.PAIRS, tree.COUNTER, tree.TUPLE, tree.FLOAT]
TEXT = st.text(max_size=3) | st.sampled_from(["a.b", *MARKS])
PLAIN = st.none() | st.booleans() | st.integers() | st.integers(-(10**300), 10**300) | st.floats() | TEXT
KEYS = PLAIN | st.tuples(PLAIN, TEXT)


def within(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists, pairs = st.lists(items, max_size=4), st.dictionaries(KEYS, items, max_size=4)
    return lists | lists.map(tuple) | pairs | pairs.map(Counter) | st.dictionaries(TEXT, items)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.recursive(PLAIN | SOME, within, max_leaves=12))
@example({"\ud800": ["\udfff", {"$": -0.0}]})
@example({"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 0: torch.zeros(2), "0": torch.ones(2)})
def test_state_comes_back_to_the_bit(value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(tree.flatten(value, tensors), allow_nan=False)
    tensors = safetensors.torch.load(safetensors.torch.save(tensors))
    assert exact(tree.restore(json.loads(text), tensors)) == exact(value)


def test_a_number_of_numpy_s_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = {
        "best": np.float64("nan"),
        "n": np.int64(2**60),
        "x": np.float32(0.1),
        "is": np.bool_(True),
        np.int8(3): 1,
    }
    read = checkpoint.read(checkpoint.write(tmp_path, 1, {}, {"mine": written}))[1]["mine"]
    assert math.isnan(read.pop("best"))
    assert exact(read) == exact({"n": 2**60, "x": float(np.float32(0.1)), "is": True, 3: 1})


@pytest.mark.parametrize(
    "value",
    [{1}, object(), print, int, np.ones(1), np.longdouble(1), b"bytes", 1j],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"'callbacks\.0\.mine' is a (builtins|numpy)\."):
        checkpoint.write(tmp_path, 1, {}, {"callbacks": [{"mine": value}]})
    assert not os.listdir(tmp_path)


def test_candidates_are_the_pointed_one_and_then_the_newest(tmp_path: Path) -> None:
    updates = [1, 10**8, 10**8 - 1, 10**8, 1]
    first, last, late, last_again, first_again = written = [write(tmp_path, update) for update in updates]
    assert all(map(is_of, written, updates))
    others = ["update-12", "update-00000013.old", ".update-00000014.0a.part"]
    for other in others:
        (tmp_path / other).mkdir()
    assert checkpoint.candidates(tmp_path) == [first_again, last_again, last, late, first]
    for garbage in (b"update-00000014", b"../other", b"\xff\xfe", b""):
        (tmp_path / "latest").write_bytes(garbage)
        assert checkpoint.candidates(tmp_path) == [last_again, last, late, first_again, first]
    checkpoint.remove_parts(tmp_path)
    assert set(os.listdir(tmp_path)) == {"latest", *others[:2], *(path.name for path in written)}
    assert checkpoint.candidates(tmp_path / "none") == []


WRITES = {"write_text": 0, "save_file": 1}
"""Functions that write a file, and which argument is its path."""
POINTS: dict[str, Any] = {"write_text": Path, "save_file": safetensors.torch}
POINTS |= dict.fromkeys(("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"), os)


def save_and_die(folder: Path, point: int, how: str) -> None:
    """Save update 2, the best, over 1; the `point`-th call that changes the disk is the last of this process.

    It dies "after" that call, or when "half" of a file is written, or the "power" fails before the call: files that
    were not forced to disk then lose what is in them.
    """
    calls = itertools.count(1)
    forced = {path.stat().st_ino for path in folder.rglob("*")}

    def lose_power() -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in forced:
                os.truncate(path, 0)

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            is_last = next(calls) == point
            result = None if is_last and how == "power" else real(*args, **options)
            if is_last and how == "half" and name in WRITES:
                os.truncate(args[WRITES[name]], args[WRITES[name]].stat().st_size // 2)
            if is_last:
                if how == "power":
                    lose_power()
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "fsync":
                forced.add(os.fstat(*args).st_ino)
            return result

        return call

    saver = CheckpointWriter(folder, keep_last=1)
    for name, owner in POINTS.items():
        setattr(owner, name, wrapped(name, getattr(owner, name)))
    save(saver, 2, is_best=True)
    lose_power()


@pytest.mark.parametrize("how", ["after", "half", "power"])
def test_a_writer_that_is_killed_leaves_only_whole_checkpoints(tmp_path: Path, how: str) -> None:
    for point in itertools.count(1):
        folder = tmp_path / str(point)
        (folder / "best").write_text(write(folder, 1).name)
        child = multiprocessing.get_context("fork").Process(target=save_and_die, args=(folder, point, how))
        child.start()
        child.join()
        found = [path.name for path in checkpoint.candidates(folder)]
        assert set(found) <= {"update-00000001", "update-00000002"}
        assert all(is_of(folder / name, int(name[-1])) for name in found)
        assert {checkpoint.pointed(folder, "latest"), checkpoint.pointed(folder, "best")} <= set(found)
        save(CheckpointWriter(folder, keep_last=1), 3, is_best=True)
        assert set(os.listdir(folder)) == {"latest", "best", "update-00000003"}
        if child.exitcode != -signal.SIGKILL:
            break
    assert (child.exitcode, found) == (0, ["update-00000002"])
    assert point > 20


Damage = Callable[[Path, bytes], Any]
"""Changes a file that held these bytes."""
DAMAGES: list[Damage] = [
    lambda file, whole: file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])),
    lambda file, whole: file.write_bytes(whole[:-1]),
    lambda file, whole: file.write_bytes(whole + b"\0"),
    lambda file, whole: file.unlink(),
    lambda file, whole: file.symlink_to(file.rename(file.with_name("elsewhere"))),
    lambda file, whole: (file.unlink(), file.mkdir()),
]


def says(**other: Any) -> Damage:
    return lambda file, whole: file.write_text(json.dumps({**json.loads(whole), **other}))


def holds(content: bytes) -> Damage:
    """A file, and the manifest to it: who can write the one can write the other."""

    def damage(file: Path, whole: bytes) -> None:
        data, manifest = content.replace(b"MADE", bytes(file.parent.parent / "made")), file.with_name(MANIFEST)
        entry = {"size": file.write_bytes(data), "sha256": hashlib.sha256(data).hexdigest()}
        files = json.loads(manifest.read_bytes())["files"]
        says(files={**files, file.name: entry})(manifest, manifest.read_bytes())
        checkpoint.verify(file.parent)

    return damage


def lists(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda file, whole: says(files=change(json.loads(whole)["files"]))(file, whole)


OUTSIDE = {"size": 16, "sha256": hashlib.sha256(b"update-00000001\n").hexdigest()}
LISTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda files: {**files, "../latest": OUTSIDE},
    lambda files: {**files, "/etc/passwd": OUTSIDE},
    lambda files: {STATE: files[STATE]},
    lambda files: dict.fromkeys(files, OUTSIDE),
    lambda files: list(files),
]
PICKLE = b"cos\nmkdir\n(VMADE\ntR."  # makes a folder when it is unpickled
HUGE = b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
WRONG = ['{"$tensor":"a"}', '{"$tensor":[]}', '{"$pairs":[[1]]}', '{"$pairs":[[[],1]]}', '{"$float":"x"}']
WRONG += [f'{{"{mark}":5}}' for mark in MARKS if mark != tree.FLOAT]
CASES: list[tuple[str, Damage]] = [
    *((name, damage) for name in (*FILES, MANIFEST) for damage in DAMAGES),
    *((MANIFEST, lists(change)) for change in LISTS),
    *((MANIFEST, says(format=version)) for version in (2, None)),
    *((MANIFEST, lambda file, whole, text=text: file.write_text(text)) for text in ("", "[1]", "{}", "[" * 100_000)),
    *((name, holds(content)) for name in FILES for content in (PICKLE, b"", (100 << 30).to_bytes(8, "little") + b"{}")),
    (TENSORS, holds(len(HUGE).to_bytes(8, "little") + HUGE)),
    *((STATE, holds(f'{{"extra_model_state":{{}},"run":{text}}}'.encode())) for text in WRONG),
    *((STATE, holds(text)) for text in (b"{}", b'{"extra_model_state": {}}', b"[]", b"\xff", b"[" * 100_000)),
]
ODD = pytest.param(MANIFEST, lists(lambda files: {name: ["size", "sha256"] for name in files}))


@pytest.mark.timeout(5)
@pytest.mark.parametrize(("name", "damage"), [*CASES, ODD])
def test_what_is_damaged_or_forged_is_refused_and_not_executed(tmp_path: Path, name: str, damage: Damage) -> None:
    path = write(tmp_path, 1)
    damage(path / name, (path / name).read_bytes())
    imported = set(sys.modules)
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint(path)["run"]
    assert str(path) in str(refusal.value)
    assert set(sys.modules) == imported
    assert set(os.listdir(tmp_path)) == {"latest", path.name}


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    saver = CheckpointWriter(tmp_path, keep_last=2)
    for update, kept in {1: {1}, 2: {1, 2}, 3: {1, 2, 3}, 4: {1, 3, 4}, 5: {4, 5}, 6: {5, 6}, 7: {5, 6, 7}}.items():
        save(saver, update, is_best=update in (1, 5))
        assert set(os.listdir(tmp_path)) == {"latest", "best", *(f"update-{number:08d}" for number in kept)}
        assert saver.newest == CheckpointWriter(tmp_path, 2).newest == tmp_path / f"update-{update:08d}"


@pytest.mark.parametrize("updates", [(5, 5, 5), (7, 8, 6)], ids=["an update three times", "back at an older one"])
def test_what_was_just_saved_is_kept(tmp_path: Path, updates: tuple[int, ...]) -> None:
    saver = CheckpointWriter(tmp_path, keep_last=1)
    for update in updates:
        save(saver, update)
        assert checkpoint.candidates(tmp_path)[0] == saver.newest


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 75 pages of 4 KiB."""
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {tmp_path} 2> {os.devnull}"):
        pytest.skip("only root can mount a small disk")
    yield tmp_path
    os.system(f"umount --lazy {tmp_path}")


def fill(disk: Path, but: int = 0) -> None:
    (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - but))


def test_a_disk_that_cannot_be_written_is_found_at_the_start(disk: Path) -> None:
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        CheckpointWriter(disk / "checkpoints", keep_last=1)
    os.system(f"mount -o remount,ro {disk}")
    with pytest.raises(OSError, match="Read-only"):
        CheckpointWriter(disk / "checkpoints", keep_last=1)


@pytest.mark.parametrize("pages", range(5))  # each file needs one, and so does the pointer
def test_the_disk_may_be_full_at_any_moment_of_a_save(disk: Path, caplog: pytest.LogCaptureFixture, pages: int) -> None:
    folder = disk / "checkpoints"
    save(saver := CheckpointWriter(folder, keep_last=1), 1)
    fill(disk, but=4096 * pages)
    with pytest.raises(Exception, match="No space left"):
        save(saver, 2)
    (told,) = caplog.records
    assert (told.name, told.levelname) == ("tally", "ERROR")
    assert "the checkpoint of update 2 could not be saved" in told.getMessage()
    assert is_of(folder / "update-00000001", 1)
    assert all(is_of(path, int(path.name[-1])) for path in checkpoint.candidates(folder))
    assert not list(folder.glob(".update*"))
    (disk / "other").unlink()
    save(saver, 3)
    assert set(os.listdir(folder)) == {"latest", "update-00000003"}
    shutil.rmtree(folder)  # and should somebody take the folder away, the next save makes it again
    save(saver, 4, is_best=True)
    assert is_of(checkpoint.candidates(folder)[0], 4)


@pytest.mark.parametrize("full", [5, 18])  # then metrics.jsonl comes to its second page
def test_training_goes_on_while_the_disk_is_full(disk: Path, caplog: pytest.LogCaptureFixture, full: int) -> None:
    class Fill(Callback):
        def on_update_end(self, trainer: Any) -> None:
            if trainer.update == full:
                for save in (thread for thread in threading.enumerate() if thread.name == "tally-save"):
                    save.join()  # or it would free what it no longer needs
                fill(disk)
            elif trainer.update > full and "could not be saved" in caplog.text:
                (disk / "other").unlink(missing_ok=True)

    options: dict[str, Any] = {"save_every_n_updates": 2, "callbacks": Fill()}
    Trainer("single", micro_batch_size=4, max_updates=24, run_dir=str(disk / "run"), **options).fit(Regression(40))
    assert "could not be saved" in caplog.text
    assert Checkpoint(disk / "run" / "checkpoints" / "update-00000024")["run"]["update"] == 24
    lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == list(range(1, 25))


def test_each_update_is_kept_once_wherever_the_file_ends(tmp_path: Path) -> None:
    kinds = [(1, "loss"), (2, "loss"), (2, "validation/loss"), (3, "loss")]
    lines = [orjson.dumps({"update": update, kind: 0.5}).decode() + "\n" for update, kind in kinds]
    RunFolder(tmp_path).write("config.json", {MARK: 1})
    for saved, newest in enumerate([(0, 0), (1, 0), (2, 0), (2, 2), (3, 2)]):  # and the run was killed later
        for end in range(len("".join(lines[:saved])), len("".join(lines)) + 1):
            (tmp_path / "metrics.jsonl").write_text("".join(lines)[:end])
            folder = RunFolder(tmp_path, takes_over=True)
            folder.rewind(*newest)
            for line in lines[saved:]:
                folder.log(json.loads(line))
            folder.close()
            assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match=r"expected a folder that nothing else is in\. Use a new folder"):
            RunFolder(path, takes_over=True)
    assert os.listdir(tmp_path) == ["notes.txt"]
