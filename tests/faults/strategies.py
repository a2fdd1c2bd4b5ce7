"""Faults of the root of strategies."""

from tests.faults.fault import Fault
from tests.faults.selections import COUNTS, TWO_MODELS

FAULTS = [
    Fault(
        "restore values only",
        "Buffers.restore",
        "buffers.update(kept)",
        "pass",
        "tests/exact/test_skipped.py::test_a_skipped_update_changes_nothing",
    ),
    Fault(
        "copy into another shape",
        "Buffers.keep",
        "kinds == self._kinds",
        "self._kinds",
        "tests/exact/test_skipped.py::test_a_skipped_update_changes_nothing",
    ),
    Fault("let a strategy have two models", "Strategy._take_model", "if self._has_model", "if False", TWO_MODELS),
    Fault(
        "clip each micro-batch",
        "Strategy.run_window",
        "                self.backward(loss, scale)\n",
        "                self.backward(loss, scale)\n                self.clip(0.05)\n",
        "tests/exact/test_table.py::test_clipping_acts_on_the_whole_gradient_of_an_update",
    ),
    Fault(
        "clip before the correction",
        "Strategy.clip",
        "            norm = norm * factor\n",
        "            pass\n",
        "tests/strategies/test_strategies.py::test_clip_is_that_of_torch_after_the_factor",
    ),
    Fault(
        "the context around backward only",
        "Strategy.run_window",
        "            with self.accumulation_context(micro.is_last):\n                loss, scale = forward(micro)\n",
        "            loss, scale = forward(micro)\n            with self.accumulation_context(micro.is_last):\n",
        COUNTS,
    ),
    Fault(
        "DP that does not split",
        "strategies.dp:_split",
        "min((len(parts) for parts in split.values()), default=1)",
        "1",
        "tests/strategies/test_strategies.py -k dp_on_the_cpu",
    ),
    Fault(
        "an effective batch without P",
        "ProcessGroupStrategy.effective_batch",
        "return self.data_parallel_size * N * K",
        "return N * K",
        "tests/strategies/test_strategies.py::test_effective_batches",
    ),
    Fault(
        "wait for each batch to arrive",
        "move",
        "return batch.to(device, non_blocking=True)",
        "return batch.to(device)",
        "tests/device/test_device.py -k as_often",
    ),
    Fault(
        "step as the run before",
        "load_named_state",
        "for name in HOW_TO_STEP if name in group",
        "for name in ()",
        "tests/device/test_fused.py -k told",
    ),
    Fault(
        "end while a thread is in the store",
        "StatusBoard._patiently",
        "atexit.register(thread.join, PATIENCE)",
        "pass",
        "tests/errors/test_silence.py -k interpreter",
    ),
    Fault(
        "take any rank",
        "strategies.environment:_number",
        "below is not None and value >= below",
        "False",
        "tests/errors/test_exit.py -k environment",
    ),
    Fault(
        "an attribute that is set on the wrapper",
        "ShowsModel.__setattr__",
        "setattr(self.module, name, value)",
        "super().__setattr__(name, value)",
        "tests/strategies/test_model_attributes.py::test_methods_and_attributes_of_the_model_work",
    ),
    Fault(
        "a wrapper that sets its own names on the model",
        "ShowsModel.__setattr__",
        '"_is_built" not in self.__dict__ or',
        "",
        "tests/strategies/test_model_attributes.py::test_methods_and_attributes_of_the_model_work",
    ),
]
