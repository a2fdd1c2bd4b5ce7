"""Counts per update: one all-reduce per bucket, one message and a few host-device syncs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from engine import Loss, Trainer
from strategies import DDPStrategy
from tests.kit.processes import on_processes
from tests.kit.recorders import Count
from tests.kit.reference import Regression


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 1)).double()


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("bucket_cap_mb", [None, 0.1])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("P", [2, 3])
def test_one_all_reduce_per_bucket_and_one_message_per_update(
    P: int, K: int, bucket_cap_mb: float | None, find_unused: bool
) -> None:
    samples = 2 * (2 * P * K) + 1  # a last window in which one process alone has a sample

    @on_processes(P)
    def results() -> Any:
        watch = Count()
        strategy = DDPStrategy(bucket_cap_mb=bucket_cap_mb, find_unused_parameters=find_unused)
        trainer = Trainer(strategy, micro_batch_size=2, accumulate_grad_batches=K, max_epochs=2, callbacks=watch)
        trainer.fit(Regression(samples, model=wide))
        return watch.counts, watch.reductions

    for counts, (buckets, size) in results:
        parameters = sum(p.numel() for p in wide().parameters())
        assert size == 8 * (parameters + find_unused)  # and one of the wrapper's own
        assert (buckets > 1) == (bucket_cap_mb is not None)
        used = {"allreduce_": 1} if find_unused else {}  # DDP's map of used parameters
        for update in counts:
            assert update == {"allreduce_": buckets + used.get("allreduce_", 0), "allgather_": 1}, counts


class Weighted(Regression):
    """Its weights are on the device, as numbers of valid tokens are."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        return Loss(super().loss(model, batch) * len(batch[0]), batch[0].new_tensor(len(batch[0])))


@pytest.mark.parametrize("task_class", [Regression, Weighted])
def test_the_host_looks_at_the_device_as_often_whatever_K_is(task_class: type[Regression]) -> None:
    looks = []
    for K in (1, 8):
        watch = Count()
        trainer = Trainer(
            "single",
            micro_batch_size=2,
            accumulate_grad_batches=K,
            max_updates=6,
            gradient_clip_norm=1.0,
            callbacks=watch,
        )
        trainer.fit(task_class(128))
        looks.append(watch.looks[1:])  # the first starts a DataLoader
    assert looks[0] == looks[1]
    expected = 2 if task_class is Regression else 4  # the loss and the norm; the weight, and whether one was negative
    assert set(looks[0]) == {expected}
