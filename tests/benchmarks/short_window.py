"""What each engine makes of a short last window: seven micro-batches of 8, 8, 8, 8, 8, 8 and 3 samples with K = 4.

python tests/benchmarks/short_window.py [--name NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from tests.benchmarks.problem import FEATURES, Contender, N, configured, loss_fn, make_model

K, SIZES = 4, (N,) * 6 + (3,)
CONTENDERS = {
    "textbook": ("textbook", "train"),
    "Tally": ("tally", "everything_off"),
    "Fabric": ("fabric", "train"),
    "Accelerate": ("", ""),
    "Ignite": ("ignite", "train"),
    "TorchTNT": ("torchtnt", "train"),
    "Lightning": ("lightning", "everything_off"),
}


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, n, FEATURES, generator=generator)) for n in SIZES]  # type: ignore[misc]


def accelerate(data: DataLoader[tuple[Tensor, Tensor]], K: int) -> nn.Module:
    """Its loop as its guide writes it; the prepared loader tells it where the epoch ends."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=K, cpu=True)
    model, optimizer, loader = accelerator.prepare(*configured(), data)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_fn(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)  # type: ignore[no-any-return]


def contender(name: str) -> Contender:
    if name == "Accelerate":
        return accelerate
    module, function = CONTENDERS[name]
    return getattr(importlib.import_module(f"tests.benchmarks.contenders.{module}"), function)  # type: ignore[no-any-return]


def by_hand(rule: Callable[[list[Tensor], list[int]], Tensor | None]) -> Tensor:
    """Train with plain SGD, a window's loss made of its micro-batches' means and sizes by `rule` (None: no update)."""
    model, data = make_model(), micro_batches()
    for start in range(0, len(data), K):
        window = data[start : start + K]
        loss = rule([loss_fn(model(x), y) for x, y in window], [len(x) for x, _ in window])
        if loss is not None:
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= 0.1 * g
    return nn.utils.parameters_to_vector(model.parameters()).detach()


RULES: dict[str, Callable[[list[Tensor], list[int]], Tensor | None]] = {
    "the mean over its samples": lambda means, sizes: (
        sum(m * n for m, n in zip(means, sizes, strict=True)) / sum(sizes)
    ),
    "the sum of its means / K": lambda means, sizes: sum(means) / K,  # type: ignore[return-value]
    "the mean of its means": lambda means, sizes: sum(means) / len(means),  # type: ignore[return-value]
    "no update": lambda means, sizes: sum(means) / K if len(means) == K else None,  # type: ignore[return-value]
}


@contextmanager
def counted() -> Iterator[list[int]]:
    found = [0]

    def see(*_: object) -> None:
        found[0] += 1

    handle = register_optimizer_step_post_hook(see)
    try:
        yield found
    finally:
        handle.remove()


def row(name: str) -> str:
    data: DataLoader[tuple[Tensor, Tensor]] = DataLoader(micro_batches(), batch_size=None)  # type: ignore[arg-type]
    with counted() as updates:
        model = contender(name)(data, K)  # type: ignore[arg-type]
    found = nn.utils.parameters_to_vector(model.parameters()).detach()
    near = [rule for rule, how in RULES.items() if torch.allclose(found, by_hand(how), rtol=0, atol=1e-6)]
    return f"| {name} | {updates[0]} | {' or '.join(near) or 'something else'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", nargs="*", default=list(CONTENDERS))
    print("| engine | updates | gradient of the last window (8, 8 and 3 samples, K = 4) |\n|---|--:|---|")
    for name in parser.parse_args().name:
        try:
            print(row(name), flush=True)
        except ModuleNotFoundError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)


if __name__ == "__main__":
    main()
