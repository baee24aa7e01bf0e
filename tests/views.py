"""A view for tests, through the command line only, like the mounts of mounts.py."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mounts
import server_stores as stores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FSTYPE = "fuse.encfs_js_view"


@dataclass
class View:
    """A store shown at `path` by a foreground process that is a child of the test."""

    store: Path
    path: Path
    process: subprocess.Popen[bytes]
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def complaints(self) -> list[str]:
        """The lines of the log that report trouble, but for one that is usual for a user without privileges."""
        lines = [line for line in self.log().splitlines() if mounts.COMPLAINT.search(line)]
        return [line for line in lines if os.geteuid() == 0 or "memory cannot be locked" not in line]


def free(view: View) -> None:
    """Whatever state it is in: reap the process, free the mountpoint."""
    mounts.abort(mounts.entry_at(view.path))
    view.process.kill()
    view.process.wait(mounts.PATIENCE)
    mounts.detach(view.path)


@contextlib.contextmanager
def shown(store: Path, path: Path, *options: str | Path, key: str | None = stores.KEY) -> Iterator[View]:
    """Show `store` at `path`; at the end of the block it is unmounted with `encfs-js umount`, unless it is gone already."""
    path.mkdir(parents=True, exist_ok=True)
    log_file = path.parent / f"{path.name}.{len(list(path.parent.glob(f'{path.name}.*.log')))}.log"
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [*mounts.COMMAND, "view", str(store), str(path), "--foreground", *map(str, options)],
            env=mounts.environment(key),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    view = View(store, path, process, log_file)
    try:
        mounts.until(lambda: process.poll() is not None or mounts.entry_at(path), "encfs-js view")
        assert process.poll() is None, f"encfs-js view ended with {process.returncode}:\n{view.log()}"
        entry = mounts.entry_at(path)
        assert entry is not None
        assert (entry.fstype, entry.source) == (FSTYPE, str(store))
        mounts.within(mounts.PATIENCE, lambda: os.statvfs(path), "statvfs", lambda: free(view))
        yield view
        if process.poll() is None:
            mounts.run("umount", path, key=None)
            assert process.wait(mounts.PATIENCE) == 0, view.log()
        assert mounts.entry_at(path) is None
    finally:
        free(view)


def problem(path: Path) -> int:
    """The errno with which the file cannot be read, 0 if it can."""
    try:
        path.read_bytes()
    except OSError as exc:
        return exc.errno or errno.EIO
    return 0
