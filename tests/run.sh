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
# All of them: what needs no mount runs beside what does, which mostly waits for other processes.
tests --basetemp "$scratch/alone" -m 'not mount' >"$scratch/alone.log" 2>&1 &
alone=$!
code=0
tests --basetemp "$scratch/pytest" -m mount || code=$?
wait "$alone" || code=$?
cat "$scratch/alone.log"
exit "$code"
