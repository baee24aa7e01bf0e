"""The codecs of nats-server's files: published vectors, inverses, and anything at all as input."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import examples

from encfs_js import natscodec
from encfs_js.natscodec import MalformedError, crc32c, highwayhash64, s2_block, s2_stream, uvarint, varint

LIMIT = 1 << 16

# --- HighwayHash ----------------------------------------------------------------------------------------------------

# Published with HighwayHash: highwayhash/highwayhash_test.cc of https://github.com/google/highwayhash, `kExpected64`:
# the hashes of [], [0], [0, 1] ... [0 ... 64] with the key 00 01 ... 1f.
PUBLISHED = """
    907A56DE22C26E53 7EAB43AAC7CDDD78 B8D0569AB0B53D62 5C6BEFAB8A463D80 F205A46893007EDA 2B8A1668E4A94541
    BD4CCC325BEFCA6F 4D02AE1738F59482 E1205108E55F3171 32D2644EC77A1584 F6E10ACDB103A90B C3BBF4615B415C15
    243CC2040063FA9C A89A58CE65E641FF 24B031A348455A23 40793F86A449F33B CFAB3489F97EB832 19FE67D2C8C5C0E2
    04DD90A69C565CC2 75D9518E2371C504 38AD9B1141D3DD16 0264432CCD8A70E0 A9DB5A6288683390 D7B05492003F028C
    205F615AEA59E51E EEE0C89621052884 1BFC1A93A7284F4F 512175B5B70DA91D F71F8976A0A2C639 AE093FEF1F84E3E7
    22CA92B01161860F 9FC7007CCF035A68 A0C964D9ECD580FC 2C90F73CA03181FC 185CF84E5691EB9E 4FC1F5EF2752AA9B
    F5B7391A5E0A33EB B9B84B83B4E96C9C 5E42FE712A5CD9B4 A150F2F90C3F97DC 7FA522D75E2D637D 181AD0CC0DFFD32B
    3889ED981E854028 FB4297E8C586EE2D 6D064A45BB28059C 90563609B3EC860C 7AA4FCE94097C666 1326BAC06B911E08
    B926168D2B154F34 9919848945B1948D A2A98FC534825EBE E9809095213EF0B6 582E5483707BC0E9 086E9414A88A6AF5
    EE86B98D20F6743D F89B7FF609B1C0A7 4C7D9CC19E22C3E8 9A97005024562A6F 5DD41CF423E6EBEF DF13609C0468E227
    6E0DA4F64188155A B755BA4B50D7D4A1 887A3484647479BD AB8EEBE9BF2139A0 75542C5D4CD2A6FF
""".split()  # noqa: SIM905


@pytest.fixture(params=["compiled", "python"])
def which(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Hash once with the extra `fast` and once without it."""
    if request.param == "python":
        monkeypatch.setattr(natscodec, "_compiled", None)
    elif natscodec._compiled is None:
        pytest.skip("highwayhash-cffi is not installed")
    return str(request.param)


@pytest.mark.usefixtures("which")
@pytest.mark.parametrize(("size", "published"), list(enumerate(PUBLISHED)))
def test_highwayhash_published(size: int, published: str) -> None:
    data = bytes(range(size))
    assert highwayhash64(bytes(range(32)), data)[::-1].hex().upper() == published
    assert highwayhash64(bytes(range(32)), data[: size // 3], b"", memoryview(data[size // 3 :])) == highwayhash64(
        bytes(range(32)), data
    )


@pytest.mark.usefixtures("which")
@pytest.mark.parametrize(
    ("data", "published"), [(bytes(range(128, 161)), "53c516cce478cad7"), (b"\xff", "7858f24d2d79b2b2")]
)
def test_highwayhash_published_with_another_key(data: bytes, published: str) -> None:
    """Of the same source, its Java test: the key is the lanes 1, 2, 3, 4."""
    key = b"".join(lane.to_bytes(8, "little") for lane in (1, 2, 3, 4))
    assert highwayhash64(key, data)[::-1].hex() == published


def test_highwayhash_is_fast_enough(which: str) -> None:
    data = hashlib.shake_128(b"speed").digest(1 << 20)
    start = time.monotonic()
    highwayhash64(bytes(32), data)
    assert time.monotonic() - start < {"compiled": 0.3, "python": 3}[which]


@given(st.binary(min_size=32, max_size=32), st.lists(st.binary(max_size=150), min_size=1, max_size=4))
@examples(200)
def test_the_compiled_hash_is_ours(key: bytes, parts: list[bytes]) -> None:
    if natscodec._compiled is None:
        pytest.skip("highwayhash-cffi is not installed")
    assert highwayhash64(key, *map(memoryview, parts)) == natscodec._in_python(key, b"".join(parts))


def test_without_the_package_python_hashes() -> None:
    """As it is where the extra is not installed: the import fails, and nothing else does."""
    code = """if True:
        import sys
        sys.modules["highwayhash"] = None
        from encfs_js import natscodec
        assert natscodec._compiled is None
        print(natscodec.highwayhash64(bytes(range(32)), b"")[::-1].hex().upper())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == PUBLISHED[:1]


def test_a_name_makes_a_key() -> None:
    assert natscodec.hash_key("ORDERS-1") == hashlib.sha256(b"ORDERS-1").digest()
    assert natscodec.hash_key(b"\xff") == natscodec.hash_key("\udcff") == hashlib.sha256(b"\xff").digest()


# --- varints --------------------------------------------------------------------------------------------------------


def put_uvarint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3), st.binary(max_size=3))
@examples(300)
def test_uvarint(value: int, before: bytes, behind: bytes) -> None:
    raw = put_uvarint(value)
    assert uvarint(before + raw + behind, len(before)) == (value, len(before) + len(raw))
    for short in range(len(raw)):
        with pytest.raises(MalformedError) as found:
            uvarint(before + raw[:short], len(before))
        assert found.value.offset == len(before)


@given(st.integers(-(2**63), 2**63 - 1))
@examples(300)
def test_varint(value: int) -> None:
    raw = put_uvarint(2 * value if value >= 0 else -2 * value - 1)
    assert varint(raw, 0) == (value, len(raw))


@pytest.mark.parametrize("raw", ["ffffffffffffffffff02", "ffffffffffffffffffff01", "80808080808080808080", "80" * 50])
def test_numbers_of_more_than_64_bits(raw: str) -> None:
    with pytest.raises(MalformedError, match="byte 0: a number of more than 64 bits"):
        uvarint(bytes.fromhex(raw), 0)


# --- CRC32C ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        # RFC 3720 section B.4 (its bytes in the order of the wire), and the check value of the CRC catalogues.
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_crc32c_published(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


# --- S2 -------------------------------------------------------------------------------------------------------------

LITERAL = b"\x0cabcd"  # (4 - 1) << 2

# Written by hand after the format descriptions: element by element, and what comes out.
ELEMENTS = [
    ("empty", b"\0", b""),
    ("literal", b"\4" + LITERAL, b"abcd"),
    ("literal, length in 1 byte", b"\x46\xf0\x45" + b"x" * 70, b"x" * 70),
    ("literal, length in 2 bytes", b"\xac\x02\xf4\x2b\x01" + b"x" * 300, b"x" * 300),
    ("literal, length in 3 bytes", b"\4\xf8\x03\0\0abcd", b"abcd"),
    ("literal, length in 4 bytes", b"\4\xfc\x03\0\0\0abcd", b"abcd"),
    ("copy, distance in 11 bits", b"\x08" + LITERAL + b"\x01\x04", b"abcdabcd"),
    ("copy, overlapping", b"\x0a" + LITERAL + b"\x09\x02", b"abcdcdcdcd"),
    ("copy, distance in 16 bits", b"\x08" + LITERAL + b"\x0e\x04\0", b"abcdabcd"),
    ("copy, distance in 32 bits", b"\x08" + LITERAL + b"\x0f\x04\0\0\0", b"abcdabcd"),
    ("repeat", b"\x0d" + LITERAL + b"\x01\x04\x05\x00", b"abcdabcdabcda"),
    ("repeat, length in 1 byte", b"\x12" + LITERAL + b"\x02\x01\0" + b"\x15\0\x05", b"abcdd" + b"d" * 13),
    ("repeat, length in 2 bytes", b"\x89\x03" + LITERAL + b"\x02\x01\0" + b"\x19\0\x80\0", b"abcdd" + b"d" * 388),
    ("repeat, length in 3 bytes", b"\x8b\x80\x04" + LITERAL + b"\x02\x01\0\x1d\0\2\0\0", b"abcdd" + b"d" * 65542),
]


@pytest.mark.parametrize(("name", "block", "plain"), ELEMENTS)
def test_s2_elements(name: str, block: bytes, plain: bytes) -> None:
    assert s2_block(block, 1 << 20) == plain, name
    with pytest.raises(MalformedError):
        s2_block(block, len(plain) - 1)
    for size in range(len(block)):
        with pytest.raises(MalformedError) as found:
            s2_block(block[:size], 1 << 20)
        assert found.value.offset <= size


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (b"", "byte 0: the data ends within a number"),
        (b"\5" + LITERAL, "byte 6: the compressed block has 4 bytes and says 5"),
        (b"\3" + LITERAL, "byte 1: more bytes than the compressed block says it has"),
        (b"\x06" + LITERAL + b"\x01\x04", "byte 6: more bytes than the compressed block says it has"),
        (b"\x08" + LITERAL + b"\x01\x05", "byte 6: a copy from before the start of the compressed block"),
        (b"\x08" + LITERAL + b"\x01\x00", "byte 6: a copy from before the start of the compressed block"),
        (b"\x08" + LITERAL + b"\x0e\0\0", "byte 6: a copy from before the start of the compressed block"),
        (b"\xff\xff\xff\xff\x0f", "byte 0: a compressed block of 4294967295 bytes, where at most 65536 can be"),
    ],
)
def test_s2_blocks_that_are_none(block: bytes, message: str) -> None:
    with pytest.raises(MalformedError) as found:
        s2_block(block, LIMIT)
    assert str(found.value) == message


def chunk(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + len(body).to_bytes(3, "little") + body


def framed(kind: int, body: bytes, plain: bytes) -> bytes:
    return chunk(kind, natscodec._masked_crc(plain).to_bytes(4, "little") + body)


STREAM = natscodec.S2_MAGIC + framed(0, b"\x08" + LITERAL + b"\x01\x04", b"abcdabcd") + framed(1, b"plain", b"plain")


def test_s2_streams() -> None:
    assert s2_stream(STREAM, LIMIT) == b"abcdabcdplain"
    assert s2_stream(natscodec.SNAPPY_MAGIC, 0) == b""
    more = STREAM + natscodec.S2_MAGIC + chunk(0x99, b"index") + chunk(0xFE, bytes(9)) + framed(1, b"!", b"!")
    assert s2_stream(more, LIMIT) == b"abcdabcdplain!"
    # The framing's mask, worked out from its text for the CRC of no bytes, which is 0.
    assert natscodec._masked_crc(b"") == 0xA282EAD8


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "byte 0: no S2 stream"),
        (STREAM[:-1], "byte 26: the S2 stream ends within a chunk"),
        (STREAM + b"\1", "byte 39: the S2 stream ends within a chunk"),
        (STREAM + chunk(1, b"abc"), "byte 39: a chunk without a checksum"),
        (STREAM + chunk(0x42, b"what"), "byte 39: a chunk of the unknown kind 66"),
        (STREAM + chunk(0xFF, b"what"), "byte 39: no S2 stream"),
        (STREAM[:-1] + b"N", "byte 26: a chunk that does not match its checksum"),
        (
            natscodec.S2_MAGIC + framed(0, b"\x08" + LITERAL, b"abcd"),
            "byte 24: the compressed block has 4 bytes and says 8",
        ),
    ],
)
def test_s2_streams_that_are_none(stream: bytes, message: str) -> None:
    with pytest.raises(MalformedError) as found:
        s2_stream(stream, LIMIT)
    assert str(found.value) == message


@pytest.mark.parametrize("limit", range(13))
def test_s2_streams_are_bounded(limit: int) -> None:
    with pytest.raises(MalformedError):
        s2_stream(STREAM, limit)


@given(st.binary(max_size=300), st.sampled_from([s2_block, s2_stream]), st.sampled_from([b"", natscodec.S2_MAGIC]))
@examples(400)
def test_anything_is_decompressed_or_refused(data: bytes, read, start: bytes) -> None:
    try:
        size, offset = len(read(start + data, LIMIT)), 0
    except MalformedError as problem:
        size, offset = 0, problem.offset
    assert size <= LIMIT
    assert 0 <= offset <= len(start + data)


@given(st.data())
@examples(400)
def test_any_change_of_a_stream_is_told(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(STREAM) - 1))
    changed = bytearray(STREAM)
    changed[at] ^= data.draw(st.integers(1, 255))
    found, offset = b"", 0
    try:
        found = s2_stream(changed, LIMIT)
    except MalformedError as problem:
        offset = problem.offset
    assert 0 <= offset <= len(changed)
    if found:
        # A chunk's kind has no checksum: one that is skipped is left out, and nothing else can happen.
        assert at in {10, 26}
        assert changed[at] >= 0x80
        assert found in {b"abcdabcd", b"plain"}
