"""The look at every file that an unclean stop may have touched, so that its window can be dropped (FORMAT.md section 4.2)."""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encfs_js.files import Files
    from encfs_js.tree import Node, Tree

log: Final = logging.getLogger("encfs_js")


def sweep(tree: Tree, files: Files) -> Iterator[None]:
    """Apply the crash rule to every file that an unclean stop may have touched; yields after each directory entry."""
    yield from _sweep(tree, files, tree.root)


def _sweep(tree: Tree, files: Files, directory: Node) -> Iterator[None]:
    for _, name in tree.listing(directory):
        try:
            node, found = tree.lookup(directory, name)
            if stat.S_ISDIR(found.st_mode):
                yield from _sweep(tree, files, node)
            elif stat.S_ISREG(found.st_mode) and not node.checked and files.state.touched(found.st_ctime_ns):
                files.size(node)
        except OSError as exc:
            if exc.errno not in {errno.ENOENT, errno.ESTALE}:  # gone since the names were read
                files.not_swept += 1
                log.warning("%s could not be looked at after the unclean stop: %s", os.fsdecode(name), exc.strerror)
        yield
