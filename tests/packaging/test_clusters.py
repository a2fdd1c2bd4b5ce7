"""The templates in launch/clusters, as far as can be seen without a cluster: read by their checkers, and run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.signals import EXIT_STATUS
from tests.kit import ROOT
from tests.kit.hosts import Host, Started, two_hosts
from tests.kit.jobs import JOB, OPTIONS, UPDATES, reach, records

pytestmark = pytest.mark.timeout(400)

CLUSTERS = ROOT / "launch" / "clusters"
SCRIPTS = sorted(p for p in (ROOT / "launch").rglob("*") if p.suffix == ".sh")

SRUN = f"""#!{sys.executable}
# Runs its command on two "nodes", hands on SIGTERM as SLURM does to a step, and ends with the highest exit status.
import os, signal, subprocess, sys

words = sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
nodes = [subprocess.Popen(words) for _ in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf 'localhost\\nlocalhost\\n' ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def sbatch(folder: Path, *options: str) -> Started:
    """Start the batch script as SLURM would: a copy of it, in the folder where it was given."""
    script = shutil.copy(CLUSTERS / "slurm.sh", folder / "slurm_script")
    return Started(
        ["bash", str(script), *OPTIONS, *options],
        folder,
        PATH=f"{folder / 'bin'}:{os.environ['PATH']}",
        PYTHON=sys.executable,
        PROCESSES="1",
        RESTARTS="0",  # torchrun starts workers that were refused as often, each after ten seconds
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="localhost,localhost",
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [checker, "--source-path=SCRIPTDIR", "-x", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_batch_script_asks_for_the_signal_before_it_is_killed() -> None:
    lines = (CLUSTERS / "slurm.sh").read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert {"requeue", "signal", "open-mode"} <= set(asked)
    name, seconds = asked["signal"].split("@")
    (grace,) = (line for line in lines if "SHUTDOWN_TIMEOUT" in line)
    assert name == "TERM"
    assert int(grace.split("=")[1].split()[0]) < int(seconds)
    assert f"SAVED={EXIT_STATUS} " in "\n".join(lines)


def test_the_pytorchjob_is_one() -> None:
    job = yaml.safe_load((CLUSTERS / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    policy, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["rdzvBackend"] == "c10d"
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"  # the operator ends a job of `ExitCode` at a status below 128
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the one that the operator looks for
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == policy["nProcPerNode"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
@pytest.mark.campaign
def test_a_slurm_job_is_put_back_and_goes_on_unless_it_was_cancelled(folder: Path) -> None:
    run, requeued, job = folder / "runs" / str(os.getpid()), folder / "requeued", str(os.getpid())
    for update, is_cancelled in ((40, False), (120, True)):
        with sbatch(folder) as start:
            reach(run, update, start)
            if is_cancelled:
                start.process.terminate()
            os.kill(int((folder / "srun.pid").read_text()), signal.SIGTERM)
            assert start.wait(120) == EXIT_STATUS, start.output
        assert update <= len(records(run)) < UPDATES
        assert requeued.read_text().split() == [job]
    with sbatch(folder) as last:
        assert last.wait(120) == 0, last.output
    assert requeued.read_text().split() == [job]
    assert [record["update"] for record in records(run)] == list(range(1, UPDATES + 1))
    assert {record["effective_batch"] for record in records(run)} == {16, 4}


@pytest.mark.slow
def test_a_slurm_job_that_is_wrong_is_not_put_back(folder: Path) -> None:
    with sbatch(folder, "--trainer.micro_batch_size=0") as refused:
        assert refused.wait(120) == 2, refused.output
    assert "micro_batch_size=0" in refused.output
    assert not (folder / "requeued").exists()


@pytest.mark.slow
def test_hosts_without_a_scheduler_lose_one_and_take_it_in_again(folder: Path) -> None:
    """HOSTS=1:2 in two namespaces; needs root."""
    run = folder / "runs" / "mine"

    def start(host: Host) -> Started:
        return host.start(
            [str(CLUSTERS / "host.sh"), *OPTIONS],
            folder,
            PYTHON=sys.executable,
            HOSTS="1:2",
            FIRST=hosts[0].address,
            JOB="mine",
            PROCESSES="1",
            PET_LOCAL_ADDR=host.address,  # both have this machine's name
            PET_RDZV_CONF=f"is_host={int(host is hosts[0])},last_call_timeout=2,keep_alive_interval=1",
            RESTARTS="20",
        )

    with two_hosts() as hosts, start(hosts[0]) as stays:
        with start(hosts[1]) as leaves:
            reach(run, 60, stays)
            leaves.process.terminate()
            assert leaves.wait(40) == EXIT_STATUS, leaves.output
        reach(run, 100, stays)
        with start(hosts[1]) as comes:
            assert [host.wait(120) for host in (stays, comes)] == [0, 0], stays.output + comes.output
    assert [record["update"] for record in records(run)] == list(range(1, UPDATES + 1))
    assert {record["effective_batch"] for record in records(run)} == {16, 4}
