"""The ways of keeping a store: a plain directory, nats-server's own encryption, our mount, and two outside references.

Each is used as its operators use it: through its command line, with the key from where a key belongs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js.compare import processes
from encfs_js.compare.processes import RefusedError, RunError
from encfs_js.compare.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encfs_js.compare.result import Kind

_GOCRYPTFS_READY: Final = "Filesystem mounted and ready."
_BUSY: Final = 10.0  # seconds that a mount may be busy although nobody uses it any more
OURS: Final = (sys.executable, "-m", "encfs_js")


@dataclass(frozen=True)
class Mode:
    """One way of keeping a store."""

    name: str
    title: str
    kind: Kind
    cipher: str = ""


MODES: Final = (
    Mode("plain", "plain directory", "plain"),
    Mode("server chachapoly", "NATS's own encryption, chachapoly", "server", "chachapoly"),
    Mode("server aes", "NATS's own encryption, aes", "server", "aes"),
    Mode("mount chachapoly", "encfs_js, chachapoly", "mount", "chachapoly"),
    Mode("mount aes", "encfs_js, aes", "mount", "aes"),
    Mode("gocryptfs", "gocryptfs", "reference", "AES-GCM"),
    Mode("securefs", "securefs", "reference", "AES-GCM"),
)
PLAIN: Final = MODES[0]


def missing(mode: Mode) -> str:
    """Say why a mode cannot run here, or return an empty string."""
    if mode.kind == "reference" and not shutil.which(mode.name):
        return f"{mode.name} is not installed (apt-get install {mode.name})"
    if mode.kind in ("mount", "reference"):
        if not os.path.exists("/dev/fuse"):
            return "no mounts here: /dev/fuse is missing"
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "no mounts here: this user may not open /dev/fuse"
        if not shutil.which("fusermount3"):
            return "no mounts here: fusermount3 is missing (apt-get install fuse3)"
    return ""


def version(mode: Mode) -> str:
    """Return the version of an outside reference, in its own words, "" when it does not say."""
    argument = "--version" if mode.name == "gocryptfs" else "version"
    try:
        done = subprocess.run([mode.name, argument], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    first = (done.stdout.splitlines() or [""])[0]
    return first.split(";")[0]


@dataclass
class Store:
    """A store of one mode, and where its parts are.

    root: the directory that holds everything of it; backing: what lies on the disk; directory: nats-server's store_dir.
    ours: the command that is encfs-js.
    """

    mode: Mode
    root: str
    key: str = field(repr=False)
    backing: str = ""
    directory: str = ""
    options: tuple[str, ...] = ()  # more for `encfs-js mount`
    ours: tuple[str, ...] = OURS

    def __post_init__(self) -> None:
        """Find the directories."""
        self.backing = os.path.join(self.root, "store")
        self.directory = os.path.join(self.root, "data") if self.has_daemon else self.backing

    @property
    def has_daemon(self) -> bool:
        """Whether a daemon serves it."""
        return self.mode.kind in ("mount", "reference")

    @property
    def log(self) -> str:
        """The path of the daemon's log."""
        return os.path.join(self.root, "daemon.log")

    @property
    def password(self) -> str:
        """The path of the file with the key of an outside reference; it lies beside the store."""
        return os.path.join(self.root, "password")

    def server(self, program: str, *, sync: str | None = None, name: str = "nats") -> Server:
        """Return a server for this store, not started yet; it has the key where the server encrypts."""
        key = self.key if self.mode.kind == "server" else None
        return Server(
            program, self.directory, self.root, name, key=key, cipher=self.mode.cipher if key else None, sync=sync
        )


def create(mode: Mode, root: str, *, options: tuple[str, ...] = ()) -> Store:
    """Make the directory `root` and in it an empty store of a mode, with a key of its own. Raises RunError, OSError."""
    store = Store(mode, root, secrets.token_hex(16), options=options)
    os.mkdir(root, 0o700)
    os.mkdir(store.backing, 0o700)
    if store.has_daemon:
        os.mkdir(store.directory, 0o700)
    if mode.kind == "mount":
        processes.call([*OURS, "init", store.backing, "--cipher", mode.cipher], {"JS_KEY": store.key})
    if mode.kind == "reference":
        write_password(store, store.key)
        if mode.name == "gocryptfs":
            processes.call(["gocryptfs", "-init", "-q", "-passfile", store.password, store.backing])
        else:
            processes.call(["securefs", "create", "--keyfile", store.password, "--pass", "", store.backing])
    return store


def write_password(store: Store, key: str) -> None:
    """Write the key of an outside reference where its command reads it."""
    with open(os.open(store.password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(key)


def _command(store: Store) -> list[str]:
    """Return the daemon's command, in the foreground."""
    if store.mode.kind == "mount":
        return [*store.ours, "mount", store.backing, store.directory, "--foreground", *store.options]
    if store.mode.name == "gocryptfs":
        return ["gocryptfs", "-fg", "-passfile", store.password, store.backing, store.directory]
    return ["securefs", "mount", "--keyfile", store.password, "--pass", "", store.backing, store.directory]


class Daemon:
    """What serves a store while it is mounted; for a mode without a daemon it does nothing and has no process."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.process: subprocess.Popen[bytes] | None = None
        self._below = os.stat(store.directory).st_dev
        self._device = ""

    @property
    def pids(self) -> list[int]:
        """The process ids, none or one."""
        return [self.process.pid] if self.process is not None else []

    def mount(self, *, key: str | None = None) -> None:
        """Mount, with another key if one is given. Raises RefusedError when the daemon said no, RunError when it hangs."""
        store = self.store
        if not store.has_daemon:
            return
        if store.mode.kind == "reference" and key is not None:
            write_password(store, key)
        added = {"JS_KEY": key or store.key} if store.mode.kind == "mount" else {}
        at = os.path.getsize(store.log) if os.path.exists(store.log) else 0
        self.process = processes.start(_command(store), store.log, added)
        deadline = time.monotonic() + processes.PATIENCE
        while not self._ready(at):
            if (code := self.process.poll()) is not None:
                self.process = None
                with open(store.log, encoding="utf-8", errors="replace") as file:
                    file.seek(at)
                    raise RefusedError(store.mode.name, code, file.read())
            if time.monotonic() > deadline:
                raise RunError(f"{store.mode.name} did not mount within {processes.PATIENCE:.0f} s")
            time.sleep(0.005)

    def _ready(self, at: int) -> bool:
        """Whether it serves. at: where its log ended before.

        gocryptfs reads a file of its own mount first. Who unmounts before that is over, and kills it, makes it wait for itself
        for ever, and SIGKILL does not end that.
        """
        device = os.stat(self.store.directory).st_dev
        if device == self._below:
            return False
        self._device = f"{os.major(device)}:{os.minor(device)}"
        return self.store.mode.name != "gocryptfs" or _GOCRYPTFS_READY in processes.text(self.store.log, at)

    def unmount(self) -> None:
        """Unmount cleanly and wait for the daemon's end. Raises RunError."""
        if self.process is None:
            return
        if self.store.mode.kind == "mount":
            processes.call([*OURS, "umount", self.store.directory])
        else:
            processes.until(self._unmounted, f"unmounting {self.store.mode.name}", _BUSY, pause=0.05)
        try:
            code = self.process.wait(processes.PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError(f"the daemon of {self.store.mode.name} still runs after umount") from None
        self.process = None
        if code:
            raise RefusedError(f"the daemon of {self.store.mode.name}", code, processes.tail(self.store.log))

    def _unmounted(self) -> bool:
        """Unmount; False while it is busy: somebody may have looked into it at this moment, a daemon itself at its start."""
        try:
            processes.call(["fusermount3", "-u", "--", self.store.directory])
        except RefusedError as problem:
            if "busy" in problem.said:
                return False
            raise
        return True

    def kill(self) -> None:
        """Kill the daemon, its children too, and take the mountpoint away, whatever state they are in."""
        if self.process is None:
            return
        family = processes.family(self.process.pid)
        processes.kill(self.process, self.store.directory, self._device)
        for pid in family[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process = None
        processes.take_away(self.store.directory)


@contextmanager
def mounted(store: Store, *, key: str | None = None) -> Iterator[Daemon]:
    """Mount a store, yield its daemon, and unmount cleanly; the daemon is killed when the block failed. Raises RunError."""
    daemon = Daemon(store)
    try:
        daemon.mount(key=key)
        yield daemon
        daemon.unmount()
    finally:
        daemon.kill()
