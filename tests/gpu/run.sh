#!/usr/bin/env bash
# Checks and measures this machine's GPU: tests/gpu/run.sh [FOLDER]. Needs a python3 with torch 2.10 or later, and the
# wheels of tests/gpu/requirements.txt; the folder build/gpu may hold them. DEVICE=cpu runs the same at a small size.
# Writes results.json and results.md into FOLDER (default: build/gpu-results) after each part.
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../../build/gpu-results}")
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/build/gpu${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m tests.gpu "$folder" "${DEVICE:-cuda}"
