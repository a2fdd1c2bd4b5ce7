"""Faults of engine/callbacks."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "average over skipped updates",
        "EMA.on_update_end",
        "trainer.skipped > self._skipped",
        "False",
        "tests/exact/test_skipped.py::test_a_skipped_update_changes_nothing",
    ),
    Fault(
        "train on with the average",
        "EMA.around_validation",
        "list(map(Tensor.copy_, values, kept))",
        "pass",
        "tests/output/test_callbacks.py -k average",
    ),
    Fault(
        "forget how long a stop has waited",
        "EarlyStopping.load_state_dict",
        'self.best, self.waited = state["best"], state["waited"]',
        "pass",
        "tests/output/test_callbacks.py -k early",
    ),
    Fault(
        "stop each process by itself",
        "EarlyStopping._stop_if_due",
        "is_collective=True",
        "is_collective=False",
        "tests/output/test_callbacks.py -k early",
    ),
    Fault(
        "make a schedule again",
        "EpochLR.on_fit_start",
        "group.update(values)",
        "pass",
        "tests/output/test_callbacks.py -k resume",
    ),
    Fault(
        "leave out the callbacks of a task",
        "brought_callbacks",
        "list(task.configure_callbacks(trainer))",
        "[]",
        "tests/output/test_task_callbacks.py",
    ),
    Fault(
        "break the line of progress anywhere",
        "engine.callbacks.progress:_picture",
        'fits = len("  ".join([*training, *machine])) <= width',
        "fits = True",
        "tests/output/test_progress.py -k share_a_line",
    ),
    Fault(
        "leave epochs and updates of progress ragged",
        "engine.callbacks.progress:_here",
        ":>{len(str(total))}}/{total}",
        "}/{total}",
        "tests/output/test_progress.py -k aligned",
    ),
]
