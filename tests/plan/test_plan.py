"""The pure modules: thousands of cases against plain definitions."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.order import bucketed, sequential, shuffled, within_budget
from engine.plan.schedule import check_accumulation, check_scheduling
from engine.plan.windows import Plan
from engine.preview.forecast import stage_forecasts
from engine.seeds import mix
from tests.kit.planned import all_windows
from tests.kit.schedules import UNITS, schedule_of, schedules


@given(schedules, st.integers(0, 60))
def test_K_is_that_of_the_last_key_that_was_reached(scheduling: dict[int, int], place: int) -> None:
    reached = [first for first in scheduling if first <= place]
    for unit, where in (("epoch", (place, 99, 99)), ("update", (99, place, 99)), ("sample", (99, 99, place))):
        assert schedule_of(scheduling, unit).at(*where).accumulate_grad_batches == scheduling[max(reached)]


def test_the_user_s_example() -> None:
    schedule = schedule_of(check_scheduling({0: 8, 4: 4, 8: 1}), "epoch")
    assert [schedule.at(epoch, 0, 0).accumulate_grad_batches for epoch in range(10)] == [8] * 4 + [4] * 4 + [1] * 2


def test_K_is_1_before_the_first_key() -> None:
    assert check_scheduling({2: 4}) == {0: 1, 2: 4}


def test_the_dictionary_is_copied() -> None:
    given_ = {0: 8}
    checked = check_scheduling(given_)
    given_[0] = 0
    assert checked == {0: 8}


@given(st.integers(1, 50), st.integers(1, 5), schedules, st.sampled_from(UNITS), st.none() | st.integers(1, 30))
def test_all_windows_are_those_of_each_epoch(
    samples: int, N: int, scheduling: dict[int, int], unit: str, max_updates: int | None
) -> None:
    plan = Plan(samples, schedule_of(scheduling, unit, N=N), max_epochs=4, max_updates=max_updates)
    found = list(all_windows(plan))
    assert len(found) == plan.updates
    update = 0
    for epoch in range(4):
        windows = [window for e, window in found if e == epoch]
        assert windows == list(plan.windows(epoch, update))
        update += len(windows)


@given(
    samples=st.integers(1, 50),
    N=st.integers(1, 5),
    P=st.integers(1, 4),
    scheduling=schedules,
    unit=st.sampled_from(UNITS),
    max_updates=st.none() | st.integers(1, 60),
    spread=st.booleans(),
)
def test_stretches_and_forecasts_are_sums_of_all_windows(
    samples: int, N: int, P: int, scheduling: dict[int, int], unit: str, max_updates: int | None, spread: bool
) -> None:
    plan = Plan(samples, schedule_of(scheduling, unit, P, N), max_epochs=6, max_updates=max_updates)
    windows, stretches = list(all_windows(plan)), list(plan.stretches())
    sizes = [(window.stage, window.samples) for _, window in windows]
    assert Counter(sizes) == sum(
        (Counter({(s.stage, size): count}) for s in stretches for count, size in s.sizes()), Counter()
    )
    for s in stretches:
        epoch, first = windows[s.update]
        assert (epoch, first.start, first.stage) == (s.epoch, s.start, s.stage)
        assert windows[s.update + s.updates - 1][0] == s.epoch + s.epochs - 1
        assert windows[s.update + s.updates - 1][1].stop == s.stop
    lrs = [1.0 / (1 + update) for update in range(len(windows))]
    for forecast in stage_forecasts(plan, N, P, spread, lrs.__getitem__):
        own = [(number, epoch, w) for number, (epoch, w) in enumerate(windows) if w.stage == forecast.stage]
        counts = [window.count(N, P, spread) for _, _, window in own]
        assert (forecast.updates, forecast.epochs) == (len(own), (own[0][1], own[-1][1]))
        assert (forecast.samples, forecast.last_window) == (sum(w.samples for _, _, w in own), own[-1][2].samples)
        assert (forecast.micro_batches, forecast.turns) == (sum(counts), sum(-(-count // P) for count in counts))
        assert forecast.lr == (lrs[own[0][0]], lrs[own[-1][0]])


@pytest.mark.parametrize("unit", UNITS)
def test_a_plan_of_many_samples_and_stages_is_read_in_few_steps(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    span = {"epoch": 1000, "update": 10**6, "sample": 10**11}[unit]
    schedule = schedule_of({stage * span: 1 + stage % 3 for stage in range(200)}, unit, P=10, N=100)
    plan = Plan(10**10, schedule, max_epochs=10**6)
    found = list(plan.stretches())
    assert len(found) <= 3 * 200
    monkeypatch.setattr(Plan, "stretches", lambda plan: found)
    assert plan.updates == sum(stretch.updates for stretch in found) > 10**9
    monkeypatch.setattr(Plan, "stretches", None)
    assert plan.updates  # counted once


def test_a_plan_without_an_end_is_read_to_its_last_stage() -> None:
    *_, last = Plan(10, schedule_of({0: 2, 4: 3}, "epoch")).stretches()
    assert (last.epoch, last.windows) == (4, 4)


@given(
    samples=st.integers(1, 200),
    N=st.integers(1, 9),
    P=st.integers(1, 5),
    scheduling=schedules,
    unit=st.sampled_from(UNITS),
)
@settings(max_examples=500)
def test_every_sample_is_in_one_micro_batch_of_one_process(
    samples: int, N: int, P: int, scheduling: dict[int, int], unit: str
) -> None:
    plan = Plan(samples, schedule_of(scheduling, unit, P, N), max_epochs=3)
    update = 0
    for epoch in range(3):
        windows = list(plan.windows(epoch, update))
        seen: list[int] = []
        for number, window in enumerate(windows):
            place = {"epoch": epoch, "update": update + number, "sample": epoch * samples + window.start}[unit]
            K = scheduling[max(first for first in scheduling if first <= place)]
            assert window.samples == P * N * K or number == len(windows) - 1
            for spread in (False, True):
                shares = [list(window.micro_batches(N, rank, P, spread)) for rank in range(P)]
                pieces = sorted((start, stop) for share in shares for start, stop, _ in share)
                assert [s for piece in pieces for s in range(*piece)] == list(range(window.start, window.stop))
                assert all(
                    [last for _, _, last in share] == [False] * (len(share) - 1) + [True] for share in shares if share
                )
                assert all(len(share) <= K for share in shares)
                assert all(0 < stop - start <= N for start, stop in pieces)
                assert window.count(N, P, spread) == len(pieces)
                if spread:
                    sizes = [stop - start for start, stop in pieces]
                    assert max(sizes) - min(sizes) <= 1
                    assert len({len(share) for share in shares}) == 1 or window.samples < P * len(shares[0])
            seen += range(window.start, window.stop)
        assert seen == list(range(samples))
        assert len(windows) == plan.updates_in_epoch(epoch, update)
        update += len(windows)
    assert plan.updates == update


@given(samples=st.integers(1, 100), K=st.integers(1, 9), max_updates=st.integers(1, 50), max_epochs=st.integers(1, 5))
def test_max_updates_and_max_epochs_whichever_comes_first(
    samples: int, K: int, max_updates: int, max_epochs: int
) -> None:
    plan = Plan(samples, schedule_of({0: K}, "epoch"), max_epochs, max_updates)
    update = 0
    for epoch in range(max_epochs):
        update += len(list(plan.windows(epoch, update)))
    assert plan.updates == update == min(max_updates, max_epochs * -(-samples // K))


@given(samples=st.integers(1, 100), N=st.integers(1, 5), PK=st.sampled_from([4, 6, 12]), data=st.data())
def test_micro_batches_do_not_depend_on_P(samples: int, N: int, PK: int, data: st.DataObject) -> None:
    P = data.draw(st.sampled_from([p for p in range(1, PK + 1) if PK % p == 0]))

    def cut(P: int) -> list[list[tuple[int, int]]]:
        plan = Plan(samples, schedule_of({0: PK // P}, "epoch", P, N), max_epochs=1)
        return [
            sorted((a, b) for rank in range(P) for a, b, _ in w.micro_batches(N, rank, P)) for w in plan.windows(0, 0)
        ]

    assert cut(P) == cut(1)


@given(samples=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 100))
def test_a_shuffled_order_is_a_permutation_and_a_function_of_seed_and_epoch(
    samples: int, seed: int, epoch: int
) -> None:
    order = shuffled(samples, seed)(epoch)
    assert sorted(order) == list(range(samples))
    assert list(order) == list(shuffled(samples, seed)(epoch))
    assert list(sequential(samples)(epoch)) == list(range(samples))


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(lengths=lengths, bucket=st.integers(1, 20), epoch=st.integers(0, 5))
def test_a_bucketed_order_sorts_within_buckets(lengths: list[int], bucket: int, epoch: int) -> None:
    order = list(bucketed(lengths, bucket, 0)(epoch))
    assert sorted(order) == list(range(len(lengths)))
    for start in range(0, len(order), bucket):
        found = [lengths[i] for i in order[start : start + bucket]]
        assert found == sorted(found)


@given(lengths=lengths, budget=st.integers(50, 200), epoch=st.integers(0, 5))
def test_groups_stay_within_the_budget(lengths: list[int], budget: int, epoch: int) -> None:
    groups = within_budget(lengths, budget, 0)(epoch)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= budget for group in groups)
    assert len(groups) == len(within_budget(lengths, budget, 0)(epoch + 1))


def test_a_sample_over_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="sample 1 has length 9, more than the budget of 8"):
        within_budget([3, 9], 8, 0)


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(shuffled(50, seed)(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_mix_spreads_neighbours_over_the_low_32_bits() -> None:
    low = {mix(seed, epoch, place) & 0xFFFFFFFF for seed in range(10) for epoch in range(10) for place in range(100)}
    assert len(low) >= 10_000 - 1


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2", None])
def test_K_that_is_none(value: object) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        check_accumulation(value)


@pytest.mark.parametrize(
    "scheduling", [{}, None, 4, [(0, 4)], {-1: 2}, {0.0: 2}, {"0": 2}, {True: 2}, {0: 0}, {0: True}, {0: 1.5}, {0: "2"}]
)
def test_a_schedule_that_is_none(scheduling: object) -> None:
    with pytest.raises(ValueError, match="schedul"):
        check_scheduling(scheduling)


def test_pure_arithmetic_imports_no_torch() -> None:
    code = (
        "import sys, types; sys.path.insert(0, '.');"
        "new = types.ModuleType;"
        "sys.modules |= {name: new(name) for name in ('engine', 'strategies')};"
        "[setattr(sys.modules[name], '__path__', [name]) for name in ('engine', 'strategies')];"
        "import engine.plan.schedule, engine.plan.windows, engine.preview.forecast, engine.order;"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
