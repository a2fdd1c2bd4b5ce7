"""Finds the micro-batch size of a run with `micro_batch_size="auto"`, by real windows of a run that is thrown away."""

import time
from collections.abc import Callable
from itertools import chain, count, islice
from typing import NamedTuple

import torch

from engine.callbacks.accumulation import Scheduling
from engine.checkpoint.find import Checkpoint
from engine.errors import UserError, describe
from engine.memory import is_out_of_memory, peak_memory, release
from engine.plan.schedule import solve
from engine.plan.windows import Plan
from engine.settings import Settings
from engine.state import RunState
from engine.training.build import Run, known_micro_batch_size
from engine.update.updater import Updater

WINDOWS = 3  # the windows of a trial: the first allocates the optimizer's state, the others are timed


class Trial(NamedTuple):
    """A micro-batch size that was tried."""

    N: int
    memory: int  # the most bytes that a process had held by then: see `peak_memory`
    samples_per_second: float  # over all processes; 0 if memory ran out on one of them

    def __str__(self) -> str:
        rate = f"{self.samples_per_second:,.0f} samples/s" if self.samples_per_second else "did not fit"
        return f"N {self.N:<6} {self.memory / 2**20:>8,.0f} MiB  {rate}"


def build_to_fit(
    make: Callable[[int], Run], settings: Settings, scheduling: Scheduling, checkpoint: Checkpoint | None
) -> tuple[Run, int, list[Trial]]:
    """Build a run by `make(N)`; return it, its N and what was tried. N is 0 if a process was interrupted."""
    N, trials = known_micro_batch_size(settings, scheduling, checkpoint), list[Trial]()
    if not N and (trials := _try_sizes(make, settings)):
        N = max(trials, key=lambda trial: trial.samples_per_second).N
    return make(N or 1), N, trials


def _try_sizes(make: Callable[[int], Run], settings: Settings) -> list[Trial]:
    """Try N = 1, 2, 4, ..., then halves between what fits and what does not; no trial if one was interrupted.

    The run of `make(N)` leaves no trace. Raises UserError if one sample does not fit, or there are too few.
    """
    run, B = make(1), settings.effective_batch_size or 1
    run.parts.updater.noise = None  # at K = 1 it would say that it is unknown
    strategy, plan, trials = run.parts.strategy, run.layout.plan, list[Trial]()
    share = strategy.effective_batch(1, 1)
    if plan is None or plan.samples < share or not run.parts.updater.exchange.can_redo:
        raise UserError(
            f"micro_batch_size='auto': expected at least {share} samples, one for each process, and a model without "
            "SyncBatchNorm. Give a number."
        )
    most = -(-min(B, plan.samples) // share)
    N, fits, fails = 1, 0, most + 1
    while fits < N:
        trial = _try(run, N, B)
        if trial is None:
            trials = []
            break
        trials.append(trial)
        if trial.samples_per_second:
            fits = N
        elif N == 1:
            raise did_not_fit(run.parts.updater, 0)
        else:
            fails = N
        gap = fails - fits if fails <= most else fits * 2  # before anything fails, twice the last
        N = min(fits + gap // 2, most) if gap > fits // 8 else fits
    device = strategy.device
    strategy.release_model()
    del run
    release(device)
    if settings.compile_model:
        torch._dynamo.reset()  # or it would compile for sizes that vary
    return trials


def did_not_fit(updater: Updater, update: int) -> UserError:
    """Return the error, on all processes, of an update that does not fit in micro-batches of one sample."""
    texts = enumerate(updater.strategy.gather(updater.exchange.out_of_memory))
    told = "; ".join(f"process {rank}: {text}" for rank, text in texts if text)
    return UserError(
        f"update {update} does not fit into memory, with one sample in each micro-batch: {told} Use a smaller model or "
        "sample, activation checkpointing, or FSDPStrategy."
    )


def _try(run: Run, N: int, B: int) -> Trial | None:
    """Train a few windows with micro-batches of N; None if a process was interrupted."""
    strategy, updater, source, plan = run.parts.strategy, run.parts.updater, run.source, run.layout.plan
    assert plan is not None
    samples = B if strategy.runs_twice else min(B, 2 * strategy.effective_batch(N, 1))  # K > 2 needs no more memory
    source.cut(N, Plan(plan.samples, solve({0: samples}, N, strategy.effective_batch)))
    if strategy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(strategy.device)
    made, began, problem = 0, 0.0, ""
    windows = chain.from_iterable(source.windows(epoch, 0, 0) for epoch in count())
    for update, window in enumerate(islice(windows, WINDOWS)):
        began = began if update > 1 else time.perf_counter()
        try:
            outcome = updater.run(run.loss_of, window, RunState(update=update))
            if outcome.aborted and not outcome.out_of_memory:
                return None
            problem = updater.exchange.out_of_memory
        except Exception as error:  # in the optimizer's step
            if not is_out_of_memory(error):
                raise
            problem = updater.exchange.out_of_memory = describe(error)
            release(strategy.device, error)
            strategy.clear_gradients()
        if any(strategy.gather(bool(problem))):
            return Trial(N, max(strategy.gather(peak_memory(strategy.device))), 0.0)
        made += outcome.samples if update else 0
    torch.get_device_module(strategy.device).synchronize()
    seconds = time.perf_counter() - began
    rows = strategy.gather((seconds, peak_memory(strategy.device)))
    return Trial(N, max(memory for _, memory in rows), made / max(seconds for seconds, _ in rows))
