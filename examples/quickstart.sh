#!/usr/bin/env bash
# The main job of encfs_js from end to end, with a real nats-server. Takes no arguments, needs nothing but Debian 12 or
# later (as root, or as a user with sudo for the packages), and leaves nothing behind but .venv.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd -P)
. "$root/examples/setup.sh"
set_up

scratch=$(make_scratch quickstart)
store=$scratch/store
mountpoint=$scratch/mnt
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

clean_up() {
    trap '' INT TERM
    stop_server
    encfs-js status "$mountpoint" >/dev/null 2>&1 && encfs-js umount "$mountpoint"
    remove_scratch "$scratch"
}

say() { printf '\n== %s\n' "$*"; }

# shown COMMAND...: print a command as one would type it, and run it.
shown() {
    printf '$ %s\n' "${*//$scratch\//}"
    "$@"
}

start_server() {
    printf '$ nats-server -c nats.conf &\n'
    nats-server -c "$scratch/nats.conf" >>"$scratch/nats.log" 2>&1 &
    server=$!
    until url=$(python "$root/examples/quickstart.py" url "$scratch/run/nats-server_$server.ports"); do
        kill -0 "$server" 2>/dev/null || { cat "$scratch/nats.log" >&2; exit 1; }
        sleep 0.1
    done
}

stop_server() {
    local pid
    for pid in $(jobs -p); do
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
}

talk() { python "$root/examples/quickstart.py" "$1" "$url"; }

# found DIRECTORY: how often the plaintext that every message carries stands in the files below a directory.
found() { { grep -r -a -o -F -e "$marker" "$1" || true; } | wc -l; }

marker=$(python "$root/examples/quickstart.py" marker)
mkdir "$mountpoint" "$scratch/run"
cat >"$scratch/nats.conf" <<CONF
listen: "127.0.0.1:-1"
ports_file_dir: "$scratch/run"
jetstream { store_dir: "$mountpoint" }
CONF

say 'A store, and its plain view at a mountpoint'
head -c 32 /dev/urandom | base64 >"$scratch/key"
chmod 600 "$scratch/key"
shown encfs-js init "$store" --key-file "$scratch/key"
# Ctrl-C waits until the mount is there to be taken away again.
(trap '' INT TERM && shown encfs-js mount "$store" "$mountpoint" --key-file "$scratch/key")

say 'An unmodified nats-server keeps its JetStream store there'
start_server
talk fill

say 'The server is restarted, and everything is read back and compared'
stop_server
start_server
talk check
stop_server

say 'Where the plain text is'
in_mount=$(found "$mountpoint")
in_store=$(found "$store")
printf '"%s" stands %s times in the files of the mount,\nand %s times in the files of the store.\n' \
    "$marker" "$in_mount" "$in_store"
[ "$in_mount" -ge 5000 ] && [ "$in_store" -eq 0 ] || { printf 'That is wrong.\n' >&2; exit 1; }
block=$(find "$store" -path '*ORDERS/msgs/1.blk')
printf 'The first bytes of %s: %s\n' "${block#"$scratch"/}" "$(head -c 8 "$block")"

say 'The mount is taken away, and every page of the store is authenticated'
shown encfs-js umount "$mountpoint"
shown encfs-js verify "$store" --key-file "$scratch/key"

say 'What this showed'
cat <<'END'
An unmodified nats-server kept streams, a consumer, a KV bucket and an object on the mount and found all of it again after
a restart. What it wrote lies in the store as sealed files only: the text that is in every message is nowhere in them,
and every page of every file authenticates under the key.
END
