"""The gradient noise scale of a run, and the K that it suggests."""

import math
from typing import Any

from engine.callbacks.base import Callback, Trainer
from engine.errors import check_count
from engine.output import say
from engine.update.noise_scale import FIELDS, Advice, advise


class NoiseScale(Callback):
    """Measures the gradient noise scale in every n-th update, and proposes K. It never changes K.

    Each record gets `noise_scale` and its 95 % interval, `noise_scale_low` and `noise_scale_high`: in weight (samples,
    tokens), over the last 50 measured updates, and NaN while unknown, as at K=1. Process 0 prints a K for the next
    epoch if that changes, and advice at the end. Raises UserError unless n is a whole number of at least 1.
    """

    def __init__(self, every_n_updates: int = 20) -> None:
        check_count("NoiseScale.every_n_updates", every_n_updates)
        self.every_n_updates = every_n_updates
        self.proposal: dict[int, int] = {}
        """The schedule proposed so far, {epoch: K}: what `GradientAccumulationScheduler` takes."""
        self._K = self._batch = 0  # of the newest windows, and the largest batch at that K: the last may be short

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.update == 0:
            self.proposal, self._K, self._batch = {}, 0, 0

    def on_update_end(self, trainer: Trainer) -> None:
        K, batch = trainer.record["accumulate_grad_batches"], trainer.record["effective_batch"]
        self._K, self._batch = K, max(batch, self._batch if K == self._K else 0)

    def advice(self, trainer: Trainer) -> Advice | None:
        """Return which batch to use; None if the noise scale is unknown. Call it on all processes alike."""
        cost = trainer.reduction_cost
        hiding = trainer.strategy.gather(cost and cost.hiding)[0]  # a measured time: that of process 0 is for all
        if not self._batch or not trainer.weight:
            return None
        N, estimate = self._batch / self._K / trainer.strategy.data_parallel_size, [trainer.record[n] for n in FIELDS]
        return advise(estimate, self._batch, trainer.weight / trainer.samples, N, self._K, hiding)

    def on_epoch_end(self, trainer: Trainer) -> None:
        advice, proposed = self.advice(trainer), self.proposal or {0: self._K}
        if advice is None or not trainer.record[FIELDS[2]] < math.inf:  # too uncertain to propose anything
            return
        is_new = [*proposed.values()][-1] != advice.K
        self.proposal = {**proposed, trainer.epoch + 1: advice.K} if is_new else proposed
        schedule = f"; proposed: GradientAccumulationScheduler({self.proposal})"
        self._tell(trainer, advice.text + schedule, is_printed=is_new)

    def on_fit_end(self, trainer: Trainer) -> None:
        if (advice := self.advice(trainer)) is not None:
            self._tell(trainer, advice.text)

    def _tell(self, trainer: Trainer, text: str, is_printed: bool = True) -> None:
        """Write advice into events.jsonl, where the report finds it, and print it."""
        if trainer.strategy.rank == 0 and is_printed:
            say(text)
        if trainer.run_folder is not None:
            event = {"event": "advice", "update": trainer.update, "seconds": trainer.state.elapsed, "text": text}
            trainer.run_folder.log_event(event)

    def state_dict(self) -> dict[str, Any]:
        return {"proposal": [list(stage) for stage in self.proposal.items()], "newest": [self._K, self._batch]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.proposal = dict(state["proposal"])
        self._K, self._batch = state["newest"]
