"""An open window: one update driven by calls, for loops that sample, score and call several times before a step."""

import atexit
import logging
from typing import Any, NoReturn

from torch import Tensor

from engine.data.window import Window
from engine.errors import UserError
from engine.plan.schedule import Stage
from engine.state import RunState
from engine.update.message import Outcome
from engine.update.model_checks import check_no_gradients
from engine.update.terms import JoinedTerms, Weights
from engine.update.updater import LossOf, Updater
from strategies import MicroBatch

UNSIZED = "the samples of this call are unknown. Use backward(loss, samples=n), or Loss(sum, weight)."


class CallWindow:
    """A window that is driven by calls, in a loop without a trainer."""

    is_done = False
    """Whether it was updated or dropped."""

    def __init__(self, updater: Updater, window: Window, state: RunState) -> None:
        self._updater, self._window, self._state = updater, window, state

    def log(self, name: str, value: float | Tensor, weight: float | Tensor | None = None) -> None:
        """Record a mean as `Task.log` does, in the outcome's `metrics`. Call it before `backward`."""
        self._updater.logged.append((name, value, weight))

    def check_done(self) -> None:
        """Raise UserError for a window without an update."""
        if not self.is_done:
            self.fail(UserError("a window ended without window.update(). Call it after the last backward."))

    def fail(self, error: Exception) -> NoReturn:
        """Let the other processes know of `error` and raise it."""
        self._updater.exchange.fail(error, self._state.update)

    def _finish(self) -> Outcome:
        outcome = self._updater.finish(self._window, self._state)
        self.is_done = True
        if not outcome.aborted:
            self._state.count(outcome.samples, outcome.weight, outcome.skipped, outcome.overflowed)
        return outcome


class OpenWindow(CallWindow):
    """One window: call `backward` any number of times, from anywhere, then `update` or `drop` on all processes.

    No call of `backward` communicates. `update` reduces in a pass without data, once and not overlapped.
    """

    def __init__(
        self, updater: Updater, state: RunState, stage: Stage, loss_of: LossOf | None, weights: Weights | None
    ) -> None:
        super().__init__(updater, Window(stage, 0, is_empty=False), state)
        self._loss_of, updater.terms = loss_of, None
        updater.begin(self._window, state)
        self._trained = {p: p.requires_grad for p in updater.model.parameters()}
        atexit.register(self._report)
        try:
            check_no_gradients(updater.model)
            if weights is not None:
                updater.terms = JoinedTerms(updater.exchange, updater.strategy)
                updater.terms.count([weights] if weights else [], state.update)
        except Exception as error:
            self.fail(error)

    def backward(self, loss: Any, samples: int | None = None) -> None:
        """Add the gradient of a `Loss`, of a mean over `samples` (0-dim tensor), or of terms if `open` got weights.

        If `open` got a loss function, give a batch instead, on any device. Draws are not seeded.
        """
        updater = self._updater
        try:
            self._check("backward")
            if self._loss_of is not None:
                with updater.strategy.accumulation_context(False):
                    loss = self._loss_of(updater.model, updater.strategy.to_device(loss))
            micro = MicroBatch(None, 1 if samples is None else samples, 0, False, UNSIZED if samples is None else "")
            updater.strategy.backward(*updater.after_forward(loss, micro))
        except Exception as error:
            self.fail(error)

    def update(self) -> Outcome:
        """Make the update and return its outcome over all processes: `aborted` if one of them calls `drop`."""
        return self._end("update")

    def drop(self) -> None:
        """Drop the window on all processes: no gradient stays, and no update is counted."""
        self._end("drop")

    def fail(self, error: Exception) -> NoReturn:
        self._close()
        super().fail(error)

    def _end(self, call: str) -> Outcome:
        updater = self._updater
        try:
            self._check(call)
            if changed := [p for p, is_trained in self._trained.items() if p.requires_grad != is_trained]:
                for parameter in changed:  # so that this process can still take part
                    parameter.requires_grad_(not parameter.requires_grad)
                raise UserError("requires_grad changed in an open window. Change it before accumulator.open().")
            updater.signals.stop_requested = call == "drop"  # the message says so, as after a signal
            updater.exchange.send()
            updater.strategy.join(self._window)
            outcome = self._finish()
            if not outcome.samples and not outcome.aborted:
                raise UserError("window.update() was called without a backward(), on any process. Call it first.")
        except Exception as error:
            self.fail(error)
        finally:
            updater.signals.stop_requested = False
        self._close()
        return outcome

    def _check(self, call: str) -> None:
        if self.is_done:
            raise UserError(f"window.{call}() was called after update() or drop(). Open another window.")

    def _close(self) -> None:
        self.is_done = True
        atexit.unregister(self._report)

    def _report(self) -> None:
        """Say at the end of the process that the window is open; the others wait for its update."""
        calls = self._updater.losses.micro_batches
        problem = f"a window was left open: {calls} calls of backward() count for nothing. Call update() or drop()."
        logging.getLogger("tally").error(problem)
        self._updater.strategy.report(problem)
