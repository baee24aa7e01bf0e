"""Sealed files in memory for the tests of the format: keys, repeatable randomness, and disks that fail."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings

from encfs_js.backing import Backing
from encfs_js.format import DamagedPageError, Suite, capacity, plain_start
from encfs_js.sealed import FileKeys, SealedFile

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
VOLUME_KEYS = {1: bytes(range(32)), 2: bytes(range(100, 132))}
SUITES = list(Suite)
EDGES = [0, 1, 2, 4031, 4032, 4033, 8095, 8096, 8097, 12159, 12160, 12161]

# ENCFS_JS_EXAMPLES=2000 for a long run.
EXAMPLES = int(os.environ.get("ENCFS_JS_EXAMPLES", "0"))


def examples(quick: int, **more: int) -> settings:
    """Return the settings of a hypothesis test that tries `quick` examples in the normal run."""
    return settings(
        deadline=None,
        max_examples=max(EXAMPLES, quick),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **more,
    )


class Randomness:
    """A stream of bytes that looks random and is the same in every run; remembers what it gave out."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.drawn: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        name = b"%d %d" % (self.seed, len(self.drawn))
        self.drawn.append(hashlib.shake_128(name).digest(size))
        return self.drawn[-1]


def text(size: int, seed: object = "") -> bytes:
    """Return `size` plain bytes in which every page differs from every other, and from other seeds."""
    return hashlib.shake_128(f"text {seed}".encode()).digest(size)


def file_keys(suite: Suite = Suite.AES, epoch: int = 1, seed: int = 0) -> FileKeys:
    return FileKeys(VOLUME_KEYS.__getitem__, suite, epoch, Randomness(seed))


@contextlib.contextmanager
def memory_file(raw: bytes = b"") -> Iterator[int]:
    """Open a file in memory that holds `raw`."""
    fd = os.memfd_create("sealed")
    try:
        put(fd, raw)
        yield fd
    finally:
        os.close(fd)


def put(fd: int, raw: bytes) -> None:
    """Make `raw` the content of the file, behind the back of whoever has it open."""
    os.ftruncate(fd, len(raw))
    assert os.pwrite(fd, raw, 0) == len(raw)


def raw_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def seal(plain: bytes, keys: FileKeys) -> bytes:
    """Return the sealed file that the package makes of `plain`."""
    with memory_file() as fd:
        assert SealedFile(Backing(), fd, keys).write(0, plain) == len(plain)
        return raw_of(fd)


def read_all(file: SealedFile) -> bytes:
    parts = [bytes(file.read(at, 1 << 20)) for at in range(0, file.size, 1 << 20)]
    return b"".join(parts)


def unseal(raw: bytes, keys: FileKeys) -> bytes:
    """Return the plain text that the package reads; raises DamagedPageError."""
    with memory_file(raw) as fd:
        return read_all(SealedFile(Backing(), fd, keys))


def refused_pages(raw: bytes, keys: FileKeys) -> dict[int, int]:
    """Read every page for itself. Returns the pages that the package refuses, each with the page that it reports."""
    refused = {}
    with memory_file(raw) as fd:
        file = SealedFile(Backing(), fd, keys)
        for page in range(-(-len(raw) // PAGE)):
            try:
                file.read(plain_start(page), capacity(page))
            except DamagedPageError as error:
                refused[page] = error.page
    return refused


class FullDisk(Backing):
    """A disk with room for `room` bytes of the file: what lies behind is taken in part, or refused with ENOSPC."""

    def __init__(self, room: int) -> None:
        self.room = room

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        room = max(self.room, os.fstat(fd).st_size) - offset
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(fd, data[:room], offset)


class FailingDisk(Backing):
    """A disk whose `at`-th changing call fails once with `error`; a write takes `taken` bytes in the call before that.

    `calls` names the changing calls that were made. With `after` the call has its effect and fails nevertheless.
    """

    def __init__(self, at: int, error: int = errno.EIO, taken: int = 0, *, after: bool = False) -> None:
        self.at = at
        self.error = error
        self.taken = taken
        self.after = after
        self.calls: list[str] = []

    def __repr__(self) -> str:
        return f"FailingDisk({self.at}, {self.error}, {self.taken}, after={self.after})"

    def _fails(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) == self.at

    def _fail(self) -> None:
        raise OSError(self.error, os.strerror(self.error))

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if self._fails("pwrite"):
            if self.after:
                os.pwrite(fd, data, offset)
            elif 0 < self.taken < len(data):
                self.at += 1  # the rest of this write fails
                return os.pwrite(fd, data[: self.taken], offset)
            self._fail()
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        if self._fails("ftruncate"):
            if self.after:
                os.ftruncate(fd, size)
            self._fail()
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        if self._fails("fsync"):
            self._fail()
        os.fsync(fd)


class ShortWrites(Backing):
    """A disk that takes at most `most` bytes in one write."""

    def __init__(self, most: int) -> None:
        self.most = most

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data[: self.most], offset)
