# Makes this directory ready to run: Debian's packages, /etc/mtab, and .venv with encfs_js and what its tests need.
# Sourced by examples/quickstart.sh and tests/run.sh, which set `root` to the top of the repository.
#
# Nothing is done that is done already, so a second run needs neither the network nor sudo.

refuse() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# become_root MISSING COMMAND: set `as_root` to what runs a command as root. A user without sudo is told the COMMAND.
become_root() {
    as_root=()
    [ "$(id -u)" -eq 0 ] && return
    command -v sudo >/dev/null || refuse "missing: $1. Let root do it: $2"
    as_root=(sudo)
}

# install_packages NAME...: install the Debian packages among these that are missing.
install_packages() {
    local name missing=() as_root
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null | grep -q '^ii' || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    become_root "${missing[*]}" "apt-get install ${missing[*]}"
    printf 'Installing Debian packages: %s\n' "${missing[*]}" >&2
    "${as_root[@]}" apt-get update -qq >&2 || refuse 'apt-get update failed'
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -o Dpkg::Use-Pty=0 --no-install-recommends "${missing[@]}" >&2 ||
        refuse "apt-get install ${missing[*]} failed"
}

# fetch_package NAME: put the files of a Debian package into .venv/debian/NAME. It is not installed, nothing of it is started.
# Where the distribution has no such package the directory stays empty.
fetch_package() {
    local target=$root/.venv/debian/$1 scratch as_root
    [ -d "$target" ] && return 0
    exec 9<"$root/pyproject.toml"
    flock 9
    if ! apt-cache show fuse3 >/dev/null 2>&1; then # many containers come without the lists of packages
        become_root 'the lists of packages' 'apt-get update'
        "${as_root[@]}" apt-get update -qq >&2 || refuse 'apt-get update failed'
    fi
    mkdir -p "$root/.venv/debian"
    scratch=$(mktemp -d "$root/.venv/debian/.XXXXXX")
    mkdir "$scratch/files"
    if ! apt-cache show "$1" >/dev/null 2>&1; then
        printf 'This distribution has no package %s: tests that need it are skipped\n' "$1" >&2
    else
        printf 'Fetching Debian package: %s (it is not installed)\n' "$1" >&2
        if ! (cd "$scratch" && apt-get download -qq -o APT::Sandbox::User= "$1" && dpkg -x ./*.deb files) >&2; then
            printf 'It could not be fetched: tests that need it are skipped\n' >&2
            rm -r "$scratch"
            exec 9<&-
            return
        fi
    fi
    # The name appears when all is there. Another run may have come first.
    [ -d "$target" ] || mv "$scratch/files" "$target"
    rm -r "$scratch"
    exec 9<&-
}

# link_mtab: make /etc/mtab, without which fusermount3 unmounts nothing for a user. systemd makes it, and so do most
# containers; a tree that debootstrap made has none.
link_mtab() {
    local as_root
    [ -e /etc/mtab ] && return
    become_root /etc/mtab 'ln -s ../proc/self/mounts /etc/mtab'
    printf 'Linking /etc/mtab to /proc/self/mounts\n' >&2
    "${as_root[@]}" ln -s ../proc/self/mounts /etc/mtab || refuse '/etc/mtab could not be made'
}

# choose_python: print a Python that is new enough, the system's if it can be.
choose_python() {
    local python
    for python in /usr/bin/python3 python3; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v "$python" && return
    done
    refuse 'Python 3.11 or later is needed (Debian 12 has it)'
}

# make_venv: make .venv, or bring it up to date when pyproject.toml has changed or the directory was moved.
make_venv() {
    local python stamp=$root/.venv/.set-up
    if [ "$(cat "$stamp" 2>/dev/null)" = "$root" ] && [ ! "$root/pyproject.toml" -nt "$stamp" ] &&
        "$root/.venv/bin/python" -c '' 2>/dev/null; then
        return
    fi
    [ -w "$root" ] || refuse "$root is not ready and this user may not write to it"
    if ! "$root/.venv/bin/python" -c "import sys; sys.exit(sys.prefix != '$root/.venv')" 2>/dev/null; then
        python=$(choose_python)
        printf 'Making .venv with %s\n' "$python" >&2
        "$python" -m venv --clear "$root/.venv" >&2 || refuse "$python -m venv failed"
    fi
    printf 'Installing encfs_js and its tools into .venv\n' >&2
    # Dependency groups came with pip 25.1.
    "$root/.venv/bin/python" -m pip install -q --upgrade 'pip>=25.1' >&2 || refuse 'pip could not be upgraded'
    (cd "$root" && .venv/bin/python -m pip install -q --editable . --group dev) >&2 || refuse 'pip install failed'
    printf '%s\n' "$root" >"$stamp"
}

set_up() {
    command -v dpkg-query >/dev/null ||
        refuse 'this script sets up Debian 12 or later; elsewhere install fuse3, its headers, a C compiler and Python by hand'
    # One set-up at a time: quickstart and tests may be started together.
    exec 9<"$root/pyproject.toml"
    flock 9
    install_packages fuse3 libfuse3-dev pkg-config build-essential python3-venv python3-dev libtss2-dev "$@"
    link_mtab
    make_venv
    exec 9<&-
    [ -e /dev/fuse ] || refuse '/dev/fuse is missing: load the kernel module fuse, or give the container the device'
    [ -w /dev/fuse ] || refuse 'this user may not open /dev/fuse: as root, chmod 666 /dev/fuse (udev does it on Debian)'
    export PATH=$root/.venv/bin:$PATH
}

# make_scratch NAME: make a directory of its own for temporary files, and print it. Not on overlayfs, as /tmp is in most
# containers: no store can lie there.
make_scratch() {
    local where=${TMPDIR:-/tmp}
    if [ "$(stat -f -c %T "$where")" = overlayfs ]; then
        where=/dev/shm
        [ -w $where ] && [ "$(stat -f -c %T $where)" != overlayfs ] ||
            refuse 'the temporary directory lies on overlayfs: set TMPDIR to a directory on ext4, xfs, btrfs or tmpfs'
    fi
    mktemp -d "$where/encfs_js-$1.XXXXXX"
}

# remove_scratch DIRECTORY: remove it, and first what is still mounted below it (lazily: its user may hang).
remove_scratch() {
    local mountpoint
    # Fields 5 and 9 of mountinfo; the paths that mktemp and this repository make have nothing in them that is escaped.
    awk -v top="$1/" 'index($5, top) == 1 { print $5 }' /proc/self/mountinfo | tac | while read -r mountpoint; do
        umount --lazy "$mountpoint" 2>/dev/null || fusermount3 -u -z "$mountpoint" || true
    done
    rm -rf --one-file-system "$1"
}
