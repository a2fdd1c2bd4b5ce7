"""The message of many processes: exact sums in log2(P) steps, and all that rows of numbers tell is told too."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine import Callback, Trainer
from strategies import DDPStrategy, FSDPStrategy
from strategies.summed_message import from_limbs, to_limbs
from tests.kit import hungry
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.reference import Regression, Watch, big_batch_run, in_order


def summing(kind: Any, **options: Any) -> Any:
    strategy = kind(device="cpu", **options)
    strategy.largest_rows = 1
    return strategy


def test_sums_of_limbs_are_rounded_once_whatever_their_order() -> None:
    draws = random.Random(0)
    for _ in range(200):
        values = [draws.uniform(-1, 1) * 2.0 ** draws.randint(-100, 60) for _ in range(40)]
        limbs = [sum(column) for column in zip(*map(to_limbs, values), strict=True)]
        assert from_limbs(limbs) == math.fsum(values) == float(sum(map(Fraction, values)))
        draws.shuffle(values)
        assert limbs == [sum(column) for column in zip(*map(to_limbs, values), strict=True)]
    for value in (0.0, 5e-40, -(2.0**63), 2.0**-192, 1 / 3):
        assert from_limbs(to_limbs(value)) == value
    for wrong in (math.nan, math.inf, -math.inf, 2.0**64, 2.0**-193, 5e-324):
        with pytest.raises((ValueError, OverflowError)):
            to_limbs(wrong)


def values_of(rank: int, message: int, odd: float) -> list[float]:
    draws = random.Random(100 * message + rank)
    own = [draws.uniform(-1e9, 1e9), draws.uniform(-1e-9, 1e-9), float(rank), 0.1, 5.0 - rank, 3.5 + rank, -3.5 - rank]
    return [odd, *own[1:]] if odd and rank == message else own


def exchanged(odd: float) -> Any:
    strategy = summing(DDPStrategy)
    strategy.setup()
    sent: Counter[str] = Counter()
    for name in ("isend", "send"):
        original = getattr(dist, name)
        setattr(dist, name, lambda *args, name=name, send=original: sent.update([name]) or send(*args))
    started = [strategy.exchange(values_of(strategy.rank, message, odd)) for message in range(3)]
    return [receive() for receive in started], sent.total()


@pytest.mark.parametrize("P", [2, 3, 5, 8])
def test_all_get_the_same_sums_and_maxima(P: int) -> None:
    expected = []
    for message in range(3):
        columns = [*zip(*(values_of(rank, message, 0) for rank in range(P)), strict=True)]
        expected.append([[*map(math.fsum, columns[:-3]), *map(max, columns[-3:])]])
    for found, sent in run(P, exchanged, 0.0):
        assert found == expected
        assert sent <= 3 * (math.floor(math.log2(P)) + 1)


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e300, 1e-300])
@pytest.mark.parametrize("P", [2, 3, 5])
def test_numbers_that_do_not_fit_come_in_rows(P: int, odd: float) -> None:
    for found, _ in run(P, exchanged, odd):
        for message in range(min(P, 3)):
            assert repr(found[message]) == repr([values_of(rank, message, odd) for rank in range(P)])


class Logs(Regression):
    def loss(self, model: Any, batch: Any) -> Any:
        self.log("largest", batch[0].abs().max())
        return super().loss(model, batch)


class Keeps(Watch):
    """Keeps the parameters at the end, too: those of FSDP on process 0."""

    def on_fit_end(self, trainer: Any) -> None:
        model = trainer.strategy.state_dict()["model"]
        self.found = torch.cat([value.flatten() for value in model.values()]) if model else torch.empty(0)


def trained(strategy: str, largest_rows: int) -> Any:
    keeps = Keeps()
    chosen: Any = (FSDPStrategy if strategy == "fsdp" else DDPStrategy)(device="cpu")
    chosen.largest_rows = largest_rows
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2, "shuffle": False}
    Trainer(chosen, 3, callbacks=keeps, **settings).fit(Logs(27))
    names = ("update", "samples", "weight", "loss", "grad_norm", "largest", "skipped")
    return keeps.found, [[record[name] for name in names] for record in keeps.records]


@pytest.mark.parametrize(("strategy", "P"), [("ddp", 2), ("ddp", 3), ("fsdp", 2)])
def test_a_run_is_to_the_bit_that_of_rows(strategy: str, P: int) -> None:
    rows, sums = run(P, trained, strategy, 8), run(P, trained, strategy, 1)
    for (parameters_of_rows, records_of_rows), (found, records) in zip(rows, sums, strict=True):
        assert records == records_of_rows
        assert found.is_meta or torch.equal(found, parameters_of_rows)
    if strategy == "ddp":
        expected = big_batch_run(Regression(27), [in_order(27, 6 * P)] * 2)
        torch.testing.assert_close(sums[0][0], expected, rtol=0, atol=1e-12)


class Wrong(Callback):
    """Something that the last process does after the second update."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update != 2 or trainer.strategy.rank != 2:
            return
        if self.what == "dies":
            os._exit(1)
        if self.what == "stops":
            trainer.stop()
        if self.what == "freezes":
            next(trainer.model.parameters()).requires_grad_(False)


class Fails(Regression):
    def loss(self, model: Any, batch: Any) -> Any:
        if 10 in batch[2]:
            raise KeyError("a bad sample")
        return super().loss(model, batch)


class NotReduced(DDPStrategy):
    def accumulation_context(self, is_last_microbatch: bool) -> Any:
        return super().accumulation_context(False)


def goes_wrong(what: str) -> int:
    task = (Fails if what == "fails" else Regression)(40)
    strategy = summing(NotReduced if what == "forgets" else DDPStrategy)
    trainer = Trainer(strategy, 2, max_epochs=2, shuffle=False, callbacks=Wrong(what))
    trainer.fit(task)
    return trainer.update


def test_a_request_to_stop_reaches_all() -> None:
    assert run(3, goes_wrong, "stops") == [3, 3, 3]


@pytest.mark.parametrize(
    ("what", "own", "others"),
    [
        ("fails", "KeyError: 'a bad sample'", "process 2 failed in update 1: KeyError: 'a bad sample'"),
        ("freezes", "requires_grad of 0.weight changed: expected the same", "process 2 failed in update 2: requires_"),
        ("dies", "died with exit code 1", "lost contact with another process in update 2"),
        ("forgets", "have diverged: the gradient norm of update 0 is", "have diverged: the gradient norm of update 0"),
    ],
    ids=["fails", "freezes", "dies", "forgets"],
)
def test_what_goes_wrong_on_one_is_told_on_all(what: str, own: str, others: str) -> None:
    with pytest.raises(ChildError) as raised:
        run(3, goes_wrong, what, seconds=30)
    texts = raised.value.errors
    assert own in texts.pop(2)
    assert len(texts) == 2
    assert all(others in text for text in texts.values())


def test_memory_that_runs_out_on_one_costs_nothing() -> None:
    expected = big_batch_run(Regression(69), [in_order(69, 24)] * 2)

    @on_processes(3)
    def results() -> Any:
        strategy = hungry.DDP()
        strategy.largest_rows = 1
        return hungry.fit(
            hungry.HungryRegression(69, {2: ("middle", 1), 4: ("last", 2)}), strategy, 8, 24, shuffle=False
        )

    for found, records, _ in results:
        assert (found - expected).abs().max() < 1e-12
        assert len(records) == 6
