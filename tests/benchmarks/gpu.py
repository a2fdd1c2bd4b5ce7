"""Tokens per second and peak memory beside a plain loop, on a GPU: `python tests/benchmarks/gpu.py [cuda|cpu] [SIZE]`.

Prints JSON. The contenders take turns, each with a model of its own, and medians are compared. A plain loop and Tally
see the same model, data, optimizer and autocast (bf16). A round's first updates are not timed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from engine import Callback, Task, Trainer

WARM = 2
"""Updates of a round before the clock starts."""


class Size(NamedTuple):
    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int  # tokens of a sample
    N: int
    K: int
    updates: int  # timed, in each round
    rounds: int
    compiles: bool


SIZES = {
    "GPT-2": Size(50_304, 768, 12, 12, 1024, 8, 8, 8, 3, True),
    "launches": Size(1024, 128, 4, 4, 128, 4, 8, 20, 5, False),  # so small that the launches of kernels take the time
    "smallest": Size(64, 32, 1, 2, 16, 2, 2, 2, 2, False),  # for a CPU: only to see that it runs
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    """GPT-2: its last layer shares the weights of the first."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList([Block(size.width, size.heads) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


class Language(Task):
    """Random tokens: the same for all contenders."""

    def __init__(self, size: Size) -> None:
        self.size = size
        samples = size.N * size.K * (WARM + size.updates)
        generator = torch.Generator().manual_seed(0)
        self.data = torch.randint(size.vocabulary, (samples, size.length + 1), generator=generator)

    def configure_model(self) -> nn.Module:
        return GPT(self.size)

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return optimizer_of(model)

    def train_data(self) -> Any:
        return _Rows(self.data)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_of(model, batch)


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Clock(Callback):
    """Seconds from the update WARM to the last one; the device has then done all that was asked for."""

    def __init__(self, device: str, last: int) -> None:
        self.device, self.last, self.seconds = device, last, 0.0

    def on_update_end(self, trainer: Any) -> None:
        self.see(trainer.update)

    def see(self, update: int) -> None:
        if update in (WARM, self.last):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds


def plain(size: Size, device: str, clock: Clock, compiled: bool = False) -> None:
    task = Language(size)
    torch.manual_seed(0)
    model: Any = task.configure_model().to(device)
    optimizer = task.configure_optimizer(model)
    loader = torch.utils.data.DataLoader(task.train_data(), size.N, shuffle=True, pin_memory=device == "cuda")
    batches = iter(loader)
    call = torch.compile(model) if compiled else model
    for update in range(1, clock.last + 1):
        total = torch.zeros((), device=device)
        for _ in range(size.K):
            batch = next(batches).to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(call, batch)
            (loss / size.K).backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        total.item()
        clock.see(update)


def tally(size: Size, device: str, clock: Clock, **options: Any) -> None:
    trainer = Trainer("single", size.N, size.K, max_updates=clock.last, precision="bf16", callbacks=clock, **options)
    trainer.fit(Language(size))


def off(size: Size, device: str, clock: Clock) -> None:
    tally(size, device, clock, skip_nonfinite_updates=False)


def as_shipped(size: Size, device: str, clock: Clock) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        tally(size, device, clock, run_dir=f"{folder}/run", progress=True)


def plain_compiled(size: Size, device: str, clock: Clock) -> None:
    plain(size, device, clock, compiled=True)


def tally_compiled(size: Size, device: str, clock: Clock) -> None:
    tally(size, device, clock, compile_model=True)


Contender = Callable[[Size, str, Clock], None]
EAGER: dict[str, Contender] = {"plain loop": plain, "Tally, off": off, "Tally, as shipped": as_shipped}
COMPILED: dict[str, Contender] = {"plain loop, compiled": plain_compiled, "Tally, compiled": tally_compiled}


def measure(contenders: dict[str, Contender], size: Size, device: str) -> dict[str, dict[str, float | None]]:
    """Return of each contender tokens per second and MiB at the peak, and both as shares of the first one's."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, float] = {}
    for number in range(size.rounds):
        turn = [*contenders][number % len(contenders) :] + [*contenders][: number % len(contenders)]
        for name in turn:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            contenders[name](size, device, clock := Clock(device, WARM + size.updates))
            rates[name].append(size.updates * size.K * size.N * size.length / clock.seconds)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    first = next(iter(contenders))
    shares = {name: median(a / b for a, b in zip(rates[name], rates[first], strict=True)) for name in contenders}
    return {
        name: {
            "tokens_per_second": round(median(rates[name])),
            "of_plain": round(shares[name], 4),
            "peak_mib": round(peaks[name], 1) if peaks else None,
            "memory_of_plain": round(peaks[name] / peaks[first], 4) if peaks else None,
        }
        for name in contenders
    }


def main(device: str = "cuda", *names: str) -> None:
    found = {}
    for name in names or ("GPT-2", "launches"):
        size = SIZES[name]
        found[name] = measure(EAGER, size, device) | (measure(COMPILED, size, device) if size.compiles else {})
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
