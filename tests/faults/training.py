"""Faults of engine/training."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "compute a metric of process 0's samples",
        "MergedMetrics.compute",
        "metric.merge_state(self._loaded(state[name]))",
        "pass",
        "tests/exact/test_merged_metrics.py -k counts_once",
    ),
    Fault(
        "begin a validation with the samples of the last",
        "MergedMetrics.reset",
        "metric.reset()",
        "pass",
        "tests/exact/test_merged_metrics.py -k counts_once",
    ),
    Fault(
        "let loggers come before callbacks",
        "Session._run_window",
        """            self._call("on_update_end")
            self._recorder.log(state.record)""",
        """            self._recorder.log(state.record)
            self._call("on_update_end")""",
        "tests/output/test_hooks.py -k order",
    ),
    Fault(
        "leave the last record to listeners",
        "Session.run",
        "        self._record_unheard()\n",
        "",
        "tests/output/test_hooks.py -k without_listeners",
    ),
    Fault(
        "count padded validation samples twice",
        "Validation._merged",
        "means[name] = total / weight if",
        "means[name] = sum(p[name][0] / p[name][1] for _, p, _ in everyone if name in p) / len(everyone) if",
        "tests/exact/test_loop.py::test_a_validation_mean_is_that_over_all_samples_once",
    ),
    Fault(
        "do not compare replicas",
        "Session._run_epoch",
        "        self._updater.exchange.check_replicas(state.update)\n",
        "",
        "tests/errors/test_replicas.py::test_replicas_that_diverge_stop_the_run_on_all_processes",
    ),
    Fault(
        "keep K instead of the effective batch on another P",
        "lay_out",
        "checkpoint is not None and _has_same_windows(checkpoint, window_identity(settings, scheduling))",
        "False",
        "tests/resume/test_resume.py::test_a_run_goes_on_with_another_number_of_processes",
    ),
    Fault(
        "validate a new model instead of a checkpoint's",
        "first_model",
        "load_checkpoint(model, checkpoint, strategy.device)",
        "pass",
        "tests/output/test_validate.py::test_it_is_the_trained_model_or_the_one_that_was_named",
    ),
    Fault(
        "validate a checkpoint without its average",
        "first_model",
        'restore_callbacks(callbacks, checkpoint["callbacks"])',
        "pass",
        "tests/output/test_validate.py::test_it_is_the_trained_model_or_the_one_that_was_named",
    ),
    Fault(
        "predict a round twice",
        "Prediction.run_on",
        "parts[:] =",
        "parts[:] = parts +",
        "tests/exact/test_predict.py",
    ),
    Fault(
        "let predictions fill the memory",
        "Outputs.add",
        "needed > (free := free_memory())",
        "needed < (free := 0)",
        "'tests/exact/test_predict.py::test_what_cannot_be_predicted_is_an_error_on_all_processes[memory]'",
    ),
    Fault(
        "tell nobody of predictions that failed",
        "Prediction._together",
        "failure = error",
        "raise",
        "tests/exact/test_predict.py -k what_cannot_be_predicted",
    ),
    Fault(
        "write no file before the end",
        "Outputs.add",
        "self._bytes >= PART_BYTES",
        "False",
        "tests/exact/test_predict.py -k files_are_parts",
    ),
    Fault(
        "test on validation data",
        "means",
        "strategy, source)",
        "strategy)",
        "tests/exact/test_predict.py -k each_sample_once",
    ),
    Fault(
        "validate a new model for a folder without a checkpoint",
        "first_model",
        "if checkpoint is None and settings.weights is None",
        "if False",
        "tests/output/test_validate.py::test_a_folder_without_a_checkpoint_is_an_error",
    ),
    Fault(
        "forget which weights a base came from",
        "engine.training.build:_load_weights",
        "checkpoint is None or checkpoint.left_out",
        "checkpoint is None",
        "tests/resume/test_frozen_base.py -k given_as_weights",
    ),
]
