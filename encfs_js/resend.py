"""The kernel's unanswered requests: have them sent again, and look at them before anybody answers.

A worker that dies leaves requests that it had read and not answered. FUSE_NOTIFY_RESEND (Linux 6.9) puts them back at the
head of the queue, with bit 63 of their `unique` set. They are read here once, to know which they are, and sent again for
libfuse to read. Layouts: struct fuse_in_header and its neighbours in <linux/fuse.h>, little endian machines' as any other's
in the machine's own order.
"""

from __future__ import annotations

import os
import select
import struct
from typing import Final

from encfs_js.journal import CREATE, LINK, MKDIR, MKNOD, RENAME, RMDIR, SYMLINK, UNLINK, Entry

HAS_RESEND: Final = 1 << 39
_NOTIFY_RESEND: Final = struct.pack("=IiQ", 16, 7, 0)
_RESENT: Final = 1 << 63
_NOBODYS: Final = 0x7FFFFFFFFFFFFFFE
# len, opcode, unique, nodeid, uid, gid, pid, extensions
_HEADER: Final = struct.Struct("=IIQQIIII")
_INIT: Final = struct.Struct("=IIIII")
_FORGET: Final = 2
_INTERRUPT: Final = 36
_RENAME2: Final = 45
_BATCH_FORGET: Final = 42
_U64: Final = struct.Struct("=Q")
# What stands before the name: fuse_mknod_in, fuse_mkdir_in, fuse_create_in.
_BEFORE: Final = {SYMLINK: 0, MKNOD: 16, MKDIR: 8, UNLINK: 0, RMDIR: 0, CREATE: 16}
_MOST: Final = (1 << 20) + 4096


def init_flags(request: bytes) -> int:
    """Return the 64 flags of a FUSE_INIT request: what this kernel can do."""
    _, _, _, flags, more = _INIT.unpack_from(request.ljust(_HEADER.size + _INIT.size, b"\0"), _HEADER.size)
    return int(flags | more << 32) if len(request) >= _HEADER.size + _INIT.size else int(flags)


def copy_of_init(request: bytes) -> bytes:
    """Return the request under a number that the kernel has not given to any: the answer to it is dropped."""
    return request[:8] + _U64.pack(_NOBODYS) + request[16:]


def resend(fuse: int) -> None:
    """Ask the kernel to send again what was read and not answered. Raises OSError EINVAL before Linux 6.9."""
    os.write(fuse, _NOTIFY_RESEND)


def unanswered(fuse: int) -> tuple[list[Entry], list[int]]:
    """Return the unanswered requests that make, remove or move names, and the nodes that were forgotten meanwhile.

    All of them are the kernel's to send again afterwards, but for the forgotten: of those nobody hears twice.
    """
    resend(fuse)
    buffer = memoryview(bytearray(_MOST))
    poll = select.poll()
    poll.register(fuse, select.POLLIN)
    found, forgotten = [], []
    while any(happened & select.POLLIN for _, happened in poll.poll(0)):
        size = os.readv(fuse, [buffer])
        _, opcode, unique, node, _, _, pid, _ = _HEADER.unpack_from(buffer)
        body = bytes(buffer[_HEADER.size : min(size, _HEADER.size + 65536)])
        if opcode == _FORGET:
            forgotten.append(node)
        elif opcode == _BATCH_FORGET:
            count = struct.unpack_from("=I", body)[0]
            forgotten += [_U64.unpack_from(body, 8 + 16 * i)[0] for i in range(count)]
        elif opcode == _INTERRUPT:
            continue  # whoever gave up waiting gets an answer all the same
        elif not unique & _RESENT:
            break  # a new request: those sent again stand before all new ones
        elif (entry := _entry(opcode, node, body)) is not None:
            found.append(entry._replace(pid=pid))
    return found, forgotten


def _entry(opcode: int, node: int, body: bytes) -> Entry | None:
    if opcode in _BEFORE:
        return Entry(opcode, node, body[_BEFORE[opcode] :].split(b"\0", 1)[0])
    if opcode == LINK:
        return Entry(LINK, _U64.unpack_from(body)[0], b"", node, body[8:].split(b"\0", 1)[0])
    if opcode in {RENAME, _RENAME2}:
        new_parent = _U64.unpack_from(body)[0]
        flags, start = (struct.unpack_from("=I", body, 8)[0], 16) if opcode == _RENAME2 else (0, 8)
        old, new, *_ = body[start:].split(b"\0")
        return Entry(RENAME, node, old, new_parent, new, flags=flags)
    return None
