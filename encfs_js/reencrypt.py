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
    if files.promises is None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    tried: set[int] = set()
    for _ in range(_ROUNDS):
        progress.state = "counting"
        progress.cipher, progress.epoch = files.keys.suite.label, files.keys.epoch
        found: list[tuple[int, int]] = []
        yield from _survey(files, tried, found, progress)
        if not found:
            yield partial(files.io.syncfs, files.tree.root_fd)
            if (progress.cipher, progress.epoch) == (files.keys.suite.label, files.keys.epoch):
                break
            continue  # other keys came meanwhile
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
                    _note(progress, path, exc)
                    tried.add(ino)
            progress.files_done += 1
            progress.bytes_done += size
            yield None
    else:
        progress.failed.append(("", f"files of another epoch appeared again and again, {_ROUNDS} times"))
        yield partial(files.io.syncfs, files.tree.root_fd)
    progress.state = "incomplete" if progress.failed else "done"


def _note(progress: Progress, path: str, problem: OSError) -> None:
    """Note what could not be done, once; what is gone need not be done. Raises it when nothing else can be done either."""
    if problem.errno in _FULL:
        raise problem
    if problem.errno not in _GONE and path not in {known for known, _ in progress.failed}:
        log.error("%s could not be sealed anew: %s", path, problem.strerror)
        progress.failed.append((path, problem.strerror or "unreadable"))


def _survey(files: Files, tried: set[int], found: list[tuple[int, int]], progress: Progress) -> Steps[None]:
    """Collect (inode number, sealed bytes) of every file that is stale and was not tried in vain.

    What moves meanwhile may pass from a directory that is still to be listed into one that was: it is looked at as well.
    """
    tree, seen = files.tree, set(tried)
    moved = tree.moved = set()
    todo = [tree.root]
    try:
        while todo:
            for node, status in _regular(files, todo.pop(), progress):
                if node is not None and node.ino not in seen:
                    seen.add(node.ino)
                    try:
                        if _is_stale(files, node):
                            found.append((node.ino, status.st_size))
                    except OSError as exc:
                        _note(progress, os.fsdecode(tree.path(node)), exc)
                        tried.add(node.ino)
                yield None
            todo += moved
            moved.clear()
    finally:
        tree.moved = None


def _regular(files: Files, start: Node, progress: Progress) -> Iterator[tuple[Node | None, os.stat_result]]:
    """Yield the regular files below a directory, or one file; (None, ...) for another kind, so that others are let in."""
    try:
        status = files.tree.stat(start)
        if not stat.S_ISDIR(status.st_mode):
            yield (start if stat.S_ISREG(status.st_mode) and start.names else None), status
            return
        yield None, status
        names = files.tree.listing(start)
    except OSError as exc:
        _note(progress, _path(files, start), exc)
        return
    for _, name in names:
        try:
            node, status = files.tree.lookup(start, name)
        except OSError as exc:
            _note(progress, os.path.join(_path(files, start), os.fsdecode(name)), exc)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _regular(files, node, progress)
        else:
            yield (node if stat.S_ISREG(status.st_mode) else None), status


def _path(files: Files, node: Node) -> str:
    """Return the path of what may have lost its name."""
    return os.fsdecode(files.tree.path(node)) if node is files.tree.root or node.names else ""


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
