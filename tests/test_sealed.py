"""sealed.py: what a sealed file gives back, what it refuses, and what is left after a call that failed."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import decoder
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sealed_files import (
    EDGES,
    EXAMPLES,
    PAGE,
    SUITES,
    VOLUME_KEYS,
    FailingDisk,
    FullDisk,
    Randomness,
    ShortWrites,
    examples,
    file_keys,
    memory_file,
    put,
    raw_of,
    read_all,
    refused_pages,
    seal,
    text,
    unseal,
)

from encfs_js import crash
from encfs_js.backing import Backing
from encfs_js.format import DamagedPageError, Suite, capacity, page_of, pages_for, plain_start
from encfs_js.sealed import FileKeys, SealedFile

if TYPE_CHECKING:
    from collections.abc import Iterable

KEYS = file_keys()
near_edges = st.builds(lambda edge, more: max(0, edge + more), st.sampled_from(EDGES), st.integers(-2, 2))
sizes = st.integers(0, 20000) | near_edges
suites = st.sampled_from(SUITES)


def pages_of(raw: bytes) -> list[bytes]:
    return [raw[at : at + PAGE] for at in range(0, len(raw), PAGE)]


def flipped(raw: bytes, bit: int) -> bytes:
    at = bit // 8
    return raw[:at] + bytes([raw[at] ^ 1 << bit % 8]) + raw[at + 1 :]


def assert_only_damaged(raw: bytes, pages: Iterable[int]) -> None:
    """Both readers refuse these pages and no other."""
    expected = sorted(pages)
    assert decoder.damaged_pages(raw, VOLUME_KEYS) == expected
    assert refused_pages(raw, KEYS) == {page: page for page in expected}


def assert_header_damaged(raw: bytes) -> None:
    """Every page is refused, as page 0 or as the page that was read: all of them are bound to the header."""
    every = list(range(len(raw) // PAGE))
    assert decoder.damaged_pages(raw, VOLUME_KEYS) in ([0], every)
    refused = refused_pages(raw, KEYS)
    assert list(refused) == every
    assert all(reported in {0, page} for page, reported in refused.items())


def assert_flip_is_found(raw: bytes, bit: int) -> None:
    damaged = flipped(raw, bit)
    if bit // 8 < 32:
        assert_header_damaged(damaged)
    else:
        assert_only_damaged(damaged, [bit // 8 // PAGE])


def assert_no_trace(raw: bytes) -> None:
    """The crash rule finds nothing in this file and leaves it as it is."""
    assert decoder.crash_rule(raw, VOLUME_KEYS) is None
    with memory_file(raw) as fd:
        assert crash.trim(Backing(), fd, KEYS) is None
        assert raw_of(fd) == raw


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("size", [100, 8000, 8096])
def test_every_flip_in_a_field_is_found_at_its_page(suite: Suite, size: int) -> None:
    """Every bit of the fields, a bit of every 13th byte of ciphertext. A flip is no trace of a crash."""
    raw = seal(text(size), file_keys(suite))
    for page in range(len(raw) // PAGE):
        body = 16 if page else 48
        fields = [*range(body * 8), *range((PAGE - 16) * 8, PAGE * 8)]
        texts = [at * 8 + at % 8 for at in range(body, PAGE - 16, 13)]
        for bit in fields + texts:
            assert_flip_is_found(raw, page * PAGE * 8 + bit)
            if bit % 5 == 0:
                assert_no_trace(flipped(raw, page * PAGE * 8 + bit))


@given(st.integers(1, 20000), suites, st.data())
@examples(150)
def test_any_flip_is_found_at_its_page(size: int, suite: Suite, data: st.DataObject) -> None:
    raw = seal(text(size), file_keys(suite))
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    assert_flip_is_found(raw, bit)
    assert_no_trace(flipped(raw, bit))


@given(st.integers(8096, 24000), suites, st.data())
@examples(100)
def test_pages_that_changed_places_are_found(size: int, suite: Suite, data: st.DataObject) -> None:
    pages = pages_of(seal(text(size), file_keys(suite)))
    i, j = data.draw(st.lists(st.integers(0, len(pages) - 1), min_size=2, max_size=2, unique=True).map(sorted))
    pages[i], pages[j] = pages[j], pages[i]
    if i:
        assert_only_damaged(b"".join(pages), [i, j])
    else:
        assert_header_damaged(b"".join(pages))


@given(st.integers(8096, 24000), suites, suites, st.sampled_from([1, 2]), st.data())
@examples(100)
def test_a_page_of_another_file_is_found(
    size: int, suite: Suite, other_suite: Suite, epoch: int, data: st.DataObject
) -> None:
    """Of a file with the same plain text, too, whatever suite and epoch it has."""
    keys = file_keys(suite, seed=1)
    pages, others = (
        pages_of(seal(text(size), keys)),
        pages_of(seal(text(size), file_keys(other_suite, epoch, seed=2))),
    )
    page = data.draw(st.integers(1, len(pages) - 1))
    pages[page] = others[page]
    assert_only_damaged(b"".join(pages), [page])
    pages[page] = pages_of(seal(text(size), keys))[page]  # the same keys, another file id
    assert_only_damaged(b"".join(pages), [page])


@given(st.integers(8096, 24000), suites, st.data())
@examples(100)
def test_a_page_that_is_there_twice_or_missing_is_found(size: int, suite: Suite, data: st.DataObject) -> None:
    pages = pages_of(seal(text(size), file_keys(suite)))
    i = data.draw(st.integers(0, len(pages) - 1))
    j = data.draw(st.integers(1, len(pages) - 1).filter(lambda j: j != i))
    over = [*pages[:j], pages[i], *pages[j + 1 :]]
    assert_only_damaged(b"".join(over), [j])
    twice = [*pages[:j], pages[j - 1], *pages[j:]]
    assert_only_damaged(b"".join(twice), range(j, len(twice)))
    missing = [*pages[:j], *pages[j + 1 :]]
    # Without its last page the file lacks the end mark, which is found behind what is left.
    expected = list(range(j, len(missing))) or [j]
    assert decoder.damaged_pages(b"".join(missing), VOLUME_KEYS) == expected
    assert list(refused_pages(b"".join(missing), KEYS).values()) == expected


@pytest.mark.parametrize(("suite", "size"), [(Suite.AES, 4032), (Suite.CHACHAPOLY, 5000)])
def test_truncation_at_every_byte(suite: Suite, size: int) -> None:
    plain = text(size)
    raw = seal(plain, file_keys(suite))
    io = Backing()
    with memory_file() as fd:
        for length in range(len(raw)):
            cut = raw[:length]
            whole = length // PAGE
            put(fd, cut)
            file = SealedFile(io, fd, KEYS)
            if length == 0:
                assert file.size == 0
                assert file.damage is None
                continue
            # Clean: an integrity error where the page, or the end mark, is missing.
            assert decoder.damaged_pages(cut, VOLUME_KEYS) == [whole]
            assert file.damage == whole
            with pytest.raises(DamagedPageError) as caught:
                file.read(0, file.size)
            assert caught.value.page == whole
            if whole and length % PAGE:
                assert file.read(0, 4032) == plain[:4032]
            # Unclean: what is whole stays and gets an end mark.
            kept = plain[: plain_start(whole)]
            assert decoder.crash_rule(cut, VOLUME_KEYS) == decoder.Trimmed(whole, end_mark=whole > 0)
            sizes_before_and_after = crash.trim(io, fd, KEYS)
            assert sizes_before_and_after is not None
            assert sizes_before_and_after[1] == len(kept)
            trimmed = raw_of(fd)
            assert len(trimmed) == pages_for(len(kept)) * PAGE
            assert decoder.read(trimmed, VOLUME_KEYS) == kept == read_all(SealedFile(io, fd, KEYS))


@given(st.integers(12000, 24000), suites, st.data())
@examples(60)
def test_an_older_copy_of_a_page_is_accepted(size: int, suite: Suite, data: st.DataObject) -> None:
    """Documented: a page is not bound to a point in time."""
    with memory_file() as fd:
        file = SealedFile(Backing(), fd, file_keys(suite))
        file.write(0, text(8000))  # two pages: the file keeps its id from here on
        file.write(8000, text(size - 8000))
        old, old_plain = pages_of(raw_of(fd)), read_all(file)
        file.write(0, text(size, "new"))
        new, new_plain = pages_of(raw_of(fd)), text(size, "new")
    page = data.draw(st.integers(0, len(new) - 1))
    begin, end = plain_start(page), plain_start(page) + capacity(page)
    mixed = b"".join([*new[:page], old[page], *new[page + 1 :]])
    expected = new_plain[:begin] + old_plain[begin:end] + new_plain[end:]
    assert decoder.read(mixed, VOLUME_KEYS) == unseal(mixed, KEYS) == expected
    assert decoder.read(b"".join(old), VOLUME_KEYS) == old_plain


def test_an_older_last_page_does_not_shorten_an_open_file() -> None:
    with memory_file() as fd:
        file = SealedFile(Backing(), fd, KEYS)
        file.write(0, text(5000))
        old = raw_of(fd)
        file.write(5000, text(100))
        os.pwrite(fd, old[PAGE:], PAGE)
        with pytest.raises(DamagedPageError):
            file.read(4032, 2000)
        assert bytes(file.read(0, 4032)) == text(5000)[:4032]


@given(st.integers(1, 20000) | near_edges.filter(bool), suites, st.data())
@examples(150)
def test_a_damaged_last_page_never_makes_the_file_shorter(size: int, suite: Suite, data: st.DataObject) -> None:
    """Nobody reads to the end of what the file claims to hold without an error; the other pages read as ever."""
    plain = text(size)
    raw = seal(plain, file_keys(suite))
    last = len(raw) // PAGE - 1
    start = last * PAGE + (0 if last else 32)
    field = data.draw(st.sampled_from(["nonce", "length", "zero", "ciphertext", "tag"]))
    begin, end = {"nonce": (0, 12), "length": (12, 14), "zero": (14, 16), "ciphertext": (16, 4048)}.get(
        field, ((last + 1) * PAGE - 16 - start, (last + 1) * PAGE - start)
    )
    damaged = bytearray(raw)
    changed = data.draw(st.binary(min_size=end - begin, max_size=end - begin)) if end - begin < 20 else os.urandom(4032)
    damaged[start + begin : start + end] = changed[: end - begin]
    if damaged == raw:
        return
    with memory_file(bytes(damaged)) as fd:
        file = SealedFile(Backing(), fd, KEYS)
        assert file.damage == last
        assert file.size > plain_start(last)
        for offset in {0, plain_start(last), file.size - 1}:
            with pytest.raises(DamagedPageError) as caught:
                file.read(offset, file.size - offset)
            assert caught.value.page == last
        assert bytes(file.read(0, plain_start(last))) == plain[: plain_start(last)]
        for change in (
            lambda: file.write(file.size, b"x"),
            lambda: file.write(0, b"x"),
            lambda: file.truncate(1 << 20),
        ):
            with pytest.raises(DamagedPageError):
                change()
        assert raw_of(fd) == damaged


@pytest.mark.parametrize("suite", SUITES)
def test_a_file_with_a_damaged_page_can_be_cut_before_it(suite: Suite) -> None:
    plain = text(14000)
    raw = seal(plain, file_keys(suite))
    for page in range(1, 4):
        damaged = flipped(raw, page * PAGE * 8 + 1000)
        for size in (1, 4000, plain_start(page) - 1, plain_start(page)):
            with memory_file(damaged) as fd:
                file = SealedFile(Backing(), fd, KEYS)
                file.truncate(size)
                assert file.damage is None
                assert decoder.read(raw_of(fd), VOLUME_KEYS) == plain[:size] == read_all(file)
        with memory_file(damaged) as fd:
            file = SealedFile(Backing(), fd, KEYS)
            with pytest.raises(DamagedPageError):
                file.truncate(plain_start(page) + 1)
            assert raw_of(fd) == damaged
            file.truncate(0)
            assert raw_of(fd) == b""
            assert file.write(0, b"new") == 3
            assert decoder.read(raw_of(fd), VOLUME_KEYS) == b"new"


@pytest.mark.parametrize("at", [0, 8, 9, 10, 12, 20])
@pytest.mark.parametrize("size", [1, 4032, 5000, 8096, 9000])
def test_a_file_with_a_damaged_header_is_not_changed(at: int, size: int) -> None:
    raw = flipped(seal(text(14000), KEYS), at * 8)
    with memory_file(raw) as fd:
        file = SealedFile(Backing(), fd, KEYS)
        assert file.damage == 0
        for change in (
            lambda: file.truncate(size),
            lambda: file.write(size, b"x"),
            lambda: file.write(14000, b"x"),
        ):
            with pytest.raises(DamagedPageError):
                change()
            assert raw_of(fd) == raw
        file.truncate(0)
        assert file.damage is None


def test_a_damaged_page_that_is_overwritten_as_a_whole_is_whole_again() -> None:
    plain = text(14000)
    with memory_file(flipped(seal(plain, KEYS), PAGE * 8 + 1000)) as fd:
        file = SealedFile(Backing(), fd, KEYS)
        with pytest.raises(DamagedPageError):
            file.write(5000, b"part of it")
        with pytest.raises(DamagedPageError):
            file.write(4000, bytes(100))
        file.write(4032, text(4064, "new"))
        expected = plain[:4032] + text(4064, "new") + plain[8096:]
        assert decoder.read(raw_of(fd), VOLUME_KEYS) == expected == read_all(file)


@pytest.mark.parametrize("count", [3, 20])
def test_damage_does_not_spread_to_another_file(count: int) -> None:
    """All files of a store share one page buffer."""
    keys = file_keys()
    with memory_file(seal(text(count * 4064), keys)) as damaged, memory_file() as other:
        for page in range(count):
            os.pwrite(damaged, b"\xff" * PAGE, page * PAGE + (PAGE if page == 0 else 0))
        with pytest.raises(DamagedPageError):
            read_all(SealedFile(Backing(), damaged, keys))
        file = SealedFile(Backing(), other, keys)
        file.write(0, text(count * 4064))
        assert decoder.damaged_pages(raw_of(other), VOLUME_KEYS) == []
        assert read_all(file) == text(count * 4064)


def test_a_sync_reaches_the_backing_file() -> None:
    calls = []

    class Recorded(Backing):
        def fsync(self, fd: int) -> None:
            calls.append(("fsync", fd))

        def fdatasync(self, fd: int) -> None:
            calls.append(("fdatasync", fd))

    with memory_file() as fd:
        file = SealedFile(Recorded(), fd, KEYS)
        file.sync(datasync=False)
        file.sync(datasync=True)
        assert calls == [("fsync", fd), ("fdatasync", fd)]


@pytest.mark.parametrize("suite", SUITES)
def test_large_writes_and_reads(suite: Suite) -> None:
    """Longer than one run, at offsets that are no page's start."""
    plain = bytearray(text(3 << 20))
    with memory_file() as fd:
        file = SealedFile(Backing(), fd, file_keys(suite))
        assert file.write(0, plain) == len(plain)
        patch = random.Random(1).randbytes((1 << 20) + 4321)
        assert file.write(1234567, patch) == len(patch)
        plain[1234567 : 1234567 + len(patch)] = patch
        assert decoder.read(raw_of(fd), VOLUME_KEYS) == plain == read_all(file)
        assert bytes(file.read(1000001, 1 << 20)) == plain[1000001:][: 1 << 20]


# --- a file against a row of bytes ----------------------------------------------------------------------------------


class Recording(Backing):
    """Checks what FORMAT.md section 2.1 says of writing: whole pages, new nonces, ascending order."""

    def __init__(self) -> None:
        self.nonces: set[tuple[bytes, bytes]] = set()
        self.ids: set[bytes] = set()
        self.writes = 0

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        raw = bytes(data)
        assert offset % PAGE == 0
        assert len(raw) % PAGE == 0
        assert offset <= os.fstat(fd).st_size, "the write would leave a hole"
        file_id = decoder.file_id_of(raw if offset == 0 else os.pread(fd, 32, 0))
        self.ids.add(file_id)
        for i, page in enumerate(pages_of(raw)):
            nonce = decoder.nonce_of(page, 0) if offset == i == 0 else page[:12]
            assert (file_id, nonce) not in self.nonces, "a nonce was used twice"
            self.nonces.add((file_id, nonce))
        self.writes += 1
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        assert size % PAGE == 0
        assert size <= os.fstat(fd).st_size, "holes do not exist"
        os.ftruncate(fd, size)


class AgainstBytes(RuleBasedStateMachine):
    """A sealed file and a bytearray are treated alike; a decoder that knows nothing of the package reads along."""

    @initialize(suite=suites, epoch=st.sampled_from([1, 2]))
    def make(self, suite: Suite, epoch: int) -> None:
        self.random = Randomness()
        self.io = Recording()
        self.fd = os.memfd_create("sealed")
        self.model = bytearray()
        self.open(suite, epoch)

    def open(self, suite: Suite, epoch: int) -> None:
        self.keys = FileKeys(VOLUME_KEYS.__getitem__, suite, epoch, self.random)
        self.file = SealedFile(self.io, self.fd, self.keys)
        self.has_fresh_id = False

    def place(self, data: st.DataObject) -> int:
        size = len(self.model)
        return data.draw(
            st.integers(0, size) | near_edges | st.integers(-2, 2).map(lambda more: max(0, size + more)),
            "offset",
        )

    def before(self) -> tuple[bytes, int, int, set[bytes]]:
        raw = raw_of(self.fd)
        return decoder.file_id_of(raw), len(raw) // PAGE, self.io.writes, set(self.io.ids)

    def check_id(self, before: tuple[bytes, int, int, set[bytes]]) -> None:
        """A file of at most one page has a new id after its first write since the opening, a longer one its own."""
        file_id, pages, writes, ids = before
        raw = raw_of(self.fd)
        if not raw or self.io.writes == writes:
            self.has_fresh_id &= bool(raw)
            return
        if pages > 1 or self.has_fresh_id:
            assert decoder.file_id_of(raw) == file_id
        else:
            assert decoder.file_id_of(raw) not in ids
            self.has_fresh_id = True

    @rule(data=st.data(), length=st.integers(0, 9000) | near_edges, seed=st.integers())
    def write(self, data: st.DataObject, length: int, seed: int) -> None:
        offset, before = self.place(data), self.before()
        written = text(length, seed)
        assert self.file.write(offset, written) == length
        if length:
            self.model.extend(bytes(max(0, offset - len(self.model))))
            self.model[offset : offset + length] = written
        self.check_id(before)

    @rule(length=st.integers(32000, 60000), seed=st.integers())
    @precondition(lambda self: len(self.model) < 30000)
    def append_many_pages(self, length: int, seed: int) -> None:
        before = self.before()
        written = text(length, seed)
        assert self.file.write(len(self.model), written) == length
        self.model.extend(written)
        self.check_id(before)

    @rule(data=st.data(), length=st.integers(0, 30000))
    def read(self, data: st.DataObject, length: int) -> None:
        offset = self.place(data)
        assert bytes(self.file.read(offset, length)) == self.model[offset : offset + length]

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        size, before = self.place(data), self.before()
        self.file.truncate(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.check_id(before)

    @rule(more=st.integers(0, 20000), most=st.integers(1, 9000))
    @precondition(lambda self: len(self.model) < 60000)
    def grow_in_steps(self, more: int, most: int) -> None:
        size, before = len(self.model) + more, self.before()
        while not self.file.grow(size, most):
            assert self.file.size - len(self.model) == most
            self.model.extend(bytes(most))
        self.model.extend(bytes(size - len(self.model)))
        self.check_id(before)

    @rule(suite=suites, epoch=st.sampled_from([1, 2]))
    def reopen(self, suite: Suite, epoch: int) -> None:
        self.open(suite, epoch)

    @rule(datasync=st.booleans())
    def sync(self, datasync: bool) -> None:
        self.file.sync(datasync)

    @invariant()
    def the_decoder_reads_the_same(self) -> None:
        if not hasattr(self, "fd"):
            return
        raw = raw_of(self.fd)
        assert len(raw) == pages_for(len(self.model)) * PAGE
        assert decoder.plain_size(raw) == self.file.size == len(self.model)
        assert decoder.read(raw, VOLUME_KEYS) == self.model
        assert decoder.crash_rule(raw, VOLUME_KEYS) is None
        assert self.file.damage is None
        drawn = sum(len(part) for part in self.random.drawn)
        assert drawn >= 12 * len(self.io.nonces) + 16 * len(self.io.ids)

    def teardown(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


TestAgainstBytes = AgainstBytes.TestCase
TestAgainstBytes.settings = settings(
    deadline=None,
    max_examples=max(EXAMPLES, 60),
    stateful_step_count=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_the_id_of_a_file_of_one_page_changes_when_it_has_sealed_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("encfs_js.sealed.ONE_PAGE_SEALS", 5)
    io = Recording()
    with memory_file() as fd:
        file = SealedFile(io, fd, KEYS)
        for i in range(12):
            file.write(0, text(100, i))
            assert decoder.read(raw_of(fd), VOLUME_KEYS) == text(100, i)
        assert len(io.ids) == 3


def test_a_new_id_is_never_taken_behind_page_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk ends a write just when the id has sealed enough: the page that is shortened keeps the file's id."""
    monkeypatch.setattr("encfs_js.sealed.ONE_PAGE_SEALS", 3)
    raw = seal(text(10), KEYS)
    with memory_file(raw) as fd:
        file = SealedFile(FullDisk(2 * PAGE), fd, KEYS)
        assert file.write(0, text(9000)) == 8095
        assert decoder.read(raw_of(fd), VOLUME_KEYS) == text(9000)[:8095] == read_all(file)


def test_a_longer_file_asks_for_a_new_id_when_it_has_sealed_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encfs_js.sealed.REWRITE_SEALS", 6)
    with memory_file() as fd:
        file = SealedFile(Backing(), fd, KEYS)
        file.write(0, text(12000))
        assert not file.wants_new_id
        file.write(0, text(12000))
        assert file.wants_new_id


# --- faults ---------------------------------------------------------------------------------------------------------


def assert_sound(fd: int, old: bytes, offset: int, data: bytes, taken: int) -> bytes:
    """After a write that failed or was cut short: nothing outside its range changed, what was taken is there.

    Returns the plain text. A byte of the range that was not taken is the old or the new one.
    """
    plain = decoder.read(raw_of(fd), VOLUME_KEYS)
    end = offset + len(data)
    assert len(old) <= len(plain) <= max(len(old), end)
    assert plain[: min(offset, len(old))] == old[:offset]
    assert plain[end:] == old[end:]
    assert not plain[len(old) : offset].strip(b"\0")
    assert plain[offset : offset + taken] == data[:taken]
    for at in range(offset + taken, min(end, len(plain))):
        assert plain[at] == data[at - offset] or (at < len(old) and plain[at] == old[at])
    return plain


def check_failed_write(io: Backing, fd: int, old: bytes, write: tuple[int, bytes], keys: FileKeys) -> None:
    """Write once through `io`, which may fail; afterwards the disk is well again, and so must the file be."""
    offset, data = write
    file = SealedFile(io, fd, keys)
    try:
        taken = file.write(offset, data)
    except OSError as error:
        assert error.errno in {errno.ENOSPC, errno.EIO}
        taken = 0
    assert taken <= len(data)
    plain = assert_sound(fd, old, offset, data, taken)
    assert read_all(file) == plain
    assert file.size == len(plain)
    assert file.damage is None
    assert read_all(SealedFile(Backing(), fd, keys)) == plain
    file._io = Backing()
    assert file.write(offset + taken, data[taken:]) == len(data) - taken
    expected = bytearray(old.ljust(offset, b"\0"))
    expected[offset : offset + len(data)] = data
    assert decoder.read(raw_of(fd), VOLUME_KEYS) == expected == read_all(file)


writes = st.tuples(sizes, st.integers(1, 20000) | near_edges.filter(bool))


@given(sizes, writes, suites, st.data(), st.booleans())
@examples(200)
def test_a_full_disk_leaves_a_sound_file(
    size: int, write: tuple[int, int], suite: Suite, data: st.DataObject, has_id: bool
) -> None:
    """Room ends at any byte: between two pages or inside of one."""
    old, (offset, length) = text(size), write
    keys = file_keys(suite)
    raw = seal(old, keys)
    reach = max(0, pages_for(offset + length) * PAGE - len(raw))
    room = len(raw) + data.draw(st.integers(0, reach) | st.integers(0, reach // 1024).map(lambda blocks: blocks * 1024))
    with memory_file(raw) as fd:
        io = FullDisk(room)
        if has_id:  # the same with a file that has written before
            check_failed_write(io, fd, old, (0, old[:1]), keys)
        check_failed_write(io, fd, old, (offset, text(length, "new")), keys)


faults = st.builds(FailingDisk, st.integers(1, 4), st.sampled_from([errno.EIO, errno.ENOSPC]), st.integers(0, 5 * PAGE))


@given(sizes, writes, suites, faults)
@examples(200)
def test_one_failed_call_leaves_a_sound_file(size: int, write: tuple[int, int], suite: Suite, io: FailingDisk) -> None:
    """One call fails, with any part of its bytes taken before; the next one works."""
    old, (offset, length) = text(size), write
    keys = file_keys(suite)
    with memory_file(seal(old, keys)) as fd:
        check_failed_write(io, fd, old, (offset, text(length, "new")), keys)


@given(sizes, writes, suites, st.integers(1, 5000))
@examples(60)
def test_short_writes_are_carried_on(size: int, write: tuple[int, int], suite: Suite, most: int) -> None:
    old, (offset, length) = text(size), write
    data = text(length, "new")
    with memory_file(seal(old, file_keys(suite))) as fd:
        file = SealedFile(ShortWrites(most), fd, KEYS)
        assert file.write(offset, data) == length
        expected = bytearray(old.ljust(offset, b"\0"))
        expected[offset : offset + length] = data
        assert decoder.read(raw_of(fd), VOLUME_KEYS) == expected


@given(sizes, sizes, suites, faults)
@examples(200)
def test_a_truncation_that_fails_leaves_a_sound_file(size: int, to: int, suite: Suite, io: FailingDisk) -> None:
    """Shrinking or growing: no byte below both ends is lost, and the file is the open one's equal."""
    old = text(size)
    keys = file_keys(suite)
    with memory_file(seal(old, keys)) as fd:
        file = SealedFile(io, fd, keys)
        failed = False
        try:
            file.truncate(to)
        except OSError:
            failed = True
        plain = decoder.read(raw_of(fd), VOLUME_KEYS)
        assert read_all(file) == plain
        assert plain[: min(size, to)] == old[:to]
        assert not plain[size:].strip(b"\0")
        assert min(size, to) <= len(plain) <= max(size, to)
        assert failed or len(plain) == to
        file._io = Backing()
        file.truncate(to)
        assert decoder.read(raw_of(fd), VOLUME_KEYS) == old[:to].ljust(to, b"\0") == read_all(file)


def test_growing_beyond_the_disk_is_refused_before_anything_is_written() -> None:
    class Small(Backing):
        def statvfs(self, fd: int) -> os.statvfs_result:
            found = list(os.fstatvfs(fd))
            found[0] = found[1] = PAGE
            found[3] = 1000  # f_bfree
            return os.statvfs_result(found)

        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            raise AssertionError((fd, len(data), offset))

    raw = seal(text(5000), KEYS)
    with memory_file(raw) as fd:
        file = SealedFile(Small(), fd, KEYS)
        for change in (lambda: file.truncate(1 << 30), lambda: file.write(1 << 30, b"x")):
            with pytest.raises(OSError, match="No space") as caught:
                change()
            assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="too large") as caught:
            file.truncate(1 << 60)
        assert caught.value.errno == errno.EFBIG
        assert raw_of(fd) == raw


@given(st.integers(0, 3 * PAGE), st.integers(0, 20000))
@examples(40)
def test_what_no_page_holds_is_not_asked_for(size: int, offset: int) -> None:
    """Reading at or behind the end gives nothing, and an empty write changes nothing."""
    with memory_file(seal(text(size), KEYS)) as fd:
        file = SealedFile(Backing(), fd, KEYS)
        raw = raw_of(fd)
        assert bytes(file.read(size + offset, 100)) == b""
        assert file.write(offset, b"") == 0
        assert raw_of(fd) == raw
        assert page_of(size)[0] <= len(raw) // PAGE
