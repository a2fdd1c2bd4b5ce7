#!/usr/bin/env bash
# The tests that train, with another version of torch: tests/other_torch.sh VERSION [pytest options]
# Makes an environment of its own, beside .venv, once. docs/testing.md keeps the versions that it was run with.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?give a version of torch, such as 2.11.0}
shift
other=".venv-torch-$version"
if [ ! -e "$other/.done" ]; then
    echo "making $other (once) ..." >&2
    "${PYTHON:-python3}" -m venv "$other"
    grep -vE '^(torch|setuptools)==' constraints.txt > "$other/constraints.txt"
    "$other/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$other/constraints.txt" \
        "torch==$version" --editable '.[recipes,metrics]' hypothesis pytest pytest-timeout pytest-xdist transformers
    touch "$other/.done"
fi
export OMP_NUM_THREADS=1
exec "$other/bin/python" -m pytest --numprocesses="${TEST_WORKERS:-2}" "$@" \
    tests/exact tests/data tests/device tests/strategies tests/layout tests/one_reduction/test_collectives.py \
    tests/resume/test_checkpoint.py tests/resume/test_resume.py tests/errors/test_replicas.py tests/plan/test_preview.py
