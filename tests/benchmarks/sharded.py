"""What FSDP costs and saves beside DDP: peak memory and traffic of an update, at K=1 and K=8.

    python tests/benchmarks/sharded.py

Two processes on the CPU train a tower of 16 layers of 4 MiB each in float32 with AdamW (whose state is twice the
parameters). Memory is the peak of the larger process above that of one whose model is tiny: parameters, gradients,
optimizer state, what is in flight, and the activations of one micro-batch (small). Traffic is the size of the tensors
that collectives fill with parameters (gathered) and are given of gradients (reduced), on each process and in an update.
The least that an update can do is to reduce each gradient once and, where it is sharded, to gather each parameter once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

UPDATES, N, WIDTH, LAYERS = 3, 8, 1024, 16
CASES = {
    "tiny": ("ddp", {}),
    "ddp": ("ddp", {}),
    "fsdp, reduce=window": ("fsdp", {}),
    "fsdp, reduce=window, reshard_after_forward=False": ("fsdp", {"reshard_after_forward": False}),
    "fsdp, reduce=micro_batch": ("fsdp", {"reduce": "micro_batch"}),
}

# The allocator gives memory back at once, so that a peak tells what was in use at a time.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def measure(case: str, K: int) -> tuple[float, float, float]:
    """Return the peak, the bytes gathered and the bytes reduced per update, in MiB."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        case,
        str(K),
    ]
    done = subprocess.run(start, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(start)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = [tuple(map(float, numbers)) for numbers in re.findall(r"found (\S+) (\S+) (\S+)", done.stdout)]
    return max(found)  # type: ignore[return-value]


def train(case: str, K: int) -> None:
    """Train, and print what this process used."""
    import resource

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch
    from torch import Tensor, nn
    from torch.utils._python_dispatch import TorchDispatchMode

    from engine import Callback, Task, Trainer
    from strategies import DDPStrategy, FSDPStrategy

    width = 8 if case == "tiny" else WIDTH

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    class Autoencoder(Task):
        def configure_model(self) -> nn.Module:
            return Tower()

        def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), lr=1e-4)

        def train_data(self) -> torch.utils.data.TensorDataset:
            return torch.utils.data.TensorDataset(torch.rand(UPDATES * 2 * K * N, width))

        def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
            return nn.functional.mse_loss(model(batch[0]), batch[0])

    class Traffic(TorchDispatchMode, Callback):
        """Adds up what the last update gave to collectives."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}

        def on_update_end(self, trainer: Trainer) -> None:
            self.result = dict(self.sizes)
            self.sizes = dict.fromkeys(self.sizes, 0)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func._schema.name.removeprefix("c10d::")
            if name in self.sizes:  # (output, input, ...): what is gathered, what is reduced
                tensor = args[0] if name == "_allgather_base_" else args[1]
                self.sizes[name] += tensor.nbytes
            return func(*args, **(kwargs or {}))

    name, options = CASES[case]
    strategy = DDPStrategy() if name == "ddp" else FSDPStrategy(**options)  # type: ignore[arg-type]
    traffic = Traffic()
    trainer = Trainer(strategy, N, accumulate_grad_batches=K, max_epochs=1, callbacks=traffic)
    with traffic:
        trainer.fit(Autoencoder())
    assert trainer.update == UPDATES, f"{trainer.update} updates"
    gathered, reduced = traffic.result.values()
    if name == "ddp":
        reduced = sum(p.nbytes for p in trainer.model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("found", peak, gathered / 2**20, reduced / 2**20, flush=True)


def main() -> None:
    parameters = LAYERS * WIDTH * WIDTH * 4 / 2**20
    print(f"P=2, {parameters:.0f} MiB of parameters; MiB of peak memory and of traffic per update and process.\n")
    print("| strategy | peak K=1 | peak K=8 | gathered K=1 | K=8 | reduced K=1 | K=8 |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    tiny = {K: measure("tiny", K)[0] for K in (1, 8)}
    for case in CASES:
        if case != "tiny":
            small, large = measure(case, 1), measure(case, 8)
            row = [small[0] - tiny[1], large[0] - tiny[8], small[1], large[1], small[2], large[2]]
            print(f"| {case} | {' | '.join(f'{value:.0f}' for value in row)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        main()
