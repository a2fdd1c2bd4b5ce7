"""Random draws of a dataset: seeded once per micro-batch for any P, K and workers; each sample is fetched once."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import numpy
import pytest
import torch

import engine.data.fetch as fetch
import engine.data.generators as generators
from engine import Trainer
from engine.data.fetch import Fetch
from engine.data.generators import restore, saved, seed_all
from tests.kit.processes import run
from tests.kit.reference import Regression, Samples, Watch

SAMPLES, N = 30, 3


class DrawsLate(Samples):
    """Draws from each generator, first in its 21st sample and then in every third: no first sample tells of it."""

    def __getitem__(self, index: int) -> Any:
        x, y, index = super().__getitem__(index)
        draw = index > 20 and index % 3 == 0
        return x, y, index, float(torch.rand(()) + random.random() + numpy.random.normal()) if draw else 0.0


class Keeps(Regression):
    def __init__(self) -> None:
        super().__init__(SAMPLES)
        self.drawn: list[tuple[int, float]] = []

    def train_data(self) -> Any:
        return DrawsLate(self.x, self.y)

    def loss(self, model: Any, batch: Any) -> Any:
        self.drawn += zip(batch[2].tolist(), batch[3].tolist(), strict=True)
        return super().loss(model, batch[:3])


def drawn(K: int, workers: int, spread: bool) -> list[tuple[int, float]]:
    task = Keeps()
    options: dict[str, Any] = {"num_workers": workers, "spread_windows": spread, "max_epochs": 2}
    Trainer("ddp", N, accumulate_grad_batches=K, callbacks=Watch(), **options).fit(task)
    return task.drawn


@pytest.mark.parametrize("spread", [False, True])
def test_draws_that_begin_late_do_not_know_P_K_or_workers(spread: bool) -> None:
    layouts = [(1, 4, 0), (2, 2, 0), (4, 1, 0), (1, 4, 2), (1, 1, 0), (3, 1, 0)]
    found = [sorted(sum(run(P, drawn, K, workers, spread), [])) for P, K, workers in layouts]
    assert all(other == found[0] for other in found)
    assert Counter(index for index, _ in found[0]) == dict.fromkeys(range(SAMPLES), 2)  # each once an epoch
    assert len({draw for _, draw in found[0]} - {0.0}) == 2 * len([i for i in range(21, SAMPLES) if i % 3 == 0])


def test_generators_are_seeded_once_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(fetch, "seed_all", lambda seed: (seeds.append(seed), seed_all(seed)))
    Trainer("single", N, max_epochs=2).fit(Keeps())
    assert len(seeds) == len(set(seeds)) == 2 * SAMPLES // N


def test_a_piece_that_P_cuts_draws_as_any_other() -> None:
    task = Keeps()
    samples = Fetch(task.train_data(), 0, list, seeds_each=True)
    whole = samples.__getitems__((0, 0, [24, 25, 26, 27]))
    halves = [samples.__getitems__((0, start, [24 + start, 25 + start])) for start in (0, 2)]
    assert [sample[3] for sample in whole] == [sample[3] for sample in sum(halves, [])]


def look(by_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the generators be read by `getstate`, as in interpreters that keep the numbers otherwise, or in memory."""
    assert generators.memory_with(numpy.random.get_bit_generator())
    if by_state:
        monkeypatch.setattr(generators, "memory_with", lambda bits: None)


def by_numpy(seed: int) -> Any:
    numpy.random.seed(seed)
    return numpy.random.normal, numpy.random.random


def by_python(seed: int) -> Any:
    random.seed(seed)
    return random.gauss, random.random


@pytest.mark.parametrize("draws_before", [0, 1, 2, 3])
@pytest.mark.parametrize("draws_within", [0, 1, 2])
@pytest.mark.parametrize("by_state", [False, True])
@pytest.mark.parametrize("seeded", [by_numpy, by_python])
def test_normal_numbers_which_are_made_in_pairs_stay_apart(
    draws_before: int, draws_within: int, seeded: Any, by_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(by_state, monkeypatch)

    def outside(fetches: bool) -> tuple[list[float], list[float]]:
        normal, uniform = seeded(1)
        before, within = [normal() for _ in range(draws_before)], []
        if fetches:
            state = saved()
            seeded(2)
            within = [normal() for _ in range(draws_within)]
            restore(*state)
        return before + [normal() for _ in range(3)] + [uniform() for _ in range(700)], within

    normal, _ = seeded(2)
    expected_within = [normal() for _ in range(draws_within)]
    with_fetch, within = outside(True)
    assert with_fetch == outside(False)[0]
    assert within == expected_within


@pytest.mark.parametrize("pairs", [0, 1])
def test_seeding_forgets_what_was_drawn_before(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws() -> list[float]:
        ours = [random.gauss(), numpy.random.standard_normal(), torch.randn(()).item()]
        return ours + [f() for _ in range(700) for f in (random.random, numpy.random.random, torch.rand(()).item)]

    found = []
    for by_state in (False, False, True):
        look(by_state, monkeypatch)
        _ = [draw() for _ in range(pairs) for draw in (random.gauss, numpy.random.standard_normal)]
        seed_all((5 << 40) + 1)
        assert saved() == saved()
        before = saved()
        found.append(draws())
        assert saved() != before
        restore(*before)
        assert saved() == before
    assert found[0] == found[1] == found[2]
    assert len({*found[0]}) == len(found[0])
    seed_all((5 << 40) + 2)
    assert not {*draws()} & {*found[0]}


def test_a_dataset_that_replaces_numpy_s_generator_changes_nothing_outside() -> None:
    bits = numpy.random.get_bit_generator()
    numpy.random.seed(3)
    numpy.random.standard_normal()
    state, expected = saved(), numpy.random.get_state()
    numpy.random.set_bit_generator(numpy.random.PCG64())
    restore(*state)
    assert numpy.random.get_bit_generator() is bits
    assert str(numpy.random.get_state()) == str(expected)


class Replaces(DrawsLate):
    """Replaces numpy's generator by one of another kind, or of its own, in some samples."""

    kind: Any

    def __getitem__(self, index: int) -> Any:
        if index % 7 == 0:
            numpy.random.set_bit_generator(self.kind(index))
        return super().__getitem__(index)


class KeepsReplacing(Keeps):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def train_data(self) -> Any:
        data = Replaces(self.x, self.y)
        data.kind = self.kind
        return data


def drawn_replacing(kind: Any, workers: int) -> list[tuple[int, float]]:
    task = KeepsReplacing(kind)
    Trainer("single", N, num_workers=workers, max_epochs=1).fit(task)
    return task.drawn


def test_a_worker_draws_as_the_main_process_where_a_dataset_replaces_numpy_s_generator() -> None:
    assert drawn_replacing(numpy.random.MT19937, 1) == drawn_replacing(numpy.random.MT19937, 0)


def test_a_generator_of_another_kind_is_refused_in_a_worker_and_between_two_samples() -> None:
    with pytest.raises(ValueError, match="numpy's default generator is a PCG64: expected MT19937"):
        drawn_replacing(numpy.random.PCG64, 1)
    task = KeepsReplacing(numpy.random.PCG64)
    with pytest.raises(ValueError, match="numpy's default generator is a PCG64: expected MT19937"):
        Fetch(task.train_data(), 0, list, seeds_each=True).__getitems__((0, 0, [7, 8]))
    assert type(numpy.random.get_bit_generator()) is numpy.random.MT19937


@pytest.mark.parametrize("step", ["saved", "restore", "seed_all"])
def test_memory_is_not_touched_while_a_thread_draws(step: str) -> None:
    before = saved()
    works = {"saved": saved, "restore": lambda: restore(*before), "seed_all": lambda: seed_all(1)}
    thread = threading.Thread(target=works[step])
    with numpy.random.get_bit_generator().lock:  # as numpy holds it
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(10)
    assert not thread.is_alive()
    restore(*before)


def test_another_default_generator_of_numpy_is_refused() -> None:
    own = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64())
    try:
        with pytest.raises(ValueError, match="numpy's default generator is a PCG64: expected MT19937"):
            Fetch(Regression(4).train_data(), 0, list).__getitems__((0, 0, [1]))
    finally:
        numpy.random.set_bit_generator(own)
