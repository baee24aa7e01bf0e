"""The names of a mounted store: node id -> where the file is in the backing tree, and every operation on names.

A node id is the backing inode number (the root is 1), its generation comes from the file handle, a directory entry's offset
is a hash of its name: all of it can be had again from the backing tree alone, so nothing here has to outlive a process.
The table is a cache. Lookup counts are not kept; a node leaves the table with its last known name.

Synchronous; names and paths are bytes, paths relative to the store.
"""

from __future__ import annotations

import errno
import os
import stat
import zlib
from typing import TYPE_CHECKING, Final

from encfs_js.backing import META, RENAME_EXCHANGE, Backing

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.guard import Guard
    from encfs_js.redo import PlainFile
    from encfs_js.sealed import SealedFile

ROOT: Final = 1
HIDDEN: Final = META.encode()
# A caller may reach deeper than PATH_MAX by steps, and so must we: from here on a directory is kept open to start from.
_LONG_PATH: Final = 2048


class Node:
    """What is known of one file. `names`: (directory, name) by which it was found; directories have at most one.

    generation: None until the kernel asks. file, fd: the content, while open. opens: how many FUSE handles;
    cached_writers, direct_writers: those of them that write, through the kernel's cache or past it. size: plain size in
    bytes when last closed, None if never looked at. mtime_ns: one that is still to be set on the backing file (times.py).
    checked: the crash rule was applied. dated: its inode on the disk has a ctime of this run. held: an O_PATH descriptor of a
    file that lost its last name while the kernel knew it, or -1. handed: the supervisor keeps it open, too. unsure: the kernel
    may have it open from before this worker. anchor: an O_PATH descriptor of a deep directory, to start paths from, or -1.
    """

    __slots__ = (
        "anchor", "cached_writers", "checked", "children", "dated", "direct_writers", "fd", "file", "generation", "handed",
        "held", "ino", "mtime_ns", "names", "opens", "size", "unsure", "writable",
    )  # fmt: skip

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.generation: int | None = None
        self.names: list[tuple[Node, bytes]] = []
        self.children: dict[bytes, Node] = {}
        self.file: SealedFile | PlainFile | None = None
        self.fd = -1
        self.writable = False
        self.opens = 0
        self.cached_writers = 0
        self.direct_writers = 0
        self.size: int | None = None
        self.mtime_ns: int | None = None
        self.checked = False
        self.dated = False
        self.unsure = False
        self.handed = False
        self.held = -1
        self.anchor = -1


def cookie(name: bytes) -> int:
    """Return a directory entry's offset: 62 bits of its name alone, so that a listing can go on anywhere, in any process.

    From 3 on: 1 and 2 are those of `.` and `..`.
    """
    return (zlib.crc32(name) << 30 | zlib.adler32(name[::-1]) >> 2) + 3


class Tree:
    """The tree of one mounted store. give_to_caller: new files are chowned to who made them (the daemon is root)."""

    def __init__(self, io: Backing, store: str, guard: Guard, *, give_to_caller: bool) -> None:
        self.io = io
        self.guard = guard
        self.root_fd = io.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.meta_fd = io.open(HIDDEN, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.root_fd)
        self._dev = io.fstat(self.root_fd).st_dev
        self._give = give_to_caller
        # Called before an open file loses its last name, and when nobody has it any more: who else is to keep it open.
        self.hand_over: Callable[[int, int], None] = lambda _ino, _fd: None
        self.let_go: Callable[[int], None] = lambda _ino: None
        # While somebody looks for every file: what got another name meanwhile, and may have gone where he has been already.
        self.moved: set[Node] | None = None
        self.root = Node(ROOT)
        self.root.generation = 0
        self.nodes = {ROOT: self.root}

    # -- finding

    def node(self, ino: int) -> Node:
        """Return the node of that id. Raises OSError ESTALE."""
        try:
            return self.nodes[ino]
        except KeyError:
            raise _error(errno.ESTALE) from None

    def path(self, node: Node) -> bytes:
        """Return one path of the node in the store, for people and for the guard. Raises OSError ESTALE without a name."""
        parts = []
        while node is not self.root:
            if not node.names:
                raise _error(errno.ESTALE)
            node, name = node.names[0]
            parts.append(name)
        return b"/".join(reversed(parts)) or b"."

    def at(self, node: Node) -> tuple[int, bytes, bool]:
        """Return (directory descriptor, path from there, whether to follow a symbolic link at its end) for a system call.

        Raises OSError ESTALE for a node that has no name and is not held.
        """
        if node is self.root:
            return self.root_fd, b".", False
        if not node.names:
            if node.held < 0:
                raise _error(errno.ESTALE)
            return self.root_fd, b"/proc/self/fd/%d" % node.held, True
        fd, path = self.child(*node.names[0])
        return fd, path, False

    def child(self, parent: Node, name: bytes) -> tuple[int, bytes]:
        """Return (directory descriptor, path from there) of `name` in `parent`. Our own directory does not exist there."""
        if parent is self.root:
            if name == HIDDEN:
                raise _error(errno.ENOENT)
            return self.root_fd, name
        above = []
        node = parent
        while node is not self.root and node.anchor < 0:
            if not node.names:
                raise _error(errno.ENOENT)
            above.append(node)
            node = node.names[0][0]
        fd, path = (self.root_fd if node is self.root else node.anchor), b""
        for directory in reversed(above):
            path += directory.names[0][1] + b"/"
            if len(path) > _LONG_PATH:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                directory.anchor = self.io.open(path[:-1], flags, dir_fd=fd)
                fd, path = directory.anchor, b""
        return fd, path + name

    def parent(self, directory: Node) -> Node:
        """Return the directory above; the root's is itself."""
        return directory.names[0][0] if directory.names else self.root

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Find an entry. Raises OSError ENOENT, and EXDEV where another file system is mounted inside the store."""
        fd, path = self.child(parent, name)
        found = self.io.stat(path, dir_fd=fd, follow_symlinks=False)
        if found.st_dev != self._dev:
            raise _error(errno.EXDEV)
        node = self.nodes.get(found.st_ino)
        if node is None:
            node = self.nodes[found.st_ino] = Node(found.st_ino)
        if node.generation is None:
            node.generation = self.io.generation(fd, path)
        known = (parent, name)
        if known not in node.names:
            if stat.S_ISDIR(found.st_mode):
                node.names.clear()
            node.names.append(known)
        parent.children[name] = node
        return node, found

    def stat(self, node: Node) -> os.stat_result:
        """Return the backing file's stat. Raises OSError ESTALE when another file stands under its name."""
        for fd in (node.fd, node.held):
            if fd >= 0:
                return self.io.fstat(fd)
        fd, path, follow = self.at(node)
        try:
            found = self.io.stat(path, dir_fd=fd, follow_symlinks=follow)
        except FileNotFoundError:
            raise _error(errno.ESTALE) from None
        if found.st_ino != node.ino and node is not self.root:
            raise _error(errno.ESTALE)
        return found

    def open(self, node: Node, flags: int) -> int:
        """Open the backing file or directory. A symbolic link is never followed."""
        fd, path, follow = self.at(node)
        return self.io.open(path, flags | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), dir_fd=fd)

    def listing(self, node: Node) -> list[tuple[int, bytes]]:
        """Return (offset, name) of every entry, in the order of the offsets."""
        fd = self.open(node, os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = self.io.listdir(fd)
        finally:
            self.io.close(fd)
        return sorted((cookie(name), name) for name in names if name != HIDDEN or node is not self.root)

    def readlink(self, node: Node) -> bytes:
        """Return where the symbolic link points."""
        if node.held >= 0:
            return self.io.readlink(b"", dir_fd=node.held)
        fd, path, _ = self.at(node)
        return self.io.readlink(path, dir_fd=fd)

    # -- making

    def _new(self, parent: Node, name: bytes) -> tuple[int, bytes]:
        if parent is self.root and name == HIDDEN:
            raise _error(errno.EPERM)
        return self.child(parent, name)

    def made(self, parent: Node, name: bytes, mode: int, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Give what was just made to its maker, as the kernel would: the group is the directory's where that says so."""
        if self._give and (uid or gid):
            fd, path = self.child(parent, name)
            keep_group = self.stat(parent).st_mode & stat.S_ISGID
            self.io.chown(path, uid, -1 if keep_group else gid, dir_fd=fd, follow_symlinks=False)
            if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(mode):
                self.io.chmod(path, stat.S_IMODE(mode), dir_fd=fd)  # chown(2) took the set-id bits away
        return self.lookup(parent, name)

    def create(
        self, parent: Node, name: bytes, mode: int, uid: int, gid: int, *, exclusive: bool
    ) -> tuple[Node, int, os.stat_result]:
        """Make a regular file and open it. Returns its node, the open descriptor and its stat. Raises OSError."""
        at, path = self._new(parent, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else 0)
        fd = self.io.open(path, flags, stat.S_IMODE(mode), dir_fd=at)
        try:
            node, found = self.made(parent, name, mode, uid, gid)
        except BaseException:
            self.io.close(fd)
            raise
        return node, fd, found

    def mkdir(self, parent: Node, name: bytes, mode: int, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Make a directory."""
        fd, path = self._new(parent, name)
        self.io.mkdir(path, stat.S_IMODE(mode), dir_fd=fd)
        return self.made(parent, name, stat.S_IFDIR, uid, gid)

    def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Make a FIFO, a socket, a device or a regular file."""
        fd, path = self._new(parent, name)
        self.io.mknod(path, mode, rdev, dir_fd=fd)
        return self.made(parent, name, mode, uid, gid)

    def symlink(self, parent: Node, name: bytes, target: bytes, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Make a symbolic link."""
        fd, path = self._new(parent, name)
        self.io.symlink(target, path, dir_fd=fd)
        return self.made(parent, name, stat.S_IFLNK, uid, gid)

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Give the node one more name. Raises OSError ENOENT when it has none left."""
        new_fd, new_path = self._new(parent, name)
        if not node.names:
            raise _error(errno.ENOENT)
        fd, path, _ = self.at(node)
        self.io.link(path, new_path, src_dir_fd=fd, dst_dir_fd=new_fd, follow_symlinks=False)
        if self.moved is not None:
            self.moved.add(node)
        return self.lookup(parent, name)

    # -- removing and moving

    def _guarded(self, parent: Node, name: bytes, *, moves: bool = False) -> None:
        if self.guard.closed:
            self.guard.check(name if parent is self.root else self.path(parent) + b"/" + name, moves=moves)

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name that is no directory's. Raises OSError EROFS below a closed guard."""
        fd, path = self.child(parent, name)
        self._guarded(parent, name)
        held = self._hold(parent, name)
        self._unless(held, self.io.unlink, path, dir_fd=fd)
        self._forget_name(parent, name, held)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory. Raises OSError EROFS below a closed guard."""
        fd, path = self.child(parent, name)
        self._guarded(parent, name)
        held = self._hold(parent, name)
        self._unless(held, self.io.rmdir, path, dir_fd=fd)
        self._forget_name(parent, name, held)

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
        """Move `name` to `new_name`, with the flags of renameat2(2). Raises OSError EROFS below a closed guard."""
        fd, path = self.child(parent, name)
        new_fd, new_path = self._new(new_parent, new_name)
        self._guarded(parent, name, moves=True)
        self._guarded(new_parent, new_name, moves=True)
        held = -1 if flags & RENAME_EXCHANGE else self._hold(new_parent, new_name)
        if flags:
            self._unless(held, self.io.renameat2, fd, path, new_fd, new_path, flags)
        else:
            self._unless(held, self.io.rename, path, new_path, src_dir_fd=fd, dst_dir_fd=new_fd)
        moved = parent.children.pop(name, None)
        if flags & RENAME_EXCHANGE:
            other = new_parent.children.pop(new_name, None)
            self._rename_node(other, new_parent, new_name, parent, name)
        else:
            self._forget_name(new_parent, new_name, held)
        self._rename_node(moved, parent, name, new_parent, new_name)

    def _rename_node(self, node: Node | None, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        if node is not None:
            node.names[node.names.index((parent, name))] = (new_parent, new_name)
            new_parent.children[new_name] = node
            if self.moved is not None:
                self.moved.add(node)

    def _hold(self, parent: Node, name: bytes) -> int:
        """Open what is about to lose its last name, if the kernel knows it: it may be somebody's directory or descriptor.

        It also keeps the inode number from being used again. The kernel forgets it at once when nobody has it.
        """
        node = parent.children.get(name)
        if node is None or len(node.names) > 1:
            return -1
        try:
            held = -1 if node.fd >= 0 else self.open(node, os.O_PATH)
        except OSError:
            return -1  # the removal itself will say what is wrong
        if node.fd >= 0 or node.unsure:
            self.hand_over(node.ino, held if held >= 0 else node.fd)
            node.handed = True
        return held

    def _unless(self, held: int, call: Callable[..., None], *args: object, **kwargs: object) -> None:
        try:
            call(*args, **kwargs)
        except BaseException:
            if held >= 0:
                self.io.close(held)
            raise

    def _forget_name(self, parent: Node, name: bytes, held: int) -> None:
        node = parent.children.pop(name, None)
        if node is None:
            return
        node.names.remove((parent, name))
        node.held = held
        self.drop_if_gone(node)

    def drop_if_gone(self, node: Node) -> None:
        """Take a node without a name out of the table, unless it is open or held."""
        if node.names or node.fd >= 0 or node.held >= 0 or node is self.root:
            return
        if node.anchor >= 0:
            self.io.close(node.anchor)
            node.anchor = -1
        if self.nodes.get(node.ino) is node:
            del self.nodes[node.ino]

    # -- attributes

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """Change the owner; -1 leaves one as it is."""
        if node.fd >= 0:
            self.io.chown(node.fd, uid, gid)
        else:
            fd, path, follow = self.at(node)
            self.io.chown(path, uid, gid, dir_fd=fd, follow_symlinks=follow)

    def chmod(self, node: Node, mode: int) -> None:
        """Change the permission bits."""
        if node.fd >= 0:
            self.io.chmod(node.fd, stat.S_IMODE(mode))
        else:
            fd, path, _ = self.at(node)
            self.io.chmod(path, stat.S_IMODE(mode), dir_fd=fd)

    def utime(self, node: Node, atime_ns: int, mtime_ns: int) -> None:
        """Set both times."""
        if node.fd >= 0:
            self.io.utime(node.fd, ns=(atime_ns, mtime_ns))
        else:
            fd, path, follow = self.at(node)
            self.io.utime(path, ns=(atime_ns, mtime_ns), dir_fd=fd, follow_symlinks=follow)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
