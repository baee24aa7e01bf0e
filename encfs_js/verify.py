"""Authenticate every page of every file of a store, and name what is damaged by file and page.

Reads only. A store that is mounted and in use can be verified, too: a page that fails is read again, and called
damaged only when it fails every time. What is written during the walk is seen in its old or its new state.

One thread, on purpose: a second one makes it slower (on two cores aes 3.4 and 2.0 GiB/s, chachapoly 1.4 and 1.0),
because the cipher gives up the interpreter's lock for too short a time.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js.backing import META
from encfs_js.crash import pages_to_keep
from encfs_js.format import MAGIC, PAGE, DamagedPageError, FileCipher, Suite, capacity, plain_size, refused_suite
from encfs_js.inspect import open_file, walk
from encfs_js.sealed import RUN_PAGES, FileKeys

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing
    from encfs_js.keyring import Keys

# A page that fails is looked at again until it stays the same for a pause of so many seconds: a writer is between two of
# its system calls for far less than that.
_LOOKS: Final = 10
_PAUSE: Final = 0.02
# A file that is rewritten under the mount: so many times a pause of so many seconds; a gigabyte takes 4 s.
_REWRITES: Final = 100
_REWRITE: Final = 0.1
_REDO: Final = re.compile(rb"redo-([0-9a-f]{16})")


@dataclass(frozen=True, slots=True)
class Damage:
    """A run of damaged pages of one file. path: in the store; page: the first one; pages: how many in a row."""

    path: bytes
    page: int
    pages: int


@dataclass(slots=True)
class Report:
    """What `verify` found.

    files: all regular files, the `empty` and the plaintext ones included. suites, epochs: files by their header.
    crashed: (path, page) of files at whose end an unclean stop left a trace: from that page on nothing was ever
    synced. unfinished: files whose rewriting was interrupted; the next mount finishes it. unreadable: (path, why)
    of what the operating system did not show. refused: a suite that files have, and that the OpenSSL of this host refuses; they
    are among the unreadable ones.
    """

    files: int = 0
    empty: int = 0
    pages: int = 0
    plain: int = 0
    plaintext_files: int = 0
    plaintext_bytes: int = 0
    suites: Counter[str] = field(default_factory=Counter)
    epochs: Counter[int] = field(default_factory=Counter)
    damage: list[Damage] = field(default_factory=list)
    crashed: list[tuple[bytes, int]] = field(default_factory=list)
    unfinished: list[bytes] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)
    refused: Suite | None = None


def verify(
    io: Backing,
    store: str,
    keys: Keys,
    *,
    touched: Callable[[int], bool],
    newer: Callable[[], Keys] | None = None,
    busy: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Report:
    """Authenticate a store.

    touched: ctime in ns -> does the crash rule apply to such a file? newer: the keys as they are now, when an epoch turns up
    that `keys` have not. busy: somebody has the store mounted. Raises OSError when the store cannot be opened.
    """
    report = Report()
    settings = keys.settings

    def volume_key(epoch: int) -> bytes:
        nonlocal keys
        try:
            return keys.volume_key(epoch)
        except KeyError:
            if newer is None:
                raise
            keys = newer()
            return keys.volume_key(epoch)

    file_keys = FileKeys(volume_key, settings.cipher, settings.epoch)

    def failed(path: bytes, problem: OSError) -> None:
        report.unreadable.append((path, problem.strerror or "unreadable"))

    for entry in walk(io, store, failed):
        if not stat.S_ISREG(entry.status.st_mode):
            continue
        try:
            fd = open_file(io, entry)
            if fd is None:
                continue
            try:
                status = io.fstat(fd)
                file = _File(io, fd, file_keys, sleep)
                crashed = touched(status.st_ctime_ns) and file.is_ours()
                report.files += 1
                if file.refused is not None:
                    report.refused = file.refused
                    report.unreadable.append((entry.path, f"the OpenSSL of this host refuses {file.refused.label}"))
                elif settings.plaintext == "read" and file.is_plaintext() and not crashed:
                    report.plaintext_files += 1
                    report.plaintext_bytes += status.st_size
                else:
                    damaged, redo = _checked(io, store, fd, file, busy=busy, sleep=sleep)
                    _judge(report, entry.path, file, damaged, touched=crashed, redo=redo)
            finally:
                io.close(fd)
        except OSError as problem:
            failed(entry.path, problem)
    return report


def _unfinished(io: Backing, store: str) -> frozenset[int]:
    """Return the inode numbers of files whose rewriting a crash interrupted (FORMAT.md section 4.4)."""
    meta = io.open(os.path.join(store, META), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = [_REDO.fullmatch(name) for name in io.listdir(meta)]
    finally:
        io.close(meta)
    return frozenset(int(match[1], 16) for match in found if match)


def _checked(
    io: Backing, store: str, fd: int, file: _File, *, busy: bool, sleep: Callable[[float], None]
) -> tuple[list[int], bool]:
    """Return a file's damaged pages, and whether its rewriting is unfinished; what is being rewritten is waited for."""
    for _ in range(_REWRITES):
        before = io.fstat(fd)
        damaged = file.check()
        redo = bool(damaged) and before.st_ino in _unfinished(io, store)
        after = io.fstat(fd)
        changed = (before.st_size, before.st_ctime_ns) != (after.st_size, after.st_ctime_ns)
        if not damaged or not busy or not (redo or changed):
            break
        sleep(_REWRITE)
        file.measure()
    return damaged, redo


def _judge(report: Report, path: bytes, file: _File, damaged: list[int], *, touched: bool, redo: bool) -> None:
    """Put down what was found in a file. touched: the crash rule applies to it. redo: its rewriting is unfinished."""
    if not file.pages:
        report.empty += 1
        return
    report.pages += file.whole
    report.plain += plain_size(file.whole, file.last_length)
    if file.cipher is not None:
        report.suites[file.cipher.header.suite.label] += 1
        report.epochs[file.cipher.header.epoch] += 1
    if damaged and redo:
        report.unfinished.append(path)
        return
    if damaged and touched:
        keep = file.pages_to_keep()
        real = [page for page in damaged if page < keep and page not in file.short]
        if real != damaged:
            report.crashed.append((path, keep))
        damaged = real
    report.damage += [Damage(path, first, count) for first, count in _runs(damaged)]


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """Join ascending numbers to (first, count) runs."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs


class _File:
    """One file during its check.

    whole, rest: its pages and the bytes behind them. short: pages that are authentic, not full and not the last.
    last_length: of the last page; 0 when that is damaged.
    """

    def __init__(self, io: Backing, fd: int, keys: FileKeys, sleep: Callable[[float], None]) -> None:
        self._io = io
        self._fd = fd
        self._keys = keys
        self._sleep = sleep
        self._pause = _PAUSE
        self.short: set[int] = set()
        self.last_length = 0
        self.measure()

    def measure(self) -> None:
        """Take size and header as they are now."""
        self.whole, self.rest = divmod(self._io.fstat(self._fd).st_size, PAGE)
        self._start = self._page(0)
        self.cipher: FileCipher | None = self._keys.of(self._start)
        self.refused = refused_suite(self._start) if self.cipher is None else None

    @property
    def pages(self) -> int:
        """The pages, with the one that the end of the file cuts."""
        return self.whole + (self.rest > 0)

    def _page(self, page: int) -> bytes:
        raw = bytearray(PAGE)
        return bytes(raw[: self._io.preadv(self._fd, [raw], page * PAGE)])

    def is_plaintext(self) -> bool:
        """Tell whether the file has content and does not begin as a sealed one."""
        return bool(self._start) and self._start[: len(MAGIC)] != MAGIC

    def is_ours(self) -> bool:
        """Tell whether the crash rule is for this file: it begins as a sealed one, as far as it goes, or with zeros."""
        return self._start[: len(MAGIC)] == MAGIC[: len(self._start)] or not self._start.strip(b"\0")

    def pages_to_keep(self) -> int:
        """Return how many leading pages the crash rule keeps."""
        return pages_to_keep(self._io, self._fd, self.cipher, self.whole, self.rest)

    def check(self) -> list[int]:
        """Return, ascending, every page that a reader must refuse; of a file with a bad header, only both ends."""
        damaged: list[int] = []
        page = singly = 0
        while page < self.pages:
            run = 1 if page < singly else RUN_PAGES
            try:
                page += self._open(page, run)
                continue
            except DamagedPageError as problem:
                page = problem.page
            except OSError as problem:
                if problem.errno != errno.EIO:
                    raise
                if run > 1:
                    singly = page + run  # the disk cannot read some page of this run: find out which
                    continue
            if self._settles(page):
                continue
            self.last_length = 0
            if self.cipher is None:
                return [0, self.whole] if self.rest and self.whole else [0]
            damaged.append(self._refused(page))
            page += 1
        return damaged

    def _open(self, page: int, count: int) -> int:
        """Authenticate up to `count` pages; return how many were there. Raises DamagedPageError, OSError."""
        buffer, count = self._keys.buffer, min(count, self.whole - page)
        if count > 0:
            count = self._io.preadv(self._fd, [buffer.sealed[: count * PAGE]], page * PAGE) // PAGE
        if count <= 0 or self.cipher is None:
            raise DamagedPageError(page)
        self.last_length = self.cipher.open_run(buffer, page, count, self.pages - 1)
        return count

    def _settles(self, page: int) -> bool:
        """Look at a page that failed until it is sound, or gone, or stays as it is."""
        seen = None
        for _ in range(_LOOKS):
            now = self._glance(page)
            if now == seen:
                self._pause = 0  # damage that stays is in this file: no need to wait at each of its pages
                return False
            seen = now
            self._sleep(self._pause)
            self.measure()
            try:
                if page >= self.pages or self._open(page, 1):
                    return True
            except (DamagedPageError, OSError):
                continue
        return False

    def _glance(self, page: int) -> tuple[int, int, bytes]:
        try:
            return self.whole, self.rest, self._page(page)
        except OSError:
            return self.whole, self.rest, b""

    def _refused(self, page: int) -> int:
        """Return where a reader refuses the page that failed: one further on when the end mark behind it is missing."""
        try:
            raw = self._page(page)
        except OSError:
            return page
        length = self.cipher.authentic(raw, page) if self.cipher and len(raw) == PAGE else None
        if length == capacity(page):
            return page + 1 if page == self.whole - 1 else page
        if length is not None:
            self.short.add(page)
        return page
