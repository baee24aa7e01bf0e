"""What a stretch of time cost: CPU seconds of the server, the daemon and this client, and how idle the machine was."""

import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass

TICK = os.sysconf("SC_CLK_TCK")
CORES = os.cpu_count() or 1


class RunError(Exception):
    """A run that failed or lost a message: the benchmark reports it, goes on with the next one, and exits with 1."""


def process_cpu(pid):
    """CPU seconds that a process used so far: all its threads, the children it waited for, and those that still run.

    0 for None.
    """
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat", "rb") as file:
        # utime, stime, cutime and cstime are fields 14 to 17; the command's name may hold spaces and parentheses.
        fields = file.read().rpartition(b")")[2].split()[11:15]
    children = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
            children += map(int, file.read().split())
    return sum(map(int, fields)) / TICK + sum(map(process_cpu, children))


@dataclass(frozen=True)
class Reading:
    """The clocks at one moment, in seconds."""

    wall: float
    server: float
    daemon: float
    client: float
    idle: float
    waiting: float  # idle while a disk request was under way


def reading(server=None, daemon=None):
    """Read all clocks; `server` and `daemon` are process ids or None."""
    with open("/proc/stat", "rb") as file:
        machine = file.readline().split()[1:]
    own = resource.getrusage(resource.RUSAGE_SELF)
    return Reading(
        wall=time.monotonic(),
        server=process_cpu(server),
        daemon=process_cpu(daemon),
        client=own.ru_utime + own.ru_stime,
        idle=int(machine[3]) / TICK,
        waiting=int(machine[4]) / TICK,
    )


def between(before, after):
    """Say what the time between two readings cost: seconds by name, and under `bound` what held the load up."""
    names = ("wall", "server", "daemon", "client", "idle", "waiting")
    cost = {name: round(getattr(after, name) - getattr(before, name), 4) for name in names}
    return cost | {"bound": bound(cost)}


def bound(cost):
    """Name what held a load up: `client`, `cpu` of the machine, `disk`, threads of daemon or server, `latency`.

    The last means that nobody was busy: one waited for the other.
    """
    wall = max(cost["wall"], 1e-6)
    if wall < 20 / TICK:
        return "too short to say"
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
