"""Faults of engine/records."""

from tests.faults.fault import Fault
from tests.faults.selections import FOREIGN, IDENTITY, KILLED, LOSES

FAULTS = [
    Fault(
        "write updates twice into the history",
        "engine.records.history:cut",
        "        if stays:\n",
        "        if True:\n",
        KILLED,
    ),
    Fault(
        "read all records at a resume",
        "engine.records.history:_start_of_end",
        "return offset",
        "pass",
        "tests/resume/test_lean_resume.py::test_records_are_read_from_their_end",
    ),
    Fault(
        "know a folder by inode alone",
        "RunFolder.is_lost",
        '(read_mark(self.path) or {}).get("start", self._start) != self._start',
        "False",
        LOSES,
    ),
    Fault("know a folder by its ids alone", "RunFolder.is_lost", "return not is_same or", "return", LOSES),
    Fault(
        "leave the records in a folder that is lost",
        "RunFolder.rescue",
        "file.readall() +",
        'b"" +',
        LOSES,
    ),
    Fault(
        "reopen tables by the folder's name",
        "RunFolder.pinned",
        "return path if path.exists() else self.path",
        "return self.path",
        f"{IDENTITY}::test_tables_follow_a_folder_that_is_moved",
    ),
    Fault(
        "decide before the lock that a folder is empty",
        "RunFolder.__init__",
        "            _check_is_free(self.path, takes_over)  #",
        "            pass  #",
        f"{IDENTITY}::test_a_folder_that_fills_before_its_lock_is_free_is_refused",
    ),
    Fault(
        "lock out other processes only",
        "engine.records.lock:_try",
        "if holder is not None and not holder.closed:",
        "if False:",
        f"{IDENTITY}::test_two_trainers_of_one_process_are_two_runs",
    ),
    Fault(
        "follow links in a run's folder",
        "check_plain",
        "if is_shared or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):",
        "if is_shared:",
        f"{FOREIGN}::test_a_link_or_device_in_a_run_folder_is_refused",
    ),
    Fault(
        "append to a file with another name elsewhere",
        "check_plain",
        "if is_shared or not",
        "if not",
        f"{FOREIGN}::test_a_file_that_has_another_name_elsewhere_stays_as_it_is_there",
    ),
    Fault(
        "keep records of short numbers only",
        "engine.records.run_folder:_plain",
        "abs(value) < 2**63",
        "True",
        "tests/errors/test_exit.py -k records",
    ),
]
