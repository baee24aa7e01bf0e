"""The FUSE face of a store: unpack a request, call the synchronous core, pack the reply, map what went wrong to an errno.

Concurrency. One thread runs everything; a handler without `await` is atomic for all others, and that is nearly all of them.
Awaited are only: fsync and fsyncdir on a disk that has shown itself slow, the warming of cold pages before a read, and the
growing of a file by more than 1 MiB. None of them touches the core from a thread: a thread gets a descriptor and syncs it, or
reads it into a scratch buffer. The kernel holds back writes to a file while it changes its size, and sends an fsync only after
the writes it covers were answered, so no lock is needed here but one: while a file is sealed anew (rewrite.py), whoever wants
to change it waits at the gate.

Why no xattr handler exists: left at ENOSYS the kernel stops asking; with any other answer it asks for security.capability
before every write, which made small writes 20 times slower. flush is left at ENOSYS as well: the kernel writes back at
close(2) by itself, and nothing else is to be done then. fsync and fsyncdir must exist: a missing one is success for ever.
"""

from __future__ import annotations

import bisect
import errno
import operator
import os
import stat
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from encfs_js import journal, revive, times
from encfs_js.advice import Advice
from encfs_js.gate import Gate
from encfs_js.journal import Entry, Journal
from encfs_js.pace import Pace, await_pages, pages_around
from encfs_js.reply import Owner, entry_of, figures_of, nothing, replies, sets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.files import Files
    from encfs_js.tree import Node, Tree

# What `fh` says beside the node id: nothing has to be remembered per handle.
_SYNC: Final = 1 << 63  # direct I/O does not ask for an fsync after an O_SYNC write; we must
_DIRECT: Final = 1 << 62
_WRITER: Final = 1 << 61
_NODE: Final = (1 << 61) - 1
_DIRECTORY_SERIALS: Final = 1 << 12
_DIRECTORY_SHIFT: Final = 48

_GROW: Final = 1 << 20


class Operations(pyfuse3.Operations):
    """The requests of one mount. writeback: the kernel caches writes. read_only: nothing may change.

    notes: what is about to be done to names, and what workers that died have done and did not answer. owner: as Owner has it.
    """

    supports_dot_lookup = False
    enable_acl = False

    def __init__(
        self,
        tree: Tree,
        files: Files,
        notes: Journal,
        *,
        writeback: bool,
        read_only: bool,
        owner: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.enable_writeback_cache = writeback
        self._tree = tree
        self._files = files
        self._writeback = writeback
        self._read_only = read_only
        self._notes = notes
        self._owner = Owner(owner)
        self.gate = Gate(files)
        self.answering: Callable[[], None] = lambda: None
        self.answered = trio.Event()
        self._pace_of_syncs = Pace()
        self._pace_of_reads = Pace()
        self.advice = Advice(tree.path, writeback=writeback)
        self._listings: dict[int, list[tuple[int, bytes]]] = {}
        self._serial = 0

    def init(self) -> None:
        """Note that the kernel is about to get its answer to FUSE_INIT, after which it can be tuned."""
        self.answering()
        self.answered.set()

    def _may_write(self) -> None:
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _changes(self, entry: Entry) -> bool:
        """Note a change of names that is about to be made. Returns False when a worker that died has made it."""
        self._may_write()
        if self._notes.repeats(entry):
            return False
        if noted := revive.complete(self._tree, entry):
            self._notes.note(noted)
        return True

    def _entry(self, node: Node, found: os.stat_result) -> pyfuse3.EntryAttributes:
        return self._owner.show(entry_of(self._files, node, found))

    # -- names

    @replies
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """Find an entry; that there is none is cached by the kernel as well."""
        try:
            node, found = self._tree.lookup(self._tree.node(parent_inode), name)
        except FileNotFoundError:
            return nothing()
        return self._entry(node, found)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Let go of what has no name; apart from that the table is a cache, and lookups are not counted."""
        for inode, _ in inode_list:
            self._files.forget(inode)

    @replies
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        """Return the attributes of a node."""
        node = self._tree.node(inode)
        return self._entry(node, self._tree.stat(node))

    @replies
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:  # noqa: ARG002
        """Return the target of a symbolic link."""
        return self._tree.readlink(self._tree.node(inode))

    @replies
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a FIFO, socket, device or empty file."""
        parent = self._tree.node(parent_inode)
        if self._changes(Entry(journal.MKNOD, parent_inode, name, pid=ctx.pid)):
            return self._entry(*self._tree.mknod(parent, name, mode, rdev, ctx.uid, ctx.gid))
        return self._entry(*self._tree.made(parent, name, mode, ctx.uid, ctx.gid))

    @replies
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a directory."""
        parent = self._tree.node(parent_inode)
        if self._changes(Entry(journal.MKDIR, parent_inode, name, pid=ctx.pid)):
            return self._entry(*self._tree.mkdir(parent, name, mode, ctx.uid, ctx.gid))
        return self._entry(*self._tree.made(parent, name, stat.S_IFDIR, ctx.uid, ctx.gid))

    @replies
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Make a symbolic link."""
        parent = self._tree.node(parent_inode)
        if self._changes(Entry(journal.SYMLINK, parent_inode, name, pid=ctx.pid)):
            return self._entry(*self._tree.symlink(parent, name, target, ctx.uid, ctx.gid))
        return self._entry(*self._tree.made(parent, name, stat.S_IFLNK, ctx.uid, ctx.gid))

    @replies
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Give a node another name."""
        new_parent = self._tree.node(new_parent_inode)
        if self._changes(Entry(journal.LINK, inode, b"", new_parent_inode, new_name, pid=ctx.pid)):
            return self._entry(*self._tree.link(self._tree.node(inode), new_parent, new_name))
        return self._entry(*self._tree.lookup(new_parent, new_name))

    @replies
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove a name."""
        await self.gate.to_remove((parent_inode, name))
        if self._changes(Entry(journal.UNLINK, parent_inode, name, pid=ctx.pid)):
            self._tree.unlink(self._tree.node(parent_inode), name)

    @replies
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Remove an empty directory."""
        if self._changes(Entry(journal.RMDIR, parent_inode, name, pid=ctx.pid)):
            self._tree.rmdir(self._tree.node(parent_inode), name)

    @replies
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:  # fmt: skip
        """Move a name; RENAME_NOREPLACE and RENAME_EXCHANGE are the backing file system's."""
        await self.gate.to_remove((parent_inode_new, name_new))
        if self._changes(
            Entry(journal.RENAME, parent_inode_old, name_old, parent_inode_new, name_new, flags=flags, pid=ctx.pid)
        ):
            old, new = self._tree.node(parent_inode_old), self._tree.node(parent_inode_new)
            self._tree.rename(old, name_old, new, name_new, flags)

    # -- attributes

    @replies
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,  # noqa: ARG002
    ) -> pyfuse3.EntryAttributes:  # fmt: skip
        """Change size, owner, mode or times. The owner goes before the mode: changing it clears set-id bits."""
        self._may_write()
        tree = self._tree
        node = tree.node(inode)
        await self.gate.to_change(node)
        if fields.update_size:
            self._notes.change(inode)
            while not self._files.truncate(node, attr.st_size, _GROW):
                await trio.lowlevel.checkpoint()
                await self.gate.to_change(node)
                self._notes.change(inode)
            self._files.detach(node)
        if fields.update_uid or fields.update_gid or not sets(fields):
            uid, gid = attr.st_uid if fields.update_uid else -1, attr.st_gid if fields.update_gid else -1
            tree.chown(node, *self._owner.real(uid, gid))
        if fields.update_mode:
            tree.chmod(node, attr.st_mode)
        found = tree.stat(node)
        self._files.disturbed |= node is self._files.watched
        if fields.update_mtime and fields.update_ctime and not fields.update_atime:
            times.flushed(tree, node, found, attr.st_mtime_ns)
        elif fields.update_atime or fields.update_mtime:
            mtime = attr.st_mtime_ns if fields.update_mtime else times.mtime_ns(node, found)
            times.put(tree, node, attr.st_atime_ns if fields.update_atime else found.st_atime_ns, mtime)
            found = tree.stat(node)
        return self._entry(node, found)

    @replies
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:  # noqa: ARG002
        """Return the backing file system's figures."""
        return figures_of(self._tree.io.statvfs(self._tree.root_fd))

    # -- contents

    def _opened(self, node: Node, flags: int) -> pyfuse3.FileInfo:
        write = flags & os.O_ACCMODE != os.O_RDONLY
        direct = self._files.open(node, write=write)
        fh = node.ino
        if write:
            fh |= _WRITER | (_DIRECT if direct else 0)
            self.advice.writes(node)
        if flags & os.O_SYNC == os.O_SYNC or flags & os.O_DSYNC:
            fh |= _SYNC
        return pyfuse3.FileInfo(fh=fh, direct_io=direct, keep_cache=True)

    def _cut_at_open(self, node: Node, ctx: pyfuse3.RequestContext) -> None:
        """Empty a file as O_TRUNC does; the set-id bits go with the content, which the kernel leaves to us here."""
        self._notes.change(node.ino)
        self._files.truncate(node, 0)
        mode = self._tree.stat(node).st_mode
        if ctx.uid and mode & (stat.S_ISUID | stat.S_ISGID):
            drop = stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0)
            self._tree.chmod(node, mode & ~drop)

    @replies
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a regular file; O_TRUNC comes with it."""
        node = self._tree.node(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._may_write()
        try:
            if flags & os.O_TRUNC:
                await self.gate.to_change(node)
                self._cut_at_open(node, ctx)
            self.advice.opens(node, flags)
            return self._opened(node, flags)
        except BaseException:
            self._files.detach(node)
            raise

    @replies
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Make and open a regular file."""
        parent = self._tree.node(parent_inode)
        await self.gate.to_remove((parent_inode, name))
        exclusive = self._changes(Entry(journal.CREATE, parent_inode, name, pid=ctx.pid)) and bool(flags & os.O_EXCL)
        node, fd, found = self._tree.create(parent, name, mode, ctx.uid, ctx.gid, exclusive=exclusive)
        if node.file is None:
            self._files.adopt(node, fd, writable=True, found=found)
        else:
            self._tree.io.close(fd)
        if flags & os.O_TRUNC and found.st_size:
            self._cut_at_open(node, ctx)
            found = self._tree.stat(node)
        return self._opened(node, flags), self._entry(node, found)

    @replies
    async def read(self, fh: int, off: int, size: int) -> memoryview:  # type: ignore[override]
        """Return plain bytes. What is not in memory is fetched so that nobody else has to wait for the disk."""
        node = self._tree.node(fh & _NODE)
        await self.gate.to_read(node)
        try:
            return self._files.read(node, off, size, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            return self._files.read(node, off, size)
        await self._wait(node, self._pace_of_reads, await_pages, self._tree.io, node.fd, *pages_around(off, size))
        await self.gate.to_read(node)
        return self._files.read(node, off, size)

    @replies
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write plain bytes."""
        node = self._tree.node(fh & _NODE)
        cached = self._writeback and not fh & _DIRECT
        await self.gate.to_change(node)
        self._notes.change(node.ino)
        self.advice.wrote(node, len(buf))
        while not (done := self._files.write(node, off, buf, cached=cached, most=_GROW)) and buf:
            await trio.lowlevel.checkpoint()
            await self.gate.to_change(node)
            self._notes.change(node.ino)
        if fh & _SYNC and fh & _DIRECT:
            await self._wait(node, self._pace_of_syncs, self._tree.io.fsync, node.fd)
        return done

    @replies
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Bring a file to the disk."""
        node = self._tree.node(fh & _NODE)
        self._files.attach(node)
        sync = self._tree.io.fdatasync if datasync else self._tree.io.fsync
        await self._wait(node, self._pace_of_syncs, sync, node.fd)

    async def _wait(self, node: Node, pace: Pace, call: Callable[..., object], *args: object) -> None:
        """Wait for the disk with a node's descriptor, which stays open meanwhile."""
        self._files.hold(node)
        try:
            await pace.run(call, *args)
        finally:
            self._files.let_go(node)

    @replies
    async def release(self, fh: int) -> None:
        """Close a handle."""
        node = self._tree.nodes.get(fh & _NODE)
        if node is not None:
            self._files.release(node, write=bool(fh & _WRITER), direct=bool(fh & _DIRECT))
            self.advice.closed(node)

    # -- directories

    @replies
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:  # noqa: ARG002
        """Open a directory. The handle is its node id, and a serial number where that leaves room."""
        self._tree.node(inode)
        if inode >> _DIRECTORY_SHIFT:
            return inode
        self._serial = (self._serial + 1) % _DIRECTORY_SERIALS
        return inode | self._serial << _DIRECTORY_SHIFT

    @replies
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from the entry after `start_id`; the names are read again at the start."""
        directory = self._tree.node(_directory(fh))
        if start_id == 0 or fh not in self._listings:
            self._listings[fh] = self._tree.listing(directory)
        for offset, name, known in ((1, b".", directory), (2, b"..", self._tree.parent(directory))):
            if start_id < offset:
                entry = self._entry(known, self._tree.stat(known))
                if not pyfuse3.readdir_reply(token, name, entry, offset):
                    return
        listing = self._listings[fh]
        for offset, name in listing[bisect.bisect_right(listing, start_id, key=operator.itemgetter(0)) :]:
            try:
                node, found = self._tree.lookup(directory, name)
            except FileNotFoundError:
                continue  # removed since the names were read
            if not pyfuse3.readdir_reply(token, name, self._entry(node, found), offset):
                return

    @replies
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        self._listings.pop(fh, None)

    @replies
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make the entries of a directory durable."""
        fd = self._tree.open(self._tree.node(_directory(fh)), os.O_RDONLY | os.O_DIRECTORY)
        try:
            await self._pace_of_syncs.run(self._tree.io.fdatasync if datasync else self._tree.io.fsync, fd)
        finally:
            self._tree.io.close(fd)


def _directory(fh: int) -> int:
    return fh & ((1 << _DIRECTORY_SHIFT) - 1) if fh >> _DIRECTORY_SHIFT < _DIRECTORY_SERIALS else fh
