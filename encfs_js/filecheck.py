"""One file of a store: which of its pages a reader would refuse (FORMAT.md section 2), seen while others may write to it.

A page that fails is read again, and called damaged only when it fails every time.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Final

from encfs_js.backing import META
from encfs_js.crash import pages_to_keep
from encfs_js.format import (
    HEADER,
    MAGIC,
    PAGE,
    ROW,
    DamagedPageError,
    FileCipher,
    capacity,
    plain_start,
    refused_suite,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from encfs_js.backing import Backing
    from encfs_js.format import CheckBuffer
    from encfs_js.sealed import FileKeys

# Pages that are read at a time: with more of them they do not stay near the processor.
RUN: Final = 64
# A page that fails is looked at again until it stays the same for a pause of so many seconds: a writer is between two of
# its system calls for far less than that.
_LOOKS: Final = 10
_PAUSE: Final = 0.02
# Damaged pages of one file that are looked for, 256 MiB of them: a hole of terabytes costs nobody anything to make.
_MOST: Final = 1 << 16
# A file that is rewritten under the mount: so many times a pause of so many seconds; a gigabyte takes 4 s.
_REWRITES: Final = 100
_REWRITE: Final = 0.1
_REDO: Final = re.compile(rb"redo-([0-9a-f]{16})")


def _unfinished(io: Backing, store: str) -> frozenset[int]:
    """Return the inode numbers of files whose rewriting a crash interrupted (FORMAT.md section 4.4)."""
    meta = io.open(os.path.join(store, META), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = [_REDO.fullmatch(name) for name in io.listdir(meta)]
    finally:
        io.close(meta)
    return frozenset(int(match[1], 16) for match in found if match)


def checked(
    io: Backing, store: str, fd: int, file: File, *, busy: bool, sleep: Callable[[float], None]
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


def runs(pages: list[int]) -> list[tuple[int, int]]:
    """Join ascending numbers to (first, count) runs."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs


class File:
    """One file during its check.

    whole, rest: its pages and the bytes behind them. short: pages that are authentic, not full and not the last.
    last_length: of the last page; 0 when that is damaged. buffer: of RUN pages.
    done: told of bytes that were checked.
    """

    def __init__(
        self,
        io: Backing,
        fd: int,
        keys: FileKeys,
        buffer: CheckBuffer,
        sleep: Callable[[float], None],
        done: Callable[[int], None],
    ) -> None:
        self._io = io
        self._fd = fd
        self._keys = keys
        self._buffer = buffer
        self._sleep = sleep
        self._done = done
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

    def plain(self, damaged: Collection[int], most: int) -> tuple[bytearray, list[tuple[int, int]]]:
        """Return the plain bytes, anything where pages are damaged, and where that is, as (start, end) of bytes in order.

        A damaged page that is none of the file is taken for one that is missing at its end. Raises OSError, also for a file
        of more than `most` bytes.
        """
        pages = self.pages
        if pages * ROW > most:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        content, bad, length = bytearray(max(pages * ROW - HEADER, 0)), set(damaged), 0
        buffer = self._buffer
        for page in range(pages):
            got = self._io.preadv(self._fd, [buffer.sealed[:PAGE]], page * PAGE) if page not in bad else 0
            length = capacity(page)
            try:
                if got != PAGE or self.cipher is None:
                    raise DamagedPageError(page)
                length = self.cipher.open_run(buffer, page, 1, pages - 1)
            except DamagedPageError:
                bad.add(page)
                continue
            at, skip = plain_start(page), 0 if page else HEADER
            content[at : at + length] = buffer.plain[skip : skip + length]
        if pages and pages - 1 not in bad:
            del content[plain_start(pages - 1) + length :]
        holes = [(plain_start(first), plain_start(first + count)) for first, count in runs(sorted(bad))]
        return content, holes

    def check(self) -> list[int]:
        """Return, ascending, every page that a reader must refuse; of a file with a bad header, only both ends.

        Of one that has more than _MOST of them these, and the last page.
        """
        damaged: list[int] = []
        page = singly = 0
        while page < self.pages:
            run = 1 if page < singly else RUN
            try:
                count = self._open(page, run)
                self._done(count * PAGE)
                page += count
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
            if len(damaged) == _MOST:
                return sorted({*damaged, self.pages - 1})
        return damaged

    def _open(self, page: int, count: int) -> int:
        """Authenticate up to `count` pages; return how many were there. Raises DamagedPageError, OSError."""
        buffer, count = self._buffer, min(count, self.whole - page)
        if count > 0:
            count = self._io.preadv(self._fd, [buffer.sealed[: count * PAGE]], page * PAGE) // PAGE
        if count <= 0 or self.cipher is None:
            raise DamagedPageError(page)
        self.last_length = self.cipher.check_run(buffer, page, count, self.pages - 1)
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
            if self._pause:
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
