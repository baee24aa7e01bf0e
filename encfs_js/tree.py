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

from encfs_js.backing import META, Backing

if TYPE_CHECKING:
    from encfs_js.guard import Guard
    from encfs_js.redo import PlainFile
    from encfs_js.sealed import SealedFile

ROOT: Final = 1
HIDDEN: Final = META.encode()


class Node:
    """What is known of one file. `names`: (directory, name) by which it was found; directories have at most one.

    file, fd: the content, while open. opens: how many FUSE handles; cached_writers, direct_writers: those of them that
    write, through the kernel's cache or past it. size: plain size in bytes when last closed, None if never looked at.
    checked: the crash rule was applied.
    """

    __slots__ = (
        "cached_writers",
        "checked",
        "children",
        "direct_writers",
        "fd",
        "file",
        "generation",
        "ino",
        "names",
        "opens",
        "size",
        "writable",
    )

    def __init__(self, ino: int, generation: int) -> None:
        self.ino = ino
        self.generation = generation
        self.names: list[tuple[Node, bytes]] = []
        self.children: dict[bytes, Node] = {}
        self.file: SealedFile | PlainFile | None = None
        self.fd = -1
        self.writable = False
        self.opens = 0
        self.cached_writers = 0
        self.direct_writers = 0
        self.size: int | None = None
        self.checked = False


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
        self.root = Node(ROOT, 0)
        self.nodes = {ROOT: self.root}

    # -- finding

    def node(self, ino: int) -> Node:
        """Return the node of that id. Raises OSError ESTALE."""
        try:
            return self.nodes[ino]
        except KeyError:
            raise _error(errno.ESTALE) from None

    def path(self, node: Node) -> bytes:
        """Return one path of the node. Raises OSError ESTALE when it has lost its names."""
        parts = []
        while node is not self.root:
            if not node.names:
                raise _error(errno.ESTALE)
            node, name = node.names[0]
            parts.append(name)
        return b"/".join(reversed(parts)) or b"."

    def below(self, parent: Node, name: bytes) -> bytes:
        """Return the path of `name` in `parent`. Our own directory does not exist there."""
        if parent is self.root:
            if name == HIDDEN:
                raise _error(errno.ENOENT)
            return name
        return self.path(parent) + b"/" + name

    def parent(self, directory: Node) -> Node:
        """Return the directory above; the root's is itself."""
        return directory.names[0][0] if directory.names else self.root

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Find an entry. Raises OSError ENOENT, and EXDEV where another file system is mounted inside the store."""
        path = self.below(parent, name)
        found = self.io.stat(path, dir_fd=self.root_fd, follow_symlinks=False)
        if found.st_dev != self._dev:
            raise _error(errno.EXDEV)
        return self._adopt(parent, name, path, found), found

    def _adopt(self, parent: Node, name: bytes, path: bytes, found: os.stat_result) -> Node:
        node = self.nodes.get(found.st_ino)
        if node is None:
            node = self.nodes[found.st_ino] = Node(found.st_ino, self.io.generation(self.root_fd, path))
        known = (parent, name)
        if known not in node.names:
            if stat.S_ISDIR(found.st_mode):
                node.names.clear()
            node.names.append(known)
        parent.children[name] = node
        return node

    def stat(self, node: Node) -> os.stat_result:
        """Return the backing file's stat. Raises OSError ESTALE when another file stands under its name."""
        if node.fd >= 0:
            return self.io.fstat(node.fd)
        if node is self.root:
            return self.io.fstat(self.root_fd)
        try:
            found = self.io.stat(self.path(node), dir_fd=self.root_fd, follow_symlinks=False)
        except FileNotFoundError:
            raise _error(errno.ESTALE) from None
        if found.st_ino != node.ino:
            raise _error(errno.ESTALE)
        return found

    def listing(self, node: Node) -> list[tuple[int, bytes]]:
        """Return (offset, name) of every entry, in the order of the offsets."""
        fd = self.io.open(self.path(node), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.root_fd)
        try:
            names = self.io.listdir(fd)
        finally:
            self.io.close(fd)
        return sorted((cookie(name), name) for name in names if name != HIDDEN or node is not self.root)

    def readlink(self, node: Node) -> bytes:
        """Return where the symbolic link points."""
        return self.io.readlink(self.path(node), dir_fd=self.root_fd)

    # -- making

    def _new_path(self, parent: Node, name: bytes) -> bytes:
        if parent is self.root and name == HIDDEN:
            raise _error(errno.EPERM)
        return self.below(parent, name)

    def _made(
        self, parent: Node, name: bytes, path: bytes, mode: int, uid: int, gid: int
    ) -> tuple[Node, os.stat_result]:
        """Give what was just made to its maker, as the kernel would: the group is the directory's where that says so."""
        if self._give and (uid or gid):
            keep_group = self.stat(parent).st_mode & stat.S_ISGID
            self.io.chown(path, uid, -1 if keep_group else gid, dir_fd=self.root_fd, follow_symlinks=False)
            if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(mode):
                found = self.io.stat(path, dir_fd=self.root_fd, follow_symlinks=False)
                self.io.chmod(path, stat.S_IMODE(mode) | found.st_mode & stat.S_ISGID, dir_fd=self.root_fd)
        return self.lookup(parent, name)

    def create(
        self, parent: Node, name: bytes, mode: int, uid: int, gid: int, *, exclusive: bool
    ) -> tuple[Node, int, os.stat_result]:
        """Make a regular file and open it. Returns its node, the open descriptor and its stat. Raises OSError."""
        path = self._new_path(parent, name)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if exclusive else 0)
        fd = self.io.open(path, flags, stat.S_IMODE(mode), dir_fd=self.root_fd)
        try:
            node, found = self._made(parent, name, path, mode, uid, gid)
        except BaseException:
            self.io.close(fd)
            raise
        return node, fd, found

    def mkdir(self, parent: Node, name: bytes, mode: int, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Make a directory."""
        path = self._new_path(parent, name)
        self.io.mkdir(path, stat.S_IMODE(mode), dir_fd=self.root_fd)
        return self._made(parent, name, path, stat.S_IFDIR, uid, gid)

    def mknod(self, parent: Node, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Make a FIFO, a socket, a device or a regular file."""
        path = self._new_path(parent, name)
        self.io.mknod(path, mode, rdev, dir_fd=self.root_fd)
        return self._made(parent, name, path, mode, uid, gid)

    def symlink(self, parent: Node, name: bytes, target: bytes, uid: int, gid: int) -> tuple[Node, os.stat_result]:
        """Make a symbolic link."""
        path = self._new_path(parent, name)
        self.io.symlink(target, path, dir_fd=self.root_fd)
        return self._made(parent, name, path, stat.S_IFLNK, uid, gid)

    def link(self, node: Node, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """Give the node one more name. Raises OSError ENOENT when it has none left."""
        path = self._new_path(parent, name)
        if not node.names:
            raise _error(errno.ENOENT)
        self.io.link(self.path(node), path, src_dir_fd=self.root_fd, dst_dir_fd=self.root_fd, follow_symlinks=False)
        return self.lookup(parent, name)

    # -- removing and moving

    def unlink(self, parent: Node, name: bytes) -> None:
        """Remove a name that is no directory's. Raises OSError EROFS below a closed guard."""
        path = self.below(parent, name)
        self.guard.check(path)
        self.io.unlink(path, dir_fd=self.root_fd)
        self._forget_name(parent, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory. Raises OSError EROFS below a closed guard."""
        path = self.below(parent, name)
        self.guard.check(path)
        self.io.rmdir(path, dir_fd=self.root_fd)
        self._forget_name(parent, name)

    def rename(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> None:
        """Move `name` to `new_name`, with the flags of renameat2(2). Raises OSError EROFS below a closed guard."""
        path, new_path = self.below(parent, name), self._new_path(new_parent, new_name)
        self.guard.check(path, moves=True)
        self.guard.check(new_path, moves=True)
        if flags:
            self.io.renameat2(self.root_fd, path, self.root_fd, new_path, flags)
        else:
            self.io.rename(path, new_path, src_dir_fd=self.root_fd, dst_dir_fd=self.root_fd)
        moved = parent.children.pop(name, None)
        if flags & 2:  # RENAME_EXCHANGE
            other = new_parent.children.pop(new_name, None)
            self._rename_node(other, new_parent, new_name, parent, name)
        else:
            self._forget_name(new_parent, new_name)
        self._rename_node(moved, parent, name, new_parent, new_name)

    @staticmethod
    def _rename_node(node: Node | None, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> None:
        if node is not None:
            node.names[node.names.index((parent, name))] = (new_parent, new_name)
            new_parent.children[new_name] = node

    def _forget_name(self, parent: Node, name: bytes) -> None:
        node = parent.children.pop(name, None)
        if node is not None:
            node.names.remove((parent, name))
            self.drop_if_gone(node)

    def drop_if_gone(self, node: Node) -> None:
        """Take a node without a name out of the table, unless it is open."""
        if not node.names and node.fd < 0 and self.nodes.get(node.ino) is node and node is not self.root:
            del self.nodes[node.ino]

    # -- attributes

    def chown(self, node: Node, uid: int, gid: int) -> None:
        """Change the owner; -1 leaves one as it is."""
        if node.fd >= 0:
            self.io.chown(node.fd, uid, gid)
        else:
            self.io.chown(self.path(node), uid, gid, dir_fd=self.root_fd, follow_symlinks=False)

    def chmod(self, node: Node, mode: int) -> None:
        """Change the permission bits."""
        if node.fd >= 0:
            self.io.chmod(node.fd, stat.S_IMODE(mode))
        else:
            self.io.chmod(self.path(node), stat.S_IMODE(mode), dir_fd=self.root_fd)

    def utime(self, node: Node, atime_ns: int, mtime_ns: int) -> None:
        """Set both times."""
        if node.fd >= 0:
            self.io.utime(node.fd, ns=(atime_ns, mtime_ns))
        else:
            self.io.utime(self.path(node), ns=(atime_ns, mtime_ns), dir_fd=self.root_fd, follow_symlinks=False)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
