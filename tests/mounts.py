"""A mount for tests, through the command line only: what a test sees is what an operator gets.

`init` makes a store, `mounted` serves it for the length of a `with` block. Whatever happens inside the block, the
daemon is reaped and the mountpoint is free afterwards; a mount that hangs is aborted through the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from encfs_js import control

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

KEY = "correct horse battery staple"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMAND = [sys.executable, "-m", "encfs_js"]
FSTYPE = "fuse.encfs_js"
MAGIC = b"ENCFSJS1"
SUITES = {1: "chachapoly", 2: "aes"}
PATIENCE = 60.0  # seconds after which something is called hung; no test is decided by how much sooner it happens
NOBODY = 65534
COMPLAINT = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^Traceback ")


def needs_fuse() -> str:
    """Why no mount is possible here, or an empty string."""
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing: FUSE is not available here"
    if not any(os.access(os.path.join(d, "fusermount3"), os.X_OK) for d in os.get_exec_path()):
        return "fusermount3 is missing: install fuse3"
    return ""


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Poll until `condition` gives something true and return that; fail with `what` when it never does."""
    deadline = time.monotonic() + patience
    while True:
        if found := condition():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {patience:.0f} s")
        time.sleep(0.01)


# --- the command line ---------------------------------------------------------------------------------------------


def environment(key: str | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("JS_KEY", "CREDENTIALS_DIRECTORY")}
    if key is not None:
        env["JS_KEY"] = key
    return env


def run(*args: str | Path, key: str | None = KEY, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run `encfs-js args` and check its exit code (`code=None`: any). Fails, and kills it, when it hangs."""
    child = subprocess.Popen(
        [*COMMAND, *map(str, args)],
        env=environment(key),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = child.communicate(timeout=PATIENCE)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait(PATIENCE)
    done = subprocess.CompletedProcess(child.args, child.returncode, out, err)
    if code is not None and done.returncode != code:
        raise AssertionError(f"encfs-js {' '.join(map(str, args))}: exit code {done.returncode}\n{out}{err}")
    return done


def init(store: Path, *, key: str = KEY, cipher: str = "chachapoly", plaintext: str | None = None) -> None:
    extra = ("--plaintext", plaintext) if plaintext else ()
    run("init", store, "--cipher", cipher, *extra, key=key)


def verify(store: Path, *, key: str = KEY, code: int = 0) -> dict[str, Any]:
    """`encfs-js verify --json`: what it says, after its exit code was checked."""
    answer: dict[str, Any] = json.loads(run("verify", store, "--json", key=key, code=code).stdout)
    return answer


# --- the kernel's view --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MountEntry:
    """One line of /proc/self/mountinfo."""

    minor: int
    mountpoint: str
    fstype: str
    source: str


def mount_entries() -> list[MountEntry]:
    def unescape(text: str) -> str:
        return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)

    entries = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, right = line.rstrip("\n").split(" - ", 1)
            fields, kind = left.split(" "), right.split(" ")
            entries.append(MountEntry(int(fields[2].split(":")[1]), unescape(fields[4]), kind[0], unescape(kind[1])))
    return entries


def entry_at(mountpoint: Path) -> MountEntry | None:
    """The topmost mount at `mountpoint`, found without touching it: it may hang."""
    found = [entry for entry in mount_entries() if entry.mountpoint == str(mountpoint)]
    return found[-1] if found else None


def entry_above(path: Path) -> MountEntry | None:
    """The FUSE mount of ours that `path` lies on, found without touching it, or None."""
    ours = [e for e in mount_entries() if e.fstype == FSTYPE and f"{path}/".startswith(f"{e.mountpoint}/")]
    return max(ours, key=lambda e: len(e.mountpoint), default=None)


_daemons: dict[str, subprocess.Popen[bytes]] = {}  # by mountpoint, for whoever has to free a hung mount


@contextlib.contextmanager
def fuse_connections() -> Iterator[str]:
    """The directory of the kernel's FUSE connections; mounted for the moment where the system has not done it."""
    usual = "/sys/fs/fuse/connections"
    if os.listdir(usual) or os.geteuid() != 0:
        yield usual
        return
    with tempfile.TemporaryDirectory() as own:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", own], check=True, timeout=PATIENCE)
        try:
            yield own
        finally:
            subprocess.run(["umount", own], check=True, timeout=PATIENCE)


def abort(entry: MountEntry | None) -> None:
    """Make every request on a FUSE mount fail at once, so that nobody waits for its daemon any longer."""
    if entry is None:
        return
    with (
        contextlib.suppress(OSError),
        fuse_connections() as connections,
        open(os.path.join(connections, str(entry.minor), "abort"), "w") as control,
    ):
        control.write("1")
    if entry.mountpoint in _daemons:
        _daemons[entry.mountpoint].kill()


def detach(mountpoint: Path) -> None:
    """Lazily unmount whatever is at `mountpoint`."""
    while entry_at(mountpoint) is not None:
        command = ["umount", "--lazy"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        done = subprocess.run([*command, str(mountpoint)], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr


def within(patience: float, call: Callable[[], Any], what: str, rescue: Callable[[], None]) -> Any:
    """`call()`, which may hang in the kernel; after `patience` seconds `rescue` must free it and this fails."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive():
        rescue()
        thread.join(patience)
    if not result:
        raise AssertionError(f"{what}: no answer")
    return result[0]


# --- a mount ------------------------------------------------------------------------------------------------------


@dataclass
class Mount:
    """A store served at a mountpoint by a foreground daemon that is a child of the test."""

    store: Path
    path: Path
    process: subprocess.Popen[bytes]
    log_file: Path
    expected: list[str] = field(default_factory=list)
    tolerated: list[str] = field(default_factory=list)
    killed: bool = False

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def expect(self, pattern: str) -> None:
        """Declare a WARNING or ERROR line (a regular expression) that has to appear before the mount ends."""
        self.expected.append(pattern)

    def complaints(self) -> list[str]:
        """The lines of the daemon's log that report trouble."""
        return [line for line in self.log().splitlines() if COMPLAINT.search(line)]

    def check_log(self) -> None:
        """Fail on a complaint that was neither expected nor tolerated, and on an expected one that never came."""
        lines, known = self.complaints(), self.expected + self.tolerated
        if os.geteuid() != 0:
            known = [*known, "memory cannot be locked"]  # the usual limit of a user without privileges
        surprises = [line for line in lines if not any(re.search(p, line) for p in known)]
        assert not surprises, "the daemon's log has unexpected lines:\n" + "\n".join(surprises) + "\n\n" + self.log()
        missing = [p for p in self.expected if not any(re.search(p, line) for line in lines)]
        assert not missing, f"the daemon's log never said {missing}:\n{self.log()}"

    def alive(self) -> bool:
        """Whether the daemon runs and its mount answers."""
        if self.process.poll() is not None or entry_at(self.path) is None:
            return False
        within(PATIENCE, lambda: os.statvfs(self.path), "statvfs", lambda: abort(entry_at(self.path)))
        return True

    def kill(self) -> None:
        """SIGKILL the daemon, as a crash or the kernel's OOM killer would, and clear the dead mount away."""
        self.killed = True
        self.process.kill()
        self.process.wait(PATIENCE)
        detach(self.path)

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself: supervisor, worker, standby, takeovers and more."""
        return control.ask(str(self.store), {"do": "status"}, PATIENCE)

    def worker(self) -> int:
        """The process that serves; waits while none does."""
        return int(until(lambda: self.status()["worker"], "a worker that serves"))

    def kill_worker(self, number: int = signal.SIGKILL) -> int:
        """Kill the worker that serves, and have the log say that another takes over. Returns which it was, once it is gone."""
        pid = self.worker()
        self.tolerated += [rf"worker \d+ was killed by signal {int(number)}$", r"worker \d+ has taken over$"]
        os.kill(pid, number)
        until(lambda: not os.path.exists(f"/proc/{pid}"), f"the end of worker {pid}")
        return pid

    def dead(self) -> bool:
        """Whether the mount is there and nobody serves it: then nobody takes it for an empty directory."""
        try:
            os.listdir(self.path)
        except OSError as problem:
            return entry_at(self.path) is not None and problem.errno == errno.ENOTCONN
        return False

    def given_up(self) -> None:
        """Wait for the daemon to give up: exit code 27, the mount left, dead and not bare. Then clear it away."""
        self.killed = True
        assert self.process.wait(PATIENCE) == 27, self.log()
        assert self.dead()
        run("umount", self.path, key=None)
        assert entry_at(self.path) is None

    def umount(self, key: str | None = None) -> None:
        """Unmount through the command line; the daemon has to end by itself, with exit code 0."""
        run("umount", self.path, key=key)
        assert entry_at(self.path) is None, f"still mounted after umount:\n{self.log()}"
        assert self.process.wait(PATIENCE) == 0, f"the daemon ended with {self.process.returncode}:\n{self.log()}"

    def terminate(self) -> None:
        """Stop the daemon by SIGTERM, as systemd does; it has to unmount and end with exit code 0."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0, f"the daemon ended with {self.process.returncode}:\n{self.log()}"
        assert entry_at(self.path) is None, f"still mounted after SIGTERM:\n{self.log()}"

    def destroy(self) -> None:
        """Whatever state this is in: free whoever waits for the mount, reap the daemon, free the mountpoint."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(5)
        if self.process.poll() is None or entry_at(self.path) is not None:
            abort(entry_at(self.path))
        self.process.kill()
        self.process.wait(PATIENCE)
        detach(self.path)


def command_as_user(user: int) -> list[str]:
    """A prefix that runs a command as `user`, without any of root's privileges, in a mount namespace of its own.

    A directory that only root may enter (/root, usually) on the way to the repository, .venv or the interpreter is covered
    in that namespace by one that everybody may enter and that has nothing but those in it.
    """
    keep = sorted({os.path.realpath(path) for path in (ROOT, sys.prefix, sys.base_prefix)})
    covers: dict[str, list[str]] = {}
    for path in keep:
        if top := first_closed(path):
            covers.setdefault(top, []).append(path)
    script = ["set -e"]
    for top, paths in covers.items():
        # A descriptor still leads to what the cover hides; the shell has 3 to 9.
        script += [f"exec {fd}<{shlex.quote(path)}" for fd, path in enumerate(paths, 3)]
        script += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(top)}"]
        for fd, path in enumerate(paths, 3):
            script += [f"mkdir -p {shlex.quote(path)}"]
            script += [f"mount --no-canonicalize --bind /proc/self/fd/{fd} {shlex.quote(path)}", f"exec {fd}<&-"]
    script += ['cd "$PWD"', 'exec "$@"']
    namespace = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", "\n".join(script), "sh"]
    return [
        *namespace,
        *("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all", "--ambient-caps=-all"),
    ]


def first_closed(path: str) -> str:
    """The topmost directory above `path` that others may not enter, or an empty string."""
    steps = path.split("/")
    above = ["/".join(steps[:n]) for n in range(2, len(steps))]
    return next((directory for directory in above if not os.stat(directory).st_mode & stat.S_IXOTH), "")


@contextlib.contextmanager
def mounted(
    store: Path,
    mountpoint: Path,
    *options: str,
    key: str = KEY,
    expect: tuple[str, ...] = (),
    program: Sequence[str] | None = None,
    environ: dict[str, str] | None = None,
) -> Iterator[Mount]:
    """Serve `store` at `mountpoint` (made if missing) with `encfs-js mount --foreground options`.

    program: what is run as encfs-js instead of COMMAND; environ: what its environment has beside the usual.
    The block starts when the mount answers. At its end the store is unmounted with `encfs-js umount`, unless the
    block did that or killed the daemon, and the daemon's log must hold exactly the complaints that were expected.
    """
    mountpoint.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in mountpoint.parent.glob(f"{mountpoint.name}.*.log"))
    log_file = mountpoint.parent / f"{mountpoint.name}.{number}.log"
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [*(program or COMMAND), "mount", str(store), str(mountpoint), "--foreground", *options],
            env=environment(key) | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    mount = Mount(store, mountpoint, process, log_file, list(expect))
    _daemons[str(mountpoint)] = process
    try:
        until(lambda: process.poll() is not None or entry_at(mountpoint), "encfs-js mount")
        assert process.poll() is None, f"encfs-js mount ended with {process.returncode}:\n{mount.log()}"
        entry = entry_at(mountpoint)
        assert entry is not None
        assert (entry.fstype, entry.source) == (FSTYPE, str(store))
        assert mount.alive()
        yield mount
        if process.poll() is None:
            mount.umount()
        if not mount.killed:
            assert process.returncode == 0, f"the daemon ended with {process.returncode}:\n{mount.log()}"
        mount.check_log()
    finally:
        mount.destroy()
        del _daemons[str(mountpoint)]


# --- the store ----------------------------------------------------------------------------------------------------


def files(root: Path) -> list[Path]:
    """Every regular file below `root`, sorted, without what `.encfs_js` holds."""
    found = []
    for directory, names, leaves in os.walk(root):
        if ".encfs_js" in names:
            names.remove(".encfs_js")
        found += [root.__class__(directory, leaf) for leaf in leaves]
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def unsealed(store: Path) -> list[Path]:
    """The files of a store that are not sealed: no whole pages, or no header at the start."""
    bad = []
    for path in files(store):
        with open(path, "rb") as file:
            start, size = file.read(len(MAGIC)), os.fstat(file.fileno()).st_size
        if size % 4096 or (size and start != MAGIC):
            bad.append(path)
    return bad


def suite_of(path: Path) -> str | None:
    """The cipher that a sealed file's header names; None for a file without pages or one that is not sealed."""
    with open(path, "rb") as file:
        start = file.read(9)
    return SUITES.get(start[8]) if start[:8] == MAGIC else None


def holding(root: Path, marker: bytes) -> list[Path]:
    """The files below `root` (with those in `.encfs_js`) whose raw bytes hold `marker`."""
    found = []
    for directory, _, leaves in os.walk(root):
        for leaf in leaves:
            path = root.__class__(directory, leaf)
            if path.is_file() and marker in path.read_bytes():
                found.append(path)
    return sorted(found)


def contents(root: Path) -> dict[str, bytes]:
    """Path (relative) to content of every file below `root` that is not in `.encfs_js`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in files(root)}


def snapshot(root: Path) -> dict[str, tuple[int, int, int, int, str]]:
    """Everything below `root`, `.encfs_js` included: mode, size, modification and change time, digest."""
    result = {}
    for directory, names, leaves in os.walk(root):
        for name in [".", *names, *leaves]:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            digest = ""
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            relative = os.path.relpath(path, root)
            result[relative] = (info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns, digest)
    return result


def flip(path: Path, offset: int, bit: int = 1) -> None:
    """Invert one bit in place; a second call restores it."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bit]))
