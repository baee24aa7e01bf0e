"""verify and inspect: every damaged page of every file is named, as the decoder counts them, and nothing else is."""

from __future__ import annotations

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import decoder
import mounts
import nats_world as world
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import EDGES, PAGE, SUITES, Randomness, examples, text

from encfs_js import crash, keyring, keystore
from encfs_js.backing import Backing
from encfs_js.format import Suite
from encfs_js.inspect import survey
from encfs_js.redo import INFO, seal_in_place
from encfs_js.sealed import RUN_PAGES, FileKeys, SealedFile
from encfs_js.verify import Damage, Report, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHEAP = keyring.Kdf(iterations=1, lanes=1, memory_kib=8)


def never(_: int) -> bool:
    return False


def always(_: int) -> bool:
    return True


def no_pause(_: float) -> None:
    pass


class Store:
    """A store without a mount: files are sealed into it one by one."""

    def __init__(self, top: Path, plaintext: str = "refuse", cipher: Suite = Suite.AES) -> None:
        top.mkdir(exist_ok=True)
        self.top = top
        document = keyring.create(b"key", cipher=cipher, plaintext=plaintext, kdf=CHEAP)
        keystore.write(str(top), document)
        self.keyring, self.keys, _ = keystore.unlock_store(str(top), b"key")
        self.random = Randomness()

    def file_keys(self, suite: Suite | None = None) -> FileKeys:
        return FileKeys(self.keys.volume_key, suite or self.keys.settings.cipher, 1, self.random)

    def volume_keys(self) -> dict[int, bytes]:
        return {1: self.keys.volume_key(1)}

    def seal(self, name: str, plain: bytes, suite: Suite | None = None) -> Path:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w+b") as file:
            assert SealedFile(Backing(), file.fileno(), self.file_keys(suite)).write(0, plain) == len(plain)
        return path

    def verify(self, io: Backing | None = None, **how: Any) -> Report:
        return verify(io or Backing(), str(self.top), self.keys, **{"touched": never, "sleep": no_pause, **how})

    def damaged(self, **how: Any) -> dict[str, list[int]]:
        """Page by page, what `verify` finds damaged."""
        found: dict[str, list[int]] = {}
        for damage in self.verify(**how).damage:
            pages = range(damage.page, damage.page + damage.pages)
            found.setdefault(os.fsdecode(damage.path), []).extend(pages)
        return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


# --- what is sound ------------------------------------------------------------------------------------------------


def test_counts_what_is_there(store: Store) -> None:
    sizes = [*EDGES, RUN_PAGES * 4064 * 2 + 5]
    for i, size in enumerate(sizes):
        store.seal(f"jetstream/{i}/file", text(size, i), SUITES[i % 2])
    report = store.verify()
    assert report.damage == report.crashed == report.unreadable == []
    assert report.files == len(sizes)
    assert report.empty == 1
    assert report.plain == sum(sizes)
    assert report.pages == sum(path.stat().st_size for path in store.top.rglob("file")) // PAGE
    assert report.suites == {"chachapoly": len(sizes[2::2]), "aes": len(sizes[1::2])}
    assert report.epochs == {1: len(sizes) - 1}


def test_an_empty_store_is_sound(store: Store) -> None:
    assert store.verify() == Report()


def test_looks_at_regular_files_only_and_at_each_once(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "plain").write_bytes(b"not ours")
    first = store.seal("a/first", text(9000))
    os.link(first, store.top / "a" / "second")
    os.link(first, store.top / "third")
    os.symlink(outside, store.top / "directory")
    os.symlink(outside / "plain", store.top / "link")
    os.symlink("nowhere", store.top / "dangling")
    os.mkfifo(store.top / "fifo")
    os.mkdir(os.fsencode(store.top) + b"/\xff\n")
    with open(os.fsencode(store.top) + b"/\xff\n/damaged", "wb") as file:
        file.write(b"x")
    (store.top / ".encfs_js" / "foreign").write_bytes(b"not sealed")
    report = store.verify()
    assert report.files == 2
    assert report.pages == 3
    assert report.damage == [Damage(b"\xff\n/damaged", 0, 1)]
    found = survey(Backing(), str(store.top), frozenset({1}), plaintext=False)
    assert found.others == {"symlink": 3, "fifo": 1}
    assert found.directories == 2
    assert [(key, group.files, group.pages, group.plain) for key, group in found.groups.items()] == [
        (("aes", 1), 1, 3, 9000)
    ]
    assert [path for path, _ in found.foreign] == [b"\xff\n/damaged"]


@pytest.mark.parametrize("plaintext", ["refuse", "read"])
def test_plaintext_is_what_the_policy_says(tmp_path: Path, plaintext: str) -> None:
    store = Store(tmp_path / "store", plaintext)
    store.seal("sealed", text(100))
    (store.top / "plain").write_bytes(b"from before")
    (store.top / "short").write_bytes(b"ENC")
    (store.top / "empty").write_bytes(b"")
    report = store.verify()
    assert report.files == 4
    assert report.empty == 1
    if plaintext == "refuse":
        assert report.damage == [Damage(b"plain", 0, 1), Damage(b"short", 0, 1)]
        assert report.plaintext_files == 0
    else:
        assert report.damage == []
        assert (report.plaintext_files, report.plaintext_bytes) == (2, 14)
    found = survey(Backing(), str(store.top), frozenset({1}), plaintext=plaintext == "read")
    assert (found.plaintext_files, found.plaintext_bytes, found.empty) == (2, 14, 1)
    assert len(found.foreign) == (2 if plaintext == "refuse" else 0)


def test_inspect_names_what_is_foreign(store: Store) -> None:
    store.seal("sound", text(5000))
    edit(store.seal("cut", text(5000)), lambda raw: raw.__delitem__(slice(5000, None)))
    edit(store.seal("epoch", text(10)), lambda raw: raw.__setitem__(slice(12, 16), b"\x07\0\0\0"))
    edit(store.seal("flags", text(10)), lambda raw: raw.__setitem__(9, 1))
    found = survey(Backing(), str(store.top), frozenset({1}), plaintext=False)
    reasons = {os.fsdecode(path): why for path, why in found.foreign}
    assert set(reasons) == {"cut", "epoch", "flags"}
    assert "904 bytes" in reasons["cut"]
    assert "epoch 7" in reasons["epoch"]
    assert found.groups["aes", 1].files == 2


# --- what is damaged ----------------------------------------------------------------------------------------------


def test_names_every_damaged_page_of_every_file(store: Store) -> None:
    pages = 2 * RUN_PAGES + 30
    big = store.seal("big", text(pages * 4064 - 100))
    small = store.seal("small", text(10))
    store.seal("sound", text(9000))
    hurt = [0, 1, 7, RUN_PAGES - 1, RUN_PAGES, RUN_PAGES + 1, 2 * RUN_PAGES + 3, pages - 1]
    for page in hurt:
        edit(big, lambda raw, page=page: raw.__setitem__(page * PAGE + 2000, raw[page * PAGE + 2000] ^ 1))
    edit(small, lambda raw: raw.__setitem__(PAGE - 1, raw[PAGE - 1] ^ 128))
    assert store.damaged() == {"big": hurt, "small": [0]}
    runs = [(damage.page, damage.pages) for damage in store.verify().damage if damage.path == b"big"]
    assert runs == [(0, 2), (7, 1), (RUN_PAGES - 1, 3), (2 * RUN_PAGES + 3, 1), (pages - 1, 1)]


def test_a_changed_file_id_damages_every_page(store: Store) -> None:
    edit(store.seal("file", text(50_000)), lambda raw: raw.__setitem__(20, raw[20] ^ 1))
    assert store.verify().damage == [Damage(b"file", 0, 13)]


def test_pages_of_another_file_are_damage(store: Store) -> None:
    one, two = store.seal("one", text(50_000, 1)), store.seal("two", text(50_000, 2))
    part = slice(4 * PAGE, 6 * PAGE)
    edit(one, lambda raw: raw.__setitem__(part, two.read_bytes()[part]))
    assert store.damaged() == {"one": [4, 5]}


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 40_000), st.integers(0, 7)),
        st.tuples(st.just("zero"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("cut"), st.integers(0, 40_000), st.just(0)),
        st.tuples(st.just("cut pages"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("swap"), st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.just("append"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("older"), st.integers(0, 9), st.just(0)),
    ),
    max_size=4,
)


def apply(raw: bytes, older: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """Do to a sealed file what an attacker or a crash may do. `older`: the same file when it was shorter."""
    now = bytearray(raw)
    for what, at, other in changes:
        if what == "flip" and now:
            now[at % len(now)] ^= 1 << other
        elif what == "zero":
            now[at * PAGE : (at + 1) * PAGE] = bytes(len(now[at * PAGE : (at + 1) * PAGE]))
        elif what == "cut":
            del now[at:]
        elif what == "cut pages":
            del now[at * PAGE :]
        elif what == "swap":
            one, two = slice(at * PAGE, (at + 1) * PAGE), slice(other * PAGE, (other + 1) * PAGE)
            if len(now[one]) == len(now[two]):
                now[one], now[two] = now[two], now[one]
        elif what == "append":
            now += bytes(PAGE * at)
        elif what == "older":
            part = slice(at * PAGE, (at + 1) * PAGE)
            if len(now[part]) == len(older[part]) == PAGE:
                now[part] = older[part]
    return bytes(now)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for all examples of a hypothesis test: each replaces its one file."""
    return Store(tmp_path_factory.mktemp("scratch"))


def two_versions(store: Store, size: int, suite: Suite) -> tuple[bytes, bytes]:
    """The raw bytes of a file of `size` plain bytes, and of the same file before its last third was appended."""
    plain = text(size)
    with open(store.top / "file", "w+b") as file:
        sealed = SealedFile(Backing(), file.fileno(), store.file_keys(suite))
        sealed.write(0, plain[: size * 2 // 3])
        older = (store.top / "file").read_bytes()
        sealed.write(size * 2 // 3, plain[size * 2 // 3 :])
    return (store.top / "file").read_bytes(), older


@given(
    size=st.one_of(st.sampled_from(EDGES), st.integers(0, 36_000)),
    suite=st.sampled_from(SUITES),
    changes=CHANGES,
)
@examples(300)
def test_agrees_with_the_decoder(scratch: Store, size: int, suite: Suite, changes: list[tuple[str, int, int]]) -> None:
    raw = apply(*two_versions(scratch, size, suite), changes)
    (scratch.top / "file").write_bytes(raw)
    assert scratch.damaged().get("file", []) == decoder.damaged_pages(raw, scratch.volume_keys())


@given(
    size=st.one_of(st.sampled_from(EDGES), st.integers(0, 36_000)),
    suite=st.sampled_from(SUITES),
    changes=CHANGES,
)
@examples(300)
def test_after_a_crash_only_what_a_mount_would_not_trim_is_damage(
    scratch: Store, size: int, suite: Suite, changes: list[tuple[str, int, int]]
) -> None:
    path = scratch.top / "file"
    path.write_bytes(apply(*two_versions(scratch, size, suite), changes))
    report, damaged = scratch.verify(touched=always), scratch.damaged(touched=always)
    with open(path, "r+b") as file:
        trimmed = crash.trim(Backing(), file.fileno(), scratch.file_keys())
    assert damaged == scratch.damaged(), "what the mount trims is not damage, and what it leaves is"
    if report.crashed:
        assert trimmed is not None
    elif trimmed is not None:
        assert damaged["file"][0] == 0, "only a damaged header keeps the trace from being told"


# --- what changes underfoot ---------------------------------------------------------------------------------------


class Torn(Backing):
    """Shows a page half old and half new for the first `times` looks at it."""

    def __init__(self, offset: int, times: int) -> None:
        self.offset, self.times = offset, times

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        got = os.preadv(fd, buffers, offset, flags)
        at = self.offset - offset
        if self.times and 0 <= at < got:
            self.times -= 1
            buffers[0][at : at + 100] = bytes(100)
        return got


def test_a_page_that_settles_is_sound(store: Store) -> None:
    store.seal("file", text(50_000))
    at = 5 * PAGE + 300
    assert store.damaged(io=Torn(at, 1)) == {}
    assert store.damaged(io=Torn(at, 2)) == {}
    assert store.damaged(io=Torn(at, 1000)) == {"file": [5]}


def test_writers_are_never_taken_for_damage(store: Store) -> None:
    """Files grow, shrink, are rewritten, renamed and removed while verify runs, many times over."""
    stop = threading.Event()
    rounds = []

    def work(suite: Suite, name: str) -> None:
        keys = FileKeys(store.keys.volume_key, suite, 1)
        count = 0
        while not stop.is_set():
            path = store.top / name
            with open(path, "w+b") as file, closing(file):
                sealed = SealedFile(Backing(), file.fileno(), keys)
                for step in range(1, 60):
                    sealed.write(sealed.size, text(1 + step * 331 % 9001, step))
                sealed.truncate(20_000)
                sealed.truncate(0)
                sealed.write(0, text(300_000))
            os.rename(path, store.top / f"{name}.done")
            count += 1
        rounds.append(count)

    writers = [threading.Thread(target=work, args=(suite, suite.label)) for suite in SUITES]
    for writer in writers:
        writer.start()
    try:
        for _ in range(60):
            report = store.verify(sleep=time.sleep)
            assert report.damage == report.unreadable == []
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert min(rounds) > 0
    assert store.verify().damage == []


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
@pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
@pytest.mark.parametrize("sync", [None, "always"])
def test_a_store_under_a_busy_nats_server_is_sound(tmp_path: Path, sync: str | None) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    mounts.init(store, cipher="aes")
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, tmp_path / "work", sync=sync) as server:
        world.add_stream(server, "BUSY", "BUSY.>", max_bytes=3_000_000)
        stop = threading.Event()

        def endless() -> Iterator[world.Message]:
            while not stop.is_set():
                yield from world.sample("BUSY", 50)

        with ThreadPoolExecutor(1) as pool:
            publisher = pool.submit(world.publish, server, endless(), 64)
            try:
                pages = [mounts.verify(store)["pages"] for _ in range(10)]
            finally:
                stop.set()
            assert len(publisher.result()) > 0
    assert max(pages) > 0
    mounts.verify(store)


# --- what a crash and a failing disk leave ------------------------------------------------------------------------


def test_a_rewriting_that_was_interrupted_is_not_damage(store: Store) -> None:
    path = store.seal("file", text(100_000, "old"))
    with open(path, "r+b") as file:
        meta = os.open(store.top / ".encfs_js", os.O_RDONLY)

        class Crashing(Backing):
            """Ends the process, as it were, in the middle of copying the redo file over its target."""

            def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
                if fd == file.fileno():
                    os.pwrite(fd, data[: 7 * PAGE], offset)
                    raise KeyboardInterrupt
                return os.pwrite(fd, data, offset)

        io, keys = Crashing(), store.file_keys()
        source = SealedFile(io, file.fileno(), keys)
        with pytest.raises(KeyboardInterrupt):
            seal_in_place(io, meta, store.keys.derive(INFO), source, b"file", keys)
        os.close(meta)
    assert any(name.startswith("redo-") for name in os.listdir(store.top / ".encfs_js"))
    report = store.verify()
    assert report.unfinished == [b"file"]
    assert report.damage == []
    for name in os.listdir(store.top / ".encfs_js"):
        if name.startswith("redo-"):
            os.unlink(store.top / ".encfs_js" / name)
    assert store.damaged() == {"file": list(range(7, 25))}, "without the redo file it would be"


class Failing(Backing):
    """A disk with one page of every file that cannot be read, and names that cannot be opened."""

    def __init__(self, page: int = -1, names: dict[bytes, int] | None = None) -> None:
        self.page, self.names = page, names or {}

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if offset <= self.page * PAGE < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset, flags)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path in self.names:
            raise OSError(self.names[path], os.strerror(self.names[path]))
        return os.open(path, flags, mode, dir_fd=dir_fd)


def test_a_page_that_the_disk_cannot_read_is_damage_and_its_neighbours_are_not(store: Store) -> None:
    store.seal("file", text(RUN_PAGES * 4064 * 2))
    for page in (1, RUN_PAGES - 1, RUN_PAGES, 2 * RUN_PAGES):
        assert store.damaged(io=Failing(page)) == {"file": [page]}


def test_what_cannot_be_opened_is_named_and_the_rest_is_verified(store: Store) -> None:
    store.seal("a/closed", text(10))
    store.seal("a/damaged", text(10))
    store.seal("b/file", text(10))
    store.seal("gone", text(10))
    edit(store.top / "a/damaged", lambda raw: raw.__setitem__(100, raw[100] ^ 1))
    names = {b"closed": errno.EACCES, b"b": errno.EACCES, b"gone": errno.ENOENT}
    report = store.verify(Failing(names=names))
    assert report.unreadable == [(b"a/closed", "Permission denied"), (b"b", "Permission denied")]
    assert report.damage == [Damage(b"a/damaged", 0, 1)]
    assert report.files == 1
    found = survey(Failing(names=names), str(store.top), frozenset({1}), plaintext=False)
    assert found.unreadable == report.unreadable


def test_nothing_is_written(store: Store) -> None:
    store.seal("jetstream/file", text(50_000))
    edit(store.top / "jetstream/file", lambda raw: raw.__setitem__(100, raw[100] ^ 1))
    names = [store.top, *store.top.rglob("*")]
    before = [(name, name.stat()) for name in names]
    store.verify()
    survey(Backing(), str(store.top), frozenset({1}), plaintext=False)
    for name, was in before:
        now = name.stat()
        assert (now.st_mtime_ns, now.st_ctime_ns, now.st_size) == (
            was.st_mtime_ns,
            was.st_ctime_ns,
            was.st_size,
        )
