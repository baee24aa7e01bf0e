"""Who serves a view: its process listens on an abstract socket, named after the mount's device, and says nothing there.

A view leaves nothing in the store that it shows, not even a lock. The kernel tells whoever connects which process listens,
and that it does: the name is gone when the process is. Names are anybody's to take, so who listens has to be whom the mount
belongs to. In another network namespace the name is not seen: then the mount itself is asked, with a limit in time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from encfs_js.mounts import MountEntry

_CREDENTIALS: Final = struct.Struct("iII")
_PATIENCE: Final = 2.0  # seconds


def listen(device: str) -> socket.socket | None:
    """Listen for who asks after the mount of a device ("major:minor"). Returns None when the name is taken."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(_name(device))
        sock.listen()
    except OSError:
        sock.close()
        return None
    return sock


def server_of(entry: MountEntry) -> int | None:
    """Return the process that serves a view, None when it is not known or there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_PATIENCE)
        try:
            sock.connect(_name(entry.device))
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None
    pid, user, _ = _CREDENTIALS.unpack(raw)
    return pid if user in {0, entry.user} and pid > 0 else None


def answers(mountpoint: str) -> bool | None:
    """Tell whether a mount answers; None when that cannot be told: this user may not ask, or it takes too long."""
    found: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
            found.append(True)
        except PermissionError:
            pass
        except OSError:
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return found[0] if found else None


def since(pid: int) -> str | None:
    """Return when a process was started, as ISO 8601; None when that cannot be seen."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/stat", encoding="ascii") as file:
            booted = next(int(line.split()[1]) for line in file if line.startswith("btime "))
        started = booted + ticks / os.sysconf("SC_CLK_TCK")
        return datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
    return None


def _name(device: str) -> str:
    return f"\0encfs_js view {device}"
