"""Loads of plain files: each takes a fresh store, and keeps what it came to in the run, as those of encfs_js.compare.loads do."""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from encfs_js.compare import clocks, loads
from encfs_js.compare.modes import mounted
from encfs_js.compare.processes import RunError

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Size(loads.Size):
    """How much of everything."""

    file_mib: int = 1024
    files: int = 3_000


QUICK = Size(**vars(loads.QUICK) | {"file_mib": 8, "files": 100})


def file(run: Any) -> None:
    """Write one large file in requests of 1 MiB, fsync it, and read it cold."""
    chunk = bytearray(os.urandom(MIB))
    # Page-aligned and touched before the clock starts, as an application's reused buffer is.
    target = mmap.mmap(-1, MIB)
    target.write(bytes(MIB))
    path = os.path.join(run.store.directory, "large")
    with mounted(run.store) as daemon:
        os.sync()
        with clocks.measured((), daemon.pids) as written, open(path, "xb", buffering=0) as writer:
            for index in range(run.size.file_mib):
                chunk[:8] = index.to_bytes(8, "little")
                if writer.write(chunk) != MIB:
                    raise RunError(f"MiB {index} of the file was written in part")
            os.fsync(writer.fileno())
    with mounted(run.store) as daemon:
        clocks.drop_caches()
        with clocks.measured((), daemon.pids) as read, open(path, "rb", buffering=0) as reader:
            for index in range(run.size.file_mib):
                chunk[:8] = index.to_bytes(8, "little")
                if reader.readinto(target) != MIB or target[:] != chunk:
                    raise RunError(f"MiB {index} of the file is not what was written")
    share = GIB / MIB / run.size.file_mib
    for name, cost in (("write", written), ("read", read)):
        run.add(f"file.{name}", rate=run.size.file_mib * MIB / cost.wall)
        if run.store.has_daemon:
            run.add(f"file.{name}", cpu_gib=cost.daemon * share)


def small(run: Any) -> None:
    """Create, stat, rename and unlink small files, one after the other from one thread.

    Nothing is synced from the creation to the unlinking, so the file system below does not yet have to free blocks on
    the disk. `small.stat` is of a second set of files, whose names and inodes the kernel has dropped.
    """
    body = os.urandom(300)

    def create(index: int) -> None:
        descriptor = os.open(f"{index}.tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, body)
        os.close(descriptor)

    def timed(name: str, step: Callable[[int], object]) -> None:
        with clocks.measured((), daemon.pids) as cost:
            for index in range(run.size.files):
                step(index)
        run.add(f"small.{name}", time=cost.wall / run.size.files)

    with mounted(run.store) as daemon:
        directory = os.path.join(run.store.directory, "small")
        os.mkdir(directory)
        os.sync()
        with contextlib.chdir(directory):
            timed("create", create)
            timed("stat_cached", lambda index: os.stat(f"{index}.tmp"))
            timed("rename", lambda index: os.rename(f"{index}.tmp", f"{index}.dat"))
            timed("unlink", lambda index: os.unlink(f"{index}.dat"))
            if left := os.listdir("."):
                raise RunError(f"{len(left)} files are left after unlinking all")
            for index in range(run.size.files):
                create(index)
            clocks.drop_caches()
            os.stat("0.tmp")  # looks up the directory as well
            timed("stat", lambda index: os.stat(f"{index}.tmp"))


LOADS: dict[str, Callable[[Any], None]] = {
    "publish": loads.publish,
    "stream": loads.stream,
    "single": loads.single,
    "always": loads.always,
    "file": file,
    "small": small,
}


def applies(load: str, kind: str) -> bool:
    """Whether a load makes sense in a mode: nats-server's own encryption has no plain files."""
    return kind != "server" or load not in {"file", "small"}
