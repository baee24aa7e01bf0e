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
# All of them in two processes, which mostly wait for others: what needs no mount, and then some of what does, beside the rest.
comparison=(tests/test_compare*.py)
later=(tests/test_takeover*.py tests/test_v*.py tests/test_w*.py)
beside() {
    local code=0
    tests --basetemp "$scratch/alone" -m 'not mount' || code=$?
    tests --basetemp "$scratch/compare" -m mount "${comparison[@]}" || code=$?
    tests --basetemp "$scratch/later" -m mount "${later[@]}" || code=$?
    return "$code"
}
beside >"$scratch/beside.log" 2>&1 &
beside=$!
code=0
tests --basetemp "$scratch/pytest" -m mount "${comparison[@]/#/--ignore=}" "${later[@]/#/--ignore=}" || code=$?
wait "$beside" || code=$?
cat "$scratch/beside.log"
exit "$code"
