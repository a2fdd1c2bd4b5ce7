"""Callbacks that a task brings: those of a task that is a library's class, without a line for its user."""

from __future__ import annotations

from typing import Any

import pytest

from engine import Callback, GradientAccumulationScheduler, Trainer
from tests.kit.reference import Regression


class Noting(Callback):
    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def on_epoch_end(self, trainer: Any) -> None:
        self.events.append(f"{self.name} {trainer.epoch}")


class Bringing(Regression):
    def __init__(self, *brought: Callback) -> None:
        super().__init__(8)
        self.brought = brought

    def configure_callbacks(self, trainer: Any) -> Any:
        return self.brought


def test_they_come_before_those_of_the_trainer_and_go_with_their_task() -> None:
    events: list[str] = []
    trainer = Trainer("single", 4, max_epochs=1, callbacks=Noting("trainer's", events))
    trainer.fit(Bringing(Noting("task's", events)))
    trainer.fit(Regression(8))
    assert events == ["task's 0", "trainer's 0", "trainer's 0"]


@pytest.mark.parametrize(
    ("brought", "message"),
    [(GradientAccumulationScheduler({0: 2}), "Give it to the Trainer"), (len, "expected a Callback object")],
)
def test_what_sets_the_windows_or_is_not_a_callback_is_refused(brought: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer("single", 4, max_epochs=1).fit(Bringing(brought))
