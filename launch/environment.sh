# shellcheck shell=bash
# Sourced by train.sh and test.sh: makes .venv beside the code when it is missing or its requirements have changed.
# PYTHON chooses the interpreter (3.11 or newer), TALLY_EXTRAS the packages; pip's own variables choose its index.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
extras=${TALLY_EXTRAS:-dev}
wanted=$(echo "$extras" | cat pyproject.toml constraints.txt - | cksum)
if [ "$(cat .venv/.requirements 2>/dev/null)" != "$wanted" ]; then
    echo "making .venv (once) ..." >&2
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
    echo "$wanted" > .venv/.requirements
fi
unset PYTHONDONTWRITEBYTECODE # or each process would compile all code again
PATH="$PWD/.venv/bin:$PATH"
