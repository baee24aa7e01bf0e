"""The loads. Each takes a fresh store, and returns its figures and what each cost: `{figure: value}, {part: cost}`.

Rates are messages or bytes per second, times are seconds; report.py knows the units that are shown.
"""

import contextlib
import mmap
import os
import statistics
import time
from dataclasses import dataclass

from . import client, server
from .backends import mounted
from .meter import RunError, measured

GIB = 1 << 30
MIB = 1 << 20
BLOCK = 8 * MIB  # of a stream without limits


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    messages: int = 300_000
    payload: int = 512
    window: int = 4
    headers: bool = False
    sync_messages: int = 2_000
    file_mib: int = 1024
    files: int = 3_000


def settle():
    """Write everything dirty to the disk, so that one run's rest is not the next one's load."""
    os.sync()


def drop_caches(what=3):
    """Empty the page cache (1), names and inodes (2) or both (3); say whether that was allowed (to root only)."""
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write(str(what))
    except PermissionError:
        return False
    # The server's program is not what a cold store is about.
    with open(server.executable(), "rb") as file:
        while file.read(MIB):
            pass
    return True


def fill(store, daemon, size, bodies, *, storage="file"):
    """Publish the whole load into a new stream; return seconds, seconds until it is on the disk, and the cost."""
    prepared = client.chunks(size.messages, bodies, headers=size.headers)
    with server.running(store) as nats:
        client.stream(nats.port, "CREATE", storage=storage)
        settle()
        with client.connected(nats.port) as connection:
            connection.subscribe(client.ACKS, 1)
            with measured(nats.pid, daemon) as cost:
                client.publish(connection, prepared, size.window)
        if (count := client.stored(nats.port)) != size.messages:
            raise RunError(f"the stream has {count} of {size.messages} messages: the rest was lost")
        began = time.monotonic()
        settle()
    return cost["wall"], cost["wall"] + time.monotonic() - began, cost


def ceiling(store, size):
    """Publish into a stream in memory: what server and client can do without any file system."""
    took, _, cost = fill(store, None, size, client.payloads(size.payload), storage="memory")
    return {"ceiling.rate": size.messages / took}, {"ceiling": cost}


@contextlib.contextmanager
def restarted(store, daemon, size):
    """Start the server on a filled store; yield it and what it cost until it said that all messages are there."""
    with contextlib.ExitStack() as running:
        with measured(lambda: nats.pid, daemon) as cost:
            nats = running.enter_context(server.running(store))
            if (count := client.stored(nats.port)) != size.messages:
                raise RunError(f"after a restart the stream has {count} of {size.messages} messages")
        yield nats, cost


def jetstream(store, size):
    """Publish, restart the server warm and cold, and replay cold.

    A server that starts reads every message of the last two minutes, to know their message ids (the stream's
    duplicate window), and keeps the blocks in memory for a while. So `restart.warm` and `restart.cold` read the whole
    store. For `restart.settled` and the replay the window is made short first, as if the messages were older.
    """
    bodies = client.payloads(size.payload)
    costs = {}
    with mounted(store) as daemon:
        took, synced, costs["publish"] = fill(store, daemon, size, bodies)
        settle()
        with restarted(store, daemon, size) as (_, costs["restart.warm"]):
            pass
    with mounted(store) as daemon:
        drop_caches()
        with restarted(store, daemon, size) as (nats, costs["restart.cold"]):
            client.stream(nats.port, "UPDATE", storage="file", duplicate_window=100_000_000)
        drop_caches()
        with restarted(store, daemon, size) as (nats, costs["restart.settled"]):
            received, costs["replay"] = replay(nats, daemon, size, bodies)
    figures = {
        "publish.rate": size.messages / took,
        "publish.synced_rate": size.messages / synced,
        "replay.rate": size.messages / costs["replay"]["wall"],
        "replay.bytes": received / costs["replay"]["wall"],
    }
    return figures | {name: costs[name]["wall"] for name in costs if name.startswith("restart")}, costs


def replay(nats, daemon, size, bodies):
    """Replay the whole stream cold and check it; return the bytes received and the cost."""
    with client.connected(nats.port) as connection:
        consumer = client.Replay(connection, size.messages, size.payload)
        drop_caches()
        read = bytes_read(nats.pid)
        with measured(nats.pid, daemon) as cost:
            consumer.start(nats.port)
            received = consumer.receive()
    # The last block may be in the server's memory: it looked there for the duplicate window.
    if (read := bytes_read(nats.pid) - read) < size.messages * size.payload - BLOCK:
        raise RunError(f"the replay was not cold: the server read {read} bytes, the rest was in its memory")
    consumer.check(bodies)
    return received, cost


def bytes_read(pid):
    """Return how many bytes a process got from read calls so far, from wherever they came."""
    with open(f"/proc/{pid}/io") as file:
        return int(file.readline().split()[1])


def sync(store, size):
    """Publish one message at a time with `sync_interval: always`."""
    bodies = client.payloads(size.payload)
    with mounted(store) as daemon, server.running(store, sync_always=True) as nats:
        client.stream(nats.port, "CREATE", storage="file")
        settle()
        with client.connected(nats.port) as connection:
            connection.subscribe(client.ACKS, 1)
            client.publish_one_by_one(connection, min(100, size.sync_messages), bodies, headers=size.headers)
            with measured(nats.pid, daemon) as cost:
                latencies = client.publish_one_by_one(connection, size.sync_messages, bodies, headers=size.headers)
    figures = {
        "sync.p50": statistics.median(latencies),
        "sync.p99": statistics.quantiles(latencies, n=100)[98],
    }
    return figures, {"sync": cost}


def file(store, size):
    """Write one large file in requests of 1 MiB, fsync it, and read it cold."""
    chunk = bytearray(os.urandom(MIB))
    # Page-aligned and touched before the clock starts, as an application's reused buffer is.
    target = mmap.mmap(-1, MIB)
    target.write(bytes(MIB))
    path = os.path.join(store.directory, "large")
    with mounted(store) as daemon:
        settle()
        with measured(None, daemon) as written, open(path, "xb", buffering=0) as writer:
            for index in range(size.file_mib):
                chunk[:8] = index.to_bytes(8, "little")
                if writer.write(chunk) != MIB:
                    raise RunError(f"MiB {index} of the file was written in part")
            os.fsync(writer.fileno())
    with mounted(store) as daemon:
        drop_caches()
        with measured(None, daemon) as read, open(path, "rb", buffering=0) as reader:
            for index in range(size.file_mib):
                chunk[:8] = index.to_bytes(8, "little")
                if reader.readinto(target) != MIB or target[:] != chunk:
                    raise RunError(f"MiB {index} of the file is not what was written")
    share = GIB / MIB / size.file_mib
    figures = {
        "file.write": size.file_mib * MIB / written["wall"],
        "file.read": size.file_mib * MIB / read["wall"],
    }
    if store.command:
        figures |= {
            "file.write_cpu": written["daemon"] * share,
            "file.read_cpu": read["daemon"] * share,
        }
    return figures, {"file.write": written, "file.read": read}


def small(store, size):
    """Create, stat, rename and unlink small files, one after the other from one thread.

    Nothing is synced from the creation to the unlinking, so the file system below does not yet have to free blocks on
    the disk. `small.stat` is of a second set of files, whose names and inodes the kernel has dropped.
    """
    body = os.urandom(300)
    figures, costs = {}, {}

    def create(index):
        descriptor = os.open(f"{index}.tmp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, body)
        os.close(descriptor)

    def stat(index):
        os.stat(f"{index}.tmp")

    def timed(name, step):
        with measured(None, daemon) as costs[name]:
            for index in range(size.files):
                step(index)
        figures[name] = costs[name]["wall"] / size.files

    with mounted(store) as daemon:
        directory = os.path.join(store.directory, "small")
        os.mkdir(directory)
        settle()
        with contextlib.chdir(directory):
            timed("small.create", create)
            timed("small.stat_cached", stat)
            timed("small.rename", lambda index: os.rename(f"{index}.tmp", f"{index}.dat"))
            timed("small.unlink", lambda index: os.unlink(f"{index}.dat"))
            if left := os.listdir("."):
                raise RunError(f"{len(left)} files are left after unlinking all")
            for index in range(size.files):
                create(index)
            drop_caches(2)
            os.stat("0.tmp")  # looks up the directory as well
            timed("small.stat", stat)
    return figures, costs


LOADS = {"ceiling": ceiling, "jetstream": jetstream, "sync": sync, "file": file, "small": small}


def applies(load, backend):
    """Whether a load makes sense on a backend."""
    if load == "ceiling":
        return backend == "plain"
    return load in {"jetstream", "sync"} or not backend.startswith("server:")
