"""All faults, by room: a folder of engine/ or strategies/, or the root of one of the two."""

from importlib import import_module
from pathlib import Path

from tests.faults.fault import Fault

ROOMS: dict[str, list[Fault]] = {
    path.stem: import_module(f"tests.faults.{path.stem}").FAULTS
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if "\nFAULTS = [\n" in path.read_text()
}
FAULTS = [fault for faults in ROOMS.values() for fault in faults]
