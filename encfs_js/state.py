"""Who has the store, whether the last run ended cleanly, and which files a crash may have touched (FORMAT.md 4.1, 4.2)."""

from __future__ import annotations

import base64
import errno
import fcntl
import hmac
import json
import os
import shlex
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from encfs_js.backing import META, give_to_owner, replace_file, sync_directory
from encfs_js.errors import ConversionError, StoreBusyError

if TYPE_CHECKING:
    from encfs_js.keyring import Keys

MARK: Final = "encrypting"
STAGE: Final = ".encfs_js-convert"  # beside `.encfs_js`, in a store that a conversion is filling (staging.py)
_FORMAT: Final = "encfs_js state"
_INFO: Final = b"encfs_js state mac v1"
HOUR_NS: Final = 3600 * 10**9
_MOST_WINDOWS: Final = 16
_ATTEMPTS: Final = 20
_PAUSE: Final = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class State:
    """What `.encfs_js/state` says. Times in ns since 1970; `windows` are the runs that ended uncleanly, [from, to]."""

    clean: bool
    began: int
    windows: tuple[tuple[int, int], ...]

    def touched(self, ctime_ns: int) -> bool:
        """Tell whether a file of that ctime may show what a crash left. An hour is allowed for clock steps."""
        return any(low - HOUR_NS <= ctime_ns <= high + HOUR_NS for low, high in self.windows)


def lock(store: str, mountpoint: str, since: str) -> int:
    """Take the store for writing. Returns the descriptor that holds it; closing it gives the store back.

    Raises StoreBusyError, which says who holds it. On a read-only file system nobody can write, so there is nothing to
    take; whether that will do is for the caller to know, who gets the descriptor of the directory.
    """
    path = os.path.join(store, META, "lock")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        if exc.errno != errno.EROFS:
            raise
        return os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if not _locked(fd):
        who = holder(store) or {}
        os.close(fd)
        at = f" at {who['mountpoint']}" if who.get("mountpoint") else ""
        raise StoreBusyError(
            f"{store} is in use by process {who.get('pid', '(unknown)')}{at} since {who.get('since', '(unknown)')}",
            hint=f"encfs-js umount {who.get('mountpoint') or 'MOUNTPOINT'}",
        ) from None
    give_to_owner(fd, os.path.dirname(path))
    entry = {"pid": os.getpid(), "host": socket.gethostname(), "mountpoint": mountpoint, "since": since}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(entry).encode() + b"\n", 0)
    return fd


def _locked(fd: int) -> bool:
    """Take the lock; wait a little for the workers of a supervisor that has died: they are about to follow it."""
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _entry(fd).get("pid")
            if attempt == _ATTEMPTS - 1 or not isinstance(pid, int) or os.path.exists(f"/proc/{pid}"):
                return False
            time.sleep(_PAUSE)
        else:
            return True
    raise AssertionError


def _entry(fd: int) -> dict[str, object]:
    try:
        entry = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def holder(store: str) -> dict[str, object] | None:
    """Return what the lock's holder wrote (pid, host, mountpoint, since), or None when nobody holds it."""
    try:
        fd = os.open(os.path.join(store, META, "lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _entry(fd)
    else:
        return None
    finally:
        os.close(fd)


# -- a store that nats-server had encrypted, while it is sealed in place (FORMAT.md 4.7)


def is_half_sealed(store: str) -> bool:
    """Tell whether a part of the store may still be as nats-server has encrypted it."""
    return os.path.lexists(os.path.join(store, META, MARK))


def check_whole(store: str) -> None:
    """Raise ConversionError for a store that is not to be used before the rest of it is sealed, or is there at all."""
    if os.path.lexists(os.path.join(store, STAGE)):
        raise ConversionError(
            f"{store} is the target of a conversion that has not finished",
            hint="Finish it with the same `encfs-js convert` as before; or, to give it up: "
            f"rm -r {shlex.quote(os.path.join(store, STAGE))}",
        )
    if is_half_sealed(store):
        raise ConversionError(
            f"{store}: only a part of it is sealed yet, the rest is as nats-server has encrypted it",
            hint=f"encfs-js encrypt {shlex.quote(store)} --from server goes on.",
        )


def mark(store: str) -> None:
    """Note, durably, that a part of the store is not sealed yet."""
    replace_file(os.path.join(store, META), MARK, b"server\n")


def unmark(store: str) -> None:
    """Note, durably, that all of the store is sealed."""
    os.unlink(os.path.join(store, META, MARK))
    sync_directory(os.path.join(store, META))


def load(store: str, keys: Keys) -> State:
    """Read and authenticate the state. Missing or not authentic: a clean stop without windows (FORMAT.md says why)."""
    nothing = State(clean=True, began=0, windows=())
    try:
        with open(os.path.join(store, META, "state"), "rb") as file:
            document = json.load(file)
        mac = base64.b64decode(document.pop("mac"), validate=True)
        if not hmac.compare_digest(mac, _mac(document, keys)):
            return nothing
        windows = tuple((int(low), int(high)) for low, high in document["windows"])
        return State(bool(document["clean"]), int(document["began"]), windows)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return nothing


def save(store: str, keys: Keys, state: State) -> None:
    """Replace the state, atomically and synced."""
    document: dict[str, object] = {
        "format": _FORMAT,
        "version": 1,
        "clean": state.clean,
        "began": state.began,
        "windows": [list(window) for window in state.windows],
    }
    document["mac"] = base64.b64encode(_mac(document, keys)).decode()
    replace_file(os.path.join(store, META), "state", json.dumps(document).encode() + b"\n")


def found(store: str, keys: Keys, now_ns: int) -> None:
    """Give a new store that is filled by a command, not by a mount, its first state: that it is missing is to mean something."""
    save(store, keys, State(clean=True, began=now_ns, windows=()))


def begin(store: str, keys: Keys, now_ns: int) -> State:
    """Note that a run begins, before it changes anything. Returns its state; an unclean stop before it adds a window."""
    last = load(store, keys)
    windows = last.windows
    if not last.clean:
        # In order, whatever was done to the clock in between.
        windows = (*windows, (min(last.began, now_ns), max(last.began, now_ns)))
    if len(windows) > _MOST_WINDOWS:
        windows = ((min(low for low, _ in windows), max(high for _, high in windows)),)
    state = State(clean=False, began=now_ns, windows=windows)
    save(store, keys, state)
    return state


def _mac(document: dict[str, object], keys: Keys) -> bytes:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    return hmac.digest(keys.derive(_INFO), keys.store_id + canonical, "sha256")
