#!/usr/bin/env bash
# Train: launch/train.sh [torchrun options] [engine/run.py options], as in
#   launch/train.sh --nproc_per_node=4 --trainer.accumulate_grad_batches=8
# One process for each GPU, two without any, unless told otherwise. Options of torchrun come before those of engine/run.py (--config, --task, --trainer...).
set -euo pipefail
here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root=$PWD
cd "$here"

gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
launcher=(--standalone "--nproc_per_node=$((gpus > 0 ? gpus : 2))")
while [ $# -gt 0 ]; do
    case "$1" in
        --config* | --task* | --trainer* | --print_config* | --plan* | --check | --help | -h) break ;;
        --standalone | --nproc[-_]per[-_]node=*) launcher+=("$1"); shift ;;
        --rdzv[-_]backend=c10d) export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ;;& # or torchrun does not take in a host that comes later
        --nnodes* | --rdzv* | --master* | --node*) [ "${launcher[0]}" = --standalone ] && launcher=("${launcher[@]:1}"); launcher+=("$1"); shift ;;
        *) launcher+=("$1"); shift ;;
    esac
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun would set it, without its warning
exec python "$root/launch/start.py" "${launcher[@]}" "$root/engine/run.py" "$@"
