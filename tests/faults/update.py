"""Faults of engine/update."""

from tests.faults.fault import Fault
from tests.faults.selections import KILLED, LATE, STREAMS, TABLE, TOKENS, WEIGHTS

FAULTS = [
    Fault(
        "keep a skipped update's buffers",
        "Updater.finish",
        "self.rollback.skip()",
        "pass",
        "tests/exact/test_skipped.py::test_a_skipped_update_changes_nothing",
    ),
    Fault(
        "overlook parameters that come within an epoch",
        "Updater.begin",
        "self.optimizer.param_groups[-1] is not self._last_group",
        "False",
        "tests/exact/test_frozen.py::test_parameters_that_come_or_go_are_refused",
    ),
    Fault(
        "sum weights in float32", "LossSum._add_weight", "weight.detach().double()", "weight.detach().float()", WEIGHTS
    ),
    Fault(
        "check the first loss only", "LossSum.add", "or value.ndim or", "or (not self.samples and value.ndim) or", LATE
    ),
    Fault(
        "divide by the nominal window",
        "Updater.finish",
        "self.scale.factor(agreed.weight)",
        "self.scale.factor(float(window.stage.effective_batch))",
        TABLE,
    ),
    Fault("average the averages of ragged micro-batches", "LossSum.add", "= loss, micro.size", "= loss, 1", TABLE),
    Fault(
        "divide by this process's weight",
        "Updater.finish",
        "self.scale.factor(agreed.weight)",
        "self.scale.factor(float(self.losses._weight))",
        TOKENS,
    ),
    Fault(
        "divide by the weight of the update before",
        "Scale.factor",
        "self._unit / weight if weight else 1.0",
        "1.0",
        TOKENS,
    ),
    Fault(
        "a unit that processes do not share",
        "Updater.finish",
        "self.scale.end(agreed.weight, overflowed)",
        "self.scale.end(float(self.losses.samples), overflowed)",
        TOKENS,
    ),
    Fault(
        "apply the scale twice",
        "Scale.begin",
        "self._loss_scale.value / self._unit",
        "self._loss_scale.value / self._unit**2",
        TABLE,
    ),
    Fault(
        "leave fp16's scale in the gradient",
        "Scale.factor",
        "correction / self._loss_scale.value",
        "correction",
        "tests/device/test_precision.py::test_a_precision_does_not_know_P",
    ),
    Fault(
        "step on a window of weight 0",
        "Updater.finish",
        "skipped = overflowed or agreed.weight == 0",
        "skipped = overflowed",
        "tests/exact/test_tokens.py::test_a_window_of_weight_zero_is_a_skipped_update",
    ),
    Fault(
        "step on a gradient that is not finite",
        "Updater.finish",
        "overflowed = self._skips_nonfinite and",
        "overflowed = False and",
        "tests/exact/test_loop.py::test_an_update_that_is_not_finite_is_skipped_on_all_processes",
    ),
    Fault(
        "gradients leak into the next window",
        "Updater.finish",
        "self.strategy.clear_gradients()",
        "self.optimizer.zero_grad()",
        "tests/exact/test_loop.py::test_gradients_that_no_optimizer_holds_do_not_leak_into_the_next_window",
    ),
    Fault(
        "move the learning rate with each micro-batch",
        "Updater.before_forward",
        "        if micro.is_last:\n",
        "        self.lr_scheduler and self.lr_scheduler.step()\n        if micro.is_last:\n",
        "tests/exact/test_loop.py::test_the_learning_rate_moves_once_per_update",
    ),
    Fault(
        "report this process's loss",
        "Updater.finish",
        "mean = agreed.loss / agreed.weight",
        "mean = self.losses.read()[1] / agreed.weight",
        "tests/exact/test_loop.py::test_the_loss_of_a_record_is_the_mean_over_its_window",
    ),
    Fault(
        "seed the model by process",
        "Updater.before_forward",
        "self.strategy.seed(self._epoch_seed",
        "self.strategy.seed(self.strategy.rank + self._epoch_seed",
        "tests/layout/test_layout.py::test_dropout_and_augmentation_do_not_know_P",
    ),
    Fault(
        "a process's own end ends the epoch",
        "Updater.finish",
        "window.close(agreed.has_more > 0, samples)",
        "window.close(window.has_more, samples)",
        STREAMS,
    ),
    Fault(
        "forget the weight of the update before",
        "Scale.state_dict",
        '"late_weight": self._late_weight',
        '"late_weight": 0.0',
        KILLED,
    ),
    Fault(
        "stop alone",
        "Updater.finish",
        "if agreed.abort:",
        "if self.signals.stop_requested:",
        "tests/resume/test_interrupts.py::test_sigterm_at_random_moments",
    ),
    Fault(
        "keep the buffers of a window that was dropped",
        "Rollback.undo",
        "self._buffers.restore()",
        "pass",
        "tests/resume/test_interrupts.py::test_a_window_that_is_dropped_leaves_no_trace_in_buffers",
    ),
    Fault(
        "let the schedule see the rate of a rule",
        "_scaled_lr",
        'group["lr"] = rate\n',
        "pass\n",
        "tests/exact/test_lr_rules.py -k multiplies",
    ),
    Fault(
        "report a rate without its factor",
        "Updater.finish",
        "lr_factor * float(",
        "float(",
        "tests/exact/test_lr_rules.py -k multiplies",
    ),
    Fault(
        "look at the wait for the first micro-batch only",
        "UpdateTimer.watch",
        "index = int(GOLDEN * update % 1.0 * window.stage.accumulate_grad_batches)",
        "index = 0",
        "tests/one_reduction/test_reduction.py -k another",
    ),
    Fault(
        "call the wait for data computing",
        "Times.computing",
        "max(0.0, self.before - self.data)",
        "self.before",
        "tests/one_reduction/test_reduction.py -k goes",
    ),
]
