"""What a comparison starts and leaves lying about, and that nothing of it stays: processes, mounts, directories.

Every process that is started here descends from this one, and stays its descendant when its parent ends (a subreaper has that):
so all of them can be found and ended, whatever else went wrong. Mounts are found in the kernel's table, below the one scratch
directory that holds everything.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from encfs_js import mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PATIENCE: Final = 60.0  # seconds after which something that should happen is called hung
_PR_SET_CHILD_SUBREAPER: Final = 36
# System calls of Linux 5.2, with one number on every architecture, and their constants.
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_FSCONFIG_CMD_CREATE: Final = 6
_CLOEXEC: Final = 1
_GRACE: Final = 5.0  # seconds that a process has to end by itself


class RunError(Exception):
    """A run that failed, or lost a message. The others go on, and the report says so. Never carries a key."""


class RefusedError(RunError):
    """A daemon that said no: it ended by itself instead of serving. `said` is what it printed, `code` its exit code."""

    def __init__(self, what: str, code: int, said: str) -> None:
        super().__init__(f"{what} ended with {code}: {said.strip()[-2000:]}")
        self.code = code
        self.said = said


def family(pid: int) -> list[int]:
    """Return a process id and those of all its descendants that live."""
    pids = [pid]
    for parent in pids:  # grows while it is walked
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    pids += map(int, file.read().split())
    return pids


@contextmanager
def scratch(parent: str) -> Iterator[str]:
    """Yield a new directory in `parent` for everything, and leave nothing of it: no process, no mount, no file.

    Raises OSError when the directory cannot be made.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(family(os.getpid()))
    root = os.path.realpath(tempfile.mkdtemp(prefix="encfs-js-compare-", dir=parent))
    try:
        yield root
    finally:
        clear(root, before)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def clear(root: str, keep: set[int]) -> None:
    """End every descendant that is not one of `keep`, take away every mount below `root`, and remove it."""
    below = [entry for entry in mounts.mounts() if entry.mountpoint.startswith(f"{root}/")]
    for entry in below:
        abort(entry.device)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE
        while (left := set(family(os.getpid())) - keep) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            _reap(left)
            time.sleep(0.01)
    for entry in reversed(below):
        take_away(entry.mountpoint)
    still = [entry for entry in mounts.mounts() if entry.mountpoint.startswith(f"{root}/")]
    if not still:  # what is still mounted must not be emptied through its mountpoint
        shutil.rmtree(root, ignore_errors=True)


def take_away(mountpoint: str) -> None:
    """Unmount lazily, also what hangs, if anything is mounted there."""
    if any(entry.mountpoint == mountpoint for entry in mounts.mounts()):
        with suppress(FileNotFoundError):
            command = ["fusermount3", "-u", "-z", "--", mountpoint]
            subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)


def _reap(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def abort(device: str) -> None:
    """Free whoever waits for a FUSE mount: his request fails. device: "major:minor"; the mount may be detached already."""
    with suppress(OSError):
        connections = _connections()
        try:
            file = os.open(f"{device.split(':')[1]}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=connections)
            try:
                os.write(file, b"1")
            finally:
                os.close(file)
        finally:
            os.close(connections)


def _connections() -> int:
    """Open the directory of the kernel's FUSE connections. Raises OSError.

    Where the system has not mounted it, root gets it all the same: as a mount of its own that is in no directory, and is gone
    when it is closed.
    """
    usual = "/sys/fs/fuse/connections"
    if os.listdir(usual):
        return os.open(usual, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    context = _system_call(_FSOPEN, b"fusectl", _CLOEXEC)
    try:
        _system_call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _system_call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    done: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return what a child gets: this process's environment without anybody's key, and what is added."""
    ours = {name: value for name, value in os.environ.items() if name not in ("JS_KEY", "CREDENTIALS_DIRECTORY")}
    return ours | dict(added)


def start(command: Sequence[str], log: str, added: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process of its own session, whose output is appended to the file `log`.

    Its own session: a Ctrl-C at the terminal reaches this process alone, which ends the others in the right order.
    """
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(added or {}),
            start_new_session=True,
        )


def call(command: Sequence[str], added: Mapping[str, str] | None = None, *, given: bytes = b"") -> str:
    """Run a command to its end and return what it printed. Raises RefusedError when it fails, RunError when it hangs."""
    try:
        done = subprocess.run(
            command,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE * 2,
            env=environment(added or {}),
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"{name(command)} did not end within {PATIENCE * 2:.0f} s") from None
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        raise RefusedError(name(command), done.returncode, said)
    return said


def name(command: Sequence[str]) -> str:
    """Return what a command is called in an error: its program, and for ours what it does."""
    words = [word for word in command if word != "-m"]
    return f"encfs-js {words[2]}" if words[1:2] == ["encfs_js"] else os.path.basename(words[0])


def stop(process: subprocess.Popen[bytes], what: str, patience: float = PATIENCE) -> int:
    """End a process with SIGTERM and return its exit code. Raises RunError when it does not end."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        raise RunError(f"{what} did not end within {patience:.0f} s of SIGTERM") from None


def kill(process: subprocess.Popen[bytes], mountpoint: str = "", device: str = "") -> None:
    """End a process with SIGKILL, whatever state it is in.

    One that a hung mount holds is freed: the mount at `mountpoint`, or, also when it is detached already, that of `device`.
    """
    if process.poll() is not None:
        return
    process.kill()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        there = [entry.device for entry in mounts.mounts() if mountpoint and entry.mountpoint == mountpoint]
        for each in {*there, device} - {""}:
            abort(each)
        process.wait(PATIENCE)


def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE, pause: float = 0.005) -> None:
    """Wait until the condition holds. Raises RunError when it never does."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise RunError(f"{what}: not within {patience:.0f} s")
        time.sleep(pause)


def text(path: str, at: int = 0) -> str:
    """Return what a log holds, from a byte on; "" where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(at)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def tail(path: str, lines: int = 20) -> str:
    """Return the last lines of a log."""
    return "\n".join(deque(text(path).splitlines(), lines))
