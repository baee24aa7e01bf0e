"""How a backing file is opened: so that it can be written later, if at all possible, and whatever its mode says."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from encfs_js.tree import Node, Tree

_RETRY_READ_ONLY: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def open_backing(tree: Tree, node: Node, *, write: bool, read_only: bool) -> tuple[int, bool]:
    """Open for reading and writing whenever that is possible: a partial page is read before it is written.

    write: it has to be possible. read_only: the mount is. Returns the descriptor and whether it can be written. Times of
    access stay as they are (as with the mount option noatime); only an owner may ask for that. Raises OSError.
    """
    ways = [os.O_RDWR | os.O_NOATIME, os.O_RDWR]
    if read_only:
        ways = [os.O_RDONLY | os.O_NOATIME, os.O_RDONLY]
    elif not write:
        ways += [os.O_RDONLY | os.O_NOATIME, os.O_RDONLY]
    for i, way in enumerate(ways):
        try:
            return tree.open(node, way | os.O_NONBLOCK), bool(way & os.O_RDWR)
        except OSError as exc:
            if exc.errno not in _RETRY_READ_ONLY or i == len(ways) - 1:
                if read_only:
                    raise
                return _open_own(tree, node, exc)
    raise AssertionError(node)


def _open_own(tree: Tree, node: Node, refused: OSError) -> tuple[int, bool]:
    """Open a file of our own whose mode keeps even us out; the kernel has checked the caller already."""
    found = tree.stat(node)
    if refused.errno != errno.EACCES or found.st_uid != os.geteuid():
        raise refused
    mode = stat.S_IMODE(found.st_mode)
    tree.chmod(node, mode | stat.S_IRUSR | stat.S_IWUSR)
    try:
        return tree.open(node, os.O_RDWR), True
    finally:
        tree.chmod(node, mode)
