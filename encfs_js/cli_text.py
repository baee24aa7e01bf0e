"""How the commands show things to people."""

from __future__ import annotations

import os


def shown(path: bytes | str) -> str:
    """Return a path in the store for the terminal: as it is, or quoted when it has characters that would not print."""
    text = os.fsdecode(path)
    return text if text.isprintable() else repr(text)


def size(count: int) -> str:
    """Return a number of bytes for people."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return `1 file`, `2 files`."""
    return f"{count} {one if count == 1 else many or one + 's'}"
