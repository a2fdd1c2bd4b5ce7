"""A small GPT-2 of transformers: CPU seconds and tokens/s of Tally and other trainers, beside the plain loop.

    python tests/benchmarks/gpt2.py [--repetitions 2] [--updates 11] [--only NAME ...]

All make the same updates of the same model, which is checked, and take turns: an update each. CPU seconds are user and
system time of all processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

from engine import Trainer
from engine.adapters import CausalLM
from tests.benchmarks.problem import at_updates
from tests.kit import processes

N, K, LR = 4, 4, 5e-5
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33), "OMP_NUM_THREADS": "1"}
"""Keeps freed memory: otherwise the chance of a heap's layout decides how often glibc gives it back to the system."""
TOLERANCE = 1e-3  # of the way that parameters of float32 went: Adam enlarges the rounding of tiny gradients
OFF = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
SMALL = GPT2Config(vocab_size=16_000, n_positions=128, n_embd=128, n_layer=2, n_head=4, **OFF)


class Job(NamedTuple):
    """The job of a contender: to train `model` on `data`, for one epoch in order, in each of P processes."""

    model: Any
    data: Any  # samples of "input_ids" and "labels"
    P: int
    folder: str


def loader(job: Job) -> DataLoader[Any]:
    return DataLoader(job.data, N, sampler=DistributedSampler(job.data, shuffle=False) if job.P > 1 else None)


def plain(job: Job) -> None:
    model = DistributedDataParallel(job.model) if job.P > 1 else job.model
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for i, batch in enumerate(loader(job), start=1):
        is_last = i % K == 0
        with nullcontext() if is_last or job.P == 1 else model.no_sync():
            (model(**batch).loss / K).backward()
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


def tally(job: Job, **options: Any) -> None:
    trainer = Trainer(micro_batch_size=N, accumulate_grad_batches=K, max_epochs=1, shuffle=False, **options)
    trainer.fit(CausalLM(job.model, job.data, lr=LR))


def transformers_trainer(job: Job) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        job.folder, per_device_train_batch_size=N, gradient_accumulation_steps=K, num_train_epochs=1, learning_rate=LR,
        lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=0, train_sampling_strategy="sequential",
        use_cpu=True, ddp_backend="gloo" if job.P > 1 else None, report_to="none",
    )  # fmt: skip
    Trainer(job.model, arguments, train_dataset=job.data).train()


def lightning(job: Job) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> AdamW:
            return AdamW(self.parameters(), lr=LR, weight_decay=0.0)

    module = Module()
    module.model = job.model
    where = {"accelerator": "cpu", "devices": job.P, "strategy": "ddp" if job.P > 1 else "auto"}
    trainer = Trainer(**where, max_epochs=1, accumulate_grad_batches=K, default_root_dir=job.folder)
    trainer.fit(module, loader(job))


CONTENDERS: dict[str, Callable[[Job], None]] = {
    "plain loop": plain,
    "Tally, everything off": lambda job: tally(job, skip_nonfinite_updates=False),
    "Tally as shipped": lambda job: tally(job, run_dir=f"{job.folder}/run", progress=True),
    "transformers.Trainer": transformers_trainer,
    "Lightning": lightning,
    "plain loop, again": plain,
}


def in_a_process(names: list[str], job: Job, updates: int, turns: list[Any]) -> tuple[int, Any, torch.Tensor]:
    """Train as one of `names`, each update in its turn; return their number, seconds of each, and the parameters."""
    process = int(os.environ["RANK"])
    ours, following, (number, rank) = turns[process], turns[process - len(turns) + job.P], divmod(process, job.P)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[variable]
    if job.P > 1:  # as torchrun does
        group = dict.fromkeys(("RANK", "LOCAL_RANK"), rank) | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), job.P)
        os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
        dist.init_process_group("gloo", f"file://{job.folder}/store{number}", rank=rank, world_size=job.P)
    clocks: list[tuple[float, float]] = []  # the process's and the wall's, at each end and each beginning

    def see() -> None:
        clocks.append((time.process_time(), time.perf_counter()))
        if len(clocks) > 1:
            following.release()
        if len(clocks) < 2 * updates - 1:
            ours.acquire()
        clocks.append((time.process_time(), time.perf_counter()))

    events = dict.fromkeys(range(1, len(job.data)), see)
    try:
        with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null), at_updates(events):
            CONTENDERS[names[number]](job._replace(folder=f"{job.folder}/{number}"))
    finally:
        for _ in range(updates):  # nobody waits for one that has failed, or made too few
            following.release()
    spent = numpy.subtract(clocks[2::2], clocks[1:-1:2]).tolist()
    return len(clocks) // 2, spent, torch.nn.utils.parameters_to_vector(job.model.parameters()).detach()


def compare(names: list[str], config: GPT2Config, P: int, updates: int) -> dict[str, Any]:
    """Return CPU seconds and tokens/s of each one's measured updates, and check that all end with the first's model."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).train()
    rows = torch.randint(config.vocab_size, (updates * P * K * N, config.n_positions))
    turns = [multiprocessing.Semaphore(int(first < P)) for first in range(P * len(names))]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, [{"input_ids": row, "labels": row} for row in rows], P, folder)
        found = processes.run(len(turns), in_a_process, names, job, updates, turns, seconds=3000, group=False)
    start, end = torch.nn.utils.parameters_to_vector(model.parameters()).detach(), found[0][-1]
    for process, (made, _, parameters) in enumerate(found):
        error = ((parameters - end).norm() / (end - start).norm()).item()
        if made != updates or error > TOLERANCE:
            raise AssertionError(f"{names[process // P]}: {made} of {updates} updates, parameters {error:.1e} off")
    spent = numpy.array([each for _, each, _ in found])[:, 1:-1].reshape(len(names), P, updates - 3, 2)
    cpu, speed = spent[..., 0].sum(1), rows.numel() / updates / spent[:, 0, :, 1]
    return dict(zip(names, numpy.stack([cpu, speed], -1), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--updates", type=int, default=11, help="of each, of which 3 are not measured")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS)[1:], default=list(CONTENDERS)[1:], metavar="NAME")
    options = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():  # the allocator reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    sys.path.remove(str(Path(__file__).resolve().parent))  # transformers would take its datasets.py for a package
    for module in (
        "lightning.pytorch",
        "transformers.trainer",
    ):  # their import alone changes how fast torch is: for all
        import_module(module)
    torch.set_num_threads(1)
    names = ["plain loop", *options.only]
    load = f"and the middle half; the machine's load was {os.getloadavg()[1]:.1f} before, on {os.cpu_count()} cores"
    print(f"Medians of {options.repetitions * (options.updates - 3)} updates of each in turn, {load}.\n")
    print("| P | contender | CPU s an update | ratio | middle half | tokens/s | ratio |")
    print("| --: | --- | --: | --: | --: | --: | --: |")
    for P in (1, 2):
        firsts = [repetition % len(names) for repetition in range(options.repetitions)]
        runs = [compare(names[first:] + names[:first], SMALL, P, options.updates) for first in firsts]
        found = {name: numpy.concatenate([run[name] for run in runs]) for name in names}
        for name in names:
            cpu, speed = numpy.median(found[name], 0)
            least, middle, most = numpy.quantile(found[name] / found["plain loop"], (0.25, 0.5, 0.75), 0)
            ratios = f"{middle[0]:.2f} | {least[0]:.2f} to {most[0]:.2f} | {speed:,.0f} | {middle[1]:.2f}"
            print(f"| {P} | {name} | {cpu:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
