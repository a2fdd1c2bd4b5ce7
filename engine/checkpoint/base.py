"""The frozen base of a model, as under LoRA: left out of what is saved, and recognised by its digests."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from strategies import Strategy, sum_of_bits, user_name


class Base:
    """The parameters that are frozen at the start, or were `left_out` of `saved`, as long as nothing changes them."""

    def __init__(
        self, model: nn.Module, saved: Mapping[str, Tensor], left_out: Mapping[str, str] | None, strategy: Strategy
    ) -> None:
        self._model, self._strategy = model, strategy
        frozen = [(name, p) for name, p in _named(model) if not p.requires_grad]
        self._digests = {name: digest(saved.get(name, p)) for name, p in frozen if left_out is None or name in left_out}
        self._marks: dict[str, tuple[int, int]] = {}

    def begin(self) -> None:
        """Take the parameters as they are now, prepared and restored, for those of the base."""
        self._marks = {name: _mark(p) for name, p in _named(self._model) if name in self._digests}

    def digests(self) -> dict[str, str]:
        """Return the digests of what is still the base, by the user's own names. All processes call it together."""
        frozen = [(name, p) for name, p in _named(self._model) if name in self._digests]
        changed = [name for name, p in frozen if p.requires_grad or _mark(p) != self._marks[name]]
        for names in self._strategy.compare(changed):
            for name in names:
                self._digests.pop(name, None)  # for good: it may have learned
        return dict(self._digests)


def with_base(
    model: nn.Module, saved: Mapping[str, Tensor], left_out: Mapping[str, str] | None, source: Path
) -> dict[str, Tensor]:
    """Return `saved` with the parameters of `model` that were `left_out`. Raises CheckpointError for another base."""
    left_out = left_out or {}
    base = {name: p.detach() for name, p in _named(model) if name in left_out}
    if differing := [name for name, known in left_out.items() if name not in base or digest(base[name]) != known]:
        raise CheckpointError(
            f"{source} was trained on another base: {len(differing)} of its {len(left_out)} frozen parameters differ "
            f"({differing[0]}, ...). Load the same base in configure_model(), or by weights=FILE."
        )
    return {**base, **saved}


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters by the user's own names; a shared one has several."""
    return [(user_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]


def _mark(parameter: Tensor) -> tuple[int, int]:
    """Return the number of writes to a parameter, and the sum of its bits: writes through `data` are not counted."""
    own: Any = parameter.detach()
    own = own.to_local() if hasattr(own, "to_local") else own
    return parameter._version, 0 if own.is_meta else int(sum_of_bits(own))


def digest(tensor: Tensor) -> str:
    """Return a text that changes with the bits, dtype or shape of a dense tensor."""
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat: Any = whole.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + flat.tobytes()).hexdigest()
