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
from encfs_js.guard import protected_directory, subject
from encfs_js.opening import open_backing
from encfs_js.redo import PlainFile
from encfs_js.reserve import SLACK, still_to_come
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
        self._tree = tree
        self._io = tree.io
        self._keys = keys
        self.state = state
        self._redo_key = redo_key
        self._reserve = reserve
        self._now = now
        self._plaintext = plaintext
        self.writeback = writeback
        # Who waits for the disk with a node's descriptor: handles from before this worker are not counted in `opens`.
        self.awaited: Counter[Node] = Counter()
        self._writers: set[Node] = set()
        self._reported: set[tuple[int, int]] = set()
        self._unfinished: set[Node] = set()
        self.trimmed = 0
        self.not_swept = 0
        self.swept: State | None = None

    # -- opening and closing

    def attach(self, node: Node, *, write: bool = False) -> SealedFile | PlainFile:
        """Return the node's content, opening its backing file if need be. Raises OSError."""
        if node.file is not None and (node.writable or not write):
            return node.file
        fd, writable = open_backing(self._tree, node, write=write, read_only=self._reserve is None)
        found = self._io.fstat(fd)
        if found.st_ino != node.ino or not stat.S_ISREG(found.st_mode):
            self._io.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if node.fd >= 0:
            # The number stays: a thread may be syncing it.
            self._io.dup2(fd, node.fd, inheritable=False)
            self._io.close(fd)
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
            self._io.close(fd)
            node.fd, node.file = -1, None
            raise
        if node.file.damage is not None:
            self.damaged(node, node.file.damage)

    def mend(self, ino: int) -> None:
        """Make a file whole that a worker was changing when it died; whoever asked for it may not ask again."""
        node = self._tree.nodes.get(ino)
        if node is None or self._reserve is None:
            return
        try:
            fd, _ = open_backing(self._tree, node, write=True, read_only=False)
            try:
                found = self._io.fstat(fd)
                if found.st_ino == ino and stat.S_ISREG(found.st_mode):
                    crash.end(self._io, fd, self._keys, plaintext=self._plaintext)
            finally:
                self._io.close(fd)
        except OSError as exc:
            log.warning("node %d, which a worker was changing when it died, cannot be mended: %s", ino, exc.strerror)

    def _load(self, fd: int) -> SealedFile | PlainFile:
        if self._plaintext:
            start = bytearray(len(MAGIC))
            if self._io.preadv(fd, [start], 0) and start != MAGIC:
                return PlainFile(self._io, fd)
        return SealedFile(self._io, fd, self._keys)

    def detach(self, node: Node) -> None:
        """Close the backing file if nobody needs it. One without a name stays until the kernel forgets it."""
        if node.fd >= 0 and node.opens <= 0 and node.names and not self.awaited[node]:
            self._close(node)

    def _close(self, node: Node) -> None:
        if node.file is not None:
            node.size = node.file.size
        times.settle(self._tree, node)
        self._io.close(node.fd)
        node.fd, node.file, node.writable, node.opens = -1, None, False, 0
        self._tree.drop_if_gone(node)

    def forget(self, ino: int) -> None:
        """Let go of a node that the kernel has forgotten, if it has no name: nobody can have it open."""
        node = self._tree.nodes.get(ino)
        if node is None:
            return
        node.unsure = False
        if node.names:
            return
        if node.handed:
            self._tree.let_go(ino)
        if node.held >= 0:
            self._io.close(node.held)
            node.held = -1
            self._tree.drop_if_gone(node)
        if node.fd >= 0:
            self._close(node)

    def inherit(self, ino: int, fd: int) -> None:
        """Go on with a file that has lost its last name while a worker before this one had it open."""
        node = self._tree.nodes.get(ino)
        if node is not None:  # that worker died before it removed the name, or it was given another
            self._io.close(fd)
            self._tree.let_go(ino)
            return
        node = self._tree.nodes[ino] = Node(ino)
        node.held, node.handed = fd, True

    def open(self, node: Node, *, write: bool) -> bool:
        """Count one more handle. Returns whether its writes must go to the disk one by one, for want of room (reserve.py).

        All writers of a file go the same way: the kernel does not write back what it has cached before a direct read.
        """
        self.attach(node, write=write)
        node.opens += 1
        if not write or not self.writeback:
            return False
        if node.cached_writers or not (node.direct_writers or not self._has_room(node)):
            node.cached_writers += 1
            self._writers.add(node)
            return False
        node.direct_writers += 1
        return True

    def _has_room(self, node: Node) -> bool:
        assert self._reserve is not None
        reserve = self._reserve
        reserve.refill()
        free = reserve.available() - SLACK
        if free > (len(self._writers) + 1) * still_to_come(0):
            return True
        sizes = [self._io.fstat(other.fd).st_size for other in {*self._writers, node}]
        return free > sum(still_to_come(size) for size in sizes)

    def _leave_room(self, node: Node, growth: int) -> None:
        """Refuse a direct write of `growth` more bytes that would take room promised to files written through the cache."""
        others = self._writers - {node}
        if growth <= 0 or self._reserve is None or not others:
            return
        promised = sum(still_to_come(self._io.fstat(other.fd).st_size) for other in others)
        if self._reserve.available() < promised + growth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def release(self, node: Node, *, write: bool, direct: bool) -> None:
        """Count one handle less: one that was opened so."""
        node.opens -= 1
        if direct:
            node.direct_writers = max(node.direct_writers - 1, 0)
        elif write and node.cached_writers:
            node.cached_writers -= 1
            if not node.cached_writers:
                self._writers.discard(node)
        self.detach(node)

    def refill(self) -> None:
        """Take the reserve back when there is room again."""
        if self._reserve is not None:
            self._reserve.refill()
        self.save_guard()

    def close_all(self) -> None:
        """Close every backing file, at the end of a mount."""
        for node in list(self._tree.nodes.values()):
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
            elif node not in self._writers:
                node.cached_writers = 1
                self._writers.add(node)
            if self.writeback and not cached:
                self._leave_room(node, offset + len(data) - file.size)
            done = self._write(file, offset, data, most, cached=cached)
        except DamagedPageError as exc:
            raise self.damaged(node, exc.page) from None
        except OSError as exc:
            if cached:
                name = os.fsdecode(self._tree.path(node)) if node.names else "(deleted)"
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
        if self._tree.guard.closed and node.names and size < self.size(node):
            self._tree.guard.check(self._tree.path(node))
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
        self._refuse_unfinished(node)
        if isinstance(file, PlainFile):
            self._io.ftruncate(node.fd, 0)  # an empty file is a sealed one
            node.file = SealedFile(self._io, node.fd, self._keys)
        else:
            file.truncate(0)
        return True

    def _sealed(self, node: Node) -> SealedFile:
        if self._reserve is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        file = self.attach(node, write=True)
        self._refuse_unfinished(node)
        if isinstance(file, PlainFile):
            file = self._rewrite(node)
        elif file.size and not node.dated:
            self._date(node)
        node.dated = True
        return file

    def _date(self, node: Node) -> None:
        """Bring a ctime of this run to the disk before the first change of a file's pages in this run.

        Pages reach the disk before their inode does (fsync itself writes them first). A crash in between would leave a
        changed file with a ctime of long ago, to which the crash rule does not apply.
        """
        found = self._io.fstat(node.fd)
        self._io.utime(node.fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        self._io.fsync(node.fd)

    def _rewrite(self, node: Node) -> SealedFile:
        """Seal the node's file anew, in place: a plain one before its first change, or one whose id is used up."""
        assert node.file is not None
        path = self._tree.path(node)
        try:
            redo.seal_in_place(self._io, self._tree.meta_fd, self._redo_key, node.file, path, self._keys)
        except redo.UnfinishedError:
            log.error("%s: rewriting it was interrupted; it cannot be changed until the next mount", os.fsdecode(path))
            self._unfinished.add(node)
            node.opens += 1  # stays open: the inode number in the redo file must not become another file's
            node.file = SealedFile(self._io, node.fd, self._keys)
            raise
        node.file = file = SealedFile(self._io, node.fd, self._keys)
        return file

    def _refuse_unfinished(self, node: Node) -> None:
        if node in self._unfinished:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    # -- damage

    def damaged(self, node: Node, page: int) -> IntegrityError:
        """Close the guard, log a damaged page once for every time that closed it, and return the error to raise."""
        path = self._tree.path(node) if node.names else b"(deleted)"
        guards = bool(node.names) and self._reserve is not None
        closed = guards and self._tree.guard.close(path, page, self._now())
        if closed or (node.ino, page) not in self._reported:
            self._reported.add((node.ino, page))
            directory = protected_directory(path)
            log.error(
                "%s page %d does not authenticate (%s); the guard is closed: nothing below %s can be removed, renamed or cut"
                " until the file is restored from a backup, or given up, and the guard cleared"
                " (encfs-js guard clear STORE %s)",
                os.fsdecode(path), page, subject(directory), os.fsdecode(directory), os.fsdecode(directory),
            )  # fmt: skip
            self.save_guard()
        return IntegrityError(path, page)

    def save_guard(self) -> None:
        """Write down guards that were closed; what does not work is tried again by the housekeeping."""
        if self._reserve is not None:
            try:
                self._tree.guard.save(self._reserve.make_room_for)
            except OSError as exc:
                log.warning("the guard holds, but could not be written down yet: %s", exc.strerror)

    def _trim(self, node: Node) -> None:
        sizes = crash.trim(self._io, node.fd, self._keys, plaintext=self._plaintext)
        if sizes is not None:
            self.trimmed += 1
            log.warning(
                "%s: cut from %d to %d bytes: what follows was never synced before the unclean stop",
                os.fsdecode(self._tree.path(node)), *sizes,
            )  # fmt: skip
