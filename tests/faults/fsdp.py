"""Faults of strategies/fsdp."""

from tests.faults.fault import Fault

WHOLE = "'tests/strategies/test_whole_parameters.py::test_a_matrix_is_stepped_whole_whatever_the_shards[polar-fsdp]'"

FAULTS = [
    Fault(
        "sharded: reduce every micro-batch",
        "Passes.start",
        "set_requires_gradient_sync(is_closing or self._reduces_each)",
        "set_requires_gradient_sync(True)",
        "'tests/strategies/test_sharded.py::test_collectives_of_a_window[window-3]'",
    ),
    Fault(
        "sharded: average over the processes",
        "FSDPStrategy.prepare",
        "part.set_gradient_divide_factor(1.0)",
        "part.set_gradient_divide_factor(2.0)",
        "'tests/strategies/test_sharded.py::test_fsdp_equals_one_big_batch[2-micro_batch]'",
    ),
    Fault(
        "sharded: a norm of this process's part",
        "FSDPStrategy._norm",
        "        dist.all_reduce(square, group=self._shard_group)\n",
        "",
        "'tests/strategies/test_sharded.py::test_token_weights_and_clipping[window-0.1]'",
    ),
    Fault(
        "sharded: reduce at one's own last micro-batch",
        "Passes.start",
        "is_closing = self._made + 1 == self._most if self._most else is_last",
        "is_closing = is_last",
        "tests/strategies/test_sharded.py -k uneven_streams",
    ),
    Fault(
        "sharded: reduce no zeros without data",
        "CollectiveOrder.finish",
        "self.groups[name].post_backward()",
        "pass",
        "'tests/strategies/test_sharded.py::test_processes_that_never_had_a_micro_batch_learn_the_order_from_the_others[2-1]'",
    ),
    Fault(
        "sharded: continue from the middle of a forward that failed",
        "CollectiveOrder.finish",
        "if self._position or ",
        "if ",
        "tests/strategies/test_sharded.py -k forward_that_fails",
    ),
    Fault(
        "sharded: validate with the list of the forwards before",
        "FSDPStrategy.evaluation_context",
        "            reset_fsdp(self._root)  # FSDP",
        "            pass  # FSDP",
        "tests/strategies/test_sharded.py::test_uneven_validation_between_updates",
    ),
    Fault(
        "sharded: step shards of a matrix",
        "FSDPStrategy.prepare_optimizer",
        "if parts := need_whole(optimizer):",
        "if parts := []:",
        WHOLE,
    ),
    Fault(
        "sharded: step a whole matrix by this process's gradient",
        "GatheredSteps._hide",
        "whole.grad = gradient",
        "whole.grad = gradient / self._group.size()",
        WHOLE,
    ),
    Fault(
        "sharded: a whole matrix that its owner keeps",
        "GatheredSteps._broadcast",
        "            dist.broadcast(value, group=self._group, group_src=owner)\n",
        "",
        WHOLE,
    ),
    Fault(
        "sharded: forget the state of a whole matrix",
        "GatheredSteps._send",
        "optimizer.state[parameter] = optimizer.state.pop(whole)",
        "optimizer.state.pop(whole)",
        WHOLE,
    ),
    Fault(
        "a gradient of a gradient under FSDP in torch's words",
        "FSDPStrategy.backward",
        "if is_freed_storage(error):",
        "if False:",
        "tests/strategies/test_sharded.py -k cannot_do",
    ),
    Fault(
        "wait for an order that no process leads",
        "CollectiveOrder.start",
        "(derived := self._derived(kind)) is not None",
        "(derived := None) is not None",
        "tests/exact/test_window_passes.py -k streams",
    ),
]
