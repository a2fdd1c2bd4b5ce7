"""Real torchrun for tests, on this machine or on two hosts made of it: bounded in time, and nothing is left behind.

A host is a network namespace without a name, joined to the other by a wire of limited speed. It lives as long as the
processes in it, so there is nothing to collide with and nothing to forget: no mount, no file, no interface outside.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.kit import ROOT

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ENDS_WITH_US = ("setpriv", "--pdeathsig=KILL") if shutil.which("setpriv") else ()
"""Before a command: pytest may be killed too."""
WIRE = "wire"
MARK = "TALLY_TEST_STARTED"
"""In the environment of all that is started here, so that it is found again whoever its parent is by then."""

T = TypeVar("T")


def until(get: Callable[[], T], seconds: float, what: str) -> T:
    """Call `get` until it returns something, and return that. Raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := get()):
        assert time.monotonic() < end, f"not within {seconds} seconds: {what}"
        time.sleep(0.01)
    return value


class Started:
    """A command and all that it starts: killed at the latest when the context ends. Output goes to a file."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        name = uuid.uuid4().hex
        self._mark = f"{MARK}={name}"
        self._output = folder / f"output-{name}.txt"
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                [*ENDS_WITH_US, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment, MARK: name},
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        until(self._is_gone, 20, "the end of killed processes")

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def workers(self) -> dict[int, int]:
        """The ids of torchrun's workers, by rank."""
        found = sorted(self._alive(), key=lambda process: -process[0])  # a worker is older than its children
        return {int(e["RANK"]): pid for pid, e in found if "TORCHELASTIC_RUN_ID" in e}

    def new_workers(self, P: int, before: Collection[int] = (), seconds: float = 60) -> dict[int, int]:
        """Wait for P workers none of which is in `before`."""

        def get() -> dict[int, int]:
            assert self.process.poll() is None, self.output
            workers = self.workers
            return workers if len(workers) == P and not set(before) & set(workers.values()) else {}

        return until(get, seconds, f"{P} workers")

    def wait(self, seconds: float) -> int:
        """Return the exit status. Raises AssertionError, with the output, if it does not come in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} seconds:\n{self.output}") from None

    def _alive(self) -> Iterator[tuple[int, dict[str, str]]]:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is not ours
                lines = (folder / "environ").read_text(errors="replace").split("\0")
                if self._mark in lines:
                    yield int(folder.name), dict(line.split("=", 1) for line in lines if "=" in line)

    def _is_gone(self) -> bool:
        """Kill what is there, and return whether there was nothing."""
        found = [pid for pid, _ in self._alive()]
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.process.poll() is not None and not found


@dataclass(frozen=True)
class Host:
    """One end of the wire. `pid` is the process that keeps the namespace."""

    pid: int
    address: str

    @property
    def inside(self) -> tuple[str, str]:
        """What comes before a command that is to run here."""
        return "nsenter", f"--net=/proc/{self.pid}/ns/net"

    def do(self, command: str) -> None:
        done = subprocess.run([*self.inside, *command.split()], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def cut_off(self) -> None:
        self.do(f"ip link set {WIRE} down")

    def reconnect(self) -> None:
        self.do(f"ip link set {WIRE} up")

    def start(self, command: Sequence[str], folder: Path, **environment: str) -> Started:
        names = {"GLOO_SOCKET_IFNAME": WIRE, "TP_SOCKET_IFNAME": WIRE}
        return Started([*self.inside, *command], folder, **names, **environment)


@contextmanager
def two_hosts(rate: str = "200mbit") -> Iterator[tuple[Host, Host]]:
    """Two hosts on one wire; skips the test where this machine or user cannot have them."""
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "unshare", "nsenter"))):
        pytest.skip("two hosts on one machine need Linux, root, iproute2 and util-linux")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this root may not make network namespaces")
    with _host("10.0.0.1") as first, _host("10.0.0.2") as second:
        first.do(f"ip link add {WIRE} type veth peer name {WIRE} netns {second.pid}")
        for host in (first, second):
            host.do("ip link set lo up")
            host.do(f"ip address add {host.address}/24 dev {WIRE}")
            host.do(f"ip link set {WIRE} up")
            host.do(f"tc qdisc add dev {WIRE} root tbf rate {rate} burst 256kb latency 200ms")
        yield first, second


@contextmanager
def torchrun_on(hosts: Sequence[Host], *arguments: str, folder: Path, **environment: str) -> Iterator[list[Started]]:
    """One torchrun on each host, of which the first has the store; `arguments` are the rest of the command line."""
    meeting = (f"--nnodes={len(hosts)}", f"--master-addr={hosts[0].address}", "--master-port=29500")
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                host.start(
                    [*TORCHRUN, *meeting, f"--node-rank={rank}", f"--local-addr={host.address}", *arguments],
                    folder,
                    **environment,
                )
            )
            for rank, host in enumerate(hosts)
        ]


@contextmanager
def _host(address: str) -> Iterator[Host]:
    """A namespace, kept by a process that ends when its standard input is closed: with this one, however that ends."""
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as keeper:
        try:
            ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{keeper.pid}/ns/net")
            until(lambda: theirs.readlink() != ours.readlink(), 20, "a network namespace")
            yield Host(keeper.pid, address)
        finally:
            keeper.kill()
