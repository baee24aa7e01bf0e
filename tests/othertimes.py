"""Backings that show other times and inode numbers than the file system has: of a run long ago, and after a power cut."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from recording import Enter, Leave, Move, Recording, Resize, Touch, Write

from encfs_js.backing import Backing

if TYPE_CHECKING:
    from pathlib import Path

    from disk import State as Found

DAY_NS = 86_400 * 10**9
BEGAN = 20 * DAY_NS  # when the run that is cut began; files that it has not touched are days older
FAR = 1 << 40
# os.stat_result takes these seven by position, and from Python 3.13 on not by name as well.
IN_ORDER = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
BY_NAME = sorted({name for name in dir(os.stat_result) if name.startswith("st_")} - set(IN_ORDER))


class Shown(Backing):
    """A backing on which some files have another inode number or ctime than the file system says."""

    def shown(self, found: os.stat_result) -> dict[str, int]:
        raise NotImplementedError

    def _other(self, found: os.stat_result) -> os.stat_result:
        if not (fields := self.shown(found)):
            return found
        numbers = [fields.get(name, number) for name, number in zip(IN_ORDER, found, strict=False)]
        others = {name: fields.get(name, getattr(found, name)) for name in BY_NAME}
        return os.stat_result([*numbers, *found[len(IN_ORDER) :]], others)

    def fstat(self, fd):
        return self._other(os.fstat(fd))

    def stat(self, path, *, dir_fd=None, follow_symlinks=True):
        return self._other(os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks))


class QuietRecording(Recording, Shown):
    """A recording without real syncs, and without the reserve, whose content means nothing.

    A file that was there before has a ctime of days ago until something changes it.
    """

    def __init__(self, root: Path) -> None:
        self.changed: set[int] = set()
        super().__init__(root, sync=False)
        self.changed.clear()

    def _note(self, op):
        if isinstance(op, Enter | Leave | Move | Write | Resize | Touch):
            self.changed.add(op.file)
        return super()._note(op)

    def shown(self, found):
        number = self.numbers.get((found.st_dev, found.st_ino))
        return {"st_ctime_ns": DAY_NS} if number is not None and number not in self.changed else {}

    def fallocate(self, fd, mode, offset, length):
        pass


class AfterCut(Shown):
    """The backing of a store that is opened after a power cut: its files have the ctimes that the disk would show, and
    the inode numbers that they had when they were recorded. Whatever else there is has numbers far from those.
    """

    def __init__(self, base: int, found: Found, numbers: dict[int, int], inodes: dict[int, int]) -> None:
        often = Counter(inodes[number] for number in numbers.values())
        self._shown: dict[int, dict[str, int]] = {}
        for ino, number in numbers.items():
            fields = self._shown[ino] = {"st_ino": inodes[number]}
            if often[inodes[number]] > 1:  # of two files one got the number of the other, whose end was not on the disk
                fields["st_ino"] = FAR + ino
            if (at := found.changed.get(number)) is not None:
                fields["st_ctime_ns"] = BEGAN + (at if at >= base else -5 * DAY_NS)

    def shown(self, found):
        return self._shown.get(found.st_ino) or {"st_ino": FAR + found.st_ino}

    def fsync(self, fd):
        pass

    fdatasync = fsync

    def fallocate(self, fd, mode, offset, length):
        pass
