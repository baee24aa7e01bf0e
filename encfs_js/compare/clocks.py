"""What a stretch of time cost: seconds, CPU, memory and what was written to the disk, of the server, the daemon and the rest."""

from __future__ import annotations

import mmap
import os
import resource
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from encfs_js.compare.processes import family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TICK: Final = os.sysconf("SC_CLK_TCK")
CORES: Final = os.cpu_count() or 1
_SECTOR: Final = 512  # bytes, whatever the disk's own sectors are: Documentation/block/stat.rst of Linux


@dataclass
class Cost:
    """What a stretch cost, in seconds of CPU and of time; all zero until it is over.

    others: CPU of the rest of the machine, the kernel's own threads among it; waiting: idle while a disk request was under way.
    """

    wall: float = 0.0
    server: float = 0.0
    daemon: float = 0.0
    client: float = 0.0
    idle: float = 0.0
    waiting: float = 0.0
    others: float = 0.0

    def bound(self) -> str:
        """Name what held the load up; "others" makes the figures worthless, "latency" means that nobody was busy."""
        if self.wall < 20 / TICK:
            return ""
        if self.others / (self.wall * CORES) > 0.2:
            return "others"
        if self.client / self.wall > 0.85:
            return "client"
        if (self.idle + self.waiting) / (self.wall * CORES) < 0.15:
            return "cpu"
        return "disk" if self.waiting / self.wall > 0.4 else "latency"


def process_cpu(pids: Sequence[int]) -> float:
    """Return the CPU seconds that processes used so far: all threads, and their children whether they live or not."""
    ticks = 0
    for member in {each for pid in pids for each in family(pid)}:
        with suppress(OSError), open(f"/proc/{member}/stat", "rb") as file:
            # utime, stime, and both of the children it waited for; the name before them may hold spaces and ")".
            ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    return ticks / TICK


def memory(pids: Sequence[int]) -> int:
    """Return the resident memory of processes and their descendants in bytes; what several share is counted once, in parts.

    Where that may not be read (a daemon that forbids core dumps, to who is not root) what they share is counted for each.
    """
    found = 0
    for member in {each for pid in pids for each in family(pid)}:
        try:
            with open(f"/proc/{member}/smaps_rollup", "rb") as file:
                found += next(int(line.split()[1]) << 10 for line in file if line.startswith(b"Pss:"))
        except (OSError, StopIteration):
            with suppress(OSError), open(f"/proc/{member}/statm", "rb") as file:
                found += int(file.read().split()[1]) * mmap.PAGESIZE
    return found


def written(path: str) -> int | None:
    """Return how many bytes the disk below a path was told to write so far; None where no one disk is below it.

    Of the whole disk: whoever else writes there is counted, too.
    """
    device = os.stat(path).st_dev
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat", encoding="ascii") as file:
            return int(file.read().split()[6]) * _SECTOR
    except OSError:
        return None


@dataclass(frozen=True)
class _Reading:
    """The clocks at one moment. To read them takes from `begun` to `done`."""

    begun: float
    server: float
    daemon: float
    client: float
    idle: float
    waiting: float
    done: float


def _read(server: Sequence[int], daemon: Sequence[int]) -> _Reading:
    begun, own = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/stat", "rb") as file:
        machine = file.readline().split()[1:]
    return _Reading(
        begun=begun,
        server=process_cpu(server),
        daemon=process_cpu(daemon),
        client=own.ru_utime + own.ru_stime,
        idle=int(machine[3]) / TICK,
        waiting=int(machine[4]) / TICK,
        done=time.monotonic(),
    )


@contextmanager
def measured(server: Sequence[int] | Callable[[], Sequence[int]] = (), daemon: Sequence[int] = ()) -> Iterator[Cost]:
    """Measure a stretch of time; the Cost that it yields is filled in at the end.

    server: process ids, or a function to ask for them at the end, of servers that start meanwhile.
    """
    cost = Cost()
    _give_back()
    before = _read(() if callable(server) else server, daemon)
    yield cost
    after = _read(server() if callable(server) else server, daemon)
    _take()
    cost.wall = after.begun - before.done
    for name in ("server", "daemon", "client", "idle", "waiting"):
        setattr(cost, name, getattr(after, name) - getattr(before, name))
    ours = cost.server + cost.daemon + cost.client + cost.idle + cost.waiting
    cost.others = max(cost.wall * CORES - ours, 0.0)


class _Held:
    """Memory that is held between measurements. size: bytes."""

    size = 0
    blocks: list[mmap.mmap] = []  # noqa: RUF012  one for the process


def hold(size: int) -> None:
    """Have so many bytes of touched memory at hand for every measurement from now on, 0 for none.

    A virtual machine may hand memory that was free for two seconds back to its host (free page reporting), and whoever
    uses it next waits for the host: reading a plain file of 1 GiB cold took 0.11 s of CPU right after its pages were
    freed, and 1.3 to 1.8 s five seconds later. A mount caches twice what a plain directory does, so this is no detail.
    """
    _give_back()
    _Held.size = size
    _take()


def _take() -> None:
    if _Held.size and not _Held.blocks:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        _Held.blocks.append(mmap.mmap(-1, _Held.size, flags=flags))


def _give_back() -> None:
    """Free what is held: the kernel takes what was freed last first."""
    while _Held.blocks:
        _Held.blocks.pop().close()


def sync() -> None:
    """Write everything to the disk, also what the kernel holds for a FUSE mount.

    Twice: a sync takes the file systems in the order in which they were mounted, so the first one may write to the disk's file
    system before it brings what was written to the mount there. A mount had 4 KiB of 2 MiB on the disk after one.
    """
    os.sync()
    os.sync()


def drop_caches() -> bool:
    """Write everything to the disk and empty the page cache, names and inodes; False where only root could."""
    sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("3")
    except OSError:
        return False
    return True
