"""What somebody learns who gets the files of a store, or two copies of them, and has no key."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from encfs_js import format as sealed
from encfs_js.compare import forging, modes, victim
from encfs_js.compare.client import connected
from encfs_js.compare.cluster import free_ports
from encfs_js.compare.observing import contents
from encfs_js.compare.processes import RunError
from encfs_js.compare.reading import time_of
from encfs_js.compare.victim import CONSUMER, OTHER, REMINDERS, STREAM
from encfs_js.errors import FormatError
from encfs_js.serverstate import assignments, parse_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.compare.modes import Store
    from encfs_js.compare.result import Word
    from encfs_js.compare.server import Server
    from encfs_js.compare.victim import Victim

_NODES: Final = 3
_PATIENCE: Final = 40.0  # seconds for a cluster to agree, and for nats-server to compact a block
_BLOCK: Final = range(1, 36)  # the messages of the first block


def _found(names: Sequence[str], files: Sequence[tuple[str, bytes]], what: str) -> tuple[Word, str]:
    """Look for names in all paths and contents: all of them found, some, or none."""
    hits: list[str] = []
    for name in names:
        paths = sum(name in path for path, _ in files)
        inside = sum(name.encode() in data for _, data in files)
        if paths or inside:
            where = [f"in the paths of {paths}"] * bool(paths) + [f"in the content of {inside}"] * bool(inside)
            hits.append(f"{name} {' and '.join(where)}")
    if not hits:
        return "hidden", f"None of {len(names)} {what} in {len(files)} files."
    word: Word = "found" if len(hits) == len(names) else "partly found"
    return word, f"{len(hits)} of {len(names)} {what} in {len(files)} files: {'; '.join(hits)}."


def _files(store: Store) -> list[tuple[str, bytes]]:
    return contents(store.backing)


def payloads(of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    """Look for the mark that every payload has."""
    files = _files(of.stores["late"])
    hits = {path: data.count(victim.MARK) for path, data in files if victim.MARK in data}
    if not hits:
        return "hidden", f"The mark of {2 * (victim.FILLED + victim.MORE)} payloads is in none of {len(files)} files."
    return (
        "found",
        f"A mark that all payloads have was found {sum(hits.values())} times, in {len(hits)} of {len(files)} files.",
    )


def names(of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    """Look for the names of account, streams and consumer."""
    return _found([victim.ACCOUNT, STREAM, OTHER, REMINDERS, CONSUMER], _files(of.stores["late"]), "names")


def subjects(of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    """Look for subjects, a header, a description and metadata."""
    wanted = [victim.SUBJECT, "approved-by-mallory", victim.DESCRIPTION, victim.METADATA]
    return _found(wanted, _files(of.stores["late"]), "subjects, headers, descriptions and metadata")


def schedules(of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    """Look for the subjects of scheduled messages."""
    files = _files(of.stores["late"])
    hits = [path for path, data in files if victim.SCHEDULED.encode() in data]
    if not hits:
        return "hidden", f"The subject of five schedules is in none of {len(files)} files."
    names = ", ".join(sorted({os.path.basename(path) for path in hits}))
    return "found", f"The subject of five schedules was found in {len(hits)} of {len(files)} files: {names}."


def sizes(of: Victim, _name: str, _check: Callable[[], None]) -> tuple[Word, str]:
    """Compute the plain sizes of all message blocks from the files, and compare them with the true ones."""
    store = of.stores["late"]
    right = 0
    for plain, size in of.sizes.items():
        with open(os.path.join(store.backing, of.paths[plain]), "rb") as file:
            right += _plain_size(of.mode.name, file.read()) == size
    word: Word = "found" if right == len(of.sizes) else "partly found" if right else "hidden"
    how = {
        "mount": "from the number of pages and the length that the last one says",
        "reference": "from the sizes of the files",
    }.get(of.mode.kind, "they are the sizes of the files")
    return word, f"Of {right} of {len(of.sizes)} message blocks the exact number of bytes can be computed: {how}."


def _plain_size(mode: str, data: bytes) -> int:
    if mode.startswith("mount"):
        pages = len(data) // sealed.PAGE
        return sealed.plain_size(pages, sealed.page_length(data[-sealed.PAGE :], pages - 1)) if pages else 0
    head, block, extra = {"gocryptfs": (18, 4128, 32), "securefs": (16, 4124, 28)}.get(mode, (0, 1, 0))
    body = max(len(data) - head, 0)
    return body - extra * -(-body // block) if extra else body


# --- two versions of a block --------------------------------------------------------------------------------------------


def two_versions(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
    """XOR a block from before and from after it was compacted with what is known of the first, and look for the second."""
    plain = victim.block(STREAM, 1)
    with of.copied("early", name) as store:
        path = os.path.join(store.backing, of.paths[plain])
        old = forging.contents_of(path)
        with victim.served(store, of.program, sync="1s") as connection:
            for number in _BLOCK:
                if number % 3:
                    connection.api(f"STREAM.MSG.DELETE.{STREAM}", {"seq": number})
            deadline = time.monotonic() + _PATIENCE
            while not os.path.exists(path) or os.path.getsize(path) > len(old) * 2 // 3:
                check()
                if time.monotonic() > deadline:
                    raise RunError(f"nats-server did not compact the block within {_PATIENCE:.0f} s")
                time.sleep(0.1)
        new = forging.contents_of(path)
    text = _reveal(of, old, new)
    kept = [number for number in _BLOCK if number % 3 == 0]
    revealed = [number for number in kept if victim.payload(STREAM, number) in text]
    if not revealed:
        return (
            "hidden",
            f"None of the {len(kept)} messages that were kept shows in the XOR of both versions and what is known of one.",
        )
    word: Word = "found" if len(revealed) == len(kept) else "partly found"
    return word, (
        f"{len(revealed)} of {len(kept)} payloads of the later version ({len(revealed) * victim.SIZE} bytes) are the XOR of both"
        " versions with what was known of the earlier one."
    )


def _reveal(of: Victim, old: bytes, new: bytes) -> bytes:
    """Return old XOR new XOR the plain text that is known of old, byte by byte where each lies in the backing file.

    Where both are the same bytes nothing is learned that was not known, so zeros are returned.
    """
    known = b"".join(
        forging.record(STREAM, 1, number, time_of(of.early.messages[STREAM][number]), victim.payload(STREAM, number))
        for number in _BLOCK
    )
    found = bytearray(len(known))
    for i, byte in enumerate(known):
        at = forging.place(of.mode.name, i)
        if at < min(len(old), len(new)) and old[at] != new[at]:
            found[i] = old[at] ^ new[at] ^ byte
        elif at < min(len(old), len(new)):
            found[i] = byte
    return bytes(found)


# --- raft ---------------------------------------------------------------------------------------------------------------


def raft(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
    """Look into the raft logs and snapshots of a cluster of three for its configuration; snapshots are decompressed."""
    with of.copied("early", name) as store:
        groups = _cluster(of, store, check)
        files = contents(store.backing)
    opened = 0
    for path, data in files:
        try:
            held = assignments(parse_snapshot(data, "_meta_", path).data, path)
        except (FormatError, ValueError):
            continue
        opened += STREAM in json.dumps(held)
    if opened:
        return "found", (
            f"{opened} of {groups} snapshots of the cluster's configuration can be read: every stream with its subjects,"
            " description and metadata."
        )
    return (
        "hidden",
        f"None of {groups} snapshots of the cluster's configuration can be read, nor recognised by its hash.",
    )


def _cluster(of: Victim, store: Store, check: Callable[[], None]) -> int:
    """Run three servers on three directories of one store; return how many have a snapshot of the meta group then."""
    places = [os.path.join(store.directory, f"node{i}") for i in range(_NODES)]
    with modes.mounted(store), ExitStack() as stack:
        servers = _nodes(of, store, places)
        for server in servers:
            stack.callback(server.kill)
            os.mkdir(server.store)
            server.begin()
        for server in servers:
            server.ready()
        config = victim.configs()[STREAM] | {"num_replicas": _NODES}
        deadline = time.monotonic() + _PATIENCE
        while said := _create(servers[0], config):
            check()
            if time.monotonic() > deadline:
                raise RunError(f"the cluster did not create a stream within {_PATIENCE:.0f} s: {said}")
            time.sleep(0.1)
        for server in servers:
            server.stop()
        meta = [os.path.join(place, "jetstream", "$SYS", "_js_", "_meta_", "snapshots") for place in places]
        found = sum(len(os.listdir(path)) for path in meta if os.path.isdir(path))
        if not found:
            raise RunError("the servers left no snapshot of the meta group")
    return found


def _create(server: Server, config: dict[str, object]) -> str:
    """Create a stream in a cluster; return what is in the way, "" when it is there."""
    try:
        with connected(server.port) as connection:
            connection.socket.settimeout(2)
            connection.api(f"STREAM.CREATE.{STREAM}", config)
    except (RunError, OSError) as error:  # nobody leads yet
        return str(error)
    return ""


def _nodes(of: Victim, store: Store, places: Sequence[str]) -> list[Server]:
    # The route's port is opened when the server is ready: one that a connection could get by itself may be taken by then.
    ports = free_ports(len(places))
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    servers = []
    for i, (place, port) in enumerate(zip(places, ports, strict=True)):
        server = victim.server_of(store, of.program)
        server.name, server.store = f"node{i}", place
        server.cluster += f'cluster {{ name: compare, listen: "127.0.0.1:{port}", routes: [{routes}] }}\n'
        servers.append(server)
    return servers
