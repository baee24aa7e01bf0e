"""Where the log goes: the file that was asked for, else stderr (with journald's priorities under systemd), else syslog."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

log: Final = logging.getLogger("encfs_js")
_LINE: Final = logging.Formatter("encfs-js: %(levelname)s: %(message)s")
_PRIORITIES: Final = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines() or [""])


def to_journal() -> bool:
    """Tell whether stderr leads to journald, which takes a priority, as in `<3>`, from the start of a line."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def print_error(message: str, hint: object) -> None:
    """Print what went wrong, and the hint if there is one, for a person or for the journal."""
    first = "<3>" if to_journal() else ""
    print(f"{first}encfs-js: error: {message}", file=sys.stderr)
    if hint:
        print(f"{first}encfs-js: hint: {hint}", file=sys.stderr)


def configure(path: str | None, *, foreground: bool) -> None:
    """Send this process's log there, and nowhere else. Raises OSError when the file cannot be opened."""
    handler: logging.Handler
    if path is not None:
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    elif foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(_JournalFormatter() if to_journal() else _LINE)
    elif os.path.exists("/dev/log"):
        from logging.handlers import SysLogHandler  # noqa: PLC0415  it brings the network modules with it

        handler = SysLogHandler("/dev/log")
        handler.setFormatter(logging.Formatter("encfs-js[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written must not end who writes it
