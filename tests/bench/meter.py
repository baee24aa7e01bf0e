"""What a stretch of time cost: CPU seconds of the server, the daemon and this client, and how idle the machine was."""

import mmap
import os
import resource
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

TICK = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1
KEPT = min(3 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)  # bytes


class RunError(Exception):
    """A run that failed or lost a message: the benchmark reports it, goes on with the next one, and exits with 1."""


def family(pid):
    """Return a process id and those of all its descendants that live."""
    pids = [pid]
    for parent in pids:  # grows while it is walked
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    pids += map(int, file.read().split())
    return pids


def process_cpu(pid):
    """CPU seconds that a process used so far: all its threads, and its children whether they live or not.

    0 for None.
    """
    ticks = 0
    for member in family(pid) if pid is not None else ():
        with suppress(OSError), open(f"/proc/{member}/stat", "rb") as file:
            # utime, stime, and both of the children it waited for; the name before them may hold spaces and ")".
            ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    return ticks / TICK


@dataclass(frozen=True)
class Reading:
    """The clocks at one moment, in seconds. To read them takes from `begun` to `done`."""

    begun: float
    server: float
    daemon: float
    client: float
    idle: float
    waiting: float  # idle while a disk request was under way
    done: float


def reading(server=None, daemon=None):
    """Read all clocks; `server` and `daemon` are process ids or None."""
    begun, own = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/stat", "rb") as file:
        machine = file.readline().split()[1:]
    return Reading(
        begun=begun,
        server=process_cpu(server),
        daemon=process_cpu(daemon),
        client=own.ru_utime + own.ru_stime,
        idle=int(machine[3]) / TICK,
        waiting=int(machine[4]) / TICK,
        done=time.monotonic(),
    )


def between(before, after):
    """Say what the time between two readings cost: seconds by name, and under `bound` what held the load up."""
    cost = {"wall": round(after.begun - before.done, 6)}
    for name in ("server", "daemon", "client", "idle", "waiting"):
        cost[name] = round(getattr(after, name) - getattr(before, name), 4)
    ours = sum(cost[name] for name in ("server", "daemon", "client", "idle", "waiting"))
    cost["others"] = round(max(cost["wall"] * CORES - ours, 0.0), 4)  # the kernel's own threads among them
    return cost | {"bound": bound(cost)}


@contextmanager
def measured(server=None, daemon=None):
    """Measure a stretch of time: yields a dictionary that holds its cost, as `between` has it, when the stretch is over.

    `server`: a process id, or a function to ask for it at the end, of a server that starts meanwhile.
    """
    cost = {}
    give_back()
    before = reading(None if callable(server) else server, daemon)
    yield cost
    after = reading(server() if callable(server) else server, daemon)
    keep()
    cost |= between(before, after)


_kept = []


def keep():
    """Hold some memory, touched, until the next measurement, and for it.

    A virtual machine may hand memory that was free for two seconds back to its host (free page reporting), and whoever
    uses it next waits for the host: reading a plain file of 1 GiB cold took 0.11 s of CPU right after its pages were
    freed, and 1.3 to 1.8 s five seconds later. A mount caches twice what a plain directory does, so this is no detail.
    """
    if not _kept:
        memory = mmap.mmap(-1, KEPT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(0, KEPT, mmap.PAGESIZE):
            memory[at] = 1
        _kept.append(memory)


def give_back():
    """Free what is held: the kernel takes what was freed last first."""
    keep()
    _kept.pop().close()


def bound(cost):
    """Name what held a load up.

    `other processes` make the figures worthless; `cpu` is that of the whole machine; `threads of the server` means
    that one step which only one thread at a time can take was always busy; `latency` means that nobody was busy.
    """
    wall = max(cost["wall"], 1e-6)
    if wall < 20 / TICK:
        return "too short to say"
    if cost["others"] / (wall * CORES) > 0.2:
        return "other processes"
    if cost["client"] / wall > 0.85:
        return "client"
    if (cost["idle"] + cost["waiting"]) / (wall * CORES) < 0.15:
        return "cpu"
    if cost["waiting"] / wall > 0.4:
        return "disk"
    for name in ("daemon", "server"):
        if cost[name] / wall > 0.85:
            return f"threads of the {name}"
    return "latency"
