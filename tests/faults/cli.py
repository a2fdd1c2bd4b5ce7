"""Faults of engine/cli."""

from tests.faults.fault import Fault
from tests.faults.selections import FOREIGN, IDENTITY

FAULTS = [
    Fault(
        "give two commands one folder",
        "_claim_fresh_folder",
        "mkdir(parents=True)",
        "mkdir(parents=True, exist_ok=True)",
        f"{IDENTITY}::test_two_commands_of_one_second_have_a_folder_each",
    ),
    Fault(
        "write out aliases that multiply",
        "_with_init_args",
        "if next(budget, None) is None:",
        "if False:",
        f"'{FOREIGN}::test_an_option_file_is_read_or_refused_in_a_line[aliases]'",
    ),
    Fault(
        "wait for an option file that is a pipe",
        "engine.cli.main:parse",
        "if os.path.exists(value) and not (",
        "if False and not (",
        f"'{FOREIGN}::test_an_option_file_is_read_or_refused_in_a_line[pipe]'",
    ),
    Fault(
        "options beside a class path",
        "_with_init_args",
        'if "class_path" not in parts',
        "if True",
        "tests/cli/test_command.py::test_options_may_stand_beside_a_class_path",
    ),
    Fault(
        "hide an option that people use most",
        "engine.cli.help:print_help",
        "first = [entries.pop(name) for name in FIRST]",
        "first = [entries.pop(name) for name in FIRST][1:]",
        "tests/cli/test_modes.py -k help",
    ),
]
