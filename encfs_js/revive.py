"""What a worker finds out from the store alone when it goes on where another one has died: the nodes, and what was done.

Synchronous; the store is nobody else's.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from encfs_js import crash, journal
from encfs_js.backing import RENAME_EXCHANGE
from encfs_js.opening import open_backing
from encfs_js.tree import HIDDEN, Node, Tree

if TYPE_CHECKING:
    from encfs_js.files import Files
    from encfs_js.journal import Entry

log: Final = logging.getLogger("encfs_js")


def walk(tree: Tree) -> None:
    """Fill the table with a node for every name: the kernel goes on using numbers that this process has never heard.

    Only directories are read, no file is looked at. Raises OSError.
    """
    todo = [tree.root]
    while todo:
        directory = todo.pop()
        fd = tree.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            entries = tree.io.entries(fd)
        finally:
            tree.io.close(fd)
        for name, ino, is_directory in entries:
            if name == HIDDEN and directory is tree.root:
                continue
            node = tree.nodes.get(ino)
            if node is None:
                node = tree.nodes[ino] = Node(ino)
                node.unsure = True
            node.names.append((directory, name))
            directory.children[name] = node
            if is_directory:
                todo.append(node)


def mend(files: Files, ino: int) -> None:
    """Make a file whole that a worker was changing when it died; whoever asked for it may not ask again."""
    tree, io = files.tree, files.io
    node = tree.nodes.get(ino)
    if node is None or files.promises is None:
        return
    try:
        fd, _ = open_backing(tree, node, write=True, read_only=False)
        try:
            found = io.fstat(fd)
            if found.st_ino == ino and stat.S_ISREG(found.st_mode):
                crash.end(io, fd, files.keys, plaintext=files.plaintext)
        finally:
            io.close(fd)
    except OSError as exc:
        log.warning("node %d, which a worker was changing when it died, cannot be mended: %s", ino, exc.strerror)


def number(tree: Tree, parent: Node, name: bytes) -> int:
    """Return the inode number that stands under a name, 0 for none. Raises OSError."""
    fd, path = tree.child(parent, name)
    try:
        return int(tree.io.stat(path, dir_fd=fd, follow_symlinks=False).st_ino)
    except FileNotFoundError:
        return 0


def done(tree: Tree, entry: Entry) -> bool:
    """Tell whether what was noted has been done: nobody else changes names, and making was noted only where there was none."""
    node = tree.nodes.get(entry.new_parent if entry.op == journal.LINK else entry.parent)
    if node is None:
        return False
    if entry.op == journal.LINK:
        return number(tree, node, entry.new_name) != 0
    here = number(tree, node, entry.name)
    if entry.op in {journal.UNLINK, journal.RMDIR}:
        return here != entry.ino
    if entry.op != journal.RENAME:
        return here != 0
    new_parent = tree.nodes.get(entry.new_parent)
    there = number(tree, new_parent, entry.new_name) if new_parent is not None else 0
    if entry.flags & RENAME_EXCHANGE:
        return (here, there) == (entry.other, entry.ino)
    return there == entry.ino != here


def complete(tree: Tree, entry: Entry) -> Entry | None:
    """Return what is to be noted of a request, with what its outcome will be known by. Raises OSError.

    None for what would make a name that is there already: it will fail, or open the file, as often as it is repeated.
    """
    if entry.op in {journal.UNLINK, journal.RMDIR}:
        return entry._replace(ino=_known(tree, entry.parent, entry.name))
    if entry.op == journal.RENAME:
        other = _known(tree, entry.new_parent, entry.new_name) if entry.flags & RENAME_EXCHANGE else 0
        return entry._replace(ino=_known(tree, entry.parent, entry.name), other=other)
    if entry.op == journal.LINK:
        return None if number(tree, tree.node(entry.new_parent), entry.new_name) else entry
    return None if number(tree, tree.node(entry.parent), entry.name) else entry


def _known(tree: Tree, parent: int, name: bytes) -> int:
    directory = tree.node(parent)
    node = directory.children.get(name)
    return node.ino if node is not None else number(tree, directory, name)
