"""The codecs that nats-server builds its files from, purely: varints, HighwayHash-64, CRC32C, S2.

Nothing here knows a file: what is wrong with the bytes is a MalformedError with the offset in them. No function makes
more bytes than its `limit`, whatever the input claims.

Sources: varints are those of Go's `encoding/binary`; HighwayHash after its portable C version (google/highwayhash, Apache-2.0);
S2 after its format description and Snappy's (github.com/klauspost/compress, github.com/google/snappy).
"""

from __future__ import annotations

import contextlib
import struct
import sys
from hashlib import sha256
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Bytes = bytes | bytearray | memoryview

MAX_S2_CHUNK: Final = 4 << 20  # plain bytes in one chunk of an S2 stream
S2_MAGIC: Final = b"\xff\x06\x00\x00S2sTwO"
SNAPPY_MAGIC: Final = b"\xff\x06\x00\x00sNaPpY"

_64: Final = (1 << 64) - 1
_32: Final = (1 << 32) - 1

# The extra `fast` (highwayhash-cffi) hashes a record 20 times as fast, a block 80 times. It takes words as they lie.
_compiled: Callable[[bytes, bytes], bytes] | None = None
if sys.byteorder == "little":
    with contextlib.suppress(ImportError):
        import highwayhash

        _compiled = highwayhash.highwayhash_64


class MalformedError(ValueError):
    """Bytes that are not what they should be: `reason`, met at `offset` of them."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


# --- varints --------------------------------------------------------------------------------------------------------


def uvarint(data: Bytes, at: int) -> tuple[int, int]:
    """Read an unsigned varint of at most 64 bits: (value, offset behind it). Raises MalformedError."""
    value = shift = 0
    for here in range(at, min(at + 10, len(data))):
        byte = data[here]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _64:
                break
            return value, here + 1
        shift += 7
    else:
        if len(data) < at + 10:
            raise MalformedError(at, "the data ends within a number")
    raise MalformedError(at, "a number of more than 64 bits")


def varint(data: Bytes, at: int) -> tuple[int, int]:
    """Read a signed (zig-zag) varint: (value, offset behind it). Raises MalformedError."""
    value, behind = uvarint(data, at)
    return (value >> 1) ^ -(value & 1), behind


# --- HighwayHash ----------------------------------------------------------------------------------------------------

_INIT0: Final = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_INIT1: Final = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)
_LANES: Final = struct.Struct("<4Q")
_TABLE: Final = struct.Struct("<4Q224x")
# Where each byte of two pairs of lanes comes from. `bytes.translate` of this list with the lanes as its table permutes
# them in one call, eight times as fast as the masks and shifts that C would use.
_PAIR: Final = (3, 12, 2, 5, 14, 1, 15, 0, 11, 4, 10, 13, 9, 6, 8, 7)
_ZIPPER: Final = bytes(_PAIR) + bytes(16 + i for i in _PAIR)


def hash_key(name: str | bytes) -> bytes:
    """Return the key[32] of a HighwayHash that nats-server names `name`: it is public, and so the hash is no proof."""
    return sha256(name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name).digest()


def highwayhash64(key: bytes, *parts: Bytes) -> bytes:
    """Return the 8 bytes (little endian) of HighwayHash-64 with key[32] over the parts in a row.

    Without the extra `fast` about 20 MB/s, and 2 MB/s where the parts are short.
    """
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return _in_python(key, data) if _compiled is None else _compiled(key, bytes(data))


def _in_python(key: bytes, data: Bytes) -> bytes:
    data = memoryview(data)
    lanes = _LANES.unpack(key)
    v0 = [a ^ b for a, b in zip(_INIT0, lanes, strict=True)]
    v1 = [a ^ _swap(b) for a, b in zip(_INIT1, lanes, strict=True)]
    whole = len(data) & ~31
    packets: Iterable[tuple[int, ...]] = _LANES.iter_unpack(data[:whole])
    state = _mix(v0, v1, list(_INIT0), list(_INIT1), packets)
    if rest := bytes(data[whole:]):
        state = _mix_rest(*state, rest)
    for _ in range(4):
        v0 = state[0]
        state = _mix(*state, [(_swap(v0[2]), _swap(v0[3]), _swap(v0[0]), _swap(v0[1]))])
    return (sum(part[0] for part in state) & _64).to_bytes(8, "little")


def _swap(lane: int) -> int:
    return lane >> 32 | (lane & _32) << 32


_State = tuple[list[int], list[int], list[int], list[int]]


def _mix_rest(v0: list[int], v1: list[int], m0: list[int], m1: list[int], rest: bytes) -> _State:
    """Mix in the last `rest`, 1 to 31 bytes, laid out in a packet of their own by their number."""
    n = len(rest)
    v0 = [(lane + (n << 32) + n) & _64 for lane in v0]
    v1 = [_rotate(lane >> 32, n) << 32 | _rotate(lane & _32, n) for lane in v1]
    words, odd = n & ~3, n & 3
    packet = bytearray(32)
    packet[:words] = rest[:words]
    if n & 16:
        packet[28:] = rest[-4:]
    elif odd:
        packet[16:19] = rest[words], rest[words + (odd >> 1)], rest[-1]
    return _mix(v0, v1, m0, m1, [_LANES.unpack(packet)])


def _rotate(word: int, count: int) -> int:
    return (word << count | word >> (32 - count)) & _32


def _mix(v0: list[int], v1: list[int], m0: list[int], m1: list[int], packets: Iterable[tuple[int, ...]]) -> _State:
    """Mix packets of four lanes into the state. Written out: this loop is all the time that hashing takes."""
    a0, a1, a2, a3 = v0
    b0, b1, b2, b3 = v1
    c0, c1, c2, c3 = m0
    d0, d1, d2, d3 = m1
    permute, table, unpack = _ZIPPER.translate, _TABLE.pack, _LANES.unpack
    for p0, p1, p2, p3 in packets:
        b0 = (b0 + c0 + p0) & _64
        b1 = (b1 + c1 + p1) & _64
        b2 = (b2 + c2 + p2) & _64
        b3 = (b3 + c3 + p3) & _64
        c0 ^= (b0 & _32) * (a0 >> 32)
        c1 ^= (b1 & _32) * (a1 >> 32)
        c2 ^= (b2 & _32) * (a2 >> 32)
        c3 ^= (b3 & _32) * (a3 >> 32)
        a0 = (a0 + d0) & _64
        a1 = (a1 + d1) & _64
        a2 = (a2 + d2) & _64
        a3 = (a3 + d3) & _64
        d0 ^= (a0 & _32) * (b0 >> 32)
        d1 ^= (a1 & _32) * (b1 >> 32)
        d2 ^= (a2 & _32) * (b2 >> 32)
        d3 ^= (a3 & _32) * (b3 >> 32)
        z0, z1, z2, z3 = unpack(permute(table(b0, b1, b2, b3)))
        a0 = (a0 + z0) & _64
        a1 = (a1 + z1) & _64
        a2 = (a2 + z2) & _64
        a3 = (a3 + z3) & _64
        z0, z1, z2, z3 = unpack(permute(table(a0, a1, a2, a3)))
        b0 = (b0 + z0) & _64
        b1 = (b1 + z1) & _64
        b2 = (b2 + z2) & _64
        b3 = (b3 + z3) & _64
    return [a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3], [d0, d1, d2, d3]


# --- CRC32C ---------------------------------------------------------------------------------------------------------


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC: Final = _crc_table()


def crc32c(data: Bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720 section B.4) of `data`. About 15 MB/s."""
    crc, table = _32, _CRC
    for byte in bytes(data):
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ _32


def _masked_crc(data: Bytes) -> int:
    """Return the CRC as a chunk of a stream has it: masked, as Snappy's framing says."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & _32


# --- S2 and Snappy --------------------------------------------------------------------------------------------------


def s2_block(data: Bytes, limit: int) -> bytes:
    """Decompress one S2 or Snappy block into at most `limit` bytes. Raises MalformedError."""
    data = memoryview(data)
    size, at = uvarint(data, 0)
    if size > limit:
        raise MalformedError(0, f"a compressed block of {size} bytes, where at most {limit} can be")
    out = bytearray()
    end, back = len(data), 0
    while at < end:
        start, tag = at, data[at]
        kind, code = tag & 3, tag >> 2
        extra = (code - 59 if code >= 60 else 0, 1, 2, 4)[kind]
        at += 1 + extra
        if at > end:
            raise MalformedError(start, "the compressed block ends within an element")
        more = int.from_bytes(data[start + 1 : at], "little")
        if kind == 0:
            length = (more if extra else code) + 1
            if at + length > end:
                raise MalformedError(start, "the compressed block ends within a literal")
            if len(out) + length > size:
                raise MalformedError(start, "more bytes than the compressed block says it has")
            out += data[at : at + length]
            at += length
            continue
        if kind == 1:
            back_here = (tag & 0xE0) << 3 | more
            length = (code & 7) + 4
            if back_here:
                back = back_here
            elif length > 8:  # S2 only: the distance of before, with the length in 1, 2 or 3 more bytes
                here, at = at, at + length - 8
                if at > end:
                    raise MalformedError(start, "the compressed block ends within an element")
                length = int.from_bytes(data[here:at], "little") + (8, 260, 65540)[length - 9]
        else:
            back, length = more, code + 1
        if not 0 < back <= len(out):
            raise MalformedError(start, "a copy from before the start of the compressed block")
        if len(out) + length > size:
            raise MalformedError(start, "more bytes than the compressed block says it has")
        if back >= length:
            out += out[len(out) - back : len(out) - back + length]
        else:  # it copies what it writes: the last `back` bytes again and again
            out += (bytes(out[-back:]) * (length // back + 1))[:length]
    if len(out) != size:
        raise MalformedError(end, f"the compressed block has {len(out)} bytes and says {size}")
    return bytes(out)


def s2_stream(data: Bytes, limit: int) -> bytes:
    """Decompress an S2 or Snappy stream (framed, with checksums) into at most `limit` bytes. Raises MalformedError."""
    data = memoryview(data)
    if bytes(data[: len(S2_MAGIC)]) not in {S2_MAGIC, SNAPPY_MAGIC}:
        raise MalformedError(0, "no S2 stream")
    chunks: list[bytes] = []
    total, at, end = 0, len(S2_MAGIC), len(data)
    while at < end:
        start, at = at, at + 4
        kind, length = data[start], int.from_bytes(data[start + 1 : at], "little")
        if at + length > end:
            raise MalformedError(start, "the S2 stream ends within a chunk")
        body, at = data[at : at + length], at + length
        if kind in {0x00, 0x01}:
            if length < 4:
                raise MalformedError(start, "a chunk without a checksum")
            room = min(MAX_S2_CHUNK, limit - total)
            plain = _inner(body[4:], room, start + 8) if kind == 0 else bytes(body[4:])
            if len(plain) > room:
                raise MalformedError(start, f"a chunk of {len(plain)} bytes, where at most {room} can be")
            if _masked_crc(plain) != int.from_bytes(body[:4], "little"):
                raise MalformedError(start, "a chunk that does not match its checksum")
            chunks.append(plain)
            total += len(plain)
        elif kind == 0xFF:
            if bytes(data[start:at]) not in {S2_MAGIC, SNAPPY_MAGIC}:
                raise MalformedError(start, "no S2 stream")
        elif kind < 0x80:
            raise MalformedError(start, f"a chunk of the unknown kind {kind}")
    return b"".join(chunks)


def _inner(data: memoryview, limit: int, offset: int) -> bytes:
    try:
        return s2_block(data, limit)
    except MalformedError as problem:
        raise MalformedError(offset + problem.offset, problem.reason) from None
