"""What the options of DDPStrategy give: memory, bytes on the wire, and how far off the hooks are.

    python tests/benchmarks/ddp_options.py           # two processes; two CPU minutes

Memory is the peak resident memory of a process of its own (of the larger one of the two): a model of 64 MiB with
AdamW, K=4. Hooks train the digits recipe; "off" is the relative error of the whole first gradient that is sent by a
hook, against the same gradient without one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEMORY: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "shard_optimizer": {"shard_optimizer": True},
    "both": {"gradient_as_bucket_view": True, "shard_optimizer": True},
}
HOOKS: dict[str, dict[str, Any]] = {
    "none": {},
    "fp16": {"communication_hook": "fp16"},
    "bf16": {"communication_hook": "bf16"},
    "powersgd": {"communication_hook": "powersgd", "powersgd_start": 23},
    "powersgd, rank 4": {"communication_hook": "powersgd", "powersgd_start": 23, "powersgd_rank": 4},
}
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def run(what: str, options: dict[str, Any]) -> list[list[float]]:
    """Run this file's `what` on two processes and return the numbers that each printed."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    command = [*start, what, json.dumps(options)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return [[float(number) for number in line.split()] for line in re.findall(r"^found (.*)$", done.stdout, re.M)]


def memory(options: dict[str, Any]) -> None:
    """Print this process's peak in MiB, and the MiB of optimizer state."""
    import torch
    from torch import Tensor, nn

    from engine import Task, Trainer
    from strategies import DDPStrategy

    class Deep(Task):
        def configure_model(self) -> nn.Module:
            return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(16)])

        def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), foreach=False)

        def train_data(self) -> list[Tensor]:
            return [torch.ones(1024)] * 64

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            return model(batch).square().mean()

    strategy = DDPStrategy(device="cpu", **options)
    trainer = Trainer(strategy, 2, accumulate_grad_batches=4, max_updates=8)
    trainer.fit(Deep())
    state = [value for state in trainer.optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in state) / 2**20
    print("found", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, held, flush=True)


def hook(options: dict[str, Any]) -> None:
    """Print collectives and bytes per update, the first gradient's error, and the accuracy after 20 epochs."""
    import torch

    from engine import Callback, Trainer
    from launch.recipes.digits.task import Digits
    from strategies import DDPStrategy

    class AsSent(DDPStrategy):
        """Keeps the first gradient, and what the last window has sent."""

        _found: list[torch.Tensor]
        _told: tuple[int, int]

        def clip(self, max_norm: float | None, factor: float = 1.0) -> torch.Tensor:
            norm = super().clip(max_norm, factor)
            if not self._found:
                self._found.append(
                    torch.cat([p.grad.double().flatten() for p in self._parameters if p.grad is not None])
                )
            return norm

    def train(chosen: dict[str, Any], **settings: Any) -> tuple[Any, AsSent]:
        strategy = AsSent(device="cpu", **chosen)
        strategy._found = []
        told: list[tuple[int, int]] = []
        keep = Callback()
        keep.on_fit_end = lambda trainer: told.append(strategy.reductions())  # type: ignore[method-assign]
        trainer = Trainer(strategy, 16, 2, callbacks=keep, **settings)
        trainer.fit(Digits())
        strategy._told = told[0]
        return trainer, strategy

    at_once = {**options, **({"powersgd_start": 0} if "powersgd_start" in options else {})}
    exact, sent = (train(chosen, max_updates=1)[1]._found[0] for chosen in ({}, at_once))
    trainer, strategy = train(options, max_epochs=20)
    off = torch.linalg.vector_norm(sent - exact) / torch.linalg.vector_norm(exact)
    print("found", *strategy._told, float(off), trainer.metrics["accuracy"], flush=True)


def main() -> None:
    print("| option | peak, MiB above plain | optimizer state, MiB |\n| --- | --: | --: |")
    base = 0.0
    for name, options in MEMORY.items():
        found = run("memory", options)
        peak, state = max(row[0] for row in found), [row[1] for row in found]
        base = base or peak
        print(f"| {name} | {peak - base:+.0f} | {' and '.join(f'{s:.0f}' for s in state)} |", flush=True)
    print("\n| hook | collectives | bytes per update | off | accuracy |\n| --- | --: | --: | --: | --: |")
    for name, options in HOOKS.items():
        collectives, size, off, accuracy = run("hook", options)[0]
        print(f"| {name} | {collectives:.0f} | {size:,.0f} | {off:.1e} | {100 * accuracy:.1f} % |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "memory":
        memory(json.loads(sys.argv[2]))
    else:
        hook(json.loads(sys.argv[2]))
