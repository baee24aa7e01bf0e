"""What one worker was about to do when it died, in memory that outlives it: so that nothing is done twice.

Most requests may be answered twice without harm: they carry absolute offsets, or only ask. Those that make, remove or move a
name do not. Before one of them touches the store it is noted here, with what the outcome will be known by: inode numbers.
A worker's core is atomic between awaits, so no more than one is ever under way, and one record is enough. It is
struck out before the next request is read: by then it has been answered.

The next worker asks the kernel which requests were never answered (resend.py). Is the noted one among them, the tree says
whether it was done: nobody else changes the store. If so it is answered without doing it again.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import mmap

SIZE: Final = 16384  # bytes
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
CREATE: Final = 35

# valid[u8] zero[3] op[u32] parent[u64] new parent[u64] ino[u64] other ino[u64] flags[u32] name lengths[u16, u16]
_RECORD: Final = struct.Struct("<B3xIQQQQIHH")
_ANSWERED: Final = struct.Struct("<Q")
_AT: Final = 64


class Entry(NamedTuple):
    """One operation on names. op: the FUSE opcode; parent: of a link, the node that gets one more name; flags: renameat2's.

    ino: the node that is removed or moved, 0 for one that is made; other: the node that stands under the new name
    of an exchange. Names and numbers are the request's own.
    """

    op: int
    parent: int
    name: bytes
    new_parent: int = 0
    new_name: bytes = b""
    ino: int = 0
    other: int = 0
    flags: int = 0

    def same_request(self, other: Entry) -> bool:
        """Tell whether two entries are of the same request, whatever was found in the store."""
        return (self.op, self.parent, self.name, self.new_parent, self.new_name, self.flags) == (
            other.op, other.parent, other.name, other.new_parent, other.new_name, other.flags,
        )  # fmt: skip


class Journal:
    """The record, in `memory` of SIZE bytes, and a count of the requests that this and earlier workers have answered."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._memory = memory
        self._armed = bool(memory[_AT])

    def note(self, entry: Entry) -> None:
        """Note what is about to be done. The mark that it is valid comes last."""
        memory = self._memory
        names = entry.name + entry.new_name
        record = _RECORD.pack(
            0, entry.op, entry.parent, entry.new_parent, entry.ino, entry.other, entry.flags,
            len(entry.name), len(entry.new_name),
        )  # fmt: skip
        memory[_AT] = 0
        memory[_AT : _AT + len(record) + len(names)] = record + names
        memory[_AT] = 1
        self._armed = True

    def strike(self) -> None:
        """Strike the record out: its request has been answered. Counts an answer."""
        if self._armed:
            self._memory[_AT] = 0
            self._armed = False
        _ANSWERED.pack_into(self._memory, 0, _ANSWERED.unpack_from(self._memory)[0] + 1)

    def noted(self) -> Entry | None:
        """Return the record, or None when nothing is under way."""
        if not self._memory[_AT]:
            return None
        _, op, parent, new_parent, ino, other, flags, first, second = _RECORD.unpack_from(self._memory, _AT)
        at = _AT + _RECORD.size
        names = bytes(self._memory[at : at + first + second])
        return Entry(op, parent, names[:first], new_parent, names[first:], ino, other, flags)


def answered(memory: mmap.mmap | bytearray) -> int:
    """Return how many requests were answered."""
    return int(_ANSWERED.unpack_from(memory)[0])
