"""The guard: after an integrity error nothing below that stream or raft group can be deleted, renamed or cut.

nats-server 2.15.1 deletes a stream's whole directory when a read of its last block fails at start, and truncates a block
at its first bad record. A layer that answers EIO must therefore also refuse what comes next, with EROFS: after EACCES or
EPERM nats-server turns JetStream off altogether.

The guard is kept in `.encfs_js/guard` (FORMAT.md section 4.3), holds across mounts, and is opened by an operator.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from encfs_js.backing import META, replace_file
from encfs_js.errors import NotAStoreError, StoreIoError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from encfs_js.format import Suite

_NAME: Final = "guard"
_FORMAT: Final = "encfs_js guard"


@dataclass(frozen=True, slots=True)
class Closed:
    """One closed guard: below `directory` (a path in the store) nothing is removed; `file` and `page` are why."""

    directory: bytes
    file: bytes
    page: int
    since: str


def protected_directory(path: bytes) -> bytes:
    """Return the stream or raft group directory that `path` lies in, else the path's parent directory.

    `<account>/streams/<stream>/...` and `$SYS/_js_/<group>/...`, wherever in the store they begin.
    """
    parts = path.split(b"/")
    for i in range(1, len(parts) - 2):
        if parts[i] in {b"streams", b"_js_"}:
            return b"/".join(parts[: i + 2])
    return b"/".join(parts[:-1])


def subject(directory: bytes) -> str:
    """Say in NATS's words what the directory is: a stream, a raft group, or a directory."""
    parts = os.fsdecode(directory).split("/")
    if len(parts) >= 3 and parts[-2] == "streams":
        return f"stream {parts[-1]} of account {parts[-3]}"
    if len(parts) >= 2 and parts[-2] == "_js_":
        return f"raft group {parts[-1]}"
    return f"directory {os.fsdecode(directory) or '.'}"


def complaint(refused: Suite | None) -> tuple[str, str]:
    """Say what is wrong with a damaged page, and until when that stays so. refused: the file's suite, if this host refuses it."""
    if refused is None:
        return "does not authenticate", "the file is restored from a backup, or given up,"
    return (
        f"is sealed with {refused.label}, which the OpenSSL of this host refuses (FIPS)",
        "a host that can read the file has the store, or has sealed it anew (encfs-js reencrypt STORE --cipher aes),",
    )


def read(store: str) -> list[Closed]:
    """Return the store's closed guards. Raises NotAStoreError without `.encfs_js`, StoreIoError for a damaged file."""
    meta = os.path.join(store, META)
    if not os.path.isdir(meta):
        raise NotAStoreError(f"{store}: no encfs_js store", hint=f"encfs-js init {store}")
    try:
        with open(os.path.join(meta, _NAME), "rb") as file:
            document = json.load(file)
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        raise _damaged(store) from None
    try:
        return [
            Closed(os.fsencode(entry["directory"]), os.fsencode(entry["file"]), int(entry["page"]), str(entry["since"]))
            for entry in document["closed"]
        ]
    except (ValueError, KeyError, TypeError, OverflowError):  # the last: a page of 1e400
        raise _damaged(store) from None


def _damaged(store: str) -> StoreIoError:
    return StoreIoError(
        f"{store}: .encfs_js/guard is damaged",
        hint="Look at the file. It holds no secret: remove it to open all guards, after `encfs-js verify`.",
    )


def write(store: str, closed: list[Closed]) -> None:
    """Replace the store's guards, atomically and synced."""
    entries = [
        {"directory": os.fsdecode(c.directory), "file": os.fsdecode(c.file), "page": c.page, "since": c.since}
        for c in closed
    ]
    document = {"format": _FORMAT, "version": 1, "closed": entries}
    replace_file(os.path.join(store, META), _NAME, json.dumps(document, indent=1).encode() + b"\n")


def clear(store: str, directory: bytes | None = None) -> int:
    """Open the guard of `directory`, or all guards. Returns how many were opened."""
    closed = read(store)
    keep = [c for c in closed if directory is not None and c.directory != directory.strip(b"/")]
    if len(keep) != len(closed):
        write(store, keep)
    return len(closed) - len(keep)


class Guard:
    """The guards of a mounted store: asked before every removal, told of every integrity error."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._path = os.path.join(store, META, _NAME)
        self._unsaved = False
        self._seen = self._stamp()
        self.closed = {c.directory: c for c in read(store)}

    def _stamp(self) -> tuple[int, int] | None:
        try:
            st = os.stat(self._path)
        except FileNotFoundError:
            return None
        return st.st_ino, st.st_mtime_ns

    def check(self, path: bytes, *, moves: bool = False) -> None:
        """Raise OSError EROFS if `path` is a guarded directory or lies below one.

        moves: the path is to be renamed, so a directory that holds a guarded one is refused as well.
        A guard that an operator cleared meanwhile is noticed here.
        """
        self._refresh()
        for directory in self.closed:
            if (
                path == directory
                or not directory
                or path.startswith(directory + b"/")
                or (moves and directory.startswith(path + b"/"))
            ):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsdecode(path))

    def _refresh(self) -> None:
        """Notice what an operator has cleared; what could not be written down yet is not theirs to clear."""
        if self.closed and not self._unsaved and self._stamp() != self._seen:
            self._seen = self._stamp()
            self.closed = {c.directory: c for c in read(self._store)}

    def close(self, path: bytes, page: int, now: datetime) -> bool:
        """Close the guard over `path`, because of `page`. Returns whether it was open.

        It holds at once; `save` makes it outlast the mount.
        """
        self._refresh()
        directory = protected_directory(path)
        if directory in self.closed:
            return False
        self.closed[directory] = Closed(directory, path, page, now.isoformat(timespec="seconds"))
        self._unsaved = True
        return True

    def save(self, make_room_for: Callable[[Callable[[], None]], None]) -> None:
        """Write what `close` changed, if anything, with `make_room_for` (reserve.py). Raises OSError; then call it again."""
        if self._unsaved:
            make_room_for(lambda: write(self._store, list(self.closed.values())))
            self._unsaved = False
            self._seen = self._stamp()
