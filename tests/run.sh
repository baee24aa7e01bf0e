#!/usr/bin/env bash
# Sets up what is missing (Debian 12 or later, as root or with sudo) and runs every check and test.
# Arguments go to pytest: bash tests/run.sh -k keyring
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P)
. "$root/examples/setup.sh"
set_up e2fsprogs swtpm gocryptfs securefs chromium poppler-utils
fetch_package nats-server # an older one than pip has; Debian 12 has 2.9.10

cd "$root"
ruff check .
ruff format --check .
mypy

# What a test that was killed leaves mounted is below this directory, and goes with it.
scratch=$(make_scratch tests)
trap 'remove_scratch "$scratch"' EXIT
# A shell has what it starts in the background ignore Ctrl-C, and so would all that a test interrupts.
tests() { env --default-signal=INT python -m pytest "$@"; }
if [ $# -gt 0 ]; then
    tests --basetemp "$scratch/pytest" "$@"
    exit
fi
# All of them: what needs no mount, and then the comparison, runs beside what does, which mostly waits for other processes.
beside() {
    local code=0
    tests --basetemp "$scratch/alone" -m 'not mount' || code=$?
    tests --basetemp "$scratch/compare" -m mount tests/test_compare*.py || code=$?
    return "$code"
}
beside >"$scratch/beside.log" 2>&1 &
beside=$!
code=0
tests --basetemp "$scratch/pytest" -m mount --ignore-glob 'tests/test_compare*.py' || code=$?
wait "$beside" || code=$?
cat "$scratch/beside.log"
exit "$code"
