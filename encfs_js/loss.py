"""What is lost with a damaged message block: its own bytes, the stream's index.db and the blocks beside it, asked together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js import impact, jetstream, serverstate
from encfs_js.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST: Final = 128 << 20  # bytes of a file that is read whole for this
_MOST_DELETED: Final = 1 << 20  # sequences that index.db may call deleted in a block, so that memory holds them


class Source(NamedTuple):
    """How the other files of the store are read.

    read: path -> (plain bytes, mtime in ns), None for what is damaged or not there; names: path of a directory -> what is in
    it.
    """

    read: Callable[[bytes], tuple[bytes, int] | None]
    names: Callable[[bytes], list[bytes]]


def of_block(
    source: Source, path: bytes, mtime: int, content: bytes | memoryview, holes: Sequence[tuple[int, int]]
) -> list[impact.Lost]:
    """Return for each hole of a block what may be lost with it. mtime: the block's, in ns."""
    about = impact.subject(path)
    assert about.block is not None
    name = jetstream.block_name(about.owner, about.block)
    return impact.lost(content, holes, name, _bounds(source, path, about, mtime))


def _bounds(source: Source, path: bytes, about: impact.Subject, mtime: int) -> impact.Bounds:
    """Return what index.db says of a block, if it can be read; what it does not say, the blocks beside it may."""
    assert about.block is not None
    directory = os.path.dirname(path)
    first = last = None
    deleted: tuple[int, ...] = ()
    if (found := _index(source, directory, about.owner)) is not None:
        index, written = found
        state = next((state for state in index.blocks if state.number == about.block), None)
        if state is not None:
            first, deleted = state.first_seq, deleted_in(state)
            # The last block may have got more since: nats-server writes index.db when it stops, and every two minutes.
            if index.last_block != about.block or mtime <= written:
                last = state.last_seq
    if first is None or last is None:
        numbers = jetstream.block_numbers(source.names(directory))
        before = [number for number in numbers if number < about.block]
        behind = [number for number in numbers if number > about.block]
        if first is None and before and (edges := _edges(source, directory, before[-1])):
            first = edges[1] + 1
        if last is None and behind and (edges := _edges(source, directory, behind[0])):
            last = edges[0] - 1
    return impact.Bounds(first, last, deleted)


def deleted_in(state: serverstate.BlockState) -> tuple[int, ...]:
    """Return the sequences that index.db calls deleted in a block; none where they are more than memory should hold."""
    if sum(bits.bit_count() for _, bits in state.deleted) > _MOST_DELETED:
        return ()
    return tuple(serverstate.deleted_sequences(state))


def _index(source: Source, directory: bytes, owner: str) -> tuple[serverstate.Index, int] | None:
    path = directory + b"/index.db"
    found = source.read(path)
    if found is None:
        return None
    try:
        body, _ = serverstate.open_index(found[0], None, owner, os.fsdecode(path))
        return serverstate.parse_index(body, os.fsdecode(path)), found[1]
    except FormatError:
        return None


def _edges(source: Source, directory: bytes, number: int) -> tuple[int, int] | None:
    found = source.read(directory + b"/%d.blk" % number)
    return None if found is None else impact.edges(found[0])
