"""The last look at a store that was converted: every record of every block, and whether each index.db is of its stream's blocks.

What is wrong here was so before: a conversion carries every byte over and has compared them.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from encfs_js import jetstream, serverstate
from encfs_js.errors import FormatError
from encfs_js.inspect import walk
from encfs_js.serverstore import Kind, place_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing
    from encfs_js.inspect import Entry


# Bytes on the disk of what is read whole here, sealed or not.
_MOST: Final = {Kind.BLOCK: jetstream.MAX_BLOCK + (1 << 20), Kind.INDEX: 1 << 30}


@dataclass(slots=True)
class Records:
    """What the blocks hold. damaged: a line for each file with something wrong in it.

    streams: of all directories with blocks, raft groups and staged batches included. indexed: those with an index.db that
    nats-server will take; it reads the blocks of the others.
    """

    streams: int = 0
    indexed: int = 0
    blocks: int = 0
    records: int = 0
    damaged: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it for a program."""
        return {name: getattr(self, name) for name in ("streams", "indexed", "blocks", "records", "damaged")}


def check(io: Backing, store: str, read: Callable[[Entry], bytes], between: Callable[[], None]) -> Records:
    """Read every block and index.db. read: the plain content of a file. between: is called after each. Raises OSError."""
    found = Records()
    last: dict[bytes, tuple[int, bytes]] = {}  # by directory: the number of its last block, and the end of it
    indexes: dict[bytes, tuple[int, bytes]] = {}

    def failed(path: bytes, problem: OSError) -> None:
        raise OSError(problem.errno, problem.strerror, os.path.join(store, os.fsdecode(path)))

    for entry in walk(io, store, failed):
        place = place_of(entry.path)
        if not stat.S_ISREG(entry.status.st_mode) or place.staged or place.kind not in {Kind.BLOCK, Kind.INDEX}:
            continue
        path, directory = os.fsdecode(entry.path), os.path.dirname(entry.path)
        try:
            if entry.status.st_size > _MOST[place.kind]:
                raise jetstream.damaged(
                    path, _MOST[place.kind], "longer than any that nats-server writes; not looked at"
                )
            if place.kind is Kind.INDEX:
                index = serverstate.parse_index(serverstate.open_index(read(entry), None, place.label, path)[0], path)
                indexes[directory] = index.last_block, index.last_hash
                continue
            block, _ = jetstream.plain_block(read(entry), None, place.label, path)
            found.blocks += 1
            if place.number >= last.get(directory, (0, b""))[0]:
                last[directory] = place.number, block[-jetstream.HASH :] or bytes(jetstream.HASH)
            for _ in jetstream.records(block, place.label, path):
                found.records += 1
        except FormatError as problem:
            found.damaged.append(str(problem))
        between()
    found.streams = len(last)
    found.indexed = sum(indexes.get(directory) == end for directory, end in last.items())
    return found
