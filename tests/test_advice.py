"""Write-behind and read-ahead on the mount: what is asked for, and that a real mount with it is as before, only earlier."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mounts
import pytest
import takeover

from encfs_js import advice, advisor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
ADVISOR = 4711


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
        self.cached_writers = 0
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
    found = advice.Advice(lambda node: node.names[0][1], lambda: clock[0])
    ear = Ear()
    found._sock = ear  # type: ignore[assignment]
    found._process = SimpleNamespace(pid=ADVISOR)  # type: ignore[assignment]
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

    def opens(number: int, pid: int = 1) -> None:
        found.opens(blocks[number], pid)

    opens(9)
    opens(3)
    opens(3)
    assert ear.said == [], "here and there"
    opens(4)
    assert ear.said == [], "there is no fifth"
    opens(2)
    opens(3, pid=ADVISOR)
    assert ear.said == [], "the advisor itself: else one thing led to another"
    found.opens(Place(50, here, b"index.db"), 1)
    opens(3)
    assert ear.said == [(advisor.FETCH, 4, b"4.blk")]
    opens(9)
    clock[0] += advice.RECENT
    opens(10)
    assert len(ear.said) == 1, "that was long ago"
    opens(1)
    opens(2)
    assert ear.said[1:] == [(advisor.FETCH, 3, b"3.blk")]


@pytest.mark.parametrize("problem", [BlockingIOError(), BrokenPipeError()])
def test_an_advisor_that_is_behind_or_gone_is_no_trouble(told: tuple[Any, Ear, list[float]], problem: OSError) -> None:
    found, ear, _ = told
    here = Place(1)
    one = Place(11, here, b"1.blk")
    ear.problem = problem
    found.wrote(one, advice.BULK)
    found.writes(one)
    found.closed(one)
    ear.problem = None
    found.writes(one)
    assert bool(ear.said) == isinstance(problem, BlockingIOError)


def test_without_an_advisor_nothing_is_said() -> None:
    found = advice.Advice(lambda _node: b"")
    one = Place(11, Place(1), b"1.blk")
    found.wrote(one, advice.BULK)  # type: ignore[arg-type]
    found.writes(one)  # type: ignore[arg-type]
    found.closed(one)  # type: ignore[arg-type]
    found.opens(one, 1)  # type: ignore[arg-type]


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
    path.unlink()
    os.mkfifo(path)
    found = path.stat()
    os.close(advisor.opened(top, found.st_dev, b"1.blk", found.st_ino))  # does not wait for a writer
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic"):
        advisor.opened(top, found.st_dev, b"link", found.st_ino)


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
        if os.fsencode(advisor.__file__) in words and os.fsencode(mount.path) in words:
            found.append(int(pid))
    return found


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
        mounts.until(lambda: not descriptors(pid, mount), "nothing is held open when nothing grows")
        assert file.write(b"and more") == 8
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
    for turn in range(1, 6):
        with mounts.mounted(tmp_path / "store", tmp_path / "mnt") as mount:
            for number in range(3):
                fill(mount.path / f"{turn}{number}.blk", data)
    mounts.verify(tmp_path / "store")
