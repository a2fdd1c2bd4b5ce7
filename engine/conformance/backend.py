"""A strategy under test: how it is made, what it declares, and how the checks run it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from engine.callbacks import Callback
from engine.conformance.processes import ProcessesFailedError, run
from engine.conformance.reference import Regression, State, difference, network
from engine.trainer import Trainer
from strategies import MicroBatch, Strategy

N = 2  # samples per micro-batch in every check


class BrokenPromiseError(AssertionError):
    """A promise is broken; the message is one sentence that says what was expected and what was seen."""


class NotDeclaredError(Exception):
    """The strategy does not make this promise; the message says by which declaration."""


class Ran(Callback):
    """A run on one process: the record of each update, and the parameters at the end, if it has them all."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.state: State = {}

    def on_update_end(self, trainer: Trainer) -> None:
        self.records.append(dict(trainer.record))

    def on_fit_end(self, trainer: Trainer) -> None:
        self.state = whole(trainer.strategy, trainer.strategy.state_dict()["model"])


@dataclass(frozen=True, eq=False)
class Backend:
    """A strategy's class, its options and its processes; K is that of constant windows, `seconds` limits each run."""

    strategy_class: type[Strategy]
    options: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 2
    K: int = 4
    seconds: float = 60.0

    def run(self, function: Callable[..., Any], *args: Any, what: str = "a run") -> list[Any]:
        """Call `function(strategy, *args)` on each process, with a new strategy that is not set up.

        Raises BrokenPromiseError if a process does, and, naming `what`, if one fails or does not end.
        """

        def judged(strategy: Strategy) -> tuple[Any, str]:
            try:
                return function(strategy, *args), ""
            except BrokenPromiseError as broken:
                return None, str(broken)

        try:
            rows = self.attempt(judged)
        except ProcessesFailedError as error:
            raise BrokenPromiseError(f"{what}: expected all processes to end without an error, seen {error}.") from None
        for rank, (_, broken) in enumerate(rows):
            expect(not broken, f"process {rank}: {broken}")
        return [value for value, _ in rows]

    def attempt(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Do the same if a failure is expected. Raises ProcessesFailedError."""
        return run(self.processes, lambda: function(self.strategy_class(**self.options), *args), seconds=self.seconds)

    def fit(self, task: Regression, what: str = "a run", **settings: Any) -> list[Ran]:
        """Train on all processes, as `fit`. Raises BrokenPromiseError, naming `what`, if that fails."""
        return self.run(fit, task, {"accumulate_grad_batches": self.K, **settings}, what=what)

    @cached_property
    def strategy(self) -> Strategy:
        """A strategy that is not set up, for its declarations."""
        return self.strategy_class(**self.options)

    @cached_property
    def P(self) -> int:  # noqa: N802 - a word of this field
        """Data-parallel processes, as the strategy says."""
        return int(self.run(lambda strategy: strategy.data_parallel_size)[0])

    @property
    def B(self) -> int:  # noqa: N802 - a word of this field
        """Samples of a full update."""
        return self.P * N * self.K

    @cached_property
    def needs_equal_windows(self) -> bool:
        """Whether the strategy, once it has a model, wants as many micro-batches on each process."""
        return any(self.run(needs_equal_windows))

    def must_be_exact(self) -> float:
        """Return `exact_to`. Raises NotDeclaredError if it is None."""
        if (exact_to := self.strategy.exact_to) is None:
            raise NotDeclaredError("exact_to = None: its updates are not those of one big batch")
        return exact_to

    def expect_updates(self, ran: Sequence[Ran], samples: list[int], what: str) -> None:
        """Raise BrokenPromiseError unless the updates of each process have these numbers of samples."""
        for rank, own in enumerate(ran):
            seen = [record["effective_batch"] for record in own.records]
            expect(seen == samples, f"{what}: expected updates of {samples} samples, process {rank} has seen {seen}.")

    def expect_equal(self, found: State, expected: State, what: str) -> None:
        """Raise BrokenPromiseError unless `found` is what the strategy promises of `expected`, if it does."""
        if (limit := self.strategy.exact_to) is not None:
            off = difference(found, expected)
            says = f"{what}: expected what one big batch gives within {limit:g} (relative), seen {off:.1e}."
            expect(off <= limit, says)


def expect(holds: bool, sentence: str) -> None:
    """Raise BrokenPromiseError with `sentence` unless it holds."""
    if not holds:
        raise BrokenPromiseError(sentence)


def whole(strategy: Strategy, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` if it is that of the whole model on this process, as it always is on process 0; else {}."""
    return state if strategy.holds_all or strategy.rank == 0 else {}


class Started:
    """A strategy with a model and an optimizer, and windows of K micro-batches of tokens outside of any run."""

    def __init__(self, strategy: Strategy, K: int, adam: bool) -> None:
        self.strategy, self.K = strategy, K
        self.task = Regression(strategy.data_parallel_size * K * N, tokens=True, adam=adam)
        module = network()
        self.model = strategy.prepare(module)
        self.optimizer = self.task.configure_optimizer(module)

    def run_window(self, scale: float | Tensor) -> None:
        """Run a window, as the engine does, with `scale` for its losses."""

        def forward(micro: MicroBatch) -> tuple[Tensor, float | Tensor]:
            self.strategy.seed(0)
            return self.task.total(self.model, micro.batch), scale

        places = range(self.strategy.data_parallel_rank * self.K * N, len(self.task.x), N)[: self.K]
        batches = [self.strategy.to_device(self.task.batch(range(place, place + N))) for place in places]
        self.strategy.start_window(self.K)
        self.strategy.run_window([MicroBatch(b, N, 0, b is batches[-1]) for b in batches], forward)

    def step(self) -> dict[str, Any]:
        """Step, clear the gradients, and return the state of model and optimizer."""
        self.optimizer.step()
        self.strategy.clear_gradients()
        return self.strategy.state_dict(self.optimizer)

    def update(self) -> dict[str, Any]:
        """Run a window and step; return the state after it."""
        self.run_window(0.1)
        return self.step()


@contextmanager
def started(strategy: Strategy, K: int = 1, adam: bool = False) -> Iterator[Started]:
    """Set `strategy` up with a model, and tear it down on all processes together."""
    strategy.setup()
    yield Started(strategy, K, adam)
    strategy.barrier()
    strategy.teardown()


def needs_equal_windows(strategy: Strategy) -> bool:
    """Set `strategy` up with a model, and ask it."""
    with started(strategy):
        return strategy.needs_equal_windows


def fit(strategy: Strategy, task: Regression, settings: Mapping[str, Any]) -> Ran:
    """Train in order, N samples a micro-batch, and return the run of this process."""
    ran = Ran()
    trainer = Trainer(strategy, **{"micro_batch_size": N, "shuffle": False, **settings})
    trainer.callbacks.append(ran)
    task.rank = strategy.data_parallel_rank
    trainer.fit(task)
    return ran
