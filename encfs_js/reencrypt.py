"""The pass that seals every file of a store anew that has not the suite and epoch of new files (rewrite.py does one).

It can be stopped anywhere and begun again: what is done shows in the files themselves. Synchronous, in steps.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from encfs_js.format import HEADER, Header
from encfs_js.opening import open_backing
from encfs_js.rewrite import rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from encfs_js.files import Files
    from encfs_js.steps import Steps
    from encfs_js.tree import Node

log: Final = logging.getLogger("encfs_js")
_ROUNDS: Final = 10
_NAMED: Final = 20  # files that are named, of those that could not be rewritten
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})


@dataclass(slots=True)
class Progress:
    """How far a pass is. cipher, epoch: what the files get. bytes: sealed. failed: (path, why).

    state: counting, running; done, incomplete (files are left, those that failed), stopped, or failed (it could not go on, and
    `why` says why).
    """

    state: str = "counting"
    cipher: str = ""
    epoch: int = 0
    files: int = 0
    bytes: int = 0
    files_done: int = 0
    bytes_done: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    why: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will be done."""
        return self.state not in {"counting", "running"}

    def as_json(self) -> dict[str, Any]:
        """Return it for another process."""
        names = ("state", "cipher", "epoch", "files", "bytes", "files_done", "bytes_done", "why")
        numbers = {name: getattr(self, name) for name in names}
        failed = [{"file": file, "error": error} for file, error in self.failed[:_NAMED]]
        return numbers | {"files_failed": len(self.failed), "failed": failed}


def reencrypt(files: Files, progress: Progress) -> Steps[None]:
    """Seal all that is stale, until nothing is left but what failed; then bring everything to the disk.

    Raises OSError when it cannot go on: no space, or the disk became read-only.
    """
    tried: set[int] = set()
    progress.cipher, progress.epoch = files.keys.suite.label, files.keys.epoch
    for _ in range(_ROUNDS):
        progress.state = "counting"
        found: list[tuple[int, int]] = []
        yield from _survey(files, tried, found)
        if not found:
            break
        progress.files += len(found)
        progress.bytes += sum(size for _, size in found)
        progress.state = "running"
        for ino, size in found:
            node = files.tree.nodes.get(ino)
            if node is not None:
                path = os.fsdecode(files.tree.path(node)) if node.names else ""
                try:
                    yield from rewrite(files, node)
                except OSError as exc:
                    if exc.errno in _FULL:
                        raise
                    if exc.errno not in _GONE:
                        log.error("%s could not be sealed anew: %s", path, exc.strerror)
                        progress.failed.append((path, exc.strerror or "unreadable"))
                        tried.add(ino)
            progress.files_done += 1
            progress.bytes_done += size
            yield None
    else:
        progress.failed.append(("", f"files of another epoch appeared again and again, {_ROUNDS} times"))
    yield partial(files.io.syncfs, files.tree.root_fd)
    progress.state = "incomplete" if progress.failed else "done"


def _survey(files: Files, tried: set[int], found: list[tuple[int, int]]) -> Steps[None]:
    """Collect (inode number, sealed bytes) of every file that is stale and was not tried in vain."""
    seen: set[int] = set()
    for node, status in _regular(files, files.tree.root):
        if node is not None and node.ino not in seen and node.ino not in tried:
            seen.add(node.ino)
            try:
                if _is_stale(files, node):
                    found.append((node.ino, status.st_size))
            except OSError as exc:
                if exc.errno not in _GONE:
                    raise
        yield None


def _regular(files: Files, directory: Node) -> Iterator[tuple[Node | None, os.stat_result]]:
    """Yield the regular files below a directory; (None, ...) for what is another kind, so that others are let in."""
    for _, name in files.tree.listing(directory):
        try:
            node, status = files.tree.lookup(directory, name)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            yield None, status
            try:
                yield from _regular(files, node)
            except OSError as exc:
                if exc.errno not in _GONE:
                    raise
        else:
            yield (node if stat.S_ISREG(status.st_mode) else None), status


def _is_stale(files: Files, node: Node) -> bool:
    """Tell by the header whether a file is sealed with another suite or epoch than new files. Raises OSError."""
    fd, _ = open_backing(files.tree, node, write=False, read_only=False)
    try:
        raw = bytearray(HEADER)
        header = Header.parse(bytes(raw[: files.io.preadv(fd, [raw], 0)]))
    except ValueError:
        return False  # empty, not sealed, or damaged: that is for others to judge
    finally:
        files.io.close(fd)
    return (header.suite, header.epoch) != (files.keys.suite, files.keys.epoch)
