#!/usr/bin/env bash
# Test: launch/test.sh [pytest options], on four workers, which wait much. Without options two cases of each everyday
# test; --all is every case, as is a folder that is named; --quick the first of each file, --changed those of what git says
# has changed, `-m slow` what takes long, --costs what each costs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export OMP_NUM_THREADS=1 # many small processes: more threads would only wait for one another
exec pytest --numprocesses="${TEST_WORKERS:-4}" --dist=loadgroup "$@"
