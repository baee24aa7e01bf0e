#!/usr/bin/env bash
# Sets up what is missing (Debian 12 or later, as root or with sudo) and runs every check and test.
# Arguments go to pytest: bash tests/run.sh -k keyring
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P)
. "$root/examples/setup.sh"
set_up e2fsprogs swtpm
fetch_package nats-server # an older one than pip has; Debian 12 has 2.9.10

cd "$root"
ruff check .
ruff format --check .
mypy

# What a test that was killed leaves mounted is below this directory, and goes with it.
scratch=$(make_scratch tests)
trap 'remove_scratch "$scratch"' EXIT
if [ $# -gt 0 ]; then
    python -m pytest --basetemp "$scratch/pytest" "$@"
    exit
fi
# All of them: what needs no mount runs beside what does, which mostly waits for other processes.
python -m pytest --basetemp "$scratch/alone" -m 'not mount' >"$scratch/alone.log" 2>&1 &
alone=$!
code=0
python -m pytest --basetemp "$scratch/pytest" -m mount || code=$?
wait "$alone" || code=$?
cat "$scratch/alone.log"
exit "$code"
