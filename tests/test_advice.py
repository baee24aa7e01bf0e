"""Write-behind and read-ahead on the mount: what is asked for, and that a real mount with it is as before, only earlier."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

import mounts
import pytest
import takeover

from encfs_js import advice, advisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


def on_a_mount(test: Callable[..., None]) -> Callable[..., None]:
    needs = mounts.needs_fuse()
    return pytest.mark.mount(pytest.mark.skipif(bool(needs), reason=needs or "-")(test))


# --- what the worker says ---------------------------------------------------------------------------------------------


class Place:
    """What advice sees of a node."""

    def __init__(self, ino: int, directory: Any = None, name: bytes = b"") -> None:
        self.ino = ino
        self.names = [(directory, name)] if directory else []
        self.children: dict[bytes, Place] = {}
        self.cached_writers = self.direct_writers = 0
        if directory:
            directory.children[name] = self


class Ear:
    """Takes the place of the socket. behind: as if its buffer were full."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int, bytes]] = []
        self.problem: OSError | None = None

    def send(self, word: bytes, _flags: int) -> None:
        if self.problem:
            raise self.problem
        self.said.append((*struct.unpack_from(advisor.WORD, word), word[struct.calcsize(advisor.WORD) :]))

    def close(self) -> None:
        pass


@pytest.fixture
def told() -> tuple[advice.Advice, Ear, list[float]]:
    clock = [100.0]
    found = advice.Advice(lambda node: node.names[0][1], writeback=True, clock=lambda: clock[0])
    ear = Ear()
    found._sock = ear  # type: ignore[assignment]
    return found, ear, clock


def test_a_file_in_a_directory_that_is_written_in_bulk_is_followed_until_it_is_closed(
    told: tuple[Any, Ear, list[float]],
) -> None:
    found, ear, clock = told
    here, there = Place(1), Place(2)
    one, two, other = Place(11, here, b"1.blk"), Place(12, here, b"2.blk"), Place(13, there, b"2.blk")
    found.writes(one)
    found.wrote(one, advice.BULK - 1)
    found.writes(two)
    assert ear.said == [], "a file that is written slowly is left to the kernel"
    found.wrote(one, advice.BULK)
    found.writes(other)
    assert ear.said == [], "another directory"
    clock[0] += advice.RECENT * 0.9
    found.writes(two)
    assert ear.said == [(advisor.GROW, 12, b"2.blk")]
    found.closed(one)
    two.cached_writers = 1
    found.closed(two)
    assert len(ear.said) == 1, "somebody else writes on"
    two.cached_writers = 0
    found.closed(two)
    found.closed(two)
    assert ear.said[1:] == [(advisor.DROP, 12, b"")]
    clock[0] += advice.RECENT
    found.writes(two)
    assert len(ear.said) == 2, "that was long ago"


def test_the_block_after_two_in_a_row_is_fetched(told: tuple[Any, Ear, list[float]]) -> None:
    found, ear, clock = told
    here = Place(1)
    blocks = {number: Place(number, here, b"%d.blk" % number) for number in (1, 2, 3, 4, 9, 10)}

    def opens(number: int, flags: int = os.O_RDONLY) -> None:
        found.opens(blocks[number], flags)

    opens(9)
    opens(3)
    opens(3)
    assert ear.said == [], "here and there"
    opens(4)
    assert ear.said == [], "there is no fifth"
    opens(2)
    opens(3, flags=advisor.MARK)
    assert ear.said == [], "the advisor itself: else one thing led to another"
    found.opens(Place(50, here, b"index.db"), os.O_RDONLY)
    blocks[4].cached_writers = 1
    opens(3)
    opens(2)
    assert ear.said == [], "it is written: what is dirty is not ours to bring to the disk"
    blocks[4].cached_writers = 0
    opens(3)
    assert ear.said == [(advisor.FETCH, 4, b"4.blk")]
    opens(9)
    clock[0] += advice.RECENT
    opens(10)
    assert len(ear.said) == 1, "that was long ago"
    opens(1)
    opens(2)
    assert ear.said[1:] == [(advisor.FETCH, 3, b"3.blk")]


def test_an_advisor_that_is_behind_is_told_the_next_time_what_to_close(told: tuple[Any, Ear, list[float]]) -> None:
    found, ear, _ = told
    here = Place(1)
    one, two = Place(11, here, b"1.blk"), Place(12, here, b"2.blk")
    found.wrote(one, advice.BULK)
    found.writes(one)
    ear.problem = BlockingIOError()
    found.writes(two)
    found.closed(one)
    found.closed(two)
    ear.problem = None
    found.writes(two)
    assert ear.said == [
        (advisor.GROW, 11, b"1.blk"), (advisor.DROP, 11, b""), (advisor.GROW, 12, b"2.blk")
    ]  # fmt: skip


def test_an_advisor_that_is_gone_is_no_trouble(told: tuple[Any, Ear, list[float]]) -> None:
    found, ear, _ = told
    one = Place(11, Place(1), b"1.blk")
    ear.problem = BrokenPipeError()
    found.wrote(one, advice.BULK)
    found.writes(one)
    found.closed(one)
    ear.problem = None
    found.writes(one)
    assert ear.said == []


def test_a_path_that_cannot_be_told_is_no_trouble(told: tuple[Any, Ear, list[float]]) -> None:
    found, ear, _ = told
    one = Place(11, Place(1), b"1.blk")
    long = Place(12, one.names[0][0], b"x" * (advisor.LONGEST + 1))

    def nameless(_: object) -> bytes:
        raise OSError(116, "stale")

    found.wrote(one, advice.BULK)
    found.writes(long)
    found._path = nameless
    found.writes(one)
    assert ear.said == []


def test_old_directories_are_forgotten(told: tuple[Any, Ear, list[float]]) -> None:
    found, _, clock = told
    for number in range(3 * advice.MOST):
        clock[0] += advice.RECENT / 10
        one = Place(11, Place(number), b"1.blk")
        found.wrote(one, advice.BULK)
        found.opens(one, os.O_RDONLY)
        assert len(found._written) <= advice.MOST
        assert len(found._opened) <= advice.MOST


def test_a_start_that_fails_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    found = advice.Advice(lambda _node: b"", writeback=True)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    found.begin("/nowhere", 0)
    assert found._sock is None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        found.begin("/nowhere", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found._sock is None


def test_without_an_advisor_nothing_is_said() -> None:
    found = advice.Advice(lambda _node: b"", writeback=True)
    one = Place(11, Place(1), b"1.blk")
    found.wrote(one, advice.BULK)  # type: ignore[arg-type]
    found.writes(one)  # type: ignore[arg-type]
    found.closed(one)  # type: ignore[arg-type]
    found.opens(one, os.O_RDONLY)  # type: ignore[arg-type]


# --- what the advisor does --------------------------------------------------------------------------------------------


def test_only_the_file_that_is_meant_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "1.blk"
    path.write_bytes(b"x")
    found, top = path.stat(), os.fsencode(tmp_path)
    fd = advisor.opened(top, found.st_dev, b"1.blk", found.st_ino)
    assert os.pread(fd, 2, 0) == b"x"
    os.close(fd)
    assert advisor.opened(top, found.st_dev, b"2.blk", found.st_ino) == -1
    assert advisor.opened(top, found.st_dev, b"1.blk", found.st_ino + 1) == -1
    with pytest.raises(advisor.NotToBeHadError):
        advisor.opened(top, found.st_dev + 1, b"1.blk", found.st_ino)


def test_what_is_no_regular_file_of_the_mount_is_not_even_opened(tmp_path: Path) -> None:
    """To open a FIFO lets a writer go, to open a device may do anything."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "inside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "inside" / "away").symlink_to("/dev")
    found, top = (tmp_path / "fifo").stat(), os.fsencode(tmp_path)
    for path in (b"fifo", b"link", b"inside", b"inside/away/null", b"inside/away"):
        assert advisor.opened(top, found.st_dev, path, found.st_ino) == -1
    with pytest.raises(OSError, match="No such device"):  # nobody reads there, so nobody has opened it
        os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)


# --- on a mount -------------------------------------------------------------------------------------------------------


def advisors(mount: mounts.Mount) -> list[int]:
    """The advisors of a mount: the processes that were started with its mountpoint."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        if os.fsencode(advisor.__file__) in words and os.fsencode(mount.path) in words and listens(int(pid)):
            found.append(int(pid))
    return found


def listens(pid: int) -> bool:
    """Whether it has begun: it heeds SIGTERM, which its parent ignores."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        ignored = next((int(line.split()[1], 16) for line in file if line.startswith("SigIgn")), -1)
        return not ignored >> (signal.SIGTERM - 1) & 1
    return False


def descriptors(pid: int, mount: mounts.Mount) -> list[str]:
    """Which files of the mount a process has open."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(f"{mount.path}/"):
            found.append(target)
    return found


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[mounts.Mount]:
    mounts.init(tmp_path / "store", cipher="aes")
    with mounts.mounted(tmp_path / "store", tmp_path / "mnt") as found:
        mounts.until(lambda: len(advisors(found)) == 1, "the advisor")
        yield found
    mounts.until(lambda: not advisors(found), "the end of the advisor")
    mounts.verify(tmp_path / "store")


def fill(path: Path, data: bytes) -> None:
    """Write a whole file in pieces, as a server does, and close it: it was followed, or the next one will be."""
    with open(path, "xb", buffering=0) as file:
        file.writelines(data[at : at + MIB // 2] for at in range(0, len(data), MIB // 2))


@on_a_mount
def test_what_is_written_in_bulk_is_sealed_before_it_is_closed(mount: mounts.Mount) -> None:
    data = os.urandom(8 * MIB)
    fill(mount.path / "1.blk", data)
    sealed = mount.store / "2.blk"
    with open(mount.path / "2.blk", "xb", buffering=0) as file:
        file.writelines(data[at : at + MIB] for at in range(0, 8 * MIB - 100, MIB))
        mounts.until(lambda: sealed.stat().st_size > 6 * MIB, "write-behind")
        (pid,) = advisors(mount)
        assert descriptors(pid, mount) == [f"{mount.path}/2.blk"]
        assert file.write(b"and more") == 8
    mounts.until(lambda: not descriptors(pid, mount), "nothing is held open when nobody writes")
    assert (mount.path / "2.blk").read_bytes() == data + b"and more"
    assert (mount.path / "1.blk").read_bytes() == data


@on_a_mount
def test_blocks_that_are_read_in_a_row_are_fetched_ahead(mount: mounts.Mount) -> None:
    data = {number: os.urandom(4 * MIB) for number in (1, 2, 3, 4)}
    for number, content in data.items():
        fill(mount.path / f"{number}.blk", content)
    with contextlib.ExitStack() as opened:
        # Open from here on: to look at the cache is not to be taken for reading.
        files = {
            number: opened.enter_context(open(mount.path / f"{number}.blk", "rb")).fileno() for number in (4, 3, 2, 1)
        }
        for fd in files.values():
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert cached(fd) == 0
        (pid,) = advisors(mount)
        assert (mount.path / "1.blk").read_bytes() == data[1]
        assert (mount.path / "2.blk").read_bytes() == data[2]
        mounts.until(lambda: cached(files[3]) == 4 * MIB // 4096, "read-ahead of 3.blk")
        mounts.until(lambda: not descriptors(pid, mount), "nothing is held open")
        assert cached(files[4]) == 0, "the advisor's own reading leads to nothing more"
        assert (mount.path / "3.blk").read_bytes() == data[3]
        mounts.until(lambda: cached(files[4]) == 4 * MIB // 4096, "read-ahead of 4.blk")


def cached(fd: int) -> int:
    """How many pages of a file are in the page cache: cachestat(2), Linux 6.5."""

    class Range(ctypes.Structure):
        _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]

    counts = (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(451, fd, ctypes.byref(Range(0, 0)), counts, 0):
        pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
    return counts[0]


@on_a_mount
def test_an_advisor_that_is_killed_or_stopped_holds_nobody_up(mount: mounts.Mount) -> None:
    data = os.urandom(8 * MIB)
    fill(mount.path / "1.blk", data)
    (pid,) = advisors(mount)
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(2, 8):
            fill(mount.path / f"{number}.blk", data)
    finally:
        os.kill(pid, signal.SIGKILL)
    fill(mount.path / "8.blk", data)
    assert {(mount.path / f"{number}.blk").read_bytes() for number in range(1, 9)} == {data}


@on_a_mount
def test_a_worker_that_is_killed_while_a_file_is_followed_is_replaced(mount: mounts.Mount) -> None:
    """The advisor's descriptor is no reason to wait: neither for the worker that dies nor for the one that comes."""
    data = os.urandom(8 * MIB)
    mount.tolerated.extend(takeover.KILLED)
    fill(mount.path / "1.blk", data)
    for number in range(2, 6):
        with open(mount.path / f"{number}.blk", "xb", buffering=0) as file:
            file.writelines(data[at : at + MIB] for at in range(0, 4 * MIB, MIB))
            worker = mount.worker()
            os.kill(worker, signal.SIGKILL)
            file.writelines(data[at : at + MIB] for at in range(4 * MIB, 8 * MIB, MIB))
        mounts.until(lambda worker=worker: mount.worker() != worker, "another worker")
    assert {(mount.path / f"{number}.blk").read_bytes() for number in range(1, 6)} == {data}
    mounts.until(lambda: len(advisors(mount)) == 1, "one advisor, the new worker's")


@on_a_mount
def test_a_mount_can_be_taken_away_at_once_after_a_bulk_write(tmp_path: Path) -> None:
    mounts.init(tmp_path / "store", cipher="aes")
    data = os.urandom(8 * MIB)
    for turn in range(1, 4):
        with mounts.mounted(tmp_path / "store", tmp_path / "mnt") as mount:
            for number in range(3):
                fill(mount.path / f"{turn}{number}.blk", data)
            if turn == 3:  # as systemd does; no warning that it is busy
                mount.process.send_signal(signal.SIGTERM)
                assert mount.process.wait(mounts.PATIENCE) == 0
    mounts.verify(tmp_path / "store")


@on_a_mount
def test_an_advisor_that_is_stopped_for_good_ends_with_its_worker(mount: mounts.Mount) -> None:
    mount.tolerated.extend(takeover.KILLED)
    (pid,) = advisors(mount)
    os.kill(pid, signal.SIGSTOP)
    mount.kill_worker()
    mounts.until(lambda: pid not in advisors(mount), "its end")


@on_a_mount
def test_an_error_of_a_write_reaches_the_writer_who_closes(tmp_path: Path) -> None:
    """Whoever closes a file takes the note of an error away: the advisor must not be the first."""
    data = os.urandom(8 * MIB)
    with takeover.faulty_mounted(tmp_path) as faulty:
        mount = faulty.mount
        mounts.until(lambda: len(advisors(mount)) == 1, "the advisor")
        fill(mount.path / "1.blk", data)
        mount.expect("already accepted, are lost")
        faulty.plan.write({"call": "pwrite", "name": "2.blk", "do": "fail", "errno": errno.EIO})
        fd = os.open(mount.path / "2.blk", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for at in range(0, 4 * MIB, MIB):
            os.write(fd, data[at : at + MIB])
        mounts.until(lambda: "are lost" in mount.log(), "the error")
        time.sleep(0.5)  # longer than the advisor looks at a file that does not grow
        with pytest.raises(OSError, match="Input/output"):
            os.close(fd)
