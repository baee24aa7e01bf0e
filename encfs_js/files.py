"""The contents of a mounted store: opens backing files, applies the crash rule when one is first met, reads and writes.

This is where an authentication failure gets its name: the ERROR line, the guard, and IntegrityError (EIO). Synchronous.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections import Counter
from typing import TYPE_CHECKING, Final

from encfs_js import crash, redo, times
from encfs_js.errors import IntegrityError
from encfs_js.format import MAGIC, DamagedPageError
from encfs_js.guard import complaint, protected_directory, subject
from encfs_js.opening import open_backing
from encfs_js.redo import PlainFile
from encfs_js.reserve import Promises
from encfs_js.sealed import SealedFile
from encfs_js.tree import Node

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from encfs_js.reserve import Reserve
    from encfs_js.sealed import FileKeys
    from encfs_js.state import State
    from encfs_js.tree import Tree

log: Final = logging.getLogger("encfs_js")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Files:
    """The contents below one tree.

    plaintext: files that are not sealed are shown (and sealed before a change) instead of refused. state: which files a
    crash may have touched. redo_key: the MAC key of redo files. reserve: None on a read-only mount.
    """

    def __init__(
        self,
        tree: Tree,
        keys: FileKeys,
        state: State,
        redo_key: bytes,
        reserve: Reserve | None,
        now: Callable[[], datetime],
        *,
        plaintext: bool,
        writeback: bool,
    ) -> None:
        self.tree = tree
        self.io = tree.io
        self.keys = keys
        self.state = state
        self.redo_key = redo_key
        self._reserve = reserve
        self._now = now
        self.plaintext = plaintext
        self.writeback = writeback
        # Who waits for the disk with a node's descriptor: handles from before this worker are not counted in `opens`.
        self.awaited: Counter[Node] = Counter()
        self.promises = Promises(tree.io, reserve) if reserve is not None else None
        self._reported: set[tuple[int, int]] = set()
        self.unfinished: set[Node] = set()
        # While a file is sealed anew (rewrite.py): the one that is read for it, and whether its content has changed since;
        # the one whose content must not change; the one that must not be read either.
        self.watched: Node | None = None
        self.disturbed = False
        self.moved = 0  # bytes that were written for it
        self.frozen: Node | None = None
        self.copying: Node | None = None
        self._forgotten: set[Node] = set()
        self.trimmed = 0
        self.not_swept = 0
        self.swept: State | None = None

    # -- opening and closing

    def attach(self, node: Node, *, write: bool = False) -> SealedFile | PlainFile:
        """Return the node's content, opening its backing file if need be. Raises OSError."""
        if node.file is not None and (node.writable or not write):
            return node.file
        fd, writable = open_backing(self.tree, node, write=write, read_only=self._reserve is None)
        found = self.io.fstat(fd)
        if found.st_ino != node.ino or not stat.S_ISREG(found.st_mode):
            self.io.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if node.fd >= 0:
            # The number stays: a thread may be syncing it.
            self.io.dup2(fd, node.fd, inheritable=False)
            self.io.close(fd)
            fd = node.fd
        self.adopt(node, fd, writable=writable, found=found)
        assert node.file is not None
        return node.file

    def adopt(self, node: Node, fd: int, *, writable: bool, found: os.stat_result) -> None:
        """Make `fd` the node's open backing file."""
        node.fd, node.writable = fd, writable
        try:
            if not node.checked and writable and self.state.touched(found.st_ctime_ns):
                self._trim(node)
            node.checked = True
            node.file = self._load(fd)
        except BaseException:
            self.io.close(fd)
            node.fd, node.file = -1, None
            raise
        if node.file.damage is not None:
            self.damaged(node, node.file.damage)

    def _load(self, fd: int) -> SealedFile | PlainFile:
        if self.plaintext:
            start = bytearray(len(MAGIC))
            if self.io.preadv(fd, [start], 0) and start != MAGIC:
                return PlainFile(self.io, fd)
        return SealedFile(self.io, fd, self.keys)

    def detach(self, node: Node) -> None:
        """Close the backing file if nobody needs it. One without a name stays until the kernel forgets it."""
        if node.fd >= 0 and node.opens <= 0 and node.names and not self.awaited[node]:
            self._close(node)

    def _close(self, node: Node) -> None:
        if node.file is not None:
            node.size = node.file.size
        times.settle(self.tree, node)
        self.io.close(node.fd)
        node.fd, node.file, node.writable, node.opens = -1, None, False, 0
        self.tree.drop_if_gone(node)

    def forget(self, ino: int) -> None:
        """Let go of a node that the kernel has forgotten, if it has no name: nobody can have it open."""
        node = self.tree.nodes.get(ino)
        if node is None:
            return
        node.unsure = False
        if node.names:
            return
        if self.awaited[node]:
            self._forgotten.add(node)
            return
        if node.handed:
            self.tree.let_go(ino)
        if node.held >= 0:
            self.io.close(node.held)
            node.held = -1
            self.tree.drop_if_gone(node)
        if node.fd >= 0:
            self._close(node)

    def hold(self, node: Node) -> None:
        """Keep a node's descriptor open: somebody waits for the disk with it."""
        self.awaited[node] += 1

    def let_go(self, node: Node) -> None:
        """Need the descriptor no longer."""
        self.awaited[node] -= 1
        if self.awaited[node]:
            return
        del self.awaited[node]
        if node in self._forgotten:
            self._forgotten.remove(node)
            self.forget(node.ino)
        elif node.opens < 0:
            self.detach(node)

    def inherit(self, ino: int, fd: int) -> None:
        """Go on with a file that has lost its last name while a worker before this one had it open."""
        node = self.tree.nodes.get(ino)
        if node is not None:  # that worker died before it removed the name, or it was given another
            self.io.close(fd)
            self.tree.let_go(ino)
            return
        node = self.tree.nodes[ino] = Node(ino)
        node.held, node.handed = fd, True

    def open(self, node: Node, *, write: bool) -> bool:
        """Count one more handle. Returns whether its writes must go to the disk one by one, for want of room (reserve.py).

        All writers of a file go the same way: the kernel does not write back what it has cached before a direct read.
        """
        self.attach(node, write=write)
        node.opens += 1
        if not write or not self.writeback or self.promises is None:
            return False
        if node.cached_writers or not (node.direct_writers or not self.promises.has_room_for(node)):
            node.cached_writers += 1
            self.promises.writers.add(node)
            return False
        node.direct_writers += 1
        return True

    def release(self, node: Node, *, write: bool, direct: bool) -> None:
        """Count one handle less: one that was opened so."""
        node.opens -= 1
        if direct:
            node.direct_writers = max(node.direct_writers - 1, 0)
        elif write and node.cached_writers:
            node.cached_writers -= 1
            if not node.cached_writers and self.promises is not None:
                self.promises.writers.discard(node)
        self.detach(node)

    def refill(self) -> None:
        """Take the reserve back when there is room again."""
        if self._reserve is not None:
            self._reserve.refill()
        self.save_guard()

    def close_all(self) -> None:
        """Close every backing file, at the end of a mount."""
        for node in list(self.tree.nodes.values()):
            if node.fd >= 0:
                self._close(node)

    # -- content

    def size(self, node: Node) -> int:
        """Return the plain size, from the open file or by a look at the last page."""
        if node.file is not None:
            return node.file.size
        if node.size is None:
            size = self.attach(node).size
            self.detach(node)
            return size
        return node.size

    def read(self, node: Node, offset: int, size: int, flags: int = 0) -> memoryview:
        """Return plain bytes, valid until the next call here. Raises IntegrityError; BlockingIOError as SealedFile.read."""
        file = self.attach(node)
        try:
            return file.read(offset, size, flags)
        except DamagedPageError as exc:
            raise self.damaged(node, exc.page) from None

    def write(self, node: Node, offset: int, data: bytes, *, cached: bool, most: int | None = None) -> int:
        """Write, and return how much was taken. cached: promised already, so all or an error. 0: `most` of a gap is filled."""
        try:
            file = self._sealed(node)
            if not cached:
                node.mtime_ns = None
                node.direct_writers = node.direct_writers or int(self.writeback)  # opened by a worker before this one
            elif self.promises is not None and node not in self.promises.writers:
                node.cached_writers = 1
                self.promises.writers.add(node)
            if self.writeback and not cached and self.promises is not None:
                self.promises.leave_room(node, offset + len(data) - file.size)
            done = self._write(file, offset, data, most, cached=cached)
        except DamagedPageError as exc:
            raise self.damaged(node, exc.page) from None
        except OSError as exc:
            if cached:
                name = os.fsdecode(self.tree.path(node)) if node.names else "(deleted)"
                log.error("%s: %d bytes at %d, already accepted, are lost: %s", name, len(data), offset, exc.strerror)
            raise
        if file.wants_new_id:
            self._rewrite(node)
        return done

    def _write(self, file: SealedFile, offset: int, data: bytes, most: int | None, *, cached: bool) -> int:
        done = 0
        try:
            if most is not None and not file.grow(offset, most):
                return 0
            done = file.write(offset, data)
        except OSError as exc:
            if exc.errno not in _FULL or not cached:
                raise
        if done == len(data) or not cached:
            return done
        if self._reserve is None or not self._reserve.give_up():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log.warning(
            "the disk is full: the reserve of %d bytes is given up for data already accepted", self._reserve.size
        )
        rest = memoryview(data)[done:]
        if file.write(offset + done, rest) < len(rest):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def truncate(self, node: Node, size: int, most: int | None = None) -> bool:
        """Cut or grow to `size`; growing by at most `most` bytes in one call. Returns whether `size` is reached."""
        if self.tree.guard.closed and node.names and size < self.size(node):
            self.tree.guard.check(self.tree.path(node))
        try:
            if size == 0:
                return self._empty(node)
            file = self._sealed(node)
            if size > file.size:
                return file.grow(size, most)
            file.truncate(size)
        except DamagedPageError as exc:
            raise self.damaged(node, exc.page) from None
        return True

    def _empty(self, node: Node) -> bool:
        file = self.attach(node, write=True)
        self.changes(node)
        if isinstance(file, PlainFile):
            self.io.ftruncate(node.fd, 0)  # an empty file is a sealed one
            node.file = SealedFile(self.io, node.fd, self.keys)
        else:
            file.truncate(0)
        return True

    def _sealed(self, node: Node) -> SealedFile:
        if self._reserve is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        file = self.attach(node, write=True)
        self.changes(node)
        if isinstance(file, PlainFile):
            file = self._rewrite(node)
        elif file.size and not node.dated:
            self.date(node)
            self.io.fsync(node.fd)
        node.dated = True
        return file

    def date(self, node: Node) -> None:
        """Give a file a ctime of this run, which has to be on the disk before its pages first change in this run.

        Pages reach the disk before their inode does (fsync itself writes them first). A crash in between would leave a
        changed file with a ctime of long ago, to which the crash rule does not apply.
        """
        found = self.io.fstat(node.fd)
        self.io.utime(node.fd, ns=(found.st_atime_ns, found.st_mtime_ns))

    def _rewrite(self, node: Node) -> SealedFile:
        """Seal the node's file anew, in place: a plain one before its first change, or one whose id is used up."""
        assert node.file is not None
        path = self.tree.path(node)
        try:
            redo.seal_in_place(self.io, self.tree.meta_fd, self.redo_key, node.file, path, self.keys)
        except redo.UnfinishedError:
            self.was_interrupted(node, path)
            raise
        node.file = file = SealedFile(self.io, node.fd, self.keys)
        return file

    def was_interrupted(self, node: Node, path: bytes) -> None:
        """Refuse changes of a file whose redo file could not be put in place."""
        log.error("%s: rewriting it was interrupted; it cannot be changed until the next mount", os.fsdecode(path))
        self.unfinished.add(node)
        node.opens += 1  # stays open: the inode number in the redo file must not become another file's
        node.file = SealedFile(self.io, node.fd, self.keys)

    def changes(self, node: Node) -> None:
        """Note that a file's content is about to change. Raises OSError when it must not."""
        if node in self.unfinished:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if node is self.watched:
            self.disturbed = True

    def tally(self, size: int) -> None:
        """Count bytes that were written to seal files anew."""
        self.moved += size

    # -- damage

    def damaged(self, node: Node, page: int) -> IntegrityError:
        """Close the guard, log a damaged page once for every time that closed it, and return the error to raise."""
        path = self.tree.path(node) if node.names else b"(deleted)"
        guards = bool(node.names) and self._reserve is not None
        closed = guards and self.tree.guard.close(path, page, self._now())
        if closed or (node.ino, page) not in self._reported:
            self._reported.add((node.ino, page))
            assert isinstance(node.file, SealedFile)
            self.not_swept += node.file.refused is not None
            directory, (what, until) = protected_directory(path), complaint(node.file.refused)
            log.error(
                "%s page %d %s (%s); the guard is closed: nothing below %s can be removed, renamed or cut until %s"
                " and the guard cleared (encfs-js guard clear STORE %s)",
                os.fsdecode(path), page, what, subject(directory), os.fsdecode(directory), until, os.fsdecode(directory),
            )  # fmt: skip
            self.save_guard()
        return IntegrityError(path, page)

    def save_guard(self) -> None:
        """Write down guards that were closed; what does not work is tried again by the housekeeping."""
        if self._reserve is not None:
            try:
                self.tree.guard.save(self._reserve.make_room_for)
            except OSError as exc:
                log.warning("the guard holds, but could not be written down yet: %s", exc.strerror)

    def _trim(self, node: Node) -> None:
        sizes = crash.trim(self.io, node.fd, self.keys, plaintext=self.plaintext)
        if sizes is not None:
            self.trimmed += 1
            log.warning(
                "%s: cut from %d to %d bytes: what follows was never synced before the unclean stop",
                os.fsdecode(self.tree.path(node)), *sizes,
            )  # fmt: skip
