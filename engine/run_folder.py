"""A run's folder, written by process 0: configuration, one record per update, a summary, the final weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Logger(Protocol):
    """Anything that takes records; called on process 0."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one update's record, or one of validation means (`validation/...` beside `update` and `epoch`)."""
        ...

    def close(self) -> None:
        """Flush; the run is over."""
        ...


class RunFolder:
    """A new folder for one run. Raises FileExistsError where there is one with something in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"run_dir={str(path)!r} is taken: a run never overwrites another; name a new folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._encode = json.JSONEncoder(allow_nan=False).encode
        self._metrics = (self.path / "metrics.jsonl").open("x", buffering=1)  # a killed run keeps every line

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            line = self._encode(record)
        except ValueError:  # JSON has no NaN
            line = self._encode(_finite(record))
        self._metrics.write(line + "\n")

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write one JSON file."""
        (self.path / name).write_text(json.dumps(_finite(content), indent=2, default=str) + "\n")

    def save_weights(self, state: Mapping[str, Any]) -> None:
        """Write model.safetensors, under the user's own parameter names: tensors, and no extra state."""
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, Tensor)},
            self.path / "model.safetensors",
        )

    def close(self) -> None:
        """Write what is still in memory."""
        self._metrics.close()


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """A number that is not finite becomes null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
