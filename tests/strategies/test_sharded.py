"""FSDP: parts of one model on P processes train what one big batch trains, however uneven their data."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import Accumulator, Callback, GradientAccumulationScheduler, Trainer
from strategies import FSDPStrategy, resolve
from tests.kit.killed import SCHEDULING, Full, Witness, check_samples, history, same
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.recorders import Count
from tests.kit.reference import Regression, big_batch_run, in_order
from tests.kit.streams import Streamed, deal, windows_of
from tests.kit.table import TAILS
from tests.kit.tokens import Sequences, big_batch

N, EPOCHS = 4, 2
SLOW = pytest.mark.slow
LONG = (pytest.mark.slow, pytest.mark.campaign)
MODES: dict[str, dict[str, Any]] = {
    "window": {},
    "micro_batch": {"reduce": "micro_batch"},
    "kept": {"reshard_after_forward": False},
    "freed": {"reshard_after_forward": True, "find_unused_parameters": True},
}


class Tower(nn.Module):
    """Units that are residual, one whose input needs no gradient, and a root with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 1)  # comes first in the order of names
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 7), nn.Tanh()), nn.Linear(7, 7)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        h = torch.tanh(first(x))
        return self.last(h + third(h + second(h)))


def whole(strategy: Any) -> Tensor:
    """All parameters, as a checkpoint has them; without values on the processes that do not write it."""
    return torch.cat([value.flatten() for value in strategy.state_dict()["model"].values()])


class Keep(Callback):
    """Keeps each update's record, and the model that there is at the end."""

    def on_fit_start(self, trainer: Any) -> None:
        self.records: list[Any] = []

    def on_update_end(self, trainer: Any) -> None:
        self.records.append(dict(trainer.record))

    def on_fit_end(self, trainer: Any) -> None:
        self.model = whole(trainer.strategy)


def train(options: dict[str, Any], task: Any, K: int = 1, strategy: Any = None, **settings: Any) -> Any:
    keep = Keep()
    callbacks = [keep, *settings.pop("callbacks", [])]
    settings = {"accumulate_grad_batches": K, "max_epochs": EPOCHS, "shuffle": False, **settings}
    strategy = strategy or FSDPStrategy(timeout_seconds=20, **options)
    Trainer(strategy, micro_batch_size=N, callbacks=callbacks, **settings).fit(task)
    return (None if strategy.rank else keep.model), keep.records


def expected(samples: int, effective_batch: int, **options: Any) -> Tensor:
    task = Regression(samples, model=Tower)
    return big_batch_run(task, [in_order(samples, effective_batch)] * EPOCHS, **options)


def check(found: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)


EVERY_DAY = [(1, "window"), (2, "micro_batch"), (3, "window")]
TABLE = [pytest.param(P, mode, (1, 2), id=f"{P}-{mode}") for P, mode in EVERY_DAY] + [
    pytest.param(P, mode, (1, 2, 7), id=f"{P}-{mode}, K to 7", marks=SLOW if P == 3 else LONG)
    for P in (1, 2, 3, 4)
    for mode in MODES
]


@pytest.mark.parametrize(("P", "mode", "Ks"), TABLE)
def test_fsdp_equals_one_big_batch(P: int, mode: str, Ks: tuple[int, ...]) -> None:
    @on_processes(P)
    def results() -> Any:
        cases = [(K, TAILS[tail](P * N * K)) for K in Ks for tail in TAILS]
        return [(K, samples, *train(MODES[mode], Regression(samples, model=Tower), K)) for K, samples in cases]

    for K, samples, found, records in results[0]:
        check(found, expected(samples, P * N * K))
        assert records[-1]["samples"] == EPOCHS * samples


@pytest.mark.parametrize("reduce", ["window", pytest.param("micro_batch", marks=SLOW)])
@pytest.mark.parametrize("tail", ["short", pytest.param("divides", marks=LONG), pytest.param("one", marks=LONG)])
def test_hybrid_shards_equal_one_big_batch(tail: str, reduce: str) -> None:
    samples = TAILS[tail](4 * N * 2)

    @on_processes(4)
    def results() -> Any:
        strategy = FSDPStrategy(reduce, shard_size=2, timeout_seconds=20)
        fingerprints: list[int] = []
        keeps = Callback()
        keeps.on_update_end = lambda trainer: fingerprints.append(strategy.fingerprint())  # type: ignore[method-assign]
        found, records = train({}, Regression(samples, model=Tower), 2, strategy, callbacks=[keeps])
        return found, records, fingerprints

    check(results[0][0], expected(samples, 4 * N * 2))
    assert len({tuple(fingerprints) for *_, fingerprints in results}) == 1
    assert len(set(results[0][2])) == len(results[0][2])  # each update changed something


@pytest.mark.parametrize(("P", "B"), [(2, 1), pytest.param(4, 1, marks=SLOW), (4, 7)])
def test_processes_that_never_had_a_micro_batch_learn_the_order_from_the_others(P: int, B: int) -> None:
    check(run(P, lambda: train({}, Regression(23, model=Tower), effective_batch_size=B))[0][0], expected(23, B))


@pytest.mark.parametrize("mode", ["window", "kept"])
def test_windows_that_vary(mode: str) -> None:
    @on_processes(2)
    def results() -> Any:
        callbacks = [GradientAccumulationScheduler({0: 3, 1: 1, 2: 8})]
        return train(MODES[mode], Regression(45, model=Tower), max_epochs=4, callbacks=callbacks)

    found, _ = results[0]
    reference = big_batch_run(Regression(45, model=Tower), [in_order(45, 2 * N * K) for K in (3, 1, 8, 8)])
    check(found, reference)


@pytest.mark.parametrize("mode", ["window", "kept", "micro_batch"])
@pytest.mark.parametrize("lengths", [[0, 1], [7, 2], pytest.param([5, 1, 0], marks=SLOW)], ids=str)
def test_uneven_streams(lengths: list[int], mode: str) -> None:
    pieces, scheduling = deal(lengths, [3, 5, 1, 2]), {0: 3, 1: 2}

    @on_processes(len(lengths))
    def results() -> Any:
        samples = sum(len(piece) for own in pieces for piece in own)
        task = Streamed(samples, pieces, model=Tower)
        return train(MODES[mode], task, callbacks=[GradientAccumulationScheduler(scheduling)])

    found, records = results[0]
    reference = big_batch_run(
        Regression(records[-1]["samples"] // EPOCHS, model=Tower), [windows_of(pieces, K) for K in scheduling.values()]
    )
    check(found, reference)


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("mode", ["window", "micro_batch"])
def test_token_weights_and_clipping(mode: str, max_norm: float | None) -> None:
    task = Sequences(33, masked=range(4))
    reference, losses = big_batch(task, in_order(33, 2 * N * 2), EPOCHS, max_norm)
    results = run(2, lambda: train(MODES[mode], Sequences(33, masked=range(4)), 2, gradient_clip_norm=max_norm))
    check(results[0][0], reference)
    for _, records in results:
        assert [r["loss"] for r in records] == pytest.approx(losses, rel=1e-9)
        assert max_norm is None or records[0]["grad_norm"] > max_norm


class Spoilt(Regression):
    """One sample's loss is not a number."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        return loss * float("nan") if 17 in batch[2].tolist() else loss


def test_an_update_that_is_not_finite_is_skipped_on_all_processes() -> None:
    results = run(2, lambda: train({}, Spoilt(45, model=Tower), 2))
    windows = [rows for rows in in_order(45, 16) if 17 not in rows]
    check(results[0][0], big_batch_run(Regression(45, model=Tower), [windows] * EPOCHS))
    assert all([r["skipped"] for r in records] == [0, 1, 1, 1, 2, 2] for _, records in results)


UNITS = 4


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_collectives_of_a_window(mode: str, K: int) -> None:
    """The last unit's backward finds it gathered where nothing came after it; the root keeps its parameters."""
    samples = 2 * (2 * N * K) + 1  # in the last window one process alone has a sample

    @on_processes(2)
    def by_rank() -> Any:
        watch = Count()
        train({**MODES[mode], "shard_size": None}, Regression(samples, model=Tower), K, callbacks=[watch])
        return watch.counts

    for counts in by_rank:
        passes = [K, K, 1] * EPOCHS
        assert [update["_reduce_scatter_base_"] for update in counts] == [
            UNITS * (p if mode == "micro_batch" else 1) for p in passes
        ]
        gathers = {"kept": [UNITS] * len(passes), "freed": [(2 * UNITS) * p for p in passes]}
        default = [(2 * UNITS - 1) * p for p in passes]
        assert [update["_allgather_base_"] for update in counts] == gathers.get(mode, default)
        assert {update["allgather_"] for update in counts} == {1}  # the message
        assert {update["allreduce_"] for update in counts} == {2 if mode == "freed" else 1}  # norm, and used parameters


def test_a_loop_of_one_s_own() -> None:
    samples, K = 2 * 3 * N * 2 + 1, 2
    reference = big_batch_run(
        Regression(samples, model=Tower), [in_order(samples, 3 * N * K), in_order(samples, 3 * N * (K + 1))]
    )

    @on_processes(3)
    def results() -> Any:
        task = Regression(samples, model=Tower)
        strategy = FSDPStrategy()
        strategy.setup()
        torch.manual_seed(0)
        model = strategy.prepare(task.configure_model())
        accumulator = Accumulator(
            strategy, model, task.configure_optimizer(model), task.train_data(), N, {0: K, 1: K + 1}, shuffle=False
        )
        for epoch in range(2):
            for window in accumulator.windows(epoch):
                for batch in window:
                    window.backward(task.loss(model, batch))
                window.update()
        return whole(strategy)

    check(results[0], reference)


# Going on


class Dies(FSDPStrategy):
    """One process is killed after the backward of its n-th window."""

    def __init__(self, kill: tuple[int, int] | None = None, **options: Any) -> None:
        super().__init__(timeout_seconds=20, **options)
        self._kill, self._windows = kill, 0

    def clip(self, max_norm: float | None, factor: float = 1.0) -> Tensor:
        self._windows += 1
        if self._kill == (self.rank, self._windows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().clip(max_norm, factor)


def fit(folder: str, strategy: Any, task: Any = None, stops_at: int | None = None) -> Any:
    states: list[Any] = []
    keeps = Callback()
    keeps.on_fit_end = lambda trainer: states.append(strategy.state_dict(trainer.optimizer))  # type: ignore[method-assign]
    trainer = Trainer(
        strategy,
        micro_batch_size=2,
        max_epochs=3,
        gradient_clip_norm=0.5,
        save_every_n_updates=2,
        validate_every_n_updates=3,
        callbacks=[GradientAccumulationScheduler(SCHEDULING), Witness(folder, stops_at), keeps],
        run_dir=folder,
    )
    trainer.fit(task or Full())
    return trainer.interrupted_by, trainer.update, states if strategy.rank == 0 else []


def fit_sharded(folder: str, options: dict[str, Any], kill: Any = None, stops_at: int | None = None) -> Any:
    return fit(folder, Dies(kill, **options), stops_at=stops_at)


@pytest.mark.parametrize(
    ("P", "options"),
    [(2, {}), pytest.param(3, {"reduce": "micro_batch"}, marks=SLOW), pytest.param(4, {"shard_size": 2}, marks=SLOW)],
    ids=["2", "3", "2x2"],
)
def test_killed_and_continued_is_uninterrupted_to_the_bit(P: int, options: Any, tmp_path: Path) -> None:
    folders = [tmp_path / name / "run" for name in ("whole", "parts")]
    for folder in folders:
        folder.parent.mkdir()
    reference = run(P, fit_sharded, str(folders[0]), options)
    with pytest.raises(ChildError) as raised:
        run(P, fit_sharded, str(folders[1]), options, (P - 1, 4))
    assert raised.value.errors[P - 1] == "died with exit code -9"
    run(P, fit_sharded, str(folders[1]), options, None, 5)
    found = run(P, fit_sharded, str(folders[1]), options)
    assert [signal_ for signal_, *_ in found] == [""] * P
    assert same(found, reference)
    assert history(folders[0]) == history(folders[1])
    check_samples(folders[1], P)


class Twice(nn.Module):
    """Has one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5).double(), nn.Linear(5, 1).double()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.second(torch.tanh(self.first(x))))
        return found


def fit_twice(folder: str, max_updates: int) -> None:
    Trainer("fsdp", 2, max_updates=max_updates, run_dir=folder).fit(Regression(16, model=Twice))


def test_a_layer_under_two_names_is_resumed(tmp_path: Path) -> None:
    for name, updates in (("whole", 4), ("parts", 2), ("parts", 4)):
        run(2, fit_twice, str(tmp_path / name), updates)
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def fit_plain(folder: str, name: str, stops_at: int | None) -> Any:
    options = {"shard_size": 2} if name == "hybrid" else {}
    strategy = FSDPStrategy(**options) if name in ("fsdp", "hybrid") else resolve(name)  # type: ignore[arg-type]
    return fit(folder, strategy, Full(normalises=False, adaptive=False), stops_at)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(("fsdp", 4), ("fsdp", 2), marks=SLOW),
        (("fsdp", 2), ("fsdp", 1)),
        (("fsdp", 3), ("ddp", 2)),
        (("ddp", 2), ("fsdp", 3)),
        pytest.param(("hybrid", 4), ("fsdp", 3), marks=SLOW),
        pytest.param(("fsdp", 2), ("single", 0), marks=SLOW),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_processes_and_strategies(before: Any, after: Any, tmp_path: Path) -> None:
    folders = [str(tmp_path / name / "run") for name in ("whole", "parts")]
    for folder in folders:
        Path(folder).parent.mkdir()
    (name, P), (new_name, new_P) = before, after
    reference = run(P, fit_plain, folders[0], name, None)[0]
    stopped = run(P, fit_plain, folders[1], name, 5)
    assert [(signal_, update) for signal_, update, _ in stopped][-1] == ("SIGTERM", 5)
    found = run(max(new_P, 1), fit_plain, folders[1], new_name, None, group=new_P > 0)[0]
    (one,), (other,) = found[2], reference[2]
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=1e-12)
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=1e-12)
    check_samples(Path(folders[1]), max(P, new_P))


# What is uneven, or cannot be


class Stops(Full):
    """Its process is told to stop in its first loss, or before it has one."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        if self.first and dist.get_rank() in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch)

    first, ranks = True, (0,)


def stop_early(folder: str, when: str) -> Any:
    task = Stops()
    if when != "in the first":
        task.first = False
        task.ranks = (0, 1) if when == "all before" else (1,)
        stops = Callback()
        stops.on_epoch_start = lambda trainer: (  # type: ignore[assignment,method-assign]
            os.kill(os.getpid(), signal.SIGTERM) if dist.get_rank() in task.ranks else None
        )
        trainer = Trainer(
            FSDPStrategy(timeout_seconds=20),
            2,
            accumulate_grad_batches=3,
            max_epochs=3,
            run_dir=folder,
            callbacks=stops,
        )
    else:
        trainer = Trainer(FSDPStrategy(timeout_seconds=20), 2, accumulate_grad_batches=3, max_epochs=3, run_dir=folder)
    trainer.fit(task)
    return trainer.interrupted_by, trainer.update


@pytest.mark.parametrize("when", ["in the first", "all before", "one before"])
def test_an_interruption_before_anything_is_known(when: str, tmp_path: Path) -> None:
    results = run(2, stop_early, str(tmp_path / "run"), when)
    assert {update for _, update in results} == {0}
    assert "SIGTERM" in [signal_ for signal_, _ in results]


class Fails(nn.Linear):
    """Fails in the forward of a unit, on some processes, the n-th time."""

    def __init__(self, ranks: tuple[int, ...], time: int) -> None:
        super().__init__(7, 7, dtype=torch.float64)
        self.ranks, self.time = ranks, time

    def forward(self, x: Tensor) -> Tensor:
        self.time -= 1
        if not self.time and dist.get_rank() in self.ranks:
            raise KeyError("boom")
        return super().forward(x)


@pytest.mark.parametrize("time", [1, 4], ids=["first", "later"])
@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=str)
def test_a_forward_that_fails_is_told_to_all(ranks: tuple[int, ...], time: int) -> None:
    def fail() -> Any:
        def model() -> nn.Module:
            tower = Tower()
            tower.blocks[1] = Fails(ranks, time)
            return tower

        train({}, Regression(45, model=model), 3)

    with pytest.raises(ChildError) as raised:
        run(2, fail, seconds=15)
    assert raised.value.errors[1] == "KeyError: 'boom'"
    if ranks == (1,):
        assert "process 1 failed in update" in raised.value.errors[0]


class Conditional(nn.Module):
    """Calls a unit, or uses a parameter, only for some inputs."""

    def __init__(self, units: bool) -> None:
        super().__init__()
        self.left, self.right, self.never = (nn.Linear(5, 1).double() for _ in range(3))
        self.layers = nn.ModuleList([self.right] if units else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x[0, 0] > 0 else self.right(x)


def train_conditional(units: bool, find_unused: bool) -> Any:
    task = Regression(23, model=lambda: Conditional(units))
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[method-assign]
    options = {"find_unused_parameters": find_unused}
    return train(options, task, 2)


def test_parameters_that_are_not_always_used() -> None:
    task = Regression(23, model=lambda: Conditional(False))
    task.configure_optimizer = lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)  # type: ignore[method-assign]
    single = train({}, task, 4, resolve("single"))[0]
    found = run(2, train_conditional, False, True)[0][0]
    torch.testing.assert_close(found, single, rtol=0, atol=1e-9)
    with pytest.raises(ChildError, match=r"used these parameters: .*never.weight.*find_unused_parameters=True"):
        run(2, train_conditional, False, False)


def test_parameters_that_are_not_always_used_in_low_precision() -> None:
    single = train({}, Regression(23, model=lambda: Conditional(False)), 4, resolve("single"))[0]

    @on_processes(2)
    def results() -> Any:
        task = Regression(23, model=lambda: Conditional(False).float())
        task.x, task.y = task.x.float(), task.y.float()
        return train({"find_unused_parameters": True, "param_dtype": "bfloat16"}, task, 2)[0]

    torch.testing.assert_close(results[0].double(), single, rtol=0, atol=0.02)


def test_units_that_are_not_always_called_are_an_error() -> None:
    with pytest.raises(ChildError) as raised:
        run(2, train_conditional, True, True, seconds=15)
    assert len(raised.value.errors) == 2
    assert any("where another one made" in error for error in raised.value.errors.values())


class Norms(Full):
    """Seven samples to validate on: processes have different numbers of micro-batches."""


def validate(strategy: str) -> Any:
    task = Norms(adaptive=False)
    means: list[Any] = []
    keeps = Callback()
    keeps.on_validation_end = lambda trainer: means.append(dict(trainer.metrics))  # type: ignore[method-assign]
    Trainer(strategy, 2, accumulate_grad_batches=2, max_epochs=3, callbacks=keeps, validate_every_n_updates=2).fit(task)
    return means


def test_uneven_validation_between_updates() -> None:
    for found, reference in zip(run(3, validate, "fsdp"), run(3, validate, "ddp"), strict=True):
        assert len(found) == 3
        assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in reference], rel=1e-12)


def train_as(kind: str) -> Any:
    task = Regression(45, model=lambda: torch.compile(Tower(), backend="eager"))
    if kind == "bfloat16":
        task.model = lambda: Tower().float()
        task.x, task.y = task.x.float(), task.y.float()
        return train({"param_dtype": "bfloat16"}, task, 2)
    return train({}, task, 2)


def test_a_compiled_model() -> None:
    check(run(2, train_as, "compiled")[0][0], expected(45, 2 * N * 2))


def test_low_precision_keeps_the_parameters_and_the_reduction_in_float32() -> None:
    found = run(2, train_as, "bfloat16")[0][0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(45, 2 * N * 2), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "options", [{"reduce": "never"}, {"shard_size": 0}, {"param_dtype": "int8"}, {"reshard_after_forward": 2}], ids=str
)
def test_options_that_cannot_be_are_refused_at_once(options: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: expected"):
        FSDPStrategy(**options)


class Tied(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].weight = self.blocks[1][0].weight


def _mixed(tower: Tower) -> Tower:
    tower.last.bias = nn.Parameter(tower.last.bias.float())
    return tower


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shard_size", "shard_size=3: expected a divisor of the 2 processes"),
        ("wrap", "expected classes of submodules (Linear, ModuleList, Sequential, Tanh); Block is not one"),
        ("tied", "is shared between units of FSDP"),
        ("dtypes", "trainable parameters of dtypes torch.float32, torch.float64"),
    ],
)
def test_models_and_groups_that_cannot_be_are_refused(what: str, message: str) -> None:
    def refuse() -> None:
        options: dict[str, Any] = {"shard_size": {"shard_size": 3}, "wrap": {"wrap": ["Block"]}}.get(what, {})

        def model() -> nn.Module:
            tower = Tied() if what == "tied" else Tower()
            return _mixed(tower) if what == "dtypes" else tower

        train(options, Regression(45, model=model))

    with pytest.raises(ChildError) as raised:
        run(2, refuse, seconds=20)
    assert all(message in error for error in raised.value.errors.values())


class Unsupported(Regression):
    """Needs what FSDP cannot do: an optimizer, or a gradient of a gradient."""

    def __init__(self, what: str) -> None:
        super().__init__(45, model=Tower)
        self.what = what

    def configure_optimizer(self, model: nn.Module) -> Any:
        return getattr(torch.optim, self.what, torch.optim.SGD)(model.parameters(), lr=0.01)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x = batch[0].requires_grad_(True)
        output = model(x)
        value = nn.functional.mse_loss(output, batch[1])
        if self.what != "penalty":
            return value
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return value + slope.square().mean()


def fit_unsupported(what: str, strategy: Any) -> int:
    trainer = Trainer(strategy, micro_batch_size=N, accumulate_grad_batches=2, max_epochs=1)
    try:
        trainer.fit(Unsupported(what))
    finally:
        assert trainer.update == 0 or strategy == "ddp"
    return trainer.update


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=str)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("penalty", "the loss has a gradient of a gradient (create_graph=True), which FSDP cannot compute"),
    ],
)
def test_what_fsdp_cannot_do_is_named_before_the_first_update(what: str, message: str, options: Any) -> None:
    with pytest.raises(ChildError) as raised:
        run(2, fit_unsupported, what, FSDPStrategy(**options), seconds=30)
    assert len(raised.value.errors) == 2
    assert all(message in error for error in raised.value.errors.values())
    assert min(run(2, fit_unsupported, what, "ddp")) > 0


def validate_after(own_group: bool) -> Any:
    task = Full(adaptive=False)
    trainer = Trainer("fsdp", 2, max_epochs=1)
    trainer.fit(task)
    return trainer.validate(task)


def test_validation_after_the_run_needs_the_run_s_processes() -> None:
    found = run(2, validate_after, False)
    assert found[0] == found[1]
    with pytest.raises(ChildError, match="on processes whose group has ended"):
        run(1, validate_after, True, group=False)
