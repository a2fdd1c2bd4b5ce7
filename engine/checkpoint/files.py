"""A checkpoint on disk: a folder that is whole or absent, in formats that execute nothing.

    update-00000120/
        state.json              counters, and everything that is not a tensor
        model.safetensors       parameters and buffers, under the user's own names
        state.safetensors       the tensors of the optimizer and of the rest
        manifest.json           format version, id of the run, size and SHA-256 of each file: written last
    latest                      the name of the newest: replaced when that folder is whole

A folder is written under another name, forced to disk, and renamed; only then is the pointer. So whatever stops the
writer, a folder of a checkpoint's name is whole, and one that was damaged later is noticed when it is read.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint import tree
from engine.disk import force_to_disk, read_small, replace_text
from engine.errors import CheckpointError

FORMAT = 2  # version of this format; a reader refuses any other

STATE, MANIFEST, POINTER = "state.json", "manifest.json", "latest"
MODEL, TENSORS = "model.safetensors", "state.safetensors"
FILES = (STATE, MODEL, TENSORS)
NAME = re.compile(r"update-(\d{8,12})(?:-(\d{1,6}))?")


def write(
    folder: Path, update: int, model: Mapping[str, Any], state: Mapping[str, Any], run: str | None = None
) -> Path:
    """Write a checkpoint of the run with the id `run` into `folder` and point to it; return its path.

    `model` maps names to CPU tensors (and extra state); `state` is nested: see `tree.flatten`. Raises OSError, also if
    the folder above `folder` is missing, and then leaves no part behind.
    """
    from safetensors.torch import save_file

    final = folder / f"update-{update:08d}"
    before = [-age(path)[1] for path in candidates(folder) if age(path)[0] == -update]
    if before:  # this update was saved already; that one stays until it is not needed
        final = folder / f"{final.name}-{max(before) + 1}"
    tensors: dict[str, Tensor] = {}
    weights = {name: value.contiguous() for name, value in model.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in model.items() if not isinstance(value, Tensor)}
    plain = tree.flatten({**state, "extra_model_state": extra}, tensors)
    part = folder / f".{final.name}.{uuid.uuid4().hex}.part"
    if not folder.is_dir():
        folder.mkdir()
    part.mkdir()
    try:
        (part / STATE).write_text(json.dumps(plain, allow_nan=False, indent=1))
        save_file(weights, part / MODEL)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / TENSORS)
        files = {name: {"size": (part / name).stat().st_size, "sha256": _sha256(part / name)} for name in FILES}
        manifest = {"format": FORMAT, "run": run, "update": update, "files": files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for written in (*(part / name for name in (*FILES, MANIFEST)), part):
            force_to_disk(written)
        part.rename(final)
        force_to_disk(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    replace_text(folder / POINTER, f"{final.name}\n")
    return final


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (model, state) as `write` was given them. `verify` it first. Raises CheckpointError."""
    from safetensors.torch import load_file

    try:
        plain = json.loads(read_small(path / STATE))
        tensors = load_file(path / TENSORS)
        state = tree.restore(plain, tensors)
        model: dict[str, Any] = {**load_file(path / MODEL), **state.pop("extra_model_state")}
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from error
    return model, state


def verify(path: Path, run: str | None = None, reads_files: bool = True) -> str:
    """Return a text that identifies a checkpoint, each of whose files is the one that was written.

    Raises CheckpointError if one is not (without `reads_files` by their sizes), and for one of another run than `run`.
    """
    try:
        text = read_small(path / MANIFEST)
        manifest = json.loads(text)
        found, files = manifest["format"], manifest["files"]
        is_ours = set(files) == set(FILES) and all(f.keys() == {"size", "sha256"} for f in files.values())
        if found == FORMAT and not is_ours:
            raise ValueError(f"it lists {sorted(files)}")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST} is missing.") from None
    except Exception as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is damaged ({type(error).__name__}: {error}).") from error
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {found!r}; this version reads format {FORMAT}.")
    if run is not None and (manifest.get("run") or run) != run:
        raise CheckpointError(f"checkpoint {path} is of run {manifest['run']}, and its folder of run {run}.")
    for name, expected in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing.")
        if file.stat().st_size != expected["size"]:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes instead of {expected['size']}."
            )
        if reads_files and _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not have the SHA-256 it was saved with.")
    return hashlib.sha256(text.encode()).hexdigest()


def run_id(path: Path) -> str | None:
    """Return the id of the run that a verified checkpoint is of; None if it has none."""
    return json.loads(read_small(path / MANIFEST)).get("run")  # type: ignore[no-any-return]


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, the one that is pointed to first, then by update, the newest first."""
    if not folder.is_dir():
        return []
    found = sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), key=age)
    newest = pointed(folder, POINTER)
    return sorted(found, key=lambda path: path.name != newest)


def age(path: Path) -> tuple[int, int]:
    """Return a key that sorts checkpoints, the newest first."""
    update, time = NAME.fullmatch(path.name).groups(default="1")  # type: ignore[union-attr]
    return -int(update), -int(time)


def pointed(folder: Path, pointer: str) -> str | None:
    """Return the name that a pointer holds, if it holds one."""
    with suppress(OSError, ValueError):
        return read_small(folder / pointer)[:100].strip()
    return None


def remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that no half of it can be taken for a whole one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    path.rename(part)
    shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove what a writer that was killed left behind."""
    for part in folder.glob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
