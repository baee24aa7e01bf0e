"""The files of a JetStream store, decrypted: metafiles and message blocks, purely. `serverstate` reads the rest.

Every reader takes the bytes and the path they are from. What is wrong is a FormatError that names path and offset (an
offset in what was decrypted and decompressed, that is in the bytes that the reader was given). No reader makes more than a
fixed multiple of what it is given, but for `plain_block`, which makes MAX_BLOCK bytes at most.

Integers are little endian, `uv` is a varint. Hashes are HighwayHash-64 with a key that is the SHA-256 of a public name:
they find accidents, not attackers. Measured on stores of nats-server 2.10 to 2.15.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from encfs_js.errors import FormatError
from encfs_js.natscodec import S2_MAGIC, MalformedError, hash_key, highwayhash64, s2_stream, uvarint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from encfs_js.serverkeys import Keystream

    Bytes = bytes | memoryview

MAX_RECORD: Final = 32 << 20  # nats-server takes a longer record for damage
MAX_BLOCK: Final = 64 << 20  # plain bytes of a compressed block: nats-server closes one at 8 MiB and a record
HASH: Final = 8
_BLOCK_FILE: Final = re.compile(rb"([1-9][0-9]*)\.blk")
_IN_VAIN: Final = 4

_RECORD: Final = struct.Struct("<IQqH")  # length, sequence, time, length of the subject
BEFORE_SUBJECT: Final = _RECORD.size
SHORTEST: Final = BEFORE_SUBJECT + HASH  # bytes of a record: a tombstone
_HEADERS: Final = 1 << 31  # in the length: the record has message headers
_ERASED: Final = 1 << 63  # in the sequence
_TOMBSTONE: Final = 1 << 62
# Where a record may begin, found at the speed of C: its length is neither 0 nor above MAX_RECORD, and its sequence below
# 2^48, which no stream reaches. Of random bytes one offset in ten million is left.
_CANDIDATE: Final = re.compile(rb"(?=(?!\0\0\0[\0\x80])...[\0-\x02\x80-\x82].{6}\0[\0\x40\x80\xc0])", re.DOTALL)


def damaged(path: str, offset: int, reason: str) -> FormatError:
    """Make the error for bytes that are not what they should be."""
    return FormatError(f"{path}: byte {offset}: {reason}", hint="Put this file back from a backup.")


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn what is malformed into an error that names the file."""
    try:
        yield
    except MalformedError as problem:
        raise damaged(path, problem.offset, problem.reason) from None


def take(data: Bytes, at: int, size: int) -> tuple[bytes, int]:
    """Read `size` bytes: (they, offset behind them). Raises MalformedError."""
    if size > len(data) - at:
        raise MalformedError(at, "the file ends within a field")
    return bytes(data[at : at + size]), at + size


def ended(data: Bytes, at: int) -> None:
    """Raise MalformedError if there is more than was read."""
    if at != len(data):
        raise MalformedError(at, "more bytes than there should be")


def hashed(raw: Bytes, name: str, path: str) -> memoryview:
    """Return what precedes the hash at the end, having checked it. Raises FormatError."""
    body = memoryview(raw)[:-HASH]
    if len(raw) < HASH or highwayhash64(hash_key(name), body) != raw[-HASH:]:
        raise damaged(path, max(0, len(raw) - HASH), "the hash at the end does not match")
    return body


# --- meta.inf, meta.sum -----------------------------------------------------------------------------------------------


def check_meta(raw: Bytes, checksum: Bytes, name: str, path: str) -> None:
    """Compare meta.inf, as it lies on the disk, with the content of meta.sum. Raises FormatError.

    name: `<stream>`, `<stream>/<consumer>` or the raft group's.
    """
    if highwayhash64(hash_key(name), raw).hex().encode() != bytes(checksum):
        raise damaged(path, 0, "meta.sum does not match")


def parse_meta(plain: bytes, path: str) -> dict[str, Any]:
    """Return the configuration that a decrypted meta.inf holds. Raises FormatError."""
    found = json_of(plain, path)
    if not isinstance(found, dict):
        raise damaged(path, 0, "no JSON object")
    return found


def json_of(plain: bytes, path: str) -> Any:
    """Parse JSON. Raises FormatError."""
    try:
        return json.loads(plain)
    except json.JSONDecodeError as problem:
        offset = len(problem.doc[: problem.pos].encode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as problem:
        offset = problem.start
    except (ValueError, RecursionError):  # a number too long, too deep
        offset = 0
    raise damaged(path, offset, "no JSON that can be read")


# --- message blocks ---------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One record of a block.

    offset, length: where it lies; erased: no message (any more), only the sequence is taken; tombstone: says that the
    message `seq`, of this block or an earlier one, was deleted; time: ns; header: empty, or starts with `NATS/1.0`.
    """

    offset: int
    length: int
    seq: int
    erased: bool
    tombstone: bool
    time: int
    subject: bytes
    header: memoryview
    payload: memoryview


def block_name(stream: str, number: int) -> str:
    """Return the name that the hashes of a block's records are keyed with; `stream` may be a raft group."""
    return f"{stream}-{number}"


def block_numbers(names: Iterable[bytes]) -> list[int]:
    """Return, ascending, the numbers of the blocks among the names in a directory."""
    return sorted(int(match[1]) for match in map(_BLOCK_FILE.fullmatch, names) if match)


def records(block: Bytes, name: str, path: str) -> Iterator[Record]:
    """Read the records of a plain block in a row, each checked; `name` is its `block_name`. Raises FormatError."""
    view, key, at = memoryview(block), hash_key(name), 0
    with naming(path):
        while at < len(view):
            record = _record(view, key, at)
            yield record
            at += record.length


def _record(view: memoryview, key: bytes, at: int) -> Record:
    if len(view) - at < SHORTEST:
        raise MalformedError(at, "the block ends within a record")
    length, sequence, time, subject_length = _RECORD.unpack_from(view, at)
    has_header, length = bool(length & _HEADERS), length & ~_HEADERS
    body, fields = at + _RECORD.size + subject_length, _RECORD.size + subject_length + HASH
    if not fields + 4 * has_header <= length <= MAX_RECORD:
        raise MalformedError(at, f"a record that says it has {length} bytes")
    if length > len(view) - at:
        raise MalformedError(at, "the block ends within a record")
    end = at + length - HASH
    header = view[:0]
    start = body
    if has_header:
        start = body + 4
        size = int.from_bytes(view[body:start], "little")
        if size > end - start:
            raise MalformedError(at, "a record with headers that are longer than it")
        header, start = view[start : start + size], start + size
    subject = view[at + _RECORD.size : body]
    payload = view[start:end]
    if highwayhash64(key, view[at + 4 : at + 20], subject, header, payload) != view[end : end + HASH]:
        raise MalformedError(at, "a record that does not match its hash")
    erased, tombstone = bool(sequence & _ERASED), bool(sequence & _TOMBSTONE)
    sequence &= ~(_ERASED | _TOMBSTONE)
    return Record(at, length, sequence, erased, tombstone, time, bytes(subject), header, payload)


class Head(NamedTuple):
    """What a record says of itself before its subject, unproved: its fields as in Record; subject: bytes of it."""

    length: int
    seq: int
    erased: bool
    tombstone: bool
    time: int
    subject: int


def head_of(block: Bytes, at: int) -> Head | None:
    """Return the head of the record at `at`, None if there can be none. The record may be longer than the block."""
    if len(block) - at < SHORTEST:
        return None
    length, sequence, time, subject = _RECORD.unpack_from(block, at)
    has_header, length = bool(length & _HEADERS), length & ~_HEADERS
    if not SHORTEST + subject + 4 * has_header <= length <= MAX_RECORD:
        return None
    flags = sequence & (_ERASED | _TOMBSTONE)
    return Head(length, sequence ^ flags, bool(flags & _ERASED), bool(flags & _TOMBSTONE), time, subject)


class Finder:
    """Looks for records in a block that is damaged; `name` is its `block_name`.

    Anybody can compute the hashes, and have what is no record say that it is a long one. So no more than _IN_VAIN times the
    block's length is hashed, by all calls together; what lies behind is not found then.
    """

    __slots__ = ("_key", "_left", "_view")

    def __init__(self, block: Bytes, name: str) -> None:
        self._view = memoryview(block)
        self._key = hash_key(name)
        self._left = _IN_VAIN * len(self._view)

    def find(self, start: int) -> Record | None:
        """Return the first record from `start` on that is whole and matches its hash.

        Where records follow each other their lengths lead from one to the next; behind damage every offset is tried.
        """
        at, found = start, None
        while (head := head_of(self._view, at)) is not None and found is None:
            found = self._whole(at, head)
            at += head.length
        if found is not None:
            return found
        for match in _CANDIDATE.finditer(self._view, start):
            head = head_of(self._view, match.start())
            if head is not None and (found := self._whole(match.start(), head)) is not None:
                return found
            if self._left <= 0:
                break
        return None

    def _whole(self, at: int, head: Head) -> Record | None:
        if head.length > len(self._view) - at or self._left <= 0:
            return None
        self._left -= head.length
        try:
            return _record(self._view, self._key, at)
        except MalformedError:
            return None


def messages(found: Iterator[Record]) -> Iterator[Record]:
    """Return the messages among the records of a block: what nats-server itself would count as one.

    Left out are tombstones, erased ones, and those whose sequence does not come after all before. A message that a
    tombstone or index.db names as deleted is among them.
    """
    last = 0
    for record in found:
        if record.tombstone or record.seq <= last:
            continue
        last = record.seq
        if not record.erased:
            yield record


def plain_block(raw: Bytes, keystream: Keystream | None, name: str, path: str) -> tuple[bytes, bool]:
    """Decrypt and decompress a block; without a key file there is no keystream. Returns its records and: was it encrypted.

    nats-server writes N.key before it encrypts a block that was plain: such a block is taken as it is, when the other
    reading makes no sense. Which one it is says the first record, or the compressed whole. Where neither makes sense the
    block counts as encrypted, and `records` says what is wrong. Raises FormatError.
    """
    if not raw:
        return b"", keystream is not None
    if keystream is None:
        return _decompressed(bytes(raw), path), False
    if len(raw) > MAX_BLOCK:
        raise damaged(path, MAX_BLOCK, "a block longer than any that nats-server writes")
    decrypted = keystream.xor(raw)
    if (found := _sensible(decrypted, name)) is not None:
        return found, True
    if (found := _sensible(bytes(raw), name)) is not None:
        return found, False
    return _decompressed(decrypted, path), True


def _sensible(block: bytes, name: str) -> bytes | None:
    """Return the block decompressed, if it begins with a good record; else None."""
    try:
        plain = _decompressed(block, "")
        _record(memoryview(plain), hash_key(name), 0)
    except (FormatError, MalformedError):
        return None
    return plain


def begins_compressed(head: Bytes) -> bool | None:
    """Tell from its first bytes whether a block is a compressed one: None where it does not say so, False where it cannot be."""
    if bytes(head[:3]) != b"cmp":
        return None
    try:
        (algorithm,), at = take(head, 3, 1)
        size, at = uvarint(head, at)
    except MalformedError:
        return False
    return size <= MAX_BLOCK and (
        algorithm == 0 or (algorithm == 1 and bytes(head[at : at + len(S2_MAGIC)]) == S2_MAGIC)
    )


def _decompressed(block: bytes, path: str) -> bytes:
    """Undo the compression of a whole block: cmp | algorithm u8 | uv size | S2 stream of all but 8 bytes | these 8 bytes."""
    if not block.startswith(b"cmp"):
        return block
    with naming(path):
        (algorithm,), at = take(block, 3, 1)
        size, at = uvarint(block, at)
        if size > MAX_BLOCK:
            raise MalformedError(4, f"a block of {size} bytes")
        if algorithm == 0:
            plain = block[at:]
        elif algorithm == 1 and size >= HASH and len(block) >= at + HASH:
            try:
                plain = s2_stream(memoryview(block)[at:-HASH], size - HASH) + block[-HASH:]
            except MalformedError as problem:
                raise MalformedError(at + problem.offset, problem.reason) from None
        else:
            raise MalformedError(3, "a compression that is not known")
        if len(plain) != size:
            raise MalformedError(4, f"the block has {len(plain)} bytes and says {size}")
        return plain
