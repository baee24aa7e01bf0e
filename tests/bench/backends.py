"""Where a load's files go: a plain directory, our mount, nats-server's own encryption, or a gocryptfs mount."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

from .meter import RunError
from .profiler import Profiler

SEALED = ("sealed:aes", "sealed:chachapoly")
NAMES = ("plain", *SEALED, "server:aes", "server:chachapoly", "gocryptfs")
DEFAULT = NAMES[:5]
MOUNT_TIMEOUT = 60.0


@dataclass(frozen=True)
class Store:
    """One backend with an empty directory of its own.

    root: the directory that holds everything of this store; backing: what lies on the disk; directory: where the
    load's files go; command: the daemon in the foreground; jetstream, environ: for the server's configuration.
    """

    name: str
    root: str
    backing: str
    directory: str
    command: tuple[str, ...] = ()
    jetstream: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    profiler: Profiler | None = None


def missing(name):
    """Say why a backend cannot run here, or return an empty string."""
    if name == "gocryptfs" and not shutil.which("gocryptfs"):
        return "gocryptfs is not installed (apt-get install gocryptfs)"
    if name in (*SEALED, "gocryptfs") and not (os.path.exists("/dev/fuse") and shutil.which("fusermount3")):
        return "no mounts here: /dev/fuse or fusermount3 is missing (apt-get install fuse3)"
    return ""


def create(name, root, *, mount_options=(), profiler=None):
    """Make the directories and, for an encrypting backend, the store of one backend below `root`."""
    backing, directory = os.path.join(root, "store"), os.path.join(root, "data")
    os.mkdir(backing)
    if name == "plain":
        return Store(name, root, backing, backing)
    if name.startswith("server:"):
        jetstream = (f"cipher: {name.partition(':')[2]}", "key: $BENCH_KEY")
        return Store(name, root, backing, backing, jetstream=jetstream, environ={"BENCH_KEY": secrets.token_hex(16)})
    os.mkdir(directory)
    if name == "gocryptfs":
        password = os.path.join(root, "password")
        with open(password, "w") as file:
            file.write(secrets.token_hex(16))
        call("gocryptfs", "-init", "-q", "-scryptn", "10", "-passfile", password, backing)
        command = ("gocryptfs", "-fg", "-q", "-passfile", password, backing, directory)
        return Store(name, root, backing, directory, command)
    environ = {"JS_KEY": secrets.token_hex(16)}
    call(sys.executable, "-m", "encfs_js", "init", backing, "--cipher", name.partition(":")[2], environ=environ)
    command = (sys.executable, "-m", "encfs_js", "mount", backing, directory, "--foreground", *mount_options)
    return Store(name, root, backing, directory, command, environ=environ, profiler=profiler)


def call(*command, environ=None):
    """Run a command to its end; its output is the error's text."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (environ or {}),
    )
    if done.returncode:
        raise RunError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")


@contextmanager
def mounted(store):
    """Mount a store and yield the daemon's process id, or None where there is nothing to mount. Unmounts cleanly."""
    if not store.command:
        yield None
        return
    log = os.path.join(store.root, "daemon.log")
    command = store.profiler.command(store.command) if store.profiler else store.command
    with open(log, "ab") as output:
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | store.environ,
            start_new_session=True,  # a Ctrl-C at the terminal must not stop it before the server
        )
    connection = None
    try:
        connection = serving(store, daemon, log)
        with store.profiler.watching(daemon.pid) if store.profiler else nullcontext():
            yield daemon.pid
            unmount(store, daemon, log)
    finally:
        abandon(store, daemon, connection)


def serving(store, daemon, log):
    """Wait until the mount serves; return the number of its FUSE connection."""
    deadline = time.monotonic() + MOUNT_TIMEOUT
    below = os.stat(store.root).st_dev
    while (device := os.stat(store.directory).st_dev) == below:
        if daemon.poll() is not None or time.monotonic() > deadline:
            with open(log, errors="replace") as file:
                raise RunError(f"{store.name} did not mount:\n{file.read()[-4000:]}")
        time.sleep(0.01)
    return os.minor(device)


def unmount(store, daemon, log):
    """Unmount and wait for the daemon's end."""
    if store.name in SEALED:
        call(sys.executable, "-m", "encfs_js", "umount", store.directory)
    else:
        call("fusermount3", "-u", store.directory)
    try:
        code = daemon.wait(MOUNT_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RunError(f"the daemon of {store.name} still runs {MOUNT_TIMEOUT:.0f} s after umount") from None
    if code:
        with open(log, errors="replace") as file:
            raise RunError(f"the daemon of {store.name} exited with {code}:\n{file.read()[-4000:]}")


def abandon(store, daemon, connection):
    """Leave nothing behind, whatever state mount and daemon are in."""
    if daemon.poll() is None:
        if connection is not None:
            with suppress(OSError), open(f"/sys/fs/fuse/connections/{connection}/abort", "w") as file:
                file.write("1")
        daemon.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(10)
        daemon.kill()
        daemon.wait()
    subprocess.run(["fusermount3", "-u", "-z", store.directory], capture_output=True, timeout=60)
