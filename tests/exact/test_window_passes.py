"""Windows that run twice: streams, failures, interruptions and outputs that do not fit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import Accumulator, Trainer
from engine.callbacks import EMA
from engine.window_task import Added, Rows, Shared
from strategies import DDPStrategy, FSDPStrategy, Strategy
from tests.kit.processes import ChildError, on_processes, run
from tests.kit.recorders import Count
from tests.kit.reference import Regression, Watch
from tests.kit.windows import Clip, ShardedClip, fit, reference

BOTH = pytest.mark.parametrize("strategy", [DDPStrategy, partial(FSDPStrategy, wrap=["Sequential"])])


class Streamed(ShardedClip):
    """Ready micro-batches of the given sizes, dealt to the processes one after the other."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(3 * sum(lengths))
        self.lengths = lengths

    def train_data(self) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        rank = dist.get_rank()
        first = sum(self.lengths[:rank])
        for index in range(first, first + self.lengths[rank]):
            rows = slice(3 * index, 3 * index + 3)
            yield self.x[rows], self.y[rows]


@BOTH
@pytest.mark.parametrize("lengths", [[2, 1, 0], [0, 2, 2], [1, 0, 0], [0, 0, 3]])
def test_streams_of_any_length(strategy: Any, lengths: list[int]) -> None:
    task = Streamed(lengths)
    expected = reference(task, len(task.x))  # rows in another order: the loss is the same
    for found, losses, _ in run(3, fit, task, strategy, 4):
        assert (found - expected[0]).abs().max() <= 1e-12 * expected[0].abs().max()
        assert losses == pytest.approx(expected[1], rel=1e-12)


class Failing(ShardedClip):
    """Fails, or is interrupted, in a forward of one process."""

    def __init__(self, at: int, rank: int = 1, kind: str = "error") -> None:
        super().__init__(36, dropout=0.2)
        self.at, self.rank, self.kind, self.calls = at, rank, kind, 0

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        outputs = super().outputs(model, batch)
        self.calls += 1
        if self.calls == self.at and dist.get_rank() == self.rank:
            if self.kind == "error":
                raise KeyError("the label is missing")
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGTERM)
        return outputs

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return super().outputs(model, batch)["image"].tensor


@BOTH
@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])  # K = 3: the first pass is calls 1 to 3, the second 4 and 5
def test_a_failure_in_either_pass_reaches_all(strategy: Any, at: int) -> None:
    with pytest.raises(ChildError) as caught:
        run(2, fit, Failing(at), strategy, 3, seconds=40, timeout=20)
    assert "KeyError: 'the label is missing'" in caught.value.errors[1]
    assert "process 1 failed in update" in caught.value.errors[0]
    assert "the label is missing" in caught.value.errors[0]


@BOTH
@pytest.mark.parametrize("at", [2, 4, 10])
def test_an_interruption_in_either_pass_loses_nothing(strategy: Any, at: int, tmp_path: Path) -> None:
    whole = run(2, fit, Failing(0), strategy, 3)
    stopped = run(2, partial(fit, run_dir=str(tmp_path / "run")), Failing(at, kind="signal"), strategy, 3)
    resumed = run(2, partial(fit, run_dir=str(tmp_path / "run")), Failing(0), strategy, 3)
    assert stopped[0][1] + resumed[0][1] == whole[0][1]
    assert len(stopped[0][1]) == (at - 1) // 5
    assert torch.equal(resumed[0][0], whole[0][0])


def averaged(at: int, folder: str) -> Any:
    """Parameters, their average, and what the averaged model predicts; a process may be killed."""
    average = EMA(0.9)
    settings: dict[str, Any] = {"save_every_n_updates": 1, "keep_last_checkpoints": 9, "run_dir": folder}
    trainer = Trainer(DDPStrategy(), 3, 3, max_epochs=2, callbacks=average, **settings)
    trainer.fit(task := Failing(at, kind="kill"))
    rows = trainer.predict(task, torch.utils.data.TensorDataset(task.x[:7], task.y[:7]))
    return *(value.clone() for value in average.averages.values()), rows


@pytest.mark.parametrize("at", [2, 9])  # in the first update's first pass; in the second one's second
def test_a_kill_in_either_pass_leaves_the_run_that_was_not_killed(at: int, tmp_path: Path) -> None:
    whole = run(2, averaged, 0, str(tmp_path / "whole"))
    with pytest.raises(ChildError):
        run(2, averaged, at, str(tmp_path / "run"))
    for found, expected in zip(run(2, averaged, 0, str(tmp_path / "run")), whole, strict=True):
        assert all(map(torch.equal, found[:-1], expected[:-1]))
        assert str(found[-1]) == str(expected[-1])


class OnHost(ShardedClip):
    keeps_batches_on_host = True


@pytest.mark.parametrize("options", [{"prefetch_to_device": True}, {"num_workers": 1}])
def test_where_batches_wait_changes_nothing(options: dict[str, Any]) -> None:
    expected = run(2, fit, ShardedClip(36, dropout=0.2), DDPStrategy, 3)
    for kind in (ShardedClip, OnHost):
        for (found, losses, _), (plain, same, _) in zip(
            run(2, partial(fit, **options), kind(36, dropout=0.2), DDPStrategy, 3), expected, strict=True
        ):
            assert torch.equal(found, plain)
            assert losses == same


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=self.generator)


class Draws(Clip):
    def configure_model(self) -> nn.Module:
        model: Any = super().configure_model()
        model.image.append(OwnGenerator())
        return model


class DrawsFromHost(Clip):
    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return super().outputs(model, (batch[0] * (1 + random.random()), batch[1]))

    def window_loss(self, outputs: Any) -> Tensor:
        return super().window_loss(outputs) * (1 + torch.rand(())) * (1 + random.random())


def test_the_module_that_draws_outside_is_named() -> None:
    with pytest.raises(ChildError) as caught:
        run(2, fit, Draws(), DDPStrategy, 3)
    assert "module 'image.4' draws from a generator of its own" in "".join(caught.value.errors.values())
    fit(Draws(), "single", 1)  # nothing runs twice


def test_draws_of_the_host_and_of_the_loss_are_the_same_on_all() -> None:
    first, second = run(2, partial(fit, run_dir=None), DrawsFromHost(), DDPStrategy, 3)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


class Returns(Clip):
    def __init__(self, found: Any, ranks: tuple[int, ...] = (0, 1)) -> None:
        super().__init__(12)
        self.found, self.ranks = found, ranks

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        usual = super().outputs(model, batch)
        return self.found(usual) if dist.get_rank() in self.ranks else usual


@pytest.mark.parametrize(
    ("found", "ranks", "message"),
    [
        (lambda usual: None, (0, 1), "outputs() returned NoneType: expected a dict"),
        (lambda usual: {**usual, "image": usual["image"].tensor}, (0, 1), "'image'] is a Tensor: expected Rows"),
        (lambda usual: {**usual, "image": Rows(usual["image"].tensor[:1])}, (1,), "(1, 4): expected 3 rows"),
        (lambda usual: {n: type(o)(o.tensor.detach()) for n, o in usual.items()}, (1,), "no output requires grad"),
        (
            lambda usual: {n: o for n, o in usual.items() if n != "scale"},
            (1,),
            "outputs() differ between micro-batches",
        ),
        (lambda usual: {**usual, "text": Rows(usual["text"].tensor.float())}, (1,), "torch.float32"),
        (
            lambda usual: {**usual, "scale": Shared(usual["image"].tensor.sum())},
            (0, 1),
            "differs between micro-batches",
        ),
        (
            lambda usual: {**usual, "image": Added(usual["image"].tensor)},
            (1,),
            "outputs() differ between micro-batches",
        ),
        (lambda usual: {**usual, "image": Rows(usual["image"].tensor.to(torch.complex128))}, (1,), "is complex"),
    ],
)
def test_outputs_that_do_not_fit(found: Any, ranks: Any, message: str) -> None:
    with pytest.raises(ChildError) as caught:
        run(2, fit, Returns(found, ranks), DDPStrategy, 2, seconds=40, timeout=20)
    assert all(message in error for error in caught.value.errors.values()), caught.value
    assert len(caught.value.errors) == 2


def test_the_order_of_outputs_does_not_matter() -> None:
    found = run(2, fit, Returns(lambda usual: dict(reversed(usual.items())), (1,)), DDPStrategy, 2)
    expected = run(2, fit, Clip(12), DDPStrategy, 2)
    assert torch.equal(found[0][0], expected[0][0])


class LossOf(Clip):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.found = loss

    def window_loss(self, outputs: Any) -> Any:
        return self.found(outputs)


@pytest.mark.parametrize(
    "loss",
    [lambda o: 1.0, lambda o: o["image"], lambda o: o["image"].detach().sum()],
    ids=["float", "rows", "detached"],
)
def test_an_invalid_window_loss(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"window_loss\(\) returned .*: expected a 0-dim tensor"):
        fit(LossOf(loss), "single", 2)


class UsesParameter(Clip):
    """Uses a parameter of the model in the loss without returning it."""

    def __init__(self, uses_outputs: bool) -> None:
        super().__init__()
        self.uses_outputs = uses_outputs

    def configure_model(self) -> nn.Module:
        self.model: Any = super().configure_model()
        return self.model

    def window_loss(self, outputs: Any) -> Tensor:
        scale = self.model.logit_scale.exp()
        return super().window_loss({**outputs, "scale": scale}) if self.uses_outputs else scale.sum()


@pytest.mark.parametrize("uses_outputs", [True, False])
def test_a_loss_that_uses_a_parameter_by_itself_is_refused(uses_outputs: bool) -> None:
    with pytest.raises(ValueError, match="uses a parameter of the model by itself"):
        fit(UsesParameter(uses_outputs), "single", 3)


class LogsItsLoss(Clip):
    def window_loss(self, outputs: Any) -> Tensor:
        loss = super().window_loss(outputs)
        self.log("half", loss / 2)
        return loss


def test_the_bytes_of_the_outputs_are_recorded() -> None:
    row, scale = 2 * 4 * 8, 16  # two outputs of four float64; one number, aligned

    @on_processes(2)
    def results() -> Any:
        watch = Watch()
        Trainer("ddp", 3, 2, max_epochs=1, callbacks=watch).fit(Clip(24))
        return [record["window_bytes"] for record in watch.records]

    assert results == [[2 * 2 * (3 * row + scale)] * 2] * 2


@pytest.mark.parametrize("P", [1, 3])
def test_what_the_loss_of_a_window_logs_is_recorded(P: int) -> None:
    @on_processes(P)
    def results() -> Any:
        watch = Watch()
        Trainer("ddp", 3, 2, max_epochs=2, callbacks=watch).fit(LogsItsLoss(22))
        return [(record["half"], record["loss"] / 2) for record in watch.records]

    for found in results:
        assert all(half == pytest.approx(expected, rel=1e-12) for half, expected in found)


class GathersObjects(DDPStrategy):
    """Has `gather` only, as a strategy of one's own may."""

    gather_bytes = Strategy.gather_bytes


def test_a_strategy_that_gathers_objects_joins_outputs() -> None:
    expected = reference(Clip(), 2 * 2 * 3)
    for found, _, _ in run(2, fit, Clip(), GathersObjects, 2):
        assert (found - expected[0]).abs().max() <= 1e-12 * expected[0].abs().max()


def test_a_strategy_forgets_that_windows_ran_twice() -> None:
    @on_processes(2, seconds=40, timeout=20)
    def samples() -> Any:
        strategy, task = FSDPStrategy(), Regression(24)
        fit(ShardedClip(), lambda: strategy, 3)  # it runs windows twice; the loop below does not
        strategy.setup()
        model = strategy.prepare(task.model())
        own = Accumulator(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), task.train_data(), 3, 4)
        for window in own.windows(0):
            for batch in window:
                window.backward(task.loss(model, batch))
            window.update()
        return own.samples

    assert samples == [24, 24]


def test_a_loss_that_is_not_finite_skips_the_update() -> None:
    found, losses, buffers = fit(type("Nan", (Clip,), {"window_loss": _nan_first})(24, norm=True), "single", 3)
    assert len(losses) == 6
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(b).all() for b in buffers)


def _nan_first(task: Any, outputs: Any) -> Tensor:
    task.updates = getattr(task, "updates", 0) + 1
    return Clip.window_loss(task, outputs) * (float("nan") if task.updates == 1 else 1.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision: str) -> None:
    found, losses, _ = fit(Single(), "single", 3, precision=precision)
    expected, wanted, _ = fit(Single(), "single", 3)
    assert losses == pytest.approx(wanted, rel=0.02)
    assert (found - expected).abs().max() < 0.02


class Single(Clip):
    """In float32."""

    def configure_model(self) -> nn.Module:
        return super().configure_model().float()

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        return super().outputs(model, [part.float() for part in batch])


class Validated(Single):
    """Keeps the dtypes in which its loss computes."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def validation_data(self) -> Any:
        return self.train_data()

    def window_loss(self, outputs: Any) -> Tensor:
        self.dtypes |= {outputs["text"].dtype, (outputs["image"] @ outputs["text"].T).dtype}
        return super().window_loss(outputs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_loss_of_a_window_is_in_float32_in_validation_too(precision: str) -> None:
    task = Validated()
    fit(task, "single", 3, precision=precision)
    assert task.dtypes == {torch.float32}


@pytest.mark.parametrize("K", [1, 4])
def test_collectives_of_a_window(K: int) -> None:
    @on_processes(2)
    def by_rank() -> Any:
        watch = Count()
        trainer = Trainer("ddp", micro_batch_size=3, accumulate_grad_batches=K, max_epochs=2, callbacks=watch)
        trainer.fit(Clip(2 * 3 * K + 1))
        return watch.counts

    for counts, tree in zip(by_rank, ("recv_", "send"), strict=True):
        for update in counts:  # one reduction, the message and the outputs, and a gather of their shapes
            assert update == {"allreduce_": 1, "allgather_": 2, tree: 2, "broadcast_": 2}


def test_pipelines_refuse() -> None:
    from strategies import PipelineStrategy

    with pytest.raises(ChildError, match="does not support losses over a window"):
        run(2, fit, Clip(), partial(PipelineStrategy, stages=2, micro_batches=2), 2)
