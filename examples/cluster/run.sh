#!/usr/bin/env bash
# A cluster of three nats-servers, each on an encfs_js mount of its own. Key, cipher and epoch of all three stores are
# changed one after the other, while clients publish, consume and put, and no server is restarted. Takes no arguments and
# about a minute, needs nothing but Debian 12 or later (as root, or as a user with sudo for the packages), and leaves
# nothing behind but .venv.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd -P)
. "$root/examples/setup.sh"
set_up

scratch=$(make_scratch cluster)
names=(ant bee cat)
declare -A ports servers
clients=
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

clean_up() {
    local name
    trap '' INT TERM
    # By SIGKILL: Ctrl-C has ended the servers, and the clients would wait for them.
    [ -z "$clients" ] || { kill -KILL "$clients" && wait "$clients"; } 2>/dev/null || true
    stop_servers || true
    for name in "${names[@]}"; do
        encfs-js status "$scratch/$name/mnt" >/dev/null 2>&1 && encfs-js umount "$scratch/$name/mnt"
    done
    remove_scratch "$scratch"
}

say() { printf '\n== %s\n' "$*"; }

# shown COMMAND...: print a command as one would type it, and run it.
shown() {
    printf '$ %s\n' "${*//$scratch\//}"
    "$@"
}

# mount_all KEY: mount every store with the key in the file KEY of its node. Ctrl-C waits until a mount is there to be
# taken away again.
mount_all() {
    local name
    for name in "${names[@]}"; do
        (trap '' INT TERM && shown encfs-js mount "$scratch/$name/store" "$scratch/$name/mnt" --key-file "$scratch/$name/$1")
    done
}

umount_all() {
    local name
    for name in "${names[@]}"; do
        shown encfs-js umount "$scratch/$name/mnt"
    done
}

# configure NAME: the configuration of a node: nothing in it knows of encryption, store_dir is the mount.
configure() {
    cat >"$scratch/$1/nats.conf" <<CONF
server_name: $1
listen: "127.0.0.1:-1"
http: "127.0.0.1:-1"
ports_file_dir: "$scratch/$1/run"
jetstream { store_dir: "$scratch/$1/mnt" }
cluster {
  name: animals
  listen: "127.0.0.1:${ports[$1]}"
  routes: [$(printf '\n    "nats://127.0.0.1:%s"' "${ports[@]}")
  ]
}
CONF
}

start_servers() {
    local name found url monitor monitors=()
    urls=()
    for name in "${names[@]}"; do
        printf '$ nats-server -c %s/nats.conf &\n' "$name"
        nats-server -c "$scratch/$name/nats.conf" >>"$scratch/$name/nats.log" 2>&1 &
        servers[$name]=$!
    done
    for name in "${names[@]}"; do
        until found=$(talk urls "$scratch/$name/run/nats-server_${servers[$name]}.ports"); do
            kill -0 "${servers[$name]}" 2>/dev/null || { cat "$scratch/$name/nats.log" >&2; exit 1; }
            sleep 0.1
        done
        read -r url monitor <<<"$found"
        urls+=("$url")
        monitors+=("$monitor")
    done
    talk wait "${monitors[@]}"
}

stop_servers() {
    local name
    for name in "${!servers[@]}"; do
        kill -TERM "${servers[$name]}" 2>/dev/null || true
    done
    for name in "${!servers[@]}"; do
        stop "${servers[$name]}" || true
        unset "servers[$name]"
    done
}

# stop PID: have a job of this shell end, and return how it ended.
stop() {
    kill -TERM "$1" 2>/dev/null || true
    wait "$1"
}

talk() { python "$root/examples/cluster/cluster.py" "$@"; }

say 'Three stores, each with a key of its own, sealed with chachapoly'
read -r -a found <<<"$(talk ports "${#names[@]}")"
for i in "${!names[@]}"; do
    name=${names[i]}
    ports[$name]=${found[i]}
    mkdir "$scratch/$name" "$scratch/$name/mnt" "$scratch/$name/run"
    for key in key new-key; do
        head -c 32 /dev/urandom | base64 >"$scratch/$name/$key"
        chmod 600 "$scratch/$name/$key"
    done
done
for name in "${names[@]}"; do
    configure "$name"
    shown encfs-js init "$scratch/$name/store" --cipher chachapoly --key-file "$scratch/$name/key" | sed -n 1,2p
done
mount_all key

say 'Three unmodified nats-servers on them are one cluster'
start_servers
talk fill "${urls[@]}"

say 'Clients begin to work, and go on all the time'
python "$root/examples/cluster/cluster.py" work "$scratch/promised" "${urls[@]}" &
clients=$!
talk meanwhile "${urls[@]}"

for name in "${names[@]}"; do
    say "$name: another key, another volume key (epoch), another cipher"
    shown encfs-js key change "$scratch/$name/store" --key-file "$scratch/$name/key" --new-key-file "$scratch/$name/new-key"
    shown encfs-js reencrypt "$scratch/$name/store" --new-epoch --cipher aes --key-file "$scratch/$name/new-key"
    shown encfs-js reencrypt "$scratch/$name/store" --drop-epochs --key-file "$scratch/$name/new-key"
    encfs-js inspect "$scratch/$name/store" --json | talk kinds
    talk meanwhile "${urls[@]}"
done

say 'The clients end, and every replica is compared with what was promised'
stop "$clients" || { clients=; printf 'The clients failed.\n' >&2; exit 1; }
clients=
kill -0 "${servers[@]}"
# Routes to servers that were not up yet are none of this.
errors=$(cat "$scratch"/*/nats.log | { grep -E '\[(ERR|FTL)\]' || true; } | { grep -v 'Error trying to connect to route' || true; })
[ -z "$errors" ] || { printf 'The servers met errors:\n%s\n' "$errors" >&2; exit 1; }
printf 'The three servers still run, and no error is in their logs.\n'
talk check "$scratch/promised" "${urls[@]}"

say 'All is stopped and started again, with the new keys; the old ones open nothing'
stop_servers
umount_all
for name in "${names[@]}"; do
    code=0
    shown encfs-js verify "$scratch/$name/store" --key-file "$scratch/$name/key" 2>&1 || code=$?
    [ "$code" -eq 12 ] || { printf 'That is wrong: exit code %s.\n' "$code" >&2; exit 1; }
done
mount_all new-key
start_servers
talk check "$scratch/promised" "${urls[@]}"

say 'Every page of the three stores is authenticated'
stop_servers
umount_all
for name in "${names[@]}"; do
    shown encfs-js verify "$scratch/$name/store" --key-file "$scratch/$name/new-key"
done

say 'What this showed'
cat <<'END'
The stores of a running cluster were sealed anew, file by file, with new keys and another cipher. No server was restarted.
What the servers had acked before, meanwhile and after is on all three replicas, once and as it was sent; the consumers
stand where they stood. An old key opens nothing, and no file is left that an old volume key could read.
END
