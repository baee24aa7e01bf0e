#!/usr/bin/env bash
# The long form of tests/test_soak.py: nats-servers in full use on a mount whose worker is killed every 0.1 to 0.5 s. With
# the kernel's write cache, and once more without.
#   bash tests/soak.sh [KILLS [SEED]]     200 kills and a seed of its own, if not said
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P)
. "$root/examples/setup.sh"
set_up e2fsprogs

cd "$root"
kills=${1:-200} seed=${2:-$RANDOM}
scratch=$(make_scratch soak)
trap 'remove_scratch "$scratch"' EXIT
mkdir "$scratch/cached" "$scratch/through"
python tests/soak.py "$scratch/cached" --kills "$kills" --seed "$seed"
python tests/soak.py "$scratch/through" --kills "$kills" --seed "$seed" --no-writeback
