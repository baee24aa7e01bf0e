"""The FUSE face of a view (viewtree.py), and the process that serves it.

The store may be in use by a nats-server: so the kernel keeps attributes and names for a second at most, and pages not at all
(direct I/O). A page that outlived its read could be of another moment than what is on the disk, and would keep plain text in
memory that nobody locks. What takes longer than a millisecond runs in a thread; of one open file one read at a time.

There is no xattr handler on purpose (fs.py says why), and nothing can be changed: the kernel refuses it on a mount that is
read-only, and so do we, as root may remount it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import stat
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import pyfuse3
import trio

from encfs_js import fusemount
from encfs_js.mounts import mountpoint_of
from encfs_js.reply import figures_of, replies

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from encfs_js.viewtree import Found, Handle, ViewTree

log: Final = logging.getLogger("encfs_js")
TIMEOUT: Final = 1.0  # seconds
_TASKS: Final = 24
_AGAIN: Final = 0.5  # seconds until a busy mount is tried again

R = TypeVar("R")


async def _patiently(call: Callable[..., R], *args: object) -> R:
    """Call with wait=False, and where that would take long with wait=True in a thread."""
    try:
        return call(*args, wait=False)
    except BlockingIOError:
        return await trio.to_thread.run_sync(partial(call, *args, wait=True))


class ViewOperations(pyfuse3.Operations):
    """The requests of one view. answering: is called when the kernel is about to get its answer to FUSE_INIT."""

    supports_dot_lookup = False
    enable_acl = False
    enable_writeback_cache = False

    def __init__(self, tree: ViewTree, answering: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._tree = tree
        self._answering = answering
        self._handles: dict[int, tuple[Handle, trio.Lock]] = {}
        self._listings: dict[int, tuple[int, list[bytes]]] = {}
        self._serial = 0

    def init(self) -> None:
        """Tell whoever waits for it that the view is served."""
        self._answering()

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    # -- names

    @replies
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """Find an entry."""
        found = await _patiently(self._tree.lookup, parent_inode, name)
        self._tree.remember(found.number, parent_inode, name)
        return _entry(found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Let go of what the kernel does not know any more."""
        for number, count in inode_list:
            self._tree.forget(number, count)

    @replies
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """Return the attributes of a node; of one that has lost its name, as long as it is open, those of the open file."""
        try:
            return _entry(await _patiently(self._tree.stat, inode))
        except OSError:
            for handle, _ in self._handles.values():
                if handle.number == inode:
                    status = self._tree.io.fstat(handle.content.fd)
                    return _attributes(inode, status, handle.content.size)
            raise

    @replies
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:  # noqa: ARG002
        """Return the target of a symbolic link."""
        return self._tree.readlink(inode)

    @replies
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:  # noqa: ARG002
        """Return the backing file system's figures."""
        return figures_of(self._tree.io.statvfs(self._tree.root_fd))

    # -- contents

    @replies
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:  # noqa: ARG002
        """Open a regular file for reading."""
        if flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        handle = await _patiently(self._tree.open, inode)
        fh = self._next()
        self._handles[fh] = handle, trio.Lock()
        return pyfuse3.FileInfo(fh=fh, direct_io=True, keep_cache=False)

    @replies
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        """Return plain bytes."""
        handle, lock = self._handles[fh]
        async with lock:
            return await _patiently(self._tree.read, handle, off, size)

    @replies
    async def release(self, fh: int) -> None:
        """Close a handle."""
        handle, _ = self._handles.pop(fh)
        self._tree.close(handle)

    # -- directories

    @replies
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:  # noqa: ARG002
        """Open a directory."""
        names = self._tree.listing(inode)
        fh = self._next()
        self._listings[fh] = inode, names
        return fh

    @replies
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from the entry after `start_id`; the names are read again at the start."""
        number, names = self._listings[fh]
        if start_id == 0:
            names = self._tree.listing(number)
            self._listings[fh] = number, names
        for at, name in enumerate((b".", b"..", *names), 1):
            if at <= start_id:
                continue
            try:
                if at <= 2:
                    found = self._tree.stat(number if at == 1 else self._tree.parent(number))
                else:
                    found = await _patiently(self._tree.lookup, number, name)
            except FileNotFoundError:
                continue  # removed since the names were read, or a leftover that is not shown
            if not pyfuse3.readdir_reply(token, name, _entry(found), at):
                return
            if at > 2:
                self._tree.remember(found.number, number, name)

    @replies
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._listings.pop(fh, None)

    # -- changes

    @replies
    async def _refuse(self, *_: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    _refused: Any = _refuse
    setattr = mknod = mkdir = symlink = link = unlink = rmdir = rename = create = write = _refused


def _entry(found: Found) -> pyfuse3.EntryAttributes:
    entry = _attributes(found.number, found.status, found.size)
    entry.generation = found.generation
    return entry


def _attributes(number: int, status: os.stat_result, size: int) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = number
    entry.entry_timeout = entry.attr_timeout = TIMEOUT
    for name in ("mode", "uid", "gid", "rdev", "blksize", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
        setattr(entry, f"st_{name}", getattr(status, f"st_{name}"))
    # Two names of one file are two files here: what they hold depends on the names.
    entry.st_nlink = status.st_nlink if stat.S_ISDIR(status.st_mode) else 1
    entry.st_size = size
    return entry


# -- serving


def serve(
    tree: ViewTree,
    fuse: int,
    mountpoint: str,
    device: str,
    answering: Callable[[], None],
    listener: socket.socket | None,
) -> None:
    """Serve the view on the descriptor of /dev/fuse until it is unmounted.

    device: the mount's, which tells where it is when a directory above was moved. listener: where commands ask whether somebody
    serves it. SIGTERM and SIGINT unmount it, a second one lazily. A bug leaves the mount dead, and not a bare directory that
    could be taken for an empty store.
    """
    pyfuse3.init(ViewOperations(tree, answering), f"/dev/fd/{fuse}", set())
    try:
        trio.run(_main, mountpoint, device, listener)
    except BaseException:
        log.critical("%s: the view has failed", mountpoint, exc_info=True)
        raise
    pyfuse3.close(unmount=False)
    log.info("%s unmounted", mountpoint)


async def _main(mountpoint: str, device: str, listener: socket.socket | None) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_unmount_when_told, mountpoint, device)
        if listener is not None:
            nursery.start_soon(_hang_up, listener)
        await pyfuse3.main(max_tasks=_TASKS)
        nursery.cancel_scope.cancel()


async def _hang_up(listener: socket.socket) -> None:
    """Take each connection, and end it: who asks learns from the kernel who listens (presence.py)."""
    listening = trio.socket.from_stdlib_socket(listener)
    while True:
        with contextlib.suppress(OSError):
            connection, _ = await listening.accept()
            connection.close()


async def _unmount_when_told(mountpoint: str, device: str) -> None:
    told, busy = 0, False
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            told += 1
            while True:
                try:
                    pid = fusemount.unmounting(mountpoint_of(device) or mountpoint, lazy=told > 1)
                except OSError as problem:
                    log.error("%s: fusermount3 could not be started: %s", mountpoint, problem.strerror)
                    break
                if not (await trio.to_thread.run_sync(os.waitpid, pid, 0))[1]:
                    break
                if not busy:
                    log.warning("%s is busy: it will be unmounted when the last file is closed", mountpoint)
                busy = True
                with trio.move_on_after(_AGAIN):
                    await signals.__anext__()
                    told += 1
