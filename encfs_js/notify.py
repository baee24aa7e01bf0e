"""What systemd is told, as sd_notify(3) describes it; nothing where nobody asks ($NOTIFY_SOCKET)."""

from __future__ import annotations

import os
import socket
from typing import Final

_FIRST_FD: Final = 3


class Notify:
    """The connection to the service manager. environ: its variables are taken out of it, so that no child answers for us."""

    def __init__(self, environ: os._Environ[str] | dict[str, str]) -> None:
        self._path = environ.pop("NOTIFY_SOCKET", "")
        limit, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        mine = pid in {"", str(os.getpid())}
        self.watchdog = int(limit) / 2e6 if limit.isdigit() and int(limit) and mine else 0.0
        """Seconds between two signs of life, half of what the unit allows; 0.0: nobody waits for any."""
        self._said = ""

    def say(self, *lines: str, fds: list[int] | None = None) -> None:
        """Send assignments, READY=1 for instance. What cannot be sent is lost: systemd will notice by itself."""
        if not self._path:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        data = "\n".join(lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect(address)
                if fds:
                    socket.send_fds(sock, [data], fds)
                else:
                    sock.send(data)
        except OSError:
            pass

    def status(self, text: str) -> None:
        """Set the unit's status text, if it changed."""
        if text != self._said:
            self._said = text
            self.say(f"STATUS={text}")


def was_passed(name: str, environ: os._Environ[str] | dict[str, str]) -> bool:
    """Tell whether the service manager passed this very process a descriptor of that name; `passed` takes it."""
    return environ.get("LISTEN_PID") == str(os.getpid()) and name in environ.get("LISTEN_FDNAMES", "").split(":")


def passed(environ: os._Environ[str] | dict[str, str]) -> dict[str, int]:
    """Return the descriptors that the service manager passed, by name (sd_listen_fds(3)); takes them out of `environ`."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found = {}
    for i in range(int(count)):
        os.set_inheritable(_FIRST_FD + i, False)
        found[names[i] if i < len(names) else ""] = _FIRST_FD + i
    return found
