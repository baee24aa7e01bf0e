"""What goes back to the kernel: attributes, figures of the file system, and an errno for whatever went wrong."""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar, cast

import pyfuse3

from encfs_js import times
from encfs_js.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from encfs_js.files import Files
    from encfs_js.tree import Node

log: Final = logging.getLogger("encfs_js")

# Only this process changes the store, so what the kernel knows stays true; an hour, as S3QL has it.
TIMEOUT: Final = 3600.0

P = ParamSpec("P")
Q = TypeVar("Q", bound=pyfuse3.Operations)
R = TypeVar("R")


def replies(handler: Callable[Concatenate[Q, P], Awaitable[R]]) -> Callable[Concatenate[Q, P], Coroutine[Any, Any, R]]:
    """Turn what went wrong into the errno that the caller is to see. Anything else that left a handler would end the mount."""

    @functools.wraps(handler)
    async def reply(self: Q, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except IntegrityError as exc:
            raise pyfuse3.FUSEError(errno.EIO) from exc
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from exc
        except pyfuse3.FUSEError:
            raise
        except Exception as exc:
            log.exception("bug in %s", getattr(handler, "__name__", handler))
            raise pyfuse3.FUSEError(errno.EIO) from exc

    return cast("Callable[Concatenate[Q, P], Coroutine[Any, Any, R]]", reply)


class Owner:
    """Whom the mount shows in the place of the daemon's own user and group. shown: their two numbers, None for its own."""

    def __init__(self, shown: Sequence[int] | None) -> None:
        self._ours = (os.geteuid(), os.getegid())
        self._shown = self._ours if shown is None else (shown[0], shown[1])

    def show(self, entry: pyfuse3.EntryAttributes) -> pyfuse3.EntryAttributes:
        """Return the attributes with what is ours shown as theirs."""
        if self._shown == self._ours:
            return entry
        if entry.st_uid == self._ours[0]:
            entry.st_uid = self._shown[0]
        if entry.st_gid == self._ours[1]:
            entry.st_gid = self._shown[1]
        return entry

    def real(self, uid: int, gid: int) -> tuple[int, int]:
        """Return whom a file is really given to, when it is to be given to these; -1 stays -1."""
        ours, shown = self._ours, self._shown
        return ours[0] if uid == shown[0] else uid, ours[1] if gid == shown[1] else gid


def entry_of(files: Files, node: Node, found: os.stat_result) -> pyfuse3.EntryAttributes:
    """Return a node's attributes, of which `found` is the backing file's stat. Raises OSError."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = node.ino
    entry.generation = node.generation or 0
    entry.entry_timeout = TIMEOUT
    entry.attr_timeout = TIMEOUT
    entry.st_mode = found.st_mode
    entry.st_nlink = found.st_nlink
    entry.st_uid = found.st_uid
    entry.st_gid = found.st_gid
    entry.st_rdev = found.st_rdev
    entry.st_size = files.size(node) if stat.S_ISREG(found.st_mode) else found.st_size
    entry.st_blksize = found.st_blksize
    entry.st_blocks = found.st_blocks
    entry.st_atime_ns = found.st_atime_ns
    entry.st_mtime_ns = times.mtime_ns(node, found)
    entry.st_ctime_ns = found.st_ctime_ns
    return entry


def nothing() -> pyfuse3.EntryAttributes:
    """Return the entry that says there is none, which the kernel remembers as well."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = TIMEOUT
    return entry


def figures_of(disk: os.statvfs_result) -> pyfuse3.StatvfsData:
    """Return the backing file system's figures; nats-server computes free space as f_bavail * f_bsize."""
    figures = pyfuse3.StatvfsData()
    figures.f_bsize = figures.f_frsize = disk.f_frsize
    for name in ("f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"):
        setattr(figures, name, getattr(disk, name))
    return figures


def sets(fields: pyfuse3.SetattrFields) -> bool:
    """Tell whether anything is to be set: chown(-1, -1) sets nothing, and moves ctime all the same."""
    return bool(fields.update_size or fields.update_mode or fields.update_atime or fields.update_mtime)
