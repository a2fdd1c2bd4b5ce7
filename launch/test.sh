#!/usr/bin/env bash
# Test: launch/test.sh [pytest options]; without options the whole suite, on four workers, which wait much.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export OMP_NUM_THREADS=1 # many small processes: more threads would only wait for one another
exec pytest --numprocesses="${TEST_WORKERS:-4}" "$@"
