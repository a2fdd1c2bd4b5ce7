"""Faults of strategies/ddp."""

from tests.faults.fault import Fault
from tests.faults.selections import COUNTS, PREVIEW, REDO, TABLE

FAULTS = [
    Fault(
        "keep the wrapper of before an unfreezing",
        "DDPStrategy.start_window",
        "== self._requires_grad",
        "!= []",
        "tests/exact/test_frozen.py::test_freezing_and_unfreezing_is_what_it_would_be_in_a_loop",
    ),
    Fault(
        "do not agree on what is frozen",
        "DDPStrategy.start_window",
        "self._agree_on_frozen()",
        "pass",
        "tests/errors/test_replicas.py::test_parameters_frozen_on_one_process_are_an_error_on_all",
    ),
    Fault(
        "touch a parameter of the model for a process without data",
        "DDPStrategy.join",
        "trainable = [self._anchor]",
        "trainable = trainable[:1]",
        "tests/strategies/test_strategies.py::test_a_parameter_that_nobody_used_is_not_decayed_for_a_process_without_data",
    ),
    Fault(
        "count calls of the model that prepare no reduction",
        "DDPStrategy._note_call",
        "|= torch.is_grad_enabled() and self._ddp.require_backward_grad_sync",
        "= True",
        "tests/strategies/test_model_attributes.py::test_methods_and_attributes_of_the_model_work",
    ),
    Fault(
        "believe that a loss of no model depends on it",
        "DDPStrategy.backward",
        "is_last and not depends_on",
        "False and not depends_on",
        "tests/strategies/test_model_attributes.py::test_a_loss_that_does_not_depend_on_the_model_is_refused",
    ),
    Fault("divide by P twice", "DDPStrategy.backward", "scale * self.data_parallel_size)", "scale)", TABLE),
    Fault(
        "plan the bytes of float32",
        "DDPStrategy.bytes_to_reduce",
        "p.numel() * p.element_size()",
        "p.numel() * 4",
        PREVIEW,
    ),
    Fault(
        "reduce every micro-batch",
        "DDPStrategy.accumulation_context",
        "sync = is_last_microbatch",
        "sync = True",
        COUNTS,
    ),
    Fault(
        "skip the pass of a process without data",
        "DDPStrategy.join",
        "            super().backward(self._ddp(), 1.0)",
        "            pass",
        "'tests/data/test_streams.py::test_uneven_streams_equal_one_big_batch[[0, 1]-even]'",
    ),
    Fault(
        "let DDP reorder its buckets in the second window",
        "DDPStrategy.prepare",
        "        self._fix_buckets()\n",
        "",
        "tests/strategies/test_strategies.py::test_a_rerun_sums_in_the_same_order_to_the_bit",
    ),
    Fault(
        "believe that every gradient was reduced",
        "DDPStrategy.backward",
        "            self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]",
        "            pass",
        "tests/strategies/test_strategies.py::test_a_gradient_that_was_not_reduced_is_an_error_that_names_it",
    ),
    Fault(
        "buffers in each forward",
        "DDPStrategy.wrap",
        "            **ddp_options(),\n",
        "",
        "tests/errors/test_replicas.py -k batch_norm_called_twice",
    ),
    Fault(
        "buffers as each process left them",
        "DDPStrategy.accumulation_context",
        "self._broadcast_buffers_once()",
        "pass",
        "tests/resume/test_resume.py::test_buffers_that_forward_reads_are_those_of_the_checkpoint",
    ),
    Fault(
        "reduce only what the wrapper's forward has seen",
        "DDPStrategy.backward",
        "if is_last and (self.find_unused_parameters or not self._was_called):",
        "if False:",
        "tests/strategies/test_model_attributes.py::test_methods_and_attributes_of_the_model_work",
    ),
    Fault(
        "send zeros for what a failed backward has not sent",
        "SentBuckets.send_rest",
        "fill_(math.nan)",
        "zero_()",
        REDO,
    ),
    Fault(
        "send all buckets after a failed backward",
        "SentBuckets.send_rest",
        "_collectives() - self._before",
        "0",
        REDO,
    ),
]
