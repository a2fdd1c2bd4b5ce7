"""Real torchrun: workers and hosts are killed, interrupted or cut off, and the run resumes."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.kit import ROOT
from tests.kit.commands import python
from tests.kit.hosts import TORCHRUN, Host, Started, torchrun_on, two_hosts, until
from tests.kit.jobs import EVERY, JOB, OPTIONS, PAUSE, UPDATES, reach, records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # several starts of torchrun each, on processors that are busy
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]

KILLS = int(os.environ.get("TALLY_KILLS", "5"))
PATIENCE = 8.0  # seconds to wait for another host


HAS_VENV = pytest.mark.skipif(
    not (ROOT / ".venv" / ".requirements").exists(), reason="launch/train.sh would make .venv first"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, which no torchrun has started."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "job.py").write_text(JOB)
    done = python("job.py", "0.0", "60", folder=folder, P=2)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


def on_one_host(folder: Path, *options: str, pause: float = PAUSE) -> Started:
    return Started([*TORCHRUN, "--standalone", "--nproc_per_node=2", *options, "job.py", str(pause), "60"], folder)


def on_two_hosts(hosts: Sequence[Host], folder: Path) -> AbstractContextManager[list[Started]]:
    return torchrun_on(hosts, "--nproc_per_node=1", "job.py", str(PAUSE), str(PATIENCE), folder=folder)


def train_sh(folder: Path, *options: str) -> Started:
    return Started([str(ROOT / "launch" / "train.sh"), "--nproc_per_node=2", *options, *OPTIONS], folder)


def go_on(folder: Path, updates: int, torchrun: Started) -> None:
    """Wait until process 0 has made so many more updates, those that come again included."""
    trace = folder / "trace-0"

    def lines() -> int:
        assert torchrun.process.poll() is None, torchrun.output
        return len(trace.read_text().splitlines()) if trace.exists() else 0

    goal = lines() + 1 + updates  # one tells that it has started
    until(lambda: lines() >= goal, 90, f"{updates} more updates")


def attempts(folder: Path, rank: int) -> list[list[str]]:
    """What a process has done, by start: the update that it went on from, each that it made, and how it ended."""
    return [part.split() for part in (folder / f"trace-{rank}").read_text().split("from ")[1:]]


def saved(run: Path) -> list[int]:
    """The updates of which there are checkpoints, each once."""
    return sorted({int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("update-*")})


def assert_same(run: Path, undisturbed: Path) -> None:
    """The same bits, each update told of once and in order, and all that is told is the same."""
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert [record["update"] for record in records(run)] == list(range(1, UPDATES + 1))
    assert records(run) == records(undisturbed)


@pytest.mark.campaign
@pytest.mark.timeout(90 + 15 * KILLS)
def test_killed_again_and_again_it_goes_on_by_itself(folder: Path, undisturbed: Path) -> None:
    draw, before = random.Random(0), set()
    with on_one_host(folder, f"--max-restarts={KILLS}") as torchrun:
        for _ in range(KILLS):
            workers = torchrun.new_workers(2, before)
            if draw.random() < 0.25:
                time.sleep(draw.uniform(0, 3))  # it is starting
            else:
                go_on(folder, draw.randint(1, UPDATES // KILLS - 2), torchrun)
                time.sleep(draw.uniform(0, 2 * PAUSE))
            os.kill(workers[draw.randrange(2)], signal.SIGKILL)
            before |= set(workers.values())
        assert torchrun.wait(90) == 0, torchrun.output
    assert_same(folder / "run", undisturbed)
    for rank in range(2):
        *killed, last = attempts(folder, rank)
        assert last[-1] == "done"
        for one, next_one in zip(killed, [*killed[1:], last], strict=True):
            assert 0 <= int(one[-1]) - int(next_one[0]) < 2 * EVERY  # one save may have been under way


@pytest.mark.campaign
@HAS_VENV
def test_a_restarted_command_stays_in_its_folder(folder: Path, undisturbed: Path) -> None:
    before: set[int] = set()
    with train_sh(folder, "--max-restarts=3") as torchrun:
        for rank in range(2):
            workers = torchrun.new_workers(2, before)
            reach(folder / "runs" / "latest", 100 * (rank + 1), torchrun)
            os.kill(workers[rank], signal.SIGKILL)
            before |= set(workers.values())
        assert torchrun.wait(90) == 0, torchrun.output
    runs = [path for path in (folder / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 1
    assert_same(runs[0], undisturbed)


@HAS_VENV
@pytest.mark.parametrize("told", ["torchrun", *(pytest.param(rank, marks=pytest.mark.campaign) for rank in "01")])
def test_told_to_stop_all_stop_after_the_same_update_and_go_on(folder: Path, undisturbed: Path, told: str) -> None:
    run = folder / "run"
    with train_sh(folder, "--trainer.run_dir=run") as torchrun:
        reach(run, 100, torchrun)
        time.sleep(random.Random(told).uniform(0, 0.03))
        os.kill(torchrun.process.pid if told == "torchrun" else torchrun.workers[int(told)], signal.SIGTERM)
        assert torchrun.wait(40) == 75, torchrun.output
    (first,), (second,) = attempts(folder, 0), attempts(folder, 1)
    assert first == second
    assert saved(run)[-1] == int(first[-1]) < UPDATES
    with train_sh(folder, "--trainer.run_dir=run") as torchrun:
        assert torchrun.wait(90) == 0, torchrun.output
    assert_same(run, undisturbed)


@pytest.mark.campaign
@HAS_VENV
def test_the_launcher_ignores_sigusr1_and_a_second_signal(folder: Path, undisturbed: Path) -> None:
    run = folder / "run"
    with train_sh(folder, "--trainer.run_dir=run") as torchrun:
        reach(run, 50, torchrun)
        os.kill(torchrun.process.pid, signal.SIGUSR1)
        reach(run, 100, torchrun)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(torchrun.process.pid, number)
            time.sleep(0.01)
        assert torchrun.wait(40) == 75, torchrun.output
        assert not torchrun.workers
    with train_sh(folder, "--trainer.run_dir=run") as torchrun:
        assert torchrun.wait(90) == 0, torchrun.output
    assert_same(run, undisturbed)


@pytest.mark.campaign
@pytest.mark.parametrize("killed", [0, 1])
def test_the_sibling_of_a_killed_worker_was_not_told_to_stop(folder: Path, killed: int) -> None:
    run = folder / "run"
    with on_one_host(folder) as torchrun:
        reach(run, 20 * EVERY + 2, torchrun)
        os.kill(torchrun.workers[killed], signal.SIGKILL)
        assert torchrun.wait(40) == 1, torchrun.output
    assert attempts(folder, 1 - killed)[0][-1].isdigit()  # it did not come to an end
    assert all(update % EVERY == 0 for update in saved(run))


@HAS_VENV
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_killed_worker_is_no_interruption_of_the_command(folder: Path, killed: int) -> None:
    with train_sh(folder, "--trainer.run_dir=run") as torchrun:
        reach(folder / "run", 20 * EVERY + 2, torchrun)
        os.kill(torchrun.workers[killed], signal.SIGKILL)
        assert torchrun.wait(40) not in (0, 75), torchrun.output
    assert all(update % EVERY == 0 for update in saved(folder / "run"))


def test_two_hosts_train_what_one_does(folder: Path, undisturbed: Path, hosts: tuple[Host, Host]) -> None:
    with on_two_hosts(hosts, folder) as both:
        assert [torchrun.wait(90) for torchrun in both] == [0, 0], both[0].output + both[1].output
    assert_same(folder / "run", undisturbed)


@pytest.mark.campaign
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_cut_off_ends_the_run_on_both_and_nothing_is_lost(
    folder: Path, undisturbed: Path, hosts: tuple[Host, Host], lost: int
) -> None:
    with on_two_hosts(hosts, folder) as both:
        reach(folder / "run", 20 * EVERY + 2, both[0])
        time.sleep(random.Random(lost).uniform(0, 2 * PAUSE))
        hosts[lost].cut_off()
        for torchrun in both:
            assert torchrun.wait(PATIENCE + 30) == 1, torchrun.output
            assert "lost contact with another process in update" in torchrun.output
    hosts[lost].reconnect()
    with on_two_hosts(hosts, folder) as both:
        assert [torchrun.wait(90) for torchrun in both] == [0, 0], both[0].output + both[1].output
    assert_same(folder / "run", undisturbed)
    before, after = attempts(folder, 0)
    assert 0 <= int(before[-1]) - int(after[0]) < 2 * EVERY


def elastic(host: Host, folder: Path, meets_at: Host, nnodes: str = "1:2") -> Started:
    """One of the agents that meet there, each with one worker; a lost one is given up after three seconds."""
    settings = f"is_host={int(host is meets_at)},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint={meets_at.address}:29500", f"--rdzv-conf={settings}")
    options = (f"--nnodes={nnodes}", "--nproc_per_node=1", "--max-restarts=20", f"--local-addr={host.address}")
    patience = ("--trainer.strategy=strategies.DDPStrategy", f"--trainer.strategy.timeout_seconds={PATIENCE}")
    train = str(ROOT / "launch" / "train.sh")
    return host.start([train, *meeting, *options, *OPTIONS, *patience, "--trainer.run_dir=run"], folder)


@HAS_VENV
@pytest.mark.parametrize("ending", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.campaign)])
def test_where_a_host_is_lost_the_other_goes_on(folder: Path, hosts: tuple[Host, Host], ending: signal.Signals) -> None:
    run = folder / "run"
    with elastic(hosts[0], folder, hosts[0]) as stays, elastic(hosts[1], folder, hosts[0]) as leaves:
        reach(run, 100, stays)
        for pid in leaves.workers.values() if ending == signal.SIGKILL else ():
            os.kill(pid, ending)
        os.kill(leaves.process.pid, ending)
        assert stays.wait(90) == 0, stays.output
    made = records(run)
    assert [record["update"] for record in made] == list(range(1, UPDATES + 1))
    assert [record["effective_batch"] for record in made] == 10 * ([16] * 31 + [4])
    (_, *_), (went_on_from, *_) = attempts(folder, 0)
    K = [record["accumulate_grad_batches"] for record in made]
    assert K.index(4) == int(went_on_from) > 100 - 2 * EVERY
    assert sorted(K) == K


@pytest.mark.campaign
@HAS_VENV
def test_a_host_that_comes_back_is_taken_in(folder: Path, hosts: tuple[Host, Host]) -> None:
    run = folder / "run"
    with elastic(hosts[0], folder, hosts[0]) as stays:
        with elastic(hosts[1], folder, hosts[0]) as leaves:
            reach(run, 60, stays)
            leaves.process.terminate()
            leaves.wait(40)
        reach(run, 100, stays)
        with elastic(hosts[1], folder, hosts[0]) as comes:
            assert [torchrun.wait(60) for torchrun in (stays, comes)] == [0, 0], stays.output + comes.output
    K = [record["accumulate_grad_batches"] for record in records(run)]
    assert [now for before, now in zip([0, *K], K, strict=False) if now != before] == [2, 4, 2]


@pytest.mark.campaign
@HAS_VENV
@pytest.mark.timeout(60 + 15 * KILLS)
def test_workers_are_killed_on_either_host(folder: Path, undisturbed: Path, hosts: tuple[Host, Host]) -> None:
    draw = random.Random(0)
    with elastic(hosts[0], folder, hosts[0], "2") as first, elastic(hosts[1], folder, hosts[0], "2") as second:
        for _ in range(KILLS // 4):
            go_on(folder, draw.randint(1, 50), first)
            os.kill(draw.choice([*first.workers.values(), *second.workers.values()]), signal.SIGKILL)
        assert [torchrun.wait(60) for torchrun in (first, second)] == [0, 0], first.output + second.output
    assert_same(folder / "run", undisturbed)
