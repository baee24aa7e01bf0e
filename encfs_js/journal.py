"""What one worker was about to do when it died, in memory that outlives it: so that nothing is done twice.

Most requests may be answered twice without harm: they carry absolute offsets, or only ask. Those that make, remove or move a
name do not. Before one of them touches the store it is noted here, with what the outcome will be known by: inode numbers.
A worker's core is atomic between awaits, so no more than one is ever under way, and one record is enough for it. It is
struck out before the next request is read: by then it has been answered.

The next worker asks the kernel which requests were never answered (resend.py). Is the noted one among them, the tree says
whether it was done: nobody else changes the store. If so it is answered without doing it again. Its record is kept until
then, beside that of the request under way: this worker may die as well before it comes to it.

The file whose pages are being changed is noted as well. Its request is sent again, too, but not if its caller has been killed
meanwhile: then nobody would finish what was begun.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

SIZE: Final = 16384  # bytes
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
CREATE: Final = 35

# valid[u8] zero[3] op[u32] parent[u64] new parent[u64] ino[u64] other ino[u64] flags[u32] pid[u32] name lengths[u16, u16]
_RECORD: Final = struct.Struct("<B3xIQQQQIIHH")
_ANSWERED: Final = struct.Struct("<Q")
_CHANGING: Final = struct.Struct("<Q")
_CHANGING_AT: Final = 8
_AT: Final = 64  # the record of the request under way
_SLOT: Final = 640
_KEPT: Final = range(_AT + _SLOT, SIZE - _SLOT + 1, _SLOT)  # records of what workers that died have done


class Entry(NamedTuple):
    """One operation on names. op: the FUSE opcode; parent: of a link, the node that gets one more name; flags: renameat2's.

    ino: the node that is removed or moved, 0 for one that is made; other: the node that stands under the new name
    of an exchange; pid: the thread that asks. Names and numbers are the request's own.
    """

    op: int
    parent: int
    name: bytes
    new_parent: int = 0
    new_name: bytes = b""
    ino: int = 0
    other: int = 0
    flags: int = 0
    pid: int = 0

    def same_request(self, other: Entry) -> bool:
        """Tell whether two entries are of the same request, whatever was found in the store."""
        return self._replace(ino=0, other=0) == other._replace(ino=0, other=0)


class Journal:
    """The records, in `memory` of SIZE bytes, and a count of the requests that this and earlier workers have answered."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._memory = memory
        self._armed = 0  # the record to be struck out when the request under way is answered
        self._changing = False
        self._kept: dict[int, Entry] = {}  # what was done and is still to be answered, by its record

    def note(self, entry: Entry) -> None:
        """Note what is about to be done."""
        self._write(_AT, entry)
        self._armed = _AT

    def change(self, ino: int) -> None:
        """Note that the pages of a file are about to be changed."""
        _CHANGING.pack_into(self._memory, _CHANGING_AT, ino)
        self._changing = True

    def changing(self) -> int:
        """Return the inode number of the file that a worker was changing when it died, 0 for none."""
        return int(_CHANGING.unpack_from(self._memory, _CHANGING_AT)[0])

    def strike(self, answered: bool = True) -> None:
        """Strike the record out: its request has been answered. Counts an answer, if there was one."""
        if self._armed:
            self._memory[self._armed] = 0
            self._armed = 0
        if self._changing:
            _CHANGING.pack_into(self._memory, _CHANGING_AT, 0)
            self._changing = False
        if answered:
            _ANSWERED.pack_into(self._memory, 0, _ANSWERED.unpack_from(self._memory)[0] + 1)

    def noted(self) -> list[Entry]:
        """Return the records: what was under way when a worker died."""
        return [self._read(at) for at in (_AT, *_KEPT) if self._memory[at]]

    def go_on(self, is_done: Callable[[Entry], bool]) -> None:
        """Go on where a worker has died. is_done: whether what was noted has been done, and not been answered."""
        for at in (*_KEPT, _AT):
            if not self._memory[at]:
                continue
            entry = self._read(at)
            if is_done(entry):
                if at == _AT:
                    at = next((free for free in _KEPT if not self._memory[free]), _KEPT[-1])  # noqa: PLW2901
                    self._write(at, entry)
                self._kept[at] = entry
            else:
                self._memory[at] = 0
        self._memory[_AT] = 0
        _CHANGING.pack_into(self._memory, _CHANGING_AT, 0)

    def repeats(self, entry: Entry) -> bool:
        """Tell whether a request is one that a worker that died has carried out, and did not answer."""
        for at, kept in self._kept.items():
            if kept.same_request(entry):
                del self._kept[at]
                self._armed = at
                return True
        return False

    def _write(self, at: int, entry: Entry) -> None:
        """Write a record. The mark that it is valid comes last."""
        memory = self._memory
        names = entry.name + entry.new_name
        record = _RECORD.pack(
            0, entry.op, entry.parent, entry.new_parent, entry.ino, entry.other, entry.flags, entry.pid,
            len(entry.name), len(entry.new_name),
        )  # fmt: skip
        memory[at] = 0
        memory[at : at + len(record) + len(names)] = record + names
        memory[at] = 1

    def _read(self, at: int) -> Entry:
        _, op, parent, new_parent, ino, other, flags, pid, first, second = _RECORD.unpack_from(self._memory, at)
        at += _RECORD.size
        names = bytes(self._memory[at : at + first + second])
        return Entry(op, parent, names[:first], new_parent, names[first:], ino, other, flags, pid)


def answered(memory: mmap.mmap | bytearray) -> int:
    """Return how many requests were answered."""
    return int(_ANSWERED.unpack_from(memory)[0])
