"""A strategy under test: how it is made, what it declares, and how the checks run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.callbacks import Callback
from engine.conformance.processes import ProcessesFailedError, run
from engine.conformance.reference import Regression, State, difference, network
from engine.data.stream import StreamSource
from engine.data.window import Loading
from engine.plan.schedule import make_schedule
from engine.state import RunState
from engine.trainer import Trainer
from engine.update.updater import UpdateOptions, Updater
from strategies import MicroBatch, Strategy

N = 2  # samples per micro-batch in every check


class BrokenPromiseError(AssertionError):
    """A promise is broken; the message is one sentence that says what was expected and what was seen."""


class NotDeclaredError(Exception):
    """The strategy does not make this promise; the message says by which declaration."""


class Declared(NamedTuple):
    """The declarations of a strategy on one process."""

    name: str
    rank: int
    local_rank: int
    data_parallel_size: int
    data_parallel_rank: int
    device: torch.device
    supports_variable_windows: object
    exact_to: float | None
    defers_reduction: bool
    resumes_exactly: bool


class Started(NamedTuple):
    """The user's module, and what `prepare` returned for it."""

    module: nn.Module
    model: nn.Module


class Ran(NamedTuple):
    """A run on one process: the record of each update, and the parameters at the end, if it has them all."""

    records: list[dict[str, Any]]
    state: State


@dataclass(frozen=True, eq=False)
class Backend:
    """A strategy's class, its options and its processes; K is that of constant windows, `seconds` limits each run."""

    strategy_class: type[Strategy]
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 2
    K: int = 4
    seconds: float = 60.0

    def run(
        self, function: Callable[..., Any], *args: Any, processes: int | None = None, what: str = "a run"
    ) -> list[Any]:
        """Call `function(strategy, *args)` on each process, with a new strategy that is not set up.

        Raises BrokenPromiseError, naming `what`, if one of them fails or does not end.
        """
        try:
            return self.attempt(function, *args, processes=processes)
        except ProcessesFailedError as error:
            raise BrokenPromiseError(f"{what}: expected all processes to end without an error, seen {error}.") from None

    def attempt(self, function: Callable[..., Any], *args: Any, processes: int | None = None) -> list[Any]:
        """Do the same if a failure is expected. Raises ProcessesFailedError."""
        P = self.processes if processes is None else processes
        return run(P, lambda: function(self.strategy_class(**self.options), *args), seconds=self.seconds)

    def fit(self, task: Regression, what: str = "a run", strategy: str | None = None, **settings: Any) -> list[Ran]:
        """Train in order, N samples a micro-batch, on all processes, or on one with a strategy of ours.

        Raises BrokenPromiseError, naming `what`, if that fails or does not end.
        """
        settings = {"micro_batch_size": N, "accumulate_grad_batches": self.K, "shuffle": False, **settings}
        processes = None if strategy is None else 1
        return self.run(lambda own: fit(strategy or own, task, settings), processes=processes, what=what)

    @cached_property
    def declared(self) -> list[Declared]:
        """The strategy's declarations on each process, before `setup`."""
        return self.run(declare)

    @property
    def P(self) -> int:  # noqa: N802 - a word of this field
        """Data-parallel processes, as the strategy says."""
        return self.declared[0].data_parallel_size

    @cached_property
    def needs_equal_windows(self) -> bool:
        """Whether the strategy, once it has a model, wants as many micro-batches on each process."""

        def ask(strategy: Strategy) -> bool:
            with started(strategy):
                return strategy.needs_equal_windows

        return any(self.run(ask))

    def must_be_exact(self) -> float:
        """Return `exact_to`. Raises NotDeclaredError if it is None."""
        if (exact_to := self.declared[0].exact_to) is None:
            raise NotDeclaredError("exact_to = None: its updates are not those of one big batch")
        return exact_to

    def expect_equal(self, found: State, expected: State, what: str) -> None:
        """Raise BrokenPromiseError unless `found` is what the strategy promises of `expected`."""
        limit = self.must_be_exact()
        expect(
            (off := difference(found, expected)) <= limit,
            f"{what}: expected what one big batch gives within {limit:g} (relative), seen {off:.1e}.",
        )


def expect(holds: bool, sentence: str) -> None:
    """Raise BrokenPromiseError with `sentence` unless it holds."""
    if not holds:
        raise BrokenPromiseError(sentence)


def declare(strategy: Strategy) -> Declared:
    """Return the declarations of `strategy`."""
    return Declared(*(getattr(strategy, name) for name in Declared._fields))


@contextmanager
def started(strategy: Strategy) -> Iterator[Started]:
    """Set `strategy` up, yield the network, and tear `strategy` down on all processes together."""
    strategy.setup()
    module = network()
    yield Started(module, strategy.prepare(module))
    strategy.barrier()
    strategy.teardown()


def has_whole_state(strategy: Strategy) -> bool:
    """Whether `state_dict` on this process is that of the whole model, as it always is on process 0."""
    return strategy.holds_all or strategy.rank == 0


def run_window(
    strategy: Strategy, own: Started, optimizer: Optimizer, task: Regression, K: int, scale: float | Tensor
) -> None:
    """Run one window of `task`, a stream, as the engine does, but with `scale` for its losses."""
    task.rank = strategy.data_parallel_rank
    updater = Updater(strategy, own.model, optimizer, None, UpdateOptions())

    def forward(micro: MicroBatch) -> tuple[Tensor, float | Tensor]:
        updater.before_forward(micro)
        loss = task.loss(own.model, micro.batch)
        return loss if isinstance(loss, Tensor) else loss.sum, scale

    schedule = make_schedule(N, strategy.effective_batch, {0: K})
    source = StreamSource(task.train_data(), schedule, Loading(task, strategy))
    window = next(source.windows(0, 0, 0))
    updater.begin(window, RunState())
    strategy.run_window(window, forward)


def fit(strategy: Strategy | str, task: Regression, settings: Mapping[str, Any]) -> Ran:
    """Train and return the run of this process."""
    keep = _Keep()
    callbacks: Sequence[Callback] = settings.get("callbacks", ())
    trainer = Trainer(strategy, **{**settings, "callbacks": [*callbacks, keep]})
    task.rank = trainer.strategy.data_parallel_rank
    trainer.fit(task)
    return keep.ran


class _Keep(Callback):
    def __init__(self) -> None:
        self.ran = Ran([], {})

    def on_update_end(self, trainer: Trainer) -> None:
        self.ran.records.append(dict(trainer.record))

    def on_fit_end(self, trainer: Trainer) -> None:
        state = trainer.strategy.state_dict()["model"]
        self.ran.state.update(state if has_whole_state(trainer.strategy) else {})
