"""How far an update is from that of one big batch, and a run that goes on elsewhere from one that does not."""

from __future__ import annotations

import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from engine import Callback, Task, Trainer
from engine.conformance.reference import difference, in_order
from strategies.environment import as_if_started
from tests.benchmarks.cases import NAMED, Case, tower
from tests.kit.processes import run

LAYERS, WIDTH, EPOCHS = 4, 8, 2
N, K = 4, 4
STOPS_AT = 3
"""The update after which a run goes on elsewhere: in the middle of its first epoch."""

State = dict[str, Tensor]


class Regression(Task):
    """In float64, with SGD that has a state and does not amplify rounding."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.x, self.y = (torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64) for _ in "xy")

    def configure_model(self) -> nn.Module:
        return tower(LAYERS, WIDTH, torch.float64)

    def configure_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train_data(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(model(x), y)


def one_big_batch(samples: int, effective_batch: int) -> State:
    """Train with one batch for each window, in plain torch."""
    torch.manual_seed(0)
    task = Regression(samples)
    model = task.configure_model()
    optimizer = task.configure_optimizer(model)
    for rows in in_order(samples, effective_batch) * EPOCHS:
        optimizer.zero_grad()
        task.loss(model, (task.x[list(rows)], task.y[list(rows)])).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Keep(Callback):
    def on_fit_start(self, trainer: Trainer) -> None:
        self.began_at = trainer.update

    def on_fit_end(self, trainer: Trainer) -> None:
        self.state = trainer.strategy.state_dict()["model"]


def train(case: Case, K: int, samples: int, settings: dict[str, Any]) -> tuple[State, int]:
    """Return the whole model, on process 0, and the update from which the run went on."""
    keep, strategy = Keep(), case.make(K)
    settings = {"accumulate_grad_batches": K, "max_epochs": EPOCHS, **settings}
    trainer = Trainer(strategy, micro_batch_size=N, shuffle=False, callbacks=keep, **settings)
    trainer.fit(Regression(samples))
    return (keep.state if strategy.rank == 0 else {}), keep.began_at


class Declared(NamedTuple):
    P: int
    effective_batch: int
    """Of N and K."""
    supports_variable_windows: bool


def declared(case: Case) -> Declared:
    """Return what the strategy says of itself where so many processes were started."""
    with as_if_started(case.processes):
        strategy = case.make(K)
        return Declared(strategy.data_parallel_size, strategy.effective_batch(N, K), strategy.supports_variable_windows)


def exactness(case: Case) -> float:
    """Return the largest relative difference from one big batch, over two K and three lengths of data.

    One divides into windows, one ends with a short window and a ragged micro-batch, one leaves a single sample for all
    processes together.
    """
    found = []
    for windows_of in (case.smallest_window, K):
        batch = declared(case).P * N * windows_of
        for samples in (2 * batch, 2 * batch + batch // 2 + 1, 2 * batch + 1):
            state, _ = run(case.processes, train, case, windows_of, samples, {})[0]
            found.append(difference(state, one_big_batch(samples, batch)))
    return max(found)


def continued(case: Case) -> float:
    """Return how far a run that begins with `case` and goes on as `case.then` is from one big batch at each update.

    The effective batch stays: K follows from P.
    """
    assert case.then is not None
    then = NAMED[case.then[0]]._replace(processes=case.then[1])
    batch = 12 * N
    samples = 4 * batch + batch // 2 + 1
    with tempfile.TemporaryDirectory() as folder:
        for part, stops_at, expected_start in ((case, STOPS_AT, 0), (then, None, STOPS_AT)):
            settings = {
                "accumulate_grad_batches": 1,
                "effective_batch_size": batch,
                "max_updates": stops_at,
                "run_dir": folder,
            }
            state, began_at = run(part.processes, train, part, batch // (declared(part).P * N), samples, settings)[0]
            assert began_at == expected_start, f"{part.name} went on from update {began_at}"
    return difference(state, one_big_batch(samples, batch))
