"""A data order without memory: a bijection that is computed in slices, and as random as a true permutation."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import engine.order
from engine import Trainer
from engine.order import LARGEST_PERMUTATION, SLICE, KeyedPermutation, shuffled
from tests.kit.processes import run
from tests.kit.reference import Regression, Watch, big_batch_run, in_order, parameters

SAMPLES = (1 << 16) - 1000
"""Nearly a power of four: few numbers are permuted again, which would hide a bad round function."""


def is_bijection(samples: int, seed: int) -> bool:
    return bool((numpy.sort(KeyedPermutation(samples, seed, 0)[:]) == numpy.arange(samples)).all())


def test_it_is_a_bijection() -> None:
    random = numpy.random.default_rng(0)
    assert all(is_bijection(samples, 1) for samples in [*range(1, 260), *random.integers(260, 5000, 60), SAMPLES])


@pytest.mark.slow
def test_it_is_a_bijection_for_each_number_of_samples_to_5000() -> None:
    assert all(is_bijection(samples, samples) for samples in range(1, 5001))


@given(samples=st.integers(1, 10**18), seed=st.integers(0, 2**40), epoch=st.integers(0, 100), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_is_read_anywhere_at_once(samples: int, seed: int, epoch: int, data: st.DataObject) -> None:
    order = KeyedPermutation(samples, seed, epoch)
    start = data.draw(st.integers(0, samples - 1))
    found = order[start : start + 9].tolist()
    assert found == [order[place] for place in range(start, min(start + 9, samples))]
    assert len({*found}) == len(found)
    assert all(0 <= index < samples for index in found)
    assert order[start - samples] == found[0]
    with pytest.raises(IndexError):
        order[samples]


@given(
    pieces=st.lists(st.tuples(st.integers(0, 2 * SLICE), st.integers(1, 900), st.booleans()), max_size=40),
    long=st.integers(0, 3 * SLICE),
)
@settings(max_examples=40, deadline=None)
def test_small_pieces_are_those_of_the_order(pieces: list[tuple[int, int, bool]], long: int) -> None:
    order = KeyedPermutation(5 * SLICE + 7, 3, 1)
    whole = order[:].tolist()
    places = [(start, start + length, is_last) for start, length, is_last in [*pieces, (long, 2 * SLICE, True)]]
    assert [*order.read(places)] == [(start, whole[start:stop]) for start, stop, _ in places]


def test_small_pieces_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, at = [], KeyedPermutation._at
    monkeypatch.setattr(KeyedPermutation, "_at", lambda self, places: computed.append(len(places)) or at(self, places))
    far_apart = ((start, start + 32, False) for start in range(0, 10**10, 320_000))
    assert sum(1 for _ in islice(KeyedPermutation(10**10, 0, 0).read(far_apart), 1000)) == 1000
    assert len(computed) == 8
    assert max(computed) == SLICE


def test_it_takes_no_memory() -> None:
    tracemalloc.start()
    order = shuffled(10**10, 0)(3)
    start = 7 * 10**9
    assert len(order[start : start + SLICE]) == SLICE
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_to_the_threshold_it_is_numpy_s_permutation_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(shuffled(LARGEST_PERMUTATION + 1, 5)(2), KeyedPermutation)
    monkeypatch.setattr(engine.order, "LARGEST_PERMUTATION", 1000)
    expected = numpy.random.Generator(numpy.random.PCG64([5, 2])).permutation(1000)
    assert [*shuffled(1000, 5)(2)] == expected.tolist()
    order = shuffled(1001, 5)(2)
    assert isinstance(order, KeyedPermutation)
    assert [*order] == order[:].tolist() == [*KeyedPermutation(1001, 5, 2)]


# Statistics: each returns how many standard deviations an order is from a random permutation


def parity(order: NDArray[Any]) -> float:
    """The largest correlation of a bit of the place with a bit of the index."""
    places, bits = numpy.arange(len(order)), range(len(order).bit_length())
    signs = [1.0 - 2.0 * ((places >> bit) & 1) for bit in bits]
    found = [1.0 - 2.0 * ((order >> bit) & 1) for bit in bits]
    return max(abs(float(a @ b)) for a in signs for b in found) / math.sqrt(len(order))


def parities_together(order: NDArray[Any]) -> float:
    """The same for two bits of the place: a linear round function mixes the low bits of both halves."""
    places, bits = numpy.arange(len(order)), range(len(order).bit_length())
    signs = [1.0 - 2.0 * ((places >> bit) & 1) for bit in bits]
    lowest = 1.0 - 2.0 * (order & 1)
    return max(abs(float((a * b) @ lowest)) for a in signs for b in signs if a is not b) / math.sqrt(len(order))


def position(order: NDArray[Any]) -> float:
    """A table of 16 parts of the places by 16 parts of the indices, by chi-square with 225 degrees of freedom."""
    n = len(order)
    table = numpy.histogram2d(numpy.arange(n), order, bins=16, range=[[0, n], [0, n]])[0]
    return float(((table - n / 256) ** 2 / (n / 256)).sum() - 225) / math.sqrt(2 * 225)


def lag(order: NDArray[Any]) -> float:
    """The differences of neighbours, 1 to 8 apart, modulo the samples: 64 equal parts."""
    n = len(order)
    worst = 0.0
    for apart in range(1, 9):
        counts = numpy.histogram((order[apart:] - order[:-apart]) % n, bins=64, range=[0, n])[0]
        worst = max(worst, float(((counts - n / 64) ** 2 / (n / 64)).sum() - 63) / math.sqrt(2 * 63))
    return worst


STATISTICS: list[Callable[[NDArray[Any]], float]] = [parity, parities_together, position, lag]
BOUND = 7.0  # of 16,384 correlations the largest of a random permutation is about 4.5


def worst(statistic: Callable[[NDArray[Any]], float]) -> float:
    return max(statistic(numpy.asarray(KeyedPermutation(SAMPLES, seed, seed % 3)[:])) for seed in range(3))


@pytest.mark.parametrize("statistic", STATISTICS, ids=lambda f: f.__name__)
def test_it_is_as_random_as_a_permutation(statistic: Callable[[NDArray[Any]], float]) -> None:
    assert worst(statistic) < BOUND
    assert statistic(numpy.random.default_rng(0).permutation(SAMPLES)) < BOUND


def test_a_linear_round_function_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = lambda state: state * numpy.uint64(0x9E3779B1) + numpy.uint64(0x85EBCA6B)  # noqa: E731
    monkeypatch.setattr(engine.order, "_splitmix", bad)
    assert is_bijection(1000, 0)
    assert max(worst(parity), worst(parities_together)) > 10 * BOUND


def test_seeds_and_epochs_are_independent() -> None:
    n, orders = 997, []
    for seed in range(20):
        orders += [numpy.asarray(KeyedPermutation(n, seed, epoch)[:]) for epoch in range(20)]
    counts = numpy.bincount(numpy.stack(orders)[:, 0] * 16 // n, minlength=16)  # where a place's index lies
    assert ((counts - 25) ** 2 / 25).sum() < 50
    for one, other in pairwise(orders):
        assert int((one == other).sum()) < 12  # one, on average


# Runs, with the threshold set low

DATASET, N, EPOCHS = 45, 3, 2


def fit(K: int, threshold: int, options: dict[str, Any]) -> tuple[torch.Tensor, list[list[int]]]:
    engine.order.LARGEST_PERMUTATION = threshold  # in this process alone
    watch = Watch()
    options = {"max_epochs": EPOCHS, **options}
    trainer = Trainer("ddp", micro_batch_size=N, accumulate_grad_batches=K, callbacks=watch, **options)
    trainer.fit(Regression(DATASET))
    return parameters(trainer.model), watch.samples


def keyed_windows(effective_batch: int) -> list[list[list[int]]]:
    orders = [KeyedPermutation(DATASET, 0, epoch)[:].tolist() for epoch in range(EPOCHS)]
    return [[order[w.start : w.stop] for w in in_order(DATASET, effective_batch)] for order in orders]


@pytest.mark.parametrize("spread", [False, True])
def test_every_layout_sees_the_same_samples_above_the_threshold(spread: bool) -> None:
    windows = keyed_windows(4 * N)
    expected = big_batch_run(Regression(DATASET), windows)
    for P in (1, 2, 4):
        results = run(P, fit, 4 // P, DATASET - 1, {"spread_windows": spread})
        updates = [sorted(sum(shares, [])) for shares in zip(*(samples for _, samples in results), strict=True)]
        assert updates == [sorted(rows) for epoch in windows for rows in epoch]
        for found, _ in results:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_run_resumes_within_an_epoch_above_the_threshold(tmp_path: Path) -> None:
    expected = big_batch_run(Regression(DATASET), keyed_windows(2 * N))
    folder = {"run_dir": str(tmp_path / "run")}
    run(2, fit, 1, DATASET - 1, {**folder, "max_updates": 3})
    found = run(1, fit, 1, DATASET - 1, folder)[0][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
