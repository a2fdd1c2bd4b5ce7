#!/usr/bin/env bash
#SBATCH --job-name=tally
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Two hosts under SLURM, for as many time limits and preemptions as it takes:
#   sbatch launch/clusters/slurm.sh --config=mine.toml [options of engine/run.py]
# The folder in which this is given is on a file system that all hosts share.
# PYTHON is the interpreter, PROCESSES how many a host has (one for each GPU), RESTARTS how often torchrun starts workers anew.
set -euo pipefail

SAVED=75 # engine/run.py was interrupted and has saved itself
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90 # seconds from SIGTERM to SIGKILL: an update and a save, less than --signal gives
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ending=
trap 'ending=yes' TERM # only a job that is cancelled: its step saves, and it is not put back
status=0
srun --kill-on-bad-exit=0 --wait=120 "${PYTHON:-python}" -m launch.start \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id="$SLURM_JOB_ID" \
    -m engine.run "--trainer.run_dir=runs/$SLURM_JOB_ID" "$@" || status=$?

if [ "$status" = "$SAVED" ] && [ -z "$ending" ]; then
    scontrol requeue "$SLURM_JOB_ID" # the same id, and so the same folder: it goes on
fi
exit "$status"
