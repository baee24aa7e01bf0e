"""What a process that holds keys does first: no core dump, no debugger of the same user, nothing on swap."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_MCL_CURRENT_AND_FUTURE: Final = 3
_libc: Final = ctypes.CDLL(None, use_errno=True)


def no_dumps() -> None:
    """Keep this process's memory out of core files, and from ptrace and /proc/PID/mem of other processes of its user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(parent: int, signal: int) -> None:
    """Have the kernel end this process when `parent` ends, also when that has happened already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def lock_memory() -> str:
    """Keep all memory of this process, now and later, off swap and present. Returns why that was refused, or "".

    Present matters: a process that is killed while the kernel copies a request into memory that was never touched makes that
    request fail with EIO, where it would have been sent again (seen in 4 of 526 kills, and in 0 of 594 with locked memory).
    """
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    except (OSError, ValueError):
        pass
    if not _libc.mlockall(_MCL_CURRENT_AND_FUTURE):
        return ""
    code = ctypes.get_errno()
    return "RLIMIT_MEMLOCK is too low" if code == errno.ENOMEM else os.strerror(code)


def lock_buffer(buffer: memoryview) -> None:
    """Keep one buffer present, where all memory cannot be: see FORMAT.md section 2.2 for what depends on it."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    _libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(len(buffer)))


def lock_file(fd: int) -> str:
    """Keep the content of a memfd off swap for as long as this process lives. Returns why that was refused, or ""."""
    size = os.fstat(fd).st_size
    _libc.mmap.restype = ctypes.c_void_p
    at = _libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
    if at == ctypes.c_void_p(-1).value or _libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(size)):
        return os.strerror(ctypes.get_errno())
    return ""
