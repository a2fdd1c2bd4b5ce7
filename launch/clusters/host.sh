#!/usr/bin/env bash
# One of several hosts, without a scheduler. The same on each of them, in a folder that all share or hold alike:
#   HOSTS=2 FIRST=host-a JOB=mine launch/clusters/host.sh --config=mine.toml [options of engine/run.py]
# HOSTS=1:2 goes on with one when the other is lost, and takes it in again. FIRST is one that stays.
# PYTHON is the interpreter, PROCESSES how many a host has (one for each GPU), RESTARTS how often torchrun starts workers anew.
set -euo pipefail

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or torchrun does not take in a host that comes later
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m launch.start \
    --nnodes="${HOSTS:?how many, as in 2 or 1:2}" --nproc-per-node="${PROCESSES:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="${FIRST:?the name of one host}:${PORT:-29400}" --rdzv-id="${JOB:?a name for the run}" \
    -m engine.run "--trainer.run_dir=runs/$JOB" "$@"
