"""What nats-server 2.9 and older noted of every block, in N.idx and N.fss beside N.blk, purely. Since 2.10 index.db does it.

As in `serverstate`: what is wrong is a FormatError that names path and offset, and no reader makes more than a fixed multiple
of what it is given. N.idx alone says which messages of its block are deleted: these servers write no tombstones.

Where the store is encrypted N.idx is sealed with the seed of N.key, under the nonce of N.key, each time it is written. With
chachapoly this is the nonce of the block's keystream, too: N.idx and N.blk together tell the bytes of the one where those of
the other are known. N.fss, with all subjects, stays plain. Measured on stores of nats-server 2.9.10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.jetstream import HASH, damaged, ended, hashed, naming, take
from encfs_js.natscodec import MalformedError, uvarint, varint
from encfs_js.serverkeys import Seed, open_file
from encfs_js.serverstate import take_counted

if TYPE_CHECKING:
    Bytes = bytes | memoryview

_HEAD: Final = b"\x16\x01"


class OldIndex(NamedTuple):
    """What a N.idx knows of its block; `size` in bytes without what is deleted, times in ns.

    last_hash: the last record's when it was written. Where nothing is encrypted a deleted one is overwritten, and gets another.
    """

    messages: int
    size: int
    first_seq: int
    first_time: int
    last_seq: int
    last_time: int
    last_hash: bytes
    deleted: frozenset[int]


class OldSubject(NamedTuple):
    """How many messages of a subject a block has. They lie from `first` to `last`, which may be deleted themselves by now."""

    name: bytes
    total: int
    first: int
    last: int


def open_old_index(raw: Bytes, seed: Seed, path: str) -> bytes:
    """Decrypt a N.idx with what N.key holds. Raises FormatError, CipherMissingError."""
    return open_file(seed.nonce + bytes(raw), seed, path)


def parse_old_index(body: Bytes, path: str) -> OldIndex:
    """Read a decrypted N.idx. Raises FormatError."""
    with naming(path):
        at = _begun(body)
        messages, at = uvarint(body, at)
        size, at = uvarint(body, at)
        first, at = uvarint(body, at)
        first_time, at = varint(body, at)
        last, at = uvarint(body, at)
        last_time, at = varint(body, at)
        count, at = uvarint(body, at)
        last_hash, at = take(body, at, HASH)
        deleted: list[int] = []
        # Deletions before the first message may be counted and left out, so the end says how many there are.
        while at < len(body) and len(deleted) < count:
            ahead, at = uvarint(body, at)
            deleted.append(first + ahead)
        ended(body, at)
    return OldIndex(messages, size, first, first_time, last, last_time, last_hash, frozenset(deleted))


def parse_old_subjects(raw: Bytes, name: str, path: str) -> tuple[list[OldSubject], bytes]:
    """Read a N.fss: its subjects, and the hash of the block's last record. `name` is the `block_name`. Raises FormatError."""
    if len(raw) < 2 * HASH:
        raise damaged(path, 0, "the file ends within a field")
    body = hashed(raw[:-HASH], name, path)
    with naming(path):
        at = _begun(body)
        count, at = uvarint(body, at)
        subjects = []
        for _ in range(count):
            subject, at = take_counted(body, at)
            total, at = uvarint(body, at)
            first, at = uvarint(body, at)
            last, at = uvarint(body, at)
            subjects.append(OldSubject(subject, total, first, last))
        ended(body, at)
    return subjects, bytes(raw[-HASH:])


def _begun(body: Bytes) -> int:
    head, at = take(body, 0, len(_HEAD))
    if head != _HEAD:
        raise MalformedError(0, "no index of a block of a version that is known")
    return at
