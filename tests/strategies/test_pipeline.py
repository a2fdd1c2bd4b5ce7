"""A pipeline trains like one device: tables, tokens, clipping, skips, metrics, checkpoints, failures."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.pipelining  # here once, not in each process
from torch import Tensor, nn

from engine import Accumulator, Callback, GradientAccumulationScheduler, Loss, Trainer
from strategies import PipelineStrategy
from strategies.pipeline.parts import balanced
from strategies.torch_internals import IS_BEFORE_2_13
from tests.kit.killed import Full, same
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.recorders import Count
from tests.kit.reference import Regression, Samples, Watch, big_batch_run, in_order, mlp
from tests.kit.tokens import Sequences, big_batch

N, EPOCHS = 4, 3
LONG = (pytest.mark.slow, pytest.mark.campaign)


class Keeps(Callback):
    """Keeps the whole model at the end: one vector, and the state."""

    def on_fit_end(self, trainer: Any) -> None:
        self.state = trainer.strategy.state_dict(trainer.optimizer)
        self.parameters = torch.cat([value.double().flatten() for value in self.state["model"].values()])


def fit(task: Any, strategy: Any, K: int, samples_per_micro_batch: int = N, **options: Any) -> Any:
    watch, keeps = Watch(), Keeps()
    settings = {"max_epochs": EPOCHS, "shuffle": False, **options, "callbacks": [watch, keeps]}
    trainer = Trainer(strategy, samples_per_micro_batch, K, **settings)
    trainer.fit(task)
    return keeps, watch.records, trainer


def close(found: Any, expected: Any) -> None:
    """Compare two states, parameters and the optimizer's, at 1e-12."""
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for part, values in (("model", expected["model"]), ("state", expected["optimizer"]["state"])):
        torch.testing.assert_close(found["optimizer"].get(part, found["model"]), values, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("P", "stages", "schedule", "K"),
    [
        (1, 2, "GPipe", 1),
        (1, 2, "1F1B", 4),
        (1, 3, "1F1B", 3),
        *(
            pytest.param(P, 2, schedule, K, marks=LONG if P == 1 or K != 4 else pytest.mark.slow)
            for P in (1, 2)
            for schedule, Ks in (("GPipe", (1, 2, 4)), ("1F1B", (2, 4, 5)))
            for K in Ks
        ),
    ],
)
def test_a_pipeline_equals_one_big_batch(P: int, stages: int, schedule: str, K: int) -> None:
    window = P * N * K
    counts = [3 * window, 2 * window + window // 2 + 1, 2 * window + 1]  # divides; short and ragged; one sample

    @on_processes(P * stages)  # each number of samples in turn, in the same processes
    def by_rank() -> Any:
        results = []
        for samples in counts:
            keeps, records, _ = fit(Regression(samples), PipelineStrategy(stages, schedule, K), K)
            results.append((keeps.parameters, [r["effective_batch"] for r in records], records[-1]["samples"]))
        return results

    for process in by_rank:
        for samples, (found, batches, total) in zip(counts, process, strict=True):
            reference = big_batch_run(Regression(samples), [in_order(samples, window)] * EPOCHS)
            torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
            assert batches == [len(w) for w in in_order(samples, window)] * EPOCHS
            assert total == EPOCHS * samples


def fit_tokens(task: Sequences, K: int, max_norm: float) -> Any:
    keeps, records, _ = fit(task, PipelineStrategy(micro_batches=K), K, 3, gradient_clip_norm=max_norm)
    return keeps.parameters, records


@pytest.mark.parametrize("P", [1, 2])
def test_tokens_weigh_alike_and_clipping_sees_all_stages(P: int) -> None:
    task = Sequences(43, masked=range(12, 25))
    reference, losses = big_batch(task, windows := in_order(43, P * 3 * 2), 3, max_norm=0.2)
    for found, records in run(2 * P, fit_tokens, task, 2, 0.2):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        assert [r["weight"] for r in records[: len(windows)]] == [task.valid[list(w)].sum() for w in windows]
        torch.testing.assert_close([r["loss"] for r in records], losses, rtol=1e-12, atol=0, equal_nan=True)
        assert max(r["grad_norm"] for r in records) > 0.2  # it did clip


class Lengths(Sequences):
    """Sequences that are cut to the longest of their micro-batch: the shape changes within a window."""

    def collate(self, samples: Any) -> Any:
        tokens, valid = map(torch.stack, zip(*samples, strict=True))
        end = max(2, int(valid.sum(1).max()) + 1)
        return tokens[:, :end], valid[:, : end - 1]

    def train_data(self) -> Any:
        return Samples2(self.tokens, self.valid)


class Samples2(torch.utils.data.Dataset[Any]):
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(tensor[index] for tensor in self.tensors)


def test_shapes_may_change_within_a_window() -> None:
    task = Lengths(43)
    reference, losses = big_batch(task, in_order(43, 12), 3, None)
    for found, records in run(2, fit_tokens, task, 4, 1e9):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        torch.testing.assert_close([r["loss"] for r in records], losses, rtol=1e-12, atol=0)


def fit_cast(strategy: Any, precision: str | None) -> Any:
    task = Regression(20, model=lambda: mlp().float())
    task.x, task.y = task.x.float(), task.y.float()
    keeps, records, _ = fit(task, strategy, 2, precision=precision)
    return keeps.parameters, [r["loss"] for r in records]


def test_autocast_holds_on_all_stages() -> None:
    cast, losses = fit_cast("single", "bf16")
    whole, _ = fit_cast("single", None)
    assert (cast - whole).abs().max() > 1e-4
    for found, found_losses in run(2, fit_cast, PipelineStrategy(micro_batches=2), "bf16"):
        torch.testing.assert_close(found, cast, rtol=0, atol=1e-6)
        torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)


class Rounds(nn.Module):
    """Looks up which of four fifths of the line each number is in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bucketize(x, torch.tensor([-0.8, -0.3, 0.3, 0.8], dtype=x.dtype))


def whole_numbers() -> nn.Module:
    return nn.Sequential(Rounds(), nn.Embedding(5, 3), nn.Flatten(), nn.Linear(15, 1)).double()


def fit_whole_numbers(strategy: Any, K: int) -> Any:
    return fit(Regression(20, model=whole_numbers), strategy, K)[0].parameters


def test_stages_pass_on_whole_numbers_where_torch_can() -> None:
    strategy = PipelineStrategy(micro_batches=2, boundaries=[1])
    if IS_BEFORE_2_13:
        with pytest.raises(ChildError, match=r"part 0 of the pipeline returned torch.int64: expected floating-point"):
            run(2, fit_whole_numbers, strategy, 2, seconds=20)
    else:
        for found in run(2, fit_whole_numbers, strategy, 2):
            torch.testing.assert_close(found, fit_whole_numbers("single", 2), rtol=0, atol=1e-12)


def odd() -> nn.Module:
    """A frozen first stage, a layer that nothing uses, and BatchNorm."""
    layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), Unused(7), nn.Linear(7, 1)).double()
    layers[0].requires_grad_(False)
    return layers


class Unused(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.never = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Decays(Regression):
    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.01)


def fit_odd(samples: int, strategy: Any, K: int) -> Any:
    keeps, records, _ = fit(Decays(samples, model=odd), strategy, K)
    return keeps.state, records


def test_frozen_stages_unused_layers_and_batch_norm_are_as_on_one_device() -> None:
    samples = 2 * 3 * N + N + 2  # BatchNorm wants two
    expected, losses = fit_odd(samples, "single", 3)
    for strategy in (PipelineStrategy(boundaries=[2], micro_batches=3), PipelineStrategy(micro_batches=3)):
        for found, records in run(2, fit_odd, samples, strategy, 3):
            close(found, expected)
            torch.testing.assert_close([r["loss"] for r in records], [r["loss"] for r in losses], rtol=1e-9, atol=0)
            assert "3.never.weight" not in found["optimizer"]["state"]
    for found, _ in run(4, fit_odd, 2 * samples, PipelineStrategy(boundaries=[2], micro_batches=3), 3):
        assert "3.never.weight" not in found["optimizer"]["state"]


class Spikes(Regression):
    """One sample's target is not finite."""

    def __init__(self, samples: int, at: int) -> None:
        super().__init__(samples)
        self.y[at] = math.inf


@pytest.mark.parametrize("P", [1, 2])
def test_an_update_that_is_not_finite_is_skipped_by_all(P: int) -> None:
    samples = 3 * P * N * 2
    windows = in_order(samples, P * N * 2)
    reference = big_batch_run(Regression(samples), [[windows[0], windows[2]]])

    @on_processes(2 * P)
    def results() -> Any:
        keeps, records, _ = fit(Spikes(samples, windows[1][-1]), PipelineStrategy(micro_batches=2), 2, max_epochs=1)
        return keeps.parameters, [r["skipped"] for r in records]

    for found, skipped in results:
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        assert skipped == [0, 1, 1]


class Validated(Regression):
    """Two metrics from one call of the model, on a number of samples that does not divide."""

    def validation_data(self) -> Any:
        return Samples(self.x[:7], self.y[:7])

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        x, y, _ = batch
        errors = (model(x) - y)[:, 0]
        return {"loss": (errors**2).mean(), "bias": Loss(errors.sum(), len(x))}


@pytest.mark.parametrize("P", [1, 2])
def test_validation_goes_through_the_pipeline(P: int) -> None:
    task = Validated(20)
    untrained = Trainer("single", max_epochs=1).validate(task)

    @on_processes(2 * P)
    def results() -> Any:
        keeps, _, trainer = fit(task, PipelineStrategy(2, "1F1B", 2), 2)
        return (
            keeps.state["model"],
            trainer.metrics,
            trainer.validate(task),
            Trainer(PipelineStrategy(), accumulate_grad_batches=4, max_epochs=1).validate(task),
        )

    for state, metrics, again, fresh in results:
        model = mlp()
        model.load_state_dict(state)
        errors = (model(task.x[:7]) - task.y[:7]).detach()
        expected = {"loss": (errors**2).mean().item(), "bias": errors.mean().item()}
        for found, right in ((metrics, expected), (again, expected), (fresh, untrained)):
            assert found == pytest.approx(right, rel=1e-12)


# What crosses between processes


def count(K: int) -> Any:
    counts = Count()
    trainer = Trainer(PipelineStrategy(micro_batches=K), N, K, max_epochs=1, callbacks=counts)
    trainer.fit(Regression(2 * N * K * 4))
    return counts.counts[1:], counts.reductions  # the first window finds the shapes


def test_one_reduction_per_bucket_and_window_and_messages_do_not_grow_with_k() -> None:
    few, many = run(4, count, 2), run(4, count, 8)
    for (before, reductions), (after, _) in zip(few, many, strict=True):
        for update in (*before, *after):
            assert update["allreduce_"] == reductions[0] + 1  # and the norm over the stages
            gathers = sum(times for name, times in update.items() if "allgather" in name)
            assert gathers == 3  # what comes in this window (two), and the message of the update
        assert before[0].keys() == after[0].keys()


# Refusals, before anything starts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "ZigZag"}, "expected one of GPipe, 1F1B"),
        ({"stages": 1}, "stages=1"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"micro_batches": 1}, "expected at least 2 for 1F1B over 2 stages"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineStrategy(**options)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (
            {"accumulate_grad_batches": 2},
            "'pipeline' was built for windows of 4 .* have 2. Use accumulate_grad_batches=4",
        ),
        ({"effective_batch_size": 9 * N}, "those of this run have 9"),
        ({"callbacks": GradientAccumulationScheduler({0: 8, 4: 4})}, r"'pipeline'.*\{0: 8, 4: 4\} changes K"),
        ({"callbacks": GradientAccumulationScheduler({0: 8})}, "those of this run have 8"),
    ],
)
def test_another_k_is_refused_before_anything_starts(windows: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(PipelineStrategy(micro_batches=4), N, max_epochs=1, **windows)


def test_the_right_k_may_be_said_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    strategy = PipelineStrategy(micro_batches=4)
    assert strategy.effective_batch(N, 4) == 3 * N * 4
    Trainer(strategy, N, max_epochs=1, effective_batch_size=3 * N * 4)
    Trainer(strategy, N, max_epochs=1, callbacks=GradientAccumulationScheduler({0: 4, 2: 4}))


def test_processes_that_do_not_divide_are_refused() -> None:
    trainer = Trainer(PipelineStrategy(), accumulate_grad_batches=4, max_epochs=1)
    with pytest.raises(ValueError, match="expected a multiple of 2 processes, but 1 were started"):
        trainer.fit(Regression(64))


class Streams(Regression):
    def train_data(self) -> Any:
        return torch.utils.data.DataLoader(super().train_data(), batch_size=N)


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self[2].weight = self[0].weight


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 1)).double()
    model.register_forward_hook(lambda module, arguments, output: 3 * output)
    return model


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


class Real(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.real)


def complex_inside() -> nn.Module:
    return nn.Sequential(Spectrum(), Real(5, 1)).double()


def fit_refused(task: Any, strategy: Any) -> None:
    Trainer(strategy, N, 4, max_epochs=1).fit(task)


@pytest.mark.parametrize(
    ("task", "boundaries", "message"),
    [
        (Streams(64), None, "Return a map-style dataset"),
        (Regression(64, model=lambda: nn.Linear(5, 1)), None, "model=Linear: expected a plain nn.Sequential"),
        (Regression(64, model=lambda: nn.Sequential(nn.Linear(5, 1))), None, "stages=2: expected at most"),
        (Regression(64, model=Tied), None, "2.weight is also in another part"),
        (Regression(64, model=hooked), None, "model=Sequential: expected a plain nn.Sequential, without hooks"),
        (Regression(64, model=complex_inside), [1], "part 0 of the pipeline returned torch.complex128: expected real"),
        (Regression(64), [5], "ascending numbers from 1 to 4"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused_on_all_processes(task: Any, boundaries: Any, message: str) -> None:
    with pytest.raises(ChildError, match=message) as raised:
        run(2, fit_refused, task, PipelineStrategy(boundaries=boundaries), seconds=20)
    assert len(raised.value.errors) == 2
    assert all("UserError" in text or "ValueError" in text for text in raised.value.errors.values())


def test_a_loop_of_one_s_own_is_refused() -> None:
    def own_loop() -> None:
        strategy, task = PipelineStrategy(), Regression(64)
        strategy.setup()
        model = strategy.prepare(mlp())
        Accumulator(strategy, model, task.configure_optimizer(model), task.train_data(), N, 4)

    with pytest.raises(ChildError, match="runs whole windows"):
        run(2, own_loop, seconds=20)


def test_parts_are_balanced() -> None:
    assert balanced([5, 1, 1, 1, 5], 2) in ([2], [3])
    assert balanced([1, 1, 1, 9], 2) == [3]
    assert balanced([9, 1, 1, 1], 3) == [1, 2]
    assert balanced([7, 0, 7, 0, 0, 7], 3) == [2, 5]  # no part begins with a layer without parameters
    assert balanced([7, 0], 2) == [1]
    with pytest.raises(ValueError, match="expected at most as many stages as layers"):
        balanced([1], 2)


# Failures: all processes end, and hear what it was


class Fails(nn.Module):
    """Raises on its n-th call, in forward or in backward."""

    def __init__(self, where: str, at: int) -> None:
        super().__init__()
        self.where, self.at = where, at

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.at -= 1
            if self.at == 0 and self.where == "forward":
                raise LookupError("a layer is gone")
            if self.at == 0 and self.where == "backward":
                x.register_hook(self.fail)
        return x

    def fail(self, gradient: Tensor) -> None:
        raise LookupError("a layer is gone")


class Failing(Regression):
    def __init__(self, where: str, stage: int) -> None:
        super().__init__(64)
        self.where, self.stage = where, stage

    def configure_model(self) -> nn.Module:
        layers = [nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh()]
        layers[2 * self.stage + 1] = Fails(self.where, 6)
        return nn.Sequential(*layers).double()

    def train_data(self) -> Any:
        return self if self.where == "data" else super().train_data()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == 21 and torch.distributed.get_rank() == self.stage:
            raise LookupError("a layer is gone")
        return self.x[index], self.y[index], index

    def loss(self, model: nn.Module, batch: Any) -> Any:
        x, y, index = batch
        if self.where == "before the model" and 21 in index and torch.distributed.get_rank() == self.stage:
            raise LookupError("a layer is gone")
        loss = nn.functional.mse_loss(model(x), y)
        if self.where == "after the model" and 21 in index:
            raise LookupError("a layer is gone")
        return loss


def fit_failing(where: str, stage: int, stages: int) -> None:
    strategy = PipelineStrategy(stages, micro_batches=4, boundaries=[2, 4][: stages - 1])
    Trainer(strategy, N, 4, max_epochs=1, shuffle=False).fit(Failing(where, stage))


@pytest.mark.parametrize(
    ("where", "stage", "processes"),
    [
        ("forward", 0, 3),
        ("forward", 1, 3),
        ("forward", 2, 3),
        ("data", 1, 3),
        ("before the model", 0, 3),
        ("after the model", 2, 3),
        pytest.param("forward", 1, 4, marks=pytest.mark.slow),
        pytest.param("data", 2, 4, marks=pytest.mark.slow),
        pytest.param("after the model", 1, 4, marks=pytest.mark.slow),
    ],
)
def test_an_error_on_one_stage_is_heard_on_all(where: str, stage: int, processes: int) -> None:
    with pytest.raises(ChildError) as raised:
        run(processes, fit_failing, where, stage, 3 if processes == 3 else 2, seconds=25, timeout=20)
    errors = raised.value.errors
    assert len(errors) == processes
    assert all("a layer is gone" in text for text in errors.values()), errors
    assert (
        sum("ProcessFailureError" in text and " failed in update " in text for text in errors.values()) >= processes - 2
    )


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_error_in_backward_ends_all(stage: int) -> None:
    with pytest.raises(ChildError) as raised:
        run(3, fit_failing, "backward", stage, 3, seconds=25, timeout=20)
    errors = raised.value.errors
    assert errors[stage] == "LookupError: a layer is gone"
    assert all("lost contact with another process" in text for rank, text in errors.items() if rank != stage), errors
    assert str(raised.value).count(f"process {stage} failed: LookupError: a layer is gone") == 2


class Calls(Regression):
    def __init__(self, times: int) -> None:
        super().__init__(64)
        self.times = times

    def loss(self, model: nn.Module, batch: Any) -> Any:
        outputs = [model(batch[0]) for _ in range(self.times)]
        return sum(outputs, self.x.new_zeros((), requires_grad=True)).mean()


@pytest.mark.parametrize(("times", "message"), [(0, "call that one"), (2, "called once for each micro-batch")])
def test_the_model_is_called_once(times: int, message: str) -> None:
    with pytest.raises(ChildError, match=message) as raised:
        run(2, fit_refused, Calls(times), PipelineStrategy(), seconds=20)
    assert len(raised.value.errors) == 2


# Checkpoints and signals


class Stops(Callback):
    """Has one process told to stop: after an update, in a window, or in a validation."""

    def __init__(self, at: int | None, rank: int) -> None:
        self.at, self.rank = at, rank

    def on_update_end(self, trainer: Any) -> None:
        if trainer.update == self.at and trainer.strategy.rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def fit_full(folder: str, strategy: Any, stops: Stops, adaptive: bool, dropout: bool) -> Any:
    keeps, task = Keeps(), Full(normalises=adaptive, adaptive=adaptive)
    if not dropout:
        make = task.configure_model
        task.configure_model = lambda: nn.Sequential(*(m for m in make() if not isinstance(m, nn.Dropout)))  # type: ignore[method-assign]
    options = {"gradient_clip_norm": 0.5, "save_every_n_updates": 2, "validate_every_n_updates": 3}
    trainer = Trainer(strategy, 2, 2, max_epochs=2, callbacks=[keeps, stops], run_dir=folder, **options)
    trainer.fit(task)
    return trainer.interrupted_by, trainer.update, getattr(keeps, "state", None), trainer.metrics


@pytest.mark.parametrize(("P", "schedule", "rank"), [(1, "GPipe", 1), (2, "1F1B", 2)])
def test_stopped_and_continued_is_uninterrupted_to_the_bit(tmp_path: Path, P: int, schedule: Any, rank: int) -> None:
    strategy = PipelineStrategy(2, schedule, 2)
    whole = run(2 * P, fit_full, str(tmp_path / "whole"), strategy, Stops(None, 0), True, True)
    folder = str(tmp_path / "parts")
    for at in (2, 5):
        stopped = run(2 * P, fit_full, folder, strategy, Stops(at, rank), True, True)
        assert {(bool(reason), update) for reason, update, *_ in stopped} == {(True, at)}
    assert same(run(2 * P, fit_full, folder, strategy, Stops(None, 0), True, True), whole)


def test_a_run_goes_on_from_one_device_to_a_pipeline_and_back(tmp_path: Path) -> None:
    pipeline = PipelineStrategy(2, "1F1B", 2)
    folders = [str(tmp_path / "whole"), str(tmp_path / "parts")]
    expected = run(1, fit_full, folders[0], "single", Stops(None, 0), False, False, group=False)[0]
    run(1, fit_full, folders[1], "single", Stops(3, 0), False, False, group=False)
    stopped = run(2, fit_full, folders[1], pipeline, Stops(7, 1), False, False)
    assert {update for _, update, *_ in stopped} == {7}
    found = run(1, fit_full, folders[1], "single", Stops(None, 0), False, False, group=False)[0]
    close(found[2], expected[2])
    assert found[3] == pytest.approx(expected[3], rel=1e-12)


class Told(Full):
    """Is told to stop in a validation or in a window, on one process."""

    def __init__(self, where: str, rank: int) -> None:
        super().__init__(normalises=False)
        self.where, self.rank = where, rank

    def tell(self, where: str) -> None:
        if where == self.where and torch.distributed.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        self.tell("window")
        return super().loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Any) -> Any:
        self.tell("validation")
        return super().evaluate(model, batch)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("where", "update"), [("window", {0, 1}), ("validation", {2})])
def test_a_signal_to_one_stage_stops_all_at_one_boundary(tmp_path: Path, where: str, update: Any, rank: int) -> None:
    @on_processes(2, seconds=20, timeout=15)
    def results() -> Any:
        options = {"validate_every_n_updates": 2, "run_dir": str(tmp_path / "run")}
        trainer = Trainer(PipelineStrategy(micro_batches=2), 2, 2, max_epochs=2, **options)
        trainer.fit(Told(where, rank))
        return bool(trainer.interrupted_by), trainer.update

    assert len(set(results)) == 1
    assert results[0][0]
    assert results[0][1] in update


class Adagrad(Regression):
    """Its optimizer has state from the start, for each parameter that it is given."""

    def configure_optimizer(self, model: nn.Module) -> Any:
        return torch.optim.Adagrad(model.parameters(), lr=0.05)


def test_an_optimizer_with_state_from_the_start_is_saved_and_resumed(tmp_path: Path) -> None:
    def part(folder: str, updates: int) -> Any:
        return fit(Adagrad(31), PipelineStrategy(2, "1F1B", 2), 2, run_dir=folder, max_updates=updates)[0].state

    expected = fit(Adagrad(31), "single", 2, max_updates=9)[0].state
    run(2, part, str(tmp_path), 5)
    close(run(2, part, str(tmp_path), 9)[0], expected)
