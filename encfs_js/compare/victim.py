"""The filled store that is attacked: what is in it, how it is made in each mode, and where its files lie on the disk.

A real nats-server fills it through a real mount, and both are stopped cleanly. Three states of it are kept, to be copied for
each attack: `early`, `late` (some messages deleted, others published since) and `unindexed`: late without the index.db of the
two streams that are attacked, so that nats-server reads all their blocks at its start, as where an index.db is of no use to it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from encfs_js.compare import modes, processes
from encfs_js.compare.client import ACKS, ApiError, Connection, connected
from encfs_js.compare.processes import RunError
from encfs_js.compare.reading import Reading, read, time_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from encfs_js.compare.modes import Mode, Store
    from encfs_js.compare.server import Server

ACCOUNT: Final = "BANKINGDEPT"
STREAM: Final = "TRANSFERS"
OTHER: Final = "LEDGERBOOK"
REMINDERS: Final = "REMINDERS"
CONSUMER: Final = "bookkeeper"
SUBJECT: Final = "incoming-wire"  # within the subjects of the two streams
SCHEDULED: Final = "dunning-letter"  # within those of the schedules
HEADER: Final = b"NATS/1.0\r\nX-Approval: approved-by-mallory\r\n\r\n"
DESCRIPTION: Final = "description-of-the-wires"
METADATA: Final = "metadata-cost-centre"
MARK: Final = b"reference 7c5e01f4-9d2b-4f7e"  # in every payload
SIZE: Final = 800  # bytes of a payload
FILLED: Final = 80  # messages in the early state: 37 or so in a block
MORE: Final = 10  # published later
DELETED: Final = (3, 77)  # deleted later: one in the first block, one in the last
ACKED: Final = 30
_SMALL_BLOCKS: Final = 120_000  # max_bytes that makes blocks of 32,000 bytes
_WINDOW: Final = 0.2  # seconds in which the server looks for duplicates, and for that reads blocks at its start
_FAR: Final = "2099-01-01T00:00:00Z"
_STATES: Final = ("early", "late", "unindexed")
# So that the account's name can be looked for, too.
_ACCOUNTS: Final = (
    f"accounts {{ {ACCOUNT} {{ jetstream: enabled, users: [ {{ user: teller, password: teller }} ] }} }}\n"
    "no_auth_user: teller\n"
)


def configs() -> dict[str, dict[str, Any]]:
    """Return the configurations of the streams, as the application creates them, by name."""
    common = {"num_replicas": 1, "allow_direct": True, "duplicate_window": int(_WINDOW * 1e9)}
    blocks = {"max_bytes": _SMALL_BLOCKS, "description": DESCRIPTION, "metadata": {"note": METADATA}}
    found = {name: common | blocks | {"name": name, "subjects": [f"{name.lower()}.>"]} for name in (STREAM, OTHER)}
    found[REMINDERS] = common | {
        "name": REMINDERS,
        "subjects": [f"{REMINDERS.lower()}.>"],
        "allow_msg_schedules": True,
    }
    return found


def subject(stream: str, number: int) -> str:
    """Return the subject of a message of one of the two streams."""
    return f"{stream.lower()}.{SUBJECT}.{number % 5}"


def payload(stream: str, number: int) -> bytes:
    """Return the payload of the message with this sequence in one of the two streams: what an attacker may know of it."""
    line = b"transfer %05d EUR to alice, " % number + MARK + b" %05d %s; " % (number, stream.encode())
    return (line * (SIZE // len(line) + 1))[:SIZE]


def record_length(stream: str, number: int) -> int:
    """Return how many bytes of its block a message takes: head, subject, headers with their length, payload, hash."""
    return 22 + len(subject(stream, number)) + 4 + len(HEADER) + SIZE + 8


def _message(where: str, headers: bytes, body: bytes) -> bytes:
    total = len(headers) + len(body)
    return b"HPUB %s %s %d %d\r\n%s%s\r\n" % (where.encode(), ACKS, len(headers), total, headers, body)


def publish(connection: Connection, stream: str, numbers: range) -> None:
    """Publish messages of one of the two streams. Raises RunError."""
    connection.subscribe(ACKS, 1)
    for number in numbers:
        connection.socket.sendall(_message(subject(stream, number), HEADER, payload(stream, number)))
        if (sequence := connection.acked()) != number:
            raise RunError(f"an ack says sequence {sequence} instead of {number}")


def create_streams(connection: Connection) -> list[str]:
    """Do what most applications do at their start: create each stream, whether it is there or not; return what was refused."""
    refused = []
    for name, config in configs().items():
        try:
            connection.api(f"STREAM.CREATE.{name}", config)
        except ApiError as error:
            refused.append(str(error))
    return refused


def _fill(connection: Connection) -> None:
    if refused := create_streams(connection):
        raise RunError("; ".join(refused))
    for stream in (STREAM, OTHER):
        publish(connection, stream, range(1, FILLED + 1))
        config = {"durable_name": CONSUMER, "ack_policy": "explicit", "ack_wait": 3_600_000_000_000}
        connection.api(f"CONSUMER.DURABLE.CREATE.{stream}.{CONSUMER}", {"stream_name": stream, "config": config})
        _consume(connection, stream)
    for number in range(1, 6):
        where = f"{REMINDERS.lower()}.{SCHEDULED}"
        headers = f"NATS/1.0\r\nNats-Schedule: @at {_FAR}\r\nNats-Schedule-Target: {where}.due\r\n\r\n".encode()
        connection.socket.sendall(_message(f"{where}.{number}", headers, b"dun the debtor, " + MARK))
        connection.acked()


def _consume(connection: Connection, stream: str) -> None:
    inbox = b"_INBOX.compare.victim." + stream.encode()
    connection.subscribe(inbox, 2)
    ask = json.dumps({"batch": ACKED, "expires": 5_000_000_000}).encode()
    api = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{CONSUMER}".encode()
    connection.socket.sendall(b"PUB %s %s %d\r\n%s\r\n" % (api, inbox, len(ask), ask))
    for _ in range(ACKED):
        connection.next()
    connection.socket.sendall(b"UNSUB 2\r\n")
    for number in range(1, ACKED + 1):
        connection.request(f"$JS.ACK.{stream}.{CONSUMER}.1.{number}.{number}.0.0", b"+ACK")


def _go_on(connection: Connection) -> None:
    """Do what makes the late state of the early one."""
    for stream in (STREAM, OTHER):
        for number in DELETED:
            connection.api(f"STREAM.MSG.DELETE.{stream}", {"seq": number})
        publish(connection, stream, range(FILLED + 1, FILLED + MORE + 1))


def directory(stream: str) -> str:
    """Return where a stream lies below the store_dir."""
    return f"jetstream/{ACCOUNT}/streams/{stream}"


def block(stream: str, number: int) -> str:
    """Return where a message block lies below the store_dir."""
    return f"{directory(stream)}/msgs/{number}.blk"


@dataclass(frozen=True)
class Victim:
    """The store of one mode. stores: its states; paths: of each plain file the backing one, both relative, in the late state.

    sizes: of the plain message blocks, in the late state; last: the number of the last block of each of the two streams.
    early, late: what was served then.
    """

    mode: Mode
    program: str
    root: str
    stores: dict[str, Store]
    paths: dict[str, str]
    sizes: dict[str, int]
    early: Reading
    late: Reading
    noise: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def last(self) -> int:
        """The number of the last block of STREAM."""
        return max(int(os.path.basename(path)[:-4]) for path in self.sizes if path.startswith(directory(STREAM) + "/"))

    @property
    def wanted(self) -> dict[str, int]:
        """The last sequence of each stream."""
        return _wanted(FILLED + MORE)

    def time(self, stream: str, number: int) -> int:
        """Return when a message was stored, in ns since 1970, as anybody learns who gets it. Raises RunError."""
        return time_of(self.late.messages[stream][number])

    @contextmanager
    def copied(self, state: str, name: str) -> Iterator[Store]:
        """Yield a copy of a state below `root`, and remove it."""
        store = copy(self.stores[state], os.path.join(self.root, name))
        try:
            yield store
        finally:
            discard(store)


def copy(store: Store, root: str) -> Store:
    """Copy a store that is not mounted, with times, modes and what lies beside it, to the directory `root`, which is made."""
    # The reserve is room for a full disk, 64 MiB of nothing: the next mount makes another.
    shutil.copytree(store.root, root, symlinks=True, ignore=shutil.ignore_patterns("reserve", "*.log"))
    return modes.Store(store.mode, root, store.key, options=store.options)


def discard(store: Store) -> None:
    """Remove a store, unless something is still mounted in it."""
    processes.take_away(store.directory)
    if not os.path.ismount(store.directory):
        shutil.rmtree(store.root, ignore_errors=True)


def server_of(store: Store, program: str, *, sync: str | None = None) -> Server:
    """Return the server for a store of a victim, not started yet."""
    server = store.server(program, sync=sync)
    server.cluster = _ACCOUNTS
    return server


@contextmanager
def served(store: Store, program: str, *, sync: str | None = None) -> Iterator[Connection]:
    """Mount, start the server, connect; stop all cleanly at the end. Raises RunError."""
    server = server_of(store, program, sync=sync)
    with modes.mounted(store):
        try:
            server.start()
            with connected(server.port) as connection:
                yield connection
            server.stop()
        finally:
            server.kill()


def securefs_chpass(old: str, new: str) -> list[str]:
    """Return the command that changes the key of a securefs store, as far as the store; old, new: files with a key."""
    return ["securefs", "chpass", "--oldkeyfile", old, "--newkeyfile", new]


def prepare(mode: Mode, program: str, root: str, check: Callable[[], None]) -> Victim:
    """Make the states of a mode's store below the directory `root`, which is made. Raises RunError, OSError."""
    os.mkdir(root, 0o700)
    store = modes.create(mode, os.path.join(root, "early"))
    if mode.name == "securefs":  # its hundreds of MiB of Argon2id for each of many mounts would be all that this takes
        processes.call([*securefs_chpass(store.password, store.password), "-r", "1", store.backing])
    with served(store, program) as connection:
        _fill(connection)
        early = read(connection, _wanted(FILLED), check)
    stores = {"early": store, "late": copy(store, os.path.join(root, "late"))}
    with served(stores["late"], program) as connection:
        _go_on(connection)
        late = read(connection, _wanted(FILLED + MORE), check)
    time.sleep(_WINDOW)
    paths, sizes = _map(stores["late"])
    stores["unindexed"] = copy(stores["late"], os.path.join(root, "unindexed"))
    with modes.mounted(stores["unindexed"]):
        for stream in (STREAM, OTHER):
            os.unlink(os.path.join(stores["unindexed"].directory, directory(stream), "msgs", "index.db"))
    return Victim(mode, program, root, stores, paths, sizes, early, late)


def _wanted(last: int) -> dict[str, int]:
    return {STREAM: last, OTHER: last, REMINDERS: 5}


def _map(store: Store) -> tuple[dict[str, str], dict[str, int]]:
    """Find which backing file is which plain one: by a time of change that is given to each through the mount."""
    stamps: dict[int, str] = {}
    sizes: dict[str, int] = {}
    with modes.mounted(store):
        for parent, _, names in os.walk(store.directory):
            for name in names:
                path = os.path.join(parent, name)
                relative = os.path.relpath(path, store.directory)
                stamp = 1_500_000_000_000_000_000 + len(stamps) * 1_000_000_000
                os.utime(path, ns=(stamp, stamp))
                stamps[stamp] = relative
                if name.endswith(".blk"):
                    sizes[relative] = os.path.getsize(path)
    found: dict[str, str] = {}
    for parent, _, names in os.walk(store.backing):
        for name in names:
            path = os.path.join(parent, name)
            if (plain := stamps.get(os.stat(path).st_mtime_ns)) is not None:
                found[plain] = os.path.relpath(path, store.backing)
    if missing := set(stamps.values()) - set(found):
        raise RunError(f"no backing file was found for {', '.join(sorted(missing)[:3])}")
    return found, sizes
