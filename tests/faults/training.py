"""Faults of engine/training."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "count padded validation samples twice",
        "Validation.run",
        "means[name] = total / weight if",
        "means[name] = sum(r[name][0] / r[name][1] for r in everyone if name in r) / len(everyone) if",
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
        "wait for each metric of a validation to arrive",
        "Validation._pair",
        "metric.new_full((), micro.size, dtype=torch.float64)",
        "torch.full((), micro.size, dtype=torch.float64).to(metric.device)",
        "tests/device/test_device.py -k once_in_a_validation",
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
        "validate a new model for a folder without a checkpoint",
        "first_model",
        "if checkpoint is None and settings.weights is None",
        "if False",
        "tests/output/test_validate.py::test_a_folder_without_a_checkpoint_is_an_error",
    ),
]
