"""thw.db, sched.db, sources.db, and N.idx and N.fss of 2.9: kept files, a real server's, and bytes that are none of them."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import make_server_vectors as maker
import nats_world as world
import pytest
import server_stores as stores
from test_jetstream import sv, unpack, uv, with_hash

from encfs_js import serverkeys, servernotes, serverold
from encfs_js.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLD = re.compile(r"^some/file: byte (\d+): .+$")
IN_2100 = 4_102_444_800


def check(streams: Path, ends: dict[str, float] | None) -> None:
    """Compare what fill_notes has made of streams with their files."""
    stamp, ttls = servernotes.parse_ttls((streams / "TTL/msgs/thw.db").read_bytes(), "thw.db")
    assert (stamp, sorted(each.seq for each in ttls)) == (7, [1, 3, 5])
    if ends is not None:
        for each in ttls:
            assert abs(each.time / 1e9 - ends[f"TTL.a.{each.seq - 1}"]) < 30
    stamp, plans = servernotes.parse_schedules((streams / "PLANS/msgs/sched.db").read_bytes(), "sched.db")
    assert stamp == 4
    assert sorted(plans) == [(b"PLANS.%d" % i, (IN_2100 + i) * 10**9, i + 1) for i in range(3)]
    assert servernotes.parse_ttls((streams / "PLANS/msgs/thw.db").read_bytes(), "thw.db") == (4, [])
    stamp, sources = servernotes.parse_sources((streams / "COPY/sources.db").read_bytes(), "sources.db")
    assert stamp == 10
    assert sorted(each[:2] for each in sources) == [(b"PLANS > >", 3), (b"TTL TTL.a.* >", 6)]
    assert {len(each.identity) for each in sources} == {8}


def test_kept_notes_are_read(tmp_path: Path) -> None:
    unpack("notes/2.15.1-plain", tmp_path)
    check(tmp_path / "jetstream/$G/streams", None)


@pytest.mark.nats
@pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
@pytest.mark.parametrize("mode", stores.MODES)
def test_notes_of_a_real_server_are_read_and_plain(mode: str, tmp_path: Path) -> None:
    with world.serving(tmp_path / "store", tmp_path / "work", **stores.MODES[mode]) as server:
        ends = maker.fill_notes(server)
    check(tmp_path / "store/jetstream/$G/streams", ends)


# --- by hand ----------------------------------------------------------------------------------------------------------

HEAD = struct.pack("<BQQ", 1, 2, 9)
TTLS = HEAD + sv(-5) + uv(3) + sv(10**18) + uv(2**64 - 1)
PLANS = HEAD + b"\3\0a.b" + sv(7) + uv(1) + b"\0\0" + sv(8) + uv(2)
SOURCES = HEAD + b"\1x" + uv(5, 0) + b"\0" + uv(6, 2) + b"id"
OLD_INDEX = b"\x16\1" + uv(3, 900, 100) + sv(10**18) + uv(120) + sv(-5) + uv(2) + b"lasthash" + uv(9, 1)
FSS = with_hash(b"\x16\1" + uv(2, 3) + b"a.b" + uv(2, 100, 110) + uv(0) + uv(1, 5, 5), "S-1") + b"lasthash"


def old_subjects(raw: bytes, path: str) -> object:
    return serverold.parse_old_subjects(raw, "S-1", path)


GOOD: list[tuple[Callable[[bytes, str], object], bytes, object]] = [
    (servernotes.parse_ttls, TTLS, (9, [(-5, 3), (10**18, 2**64 - 1)])),
    (servernotes.parse_schedules, PLANS, (9, [(b"a.b", 7, 1), (b"", 8, 2)])),
    (servernotes.parse_sources, SOURCES, (9, [(b"x", 5, b""), (b"", 6, b"id")])),
    (serverold.parse_old_index, OLD_INDEX, (3, 900, 100, 10**18, 120, -5, b"lasthash", {109, 101})),
    (old_subjects, FSS, ([(b"a.b", 2, 100, 110), (b"", 1, 5, 5)], b"lasthash")),
]


@pytest.mark.parametrize(("read", "raw", "found"), GOOD)
def test_written_by_hand(read: Callable[[bytes, str], object], raw: bytes, found: object) -> None:
    assert read(raw, "some/file") == found
    # N.idx may name fewer deletions than it counts.
    shortest = OLD_INDEX.index(b"lasthash") + 8 if raw is OLD_INDEX else len(raw)
    for size in range(shortest):
        with pytest.raises(FormatError, match=TOLD) as told:
            read(raw[:size], "some/file")
        assert told.value.hint
        assert int(TOLD.match(str(told.value))[1]) <= size  # type: ignore[index]
    for bad in (raw + b"\0", b"\2" + raw[1:]):
        with pytest.raises(FormatError, match=TOLD):
            read(bad, "some/file")


def test_what_is_wrong_is_said() -> None:
    for read, bad, message in (
        (servernotes.parse_ttls, b"\2" + TTLS[1:], "byte 0: no file of a version that is known"),
        (servernotes.parse_ttls, TTLS + b"\0", f"byte {len(TTLS)}: more bytes than there should be"),
        (servernotes.parse_ttls, struct.pack("<BQQ", 1, 2**64 - 1, 9), "byte 17: the data ends within a number"),
        (servernotes.parse_schedules, HEAD + b"\4\0a", "byte 19: the file ends within a field"),
        (servernotes.parse_sources, HEAD + uv(2**64 - 1), "byte 27: the file ends within a field"),
        (serverold.parse_old_index, OLD_INDEX + b"\1", f"byte {len(OLD_INDEX)}: more bytes than there should be"),
        (old_subjects, FSS[:8], "byte 0: the file ends within a field"),
        (old_subjects, FSS[:-9] + b"\0" + FSS[-8:], f"byte {len(FSS) - 16}: the hash at the end does not match"),
    ):
        with pytest.raises(FormatError) as told:
            read(bad, "some/file")
        assert str(told.value) == f"some/file: {message}"
    index = serverold.parse_old_index(OLD_INDEX[:-1], "some/file")
    assert index.deleted == {109}


@pytest.mark.parametrize("suite", serverkeys.NONCES)
def test_an_old_index_is_opened_with_the_nonce_of_its_key_file(suite: serverkeys.Suite, tmp_path: Path) -> None:
    name = suite.name.lower()
    unpack(f"old/2.9.10-{name}", tmp_path)
    directory = tmp_path / "jetstream/$G/streams/SMALL/msgs"
    seed = stores.key_file(directory / "1.key", serverkeys.stream("$G", "SMALL").block(1), [stores.KEY.encode()])
    assert seed is not None
    assert seed.suite is suite
    raw = (directory / "1.idx").read_bytes()
    body = serverold.open_old_index(raw, seed, "some/file")
    assert serverold.parse_old_index(body, "some/file").last_seq == 12
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        with pytest.raises(FormatError, match=r"^some/file: does not authenticate$"):
            serverold.open_old_index(changed, seed, "some/file")
