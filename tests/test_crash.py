"""crash.py against the crash rule as the decoder, written from FORMAT.md alone, understands it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from typing import TYPE_CHECKING

import decoder
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import (
    EDGES,
    PAGE,
    SUITES,
    VOLUME_KEYS,
    FailingDisk,
    ShortWrites,
    examples,
    file_keys,
    memory_file,
    put,
    raw_of,
    read_all,
    seal,
    text,
)

from encfs_js import crash
from encfs_js.backing import Backing
from encfs_js.format import MAGIC, Suite, pages_for, plain_start
from encfs_js.sealed import SealedFile

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = file_keys()
ZERO = bytes(PAGE)
suites = st.sampled_from(SUITES)


@st.composite
def histories(draw: st.DrawFn) -> tuple[bytes, bytes, bytes, bytes]:
    """A file as it was synced, and as appends and overwrites made it afterwards: plain and sealed, both."""
    before = text(draw(st.integers(0, 16000) | st.sampled_from(EDGES)))
    after = bytearray(before)
    with memory_file() as fd:
        file = SealedFile(Backing(), fd, file_keys(draw(suites)))
        file.write(0, before)
        synced = raw_of(fd)
        if draw(st.booleans()):
            file = SealedFile(Backing(), fd, KEYS)
        for seed in range(draw(st.integers(1, 3))):
            offset = draw(st.integers(0, len(after) + 3000))
            data = text(draw(st.integers(1, 9000)), seed)
            file.write(offset, data)
            after.extend(bytes(max(0, offset - len(after))))
            after[offset : offset + len(data)] = data
        return before, synced, bytes(after), raw_of(fd)


@st.composite
def crashes(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    """What a power cut may leave of such a file: each page write behind the sync reached the disk or did not."""
    before, synced, after, last = draw(histories())
    pages = []
    for at in range(0, len(last), PAGE):
        old = synced[at : at + PAGE] or ZERO
        pages.append(draw(st.sampled_from([old, last[at : at + PAGE]])))
    disk = b"".join(pages)
    kept = draw(st.integers(len(synced), len(disk)) | st.integers(len(synced) // PAGE, len(pages)).map(PAGE.__mul__))
    return before, after, disk[:kept]


@functools.cache
def variants(suite: Suite) -> list[list[bytes]]:
    """Return five pages of one file, each full, full and damaged, zero, nearly zero, and short with several lengths."""
    found = []
    with memory_file() as fd:
        file = SealedFile(Backing(), fd, file_keys(suite))
        file.write(0, text(5 * 4064))
        full = raw_of(fd)
        for page in range(5):
            good = full[page * PAGE : (page + 1) * PAGE]
            spoilt = good[:2000] + bytes([good[2000] ^ 1]) + good[2001:]
            found.append([good, spoilt, ZERO, bytes(PAGE - 1) + b"\1" if page else spoilt])
            for length in (0 if page else 1, 1, 2000, 4031):
                file.truncate(plain_start(page) + length)
                found[-1].append(raw_of(fd)[page * PAGE :])
                file.write(0, text(5 * 4064))
    return found


@st.composite
def mixtures(draw: st.DrawFn) -> bytes:
    """Any mixture of good, short, zero, and damaged pages, with or without a cut one behind them."""
    pages = variants(draw(suites))
    kinds = draw(st.lists(st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7]), min_size=1, max_size=5))
    cut = draw(st.sampled_from([0, 0, 1, 100, 4095]))
    chosen = [pages[page][kind] for page, kind in enumerate(kinds)]
    return b"".join(chosen) + pages[len(kinds) % 5][0][:cut]


def trim(raw: bytes) -> tuple[tuple[int, int] | None, bytes]:
    with memory_file(raw) as fd:
        sizes = crash.trim(Backing(), fd, KEYS)
        return sizes, raw_of(fd)


def check_against_the_text(raw: bytes) -> bytes:
    """The package trims as the text says, once; returns what is left."""
    expected = decoder.crash_rule(raw, VOLUME_KEYS)
    sizes, left = trim(raw)
    if expected is None:
        assert sizes is None
        assert left == raw
        return raw
    assert sizes is not None
    assert len(left) == expected.sealed_size
    assert left[: expected.pages * PAGE] == raw[: expected.pages * PAGE]
    if expected.end_mark:
        assert decoder.authenticate(left, expected.pages, VOLUME_KEYS) == b""
    assert sizes[1] == decoder.plain_size(left)
    assert sizes[1] <= sizes[0]
    assert decoder.crash_rule(left, VOLUME_KEYS) is None
    assert trim(left) == (None, left)
    return left


@given(mixtures())
@examples(300)
def test_a_mixture_of_pages_is_trimmed_as_the_text_says(raw: bytes) -> None:
    check_against_the_text(raw)


@given(crashes())
@examples(250)
def test_no_synced_byte_is_lost(crash_state: tuple[bytes, bytes, bytes]) -> None:
    before, after, disk = crash_state
    left = check_against_the_text(disk)
    plain = decoder.read(left, VOLUME_KEYS)
    assert len(before) <= len(plain) <= max(len(before), len(after))
    for page in range(pages_for(len(before))):
        part = slice(plain_start(page), min(plain_start(page + 1), len(before)))
        assert plain[part] in {before[part], after[part]}
    assert plain[len(before) :] == after[len(before) : len(plain)]
    with memory_file(left) as fd:
        assert read_all(SealedFile(Backing(), fd, KEYS)) == plain


@given(st.sampled_from([1, 2, 4031]), st.integers(4033, 20000), suites, suites)
@examples(40)
def test_a_file_cut_to_one_page_and_grown_again_survives_a_power_cut(
    cut: int, size: int, suite: Suite, other: Suite
) -> None:
    """Cut, given a new id, and grown, with no sync asked for: the cut may be lost when the page write is not.

    What the code syncs by itself is on the disk; what it wrote after that may be there, page by page, or not.
    """

    class Synced(Backing):
        """Remembers what the disk holds for certain."""

        safe = b""

        def fsync(self, fd: int) -> None:
            self.safe = raw_of(fd)

        fdatasync = fsync

    io = Synced()
    with memory_file(seal(text(20000), file_keys(suite))) as fd:
        io.fsync(fd)
        file = SealedFile(io, fd, file_keys(other))
        file.truncate(cut)
        file.write(cut, text(size - cut))
        last = raw_of(fd)
    # Page 0 lies where it lay, so its write may be the only thing that reached the disk.
    disk = last[:PAGE] + io.safe[PAGE:]
    left = check_against_the_text(disk)
    assert decoder.damaged_pages(left, VOLUME_KEYS) == []


# --- a crash while trimming -----------------------------------------------------------------------------------------

TRACES: dict[str, Callable[[bytes], bytes]] = {
    "last page full": lambda raw: raw[: 2 * PAGE],
    "zero page behind a full one": lambda raw: raw[: 2 * PAGE] + ZERO + raw[3 * PAGE :],
    "zeros at the end": lambda raw: raw[: 2 * PAGE] + 3 * ZERO,
    "cut page": lambda raw: raw[: 2 * PAGE + 1234],
    "short page": lambda raw: raw + raw[2 * PAGE : 3 * PAGE],
    "page 0 zero": lambda raw: ZERO + raw[PAGE:],
    "page 0 cut": lambda raw: raw[:1234],
    "damage before zeros": lambda raw: raw[:5000] + b"damage" + raw[5006 : 3 * PAGE] + ZERO,
}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("after", [False, True])
def test_a_second_crash_while_trimming_ends_in_the_same_file(name: str, suite: Suite, after: bool) -> None:
    """Every changing call of trim() fails once, before or after it had its effect; trimming again finishes it."""
    raw = TRACES[name](seal(text(14000), file_keys(suite)))
    expected = check_against_the_text(raw)
    for at in range(1, 10):
        with memory_file(raw) as fd:
            io = FailingDisk(at, after=after)
            try:
                crash.trim(io, fd, KEYS)
            except OSError as error:
                assert error.errno == errno.EIO
            else:
                assert at == len(io.calls) + 1 > 2
                assert io.calls[-1] == "fsync"
                assert raw_of(fd)[:PAGE] == expected[:PAGE]
                return
            crash.trim(Backing(), fd, KEYS)
            left = raw_of(fd)
            assert len(left) == len(expected)
            stay = decoder.crash_rule(raw, VOLUME_KEYS)
            assert stay is not None
            assert left[: stay.pages * PAGE] == raw[: stay.pages * PAGE]
            assert trim(left) == (None, left)
    pytest.fail("trim() makes more calls than expected")


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("lost", ["end mark", "cut"])
def test_a_power_cut_while_trimming_ends_in_the_same_length(name: str, lost: str) -> None:
    """Of what trim() did, the write of the end mark or the cut did not reach the disk."""
    raw = TRACES[name](seal(text(14000), KEYS))
    expected = check_against_the_text(raw)
    stay = decoder.crash_rule(raw, VOLUME_KEYS)
    assert stay is not None
    if lost == "end mark":
        disk = expected[: stay.pages * PAGE] + raw[stay.pages * PAGE : len(expected)]
        disk += bytes(len(expected) - len(disk))
    else:
        disk = expected + raw[len(expected) :]
    left = check_against_the_text(disk)
    assert len(left) == len(expected)


@pytest.mark.parametrize("most", [1000, 2048, 4095])
def test_an_end_mark_that_is_written_in_parts_is_whole(most: int) -> None:
    raw = seal(text(14000), KEYS)[: 2 * PAGE]
    with memory_file(raw) as fd:
        assert crash.trim(ShortWrites(most), fd, KEYS) == (8096, 8096)
        assert decoder.read(raw_of(fd), VOLUME_KEYS) == text(14000)[:8096]


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("taken", [1, 1000, 4095])
def test_an_end_mark_that_finds_no_room_leaves_a_trace_to_be_trimmed(name: str, taken: int) -> None:
    raw = TRACES[name](seal(text(14000), KEYS))
    expected = check_against_the_text(raw)
    with memory_file(raw) as fd:
        for at in (1, 2):
            with contextlib.suppress(OSError):
                crash.trim(FailingDisk(at, errno.ENOSPC, taken), fd, KEYS)
        crash.trim(Backing(), fd, KEYS)
        assert len(raw_of(fd)) == len(expected)
        assert decoder.crash_rule(raw_of(fd), VOLUME_KEYS) is None
        assert decoder.damaged_pages(raw_of(fd), VOLUME_KEYS) == decoder.damaged_pages(expected, VOLUME_KEYS)


# --- what is left alone ---------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=9000).filter(lambda raw: raw.strip(b"\0") and raw[:1] not in b"E\0"))
@examples(60)
def test_a_foreign_file_is_left_alone(raw: bytes) -> None:
    assert trim(raw) == (None, raw)
    assert trim(raw + bytes(10000)) == (None, raw + bytes(10000))


@pytest.mark.parametrize("raw", [b"ENCFSJS2" + bytes(5000), b"E" + bytes(5000), b"ENCFSJ" + b"x" * 9000])
def test_a_file_that_only_resembles_ours_is_left_alone(raw: bytes) -> None:
    assert trim(raw) == (None, raw)


def test_an_empty_file_is_left_alone() -> None:
    assert trim(b"") == (None, b"")


@pytest.mark.parametrize("suite", SUITES)
def test_sound_files_are_left_alone(suite: Suite) -> None:
    for size in EDGES:
        raw = seal(text(size), file_keys(suite))
        assert trim(raw) == (None, raw)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True), st.integers(0, 4095), suites)
@examples(60)
def test_damaged_pages_do_not_end_the_scan(damaged: list[int], at: int, suite: Suite) -> None:
    """A trace behind them is found; without one the file stays as it is."""
    plain = text(7 * 4064)
    raw = bytearray(seal(plain, file_keys(suite)))
    for page in damaged:
        raw[page * PAGE + at] ^= 1
    assert check_against_the_text(bytes(raw)) == raw
    raw[6 * PAGE : 7 * PAGE] = ZERO
    left = check_against_the_text(bytes(raw))
    assert left[: 6 * PAGE] == raw[: 6 * PAGE]
    assert len(left) // PAGE == 6 + (5 not in damaged)
    expected = sorted(damaged)
    assert decoder.damaged_pages(left, VOLUME_KEYS) == expected


def test_a_long_file_is_scanned_to_its_end() -> None:
    plain = text(600 * 4064)
    raw = seal(plain, KEYS)
    for page in (255, 256, 257, 511, 512, 599):
        traces = raw[: page * PAGE] + ZERO + raw[(page + 1) * PAGE :]
        with memory_file(traces) as fd:
            crash.trim(Backing(), fd, KEYS)
            assert len(raw_of(fd)) == pages_for(plain_start(page)) * PAGE


def test_the_magic_alone_tells_a_file_that_was_cut_in_it() -> None:
    raw = seal(text(100), KEYS)
    for length in range(1, len(MAGIC) + 1):
        assert trim(raw[:length]) == ((length, 0), b"")


def test_trim_leaves_the_offset_and_the_mode_of_the_file() -> None:
    with memory_file() as fd:
        put(fd, seal(text(9000), KEYS)[:PAGE])
        os.fchmod(fd, 0o640)
        os.lseek(fd, 7, os.SEEK_SET)
        crash.trim(Backing(), fd, KEYS)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7
        assert os.fstat(fd).st_mode & 0o7777 == 0o640
