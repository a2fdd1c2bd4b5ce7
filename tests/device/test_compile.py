"""`compile_model=True`: the same updates and names, and no recompile when K changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import GradientAccumulationScheduler, Trainer
from tests.kit.processes import run
from tests.kit.reference import Regression, big_batch_run, in_order, parameters

SAMPLES, N = 24, 2


def fit(strategy: str, schedules: list[list[int]]) -> Any:
    """Return, for each schedule: the parameters, the names they are saved under, how many frames and graphs there were.

    They are compiled by all of torch.compile but its code generator, which takes long.
    """
    torch.compiler.set_default_backend("aot_eager")
    results = []
    for Ks in schedules:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        scheduler = GradientAccumulationScheduler(dict(enumerate(Ks)))
        settings: Any = {"callbacks": scheduler, "max_epochs": len(Ks), "shuffle": False}
        trainer = Trainer(strategy, micro_batch_size=N, compile_model=True, **settings)
        trainer.fit(Regression(SAMPLES))
        counters, names = torch._dynamo.utils.counters, list(trainer.strategy.state_dict()["model"])
        compiled = counters["frames"]["ok"], counters["stats"]["unique_graphs"]
        results.append((parameters(trainer.model), names, compiled))
    return results


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="this torch has no default backend")
@pytest.mark.parametrize(("P", "strategy"), [(1, "single"), (2, "ddp")])
def test_nothing_is_compiled_anew_where_K_changes(P: int, strategy: str) -> None:
    Ks, task = [1, 4, 2, 3], Regression(SAMPLES)
    reference = big_batch_run(task, [in_order(SAMPLES, P * N * K) for K in Ks])
    # in the children only: a process that has compiled should not be forked
    for (_, _, expected), (found, names, compiled) in run(P, fit, strategy, [[2], Ks]):
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-12)
        assert names == list(task.model().state_dict())
        assert compiled == expected
        assert min(compiled) > 0


@pytest.mark.parametrize(
    ("strategy", "value", "message"),
    [
        ("dp", True, "'dp' calls copies or parts"),
        ("fsdp", True, "'fsdp'"),
        ("single", "inductor", "expected True or False"),
    ],
)
def test_what_cannot_be_compiled_is_refused(strategy: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(strategy, max_epochs=1, compile_model=value)
