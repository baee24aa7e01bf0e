"""Sealing a file of a mounted store anew while it is in use: with the suite and epoch that new files get.

A file of one page is written in place, which is one write. A longer one goes through a redo file (redo.py) in two stretches.
While its new form is written beside it, everybody may use it; whoever changes it makes that vain, and it begins again. Then
its content is frozen until the new form is in its place: changes wait, and during the copying so does reading. A file that
is changed time and again is frozen from the start.

Crash points: those of redo.py. A change that waited had not been answered.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from encfs_js import redo, times
from encfs_js.format import PAGE, DamagedPageError
from encfs_js.sealed import SealedFile

if TYPE_CHECKING:
    from encfs_js.files import Files
    from encfs_js.steps import Steps
    from encfs_js.tree import Node

_IN_VAIN: Final = 2  # so often, before others have to wait


def rewrite(files: Files, node: Node) -> Steps[bool]:
    """Seal one file anew. Returns False when there is nothing to do: not sealed, empty, sealed so already, or gone.

    Times of change stay. Raises IntegrityError, and OSError: ENOSPC without room beside what is promised to others,
    UnfinishedError as redo.put. The file is as it was then, or as it is to be.
    """
    files.hold(node)
    try:
        done = False
        for attempt in range(_IN_VAIN + 1):
            file = files.attach(node, write=True)
            if not node.names or not isinstance(file, SealedFile):
                break
            if file.damage is not None:  # of its header as well: what it is sealed with cannot be told then
                raise files.damaged(node, file.damage)
            if not file.is_stale:
                break
            try:
                if file.pages == 1:
                    done = yield from _page(files, node, file)
                else:
                    done = yield from _whole(files, node, file, freeze=attempt == _IN_VAIN)
            except DamagedPageError as exc:
                raise files.damaged(node, exc.page) from None
            if done:
                break
        return done
    finally:
        files.let_go(node)
        files.detach(node)


def _page(files: Files, node: Node, file: SealedFile) -> Steps[bool]:
    """Seal a file of one page. Returns False when it was changed while its inode was brought to the disk."""
    if not node.dated:
        files.date(node)
        yield partial(files.io.fsync, node.fd)
        node.dated = True
        if node.file is not file or file.pages != 1 or not file.is_stale:
            return False
    found = files.io.fstat(node.fd)
    files.changes(node)
    file.renew()
    files.tally(PAGE)
    files.io.utime(node.fd, ns=(found.st_atime_ns, found.st_mtime_ns))
    return True


def _whole(files: Files, node: Node, file: SealedFile, *, freeze: bool) -> Steps[bool]:
    """Seal a longer file. Returns False when somebody changed it meanwhile."""
    assert files.promises is not None
    io, meta_fd, path = files.io, files.tree.meta_fd, files.tree.path(node)
    files.watched, files.disturbed, files.frozen = node, False, node if freeze else None
    try:
        files.promises.leave_room_beside((file.pages + 1) * PAGE)
        mtime_ns = times.mtime_ns(node, io.fstat(node.fd))
        staged = yield from redo.stage(
            io, meta_fd, files.redo_key, file, path, files.keys, mtime_ns=mtime_ns, tally=files.tally
        )
        if files.disturbed or not node.names:
            redo.discard(io, meta_fd, staged)
            return False
        files.frozen = files.copying = node
        done = False
        try:
            yield from redo.put(io, meta_fd, staged, node.fd)
            done = True
        finally:
            if not done:  # whatever the reason: the redo file counts, and would undo what is written from now on
                files.was_interrupted(node, path)
        node.file, node.mtime_ns, node.dated = SealedFile(io, node.fd, files.keys), None, True
        return True
    finally:
        files.watched = files.frozen = files.copying = None
