"""Authenticate every page of every file of a store; name what is damaged by file and page, and by what is lost with it.

Reads only. A store that is mounted and in use can be verified, too: a page that fails is read again, and called
damaged only when it fails every time. What is written during the walk is seen in its old or its new state.

By processes, not by threads: a second thread makes it slower (on two cores aes 3.4 and 2.0 GiB/s, chachapoly 1.4 and 1.0),
because the cipher gives up the interpreter's lock for too short a time.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, fields
from itertools import repeat
from typing import TYPE_CHECKING, Any

from encfs_js import filecheck, impact, loss
from encfs_js.format import CheckBuffer, Suite, plain_size, plain_start
from encfs_js.meter import Meter
from encfs_js.near import Near, spread
from encfs_js.sealed import FileKeys

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing
    from encfs_js.keyring import Keys


@dataclass(frozen=True, slots=True)
class Damage:
    """A run of damaged pages of one file. path: in the store; page: the first one; pages: how many in a row.

    plain: it is a plain file, in a store that refuses those. subject: what the file is. lost: of a message block, the
    sequences that may be lost with these pages.
    """

    path: bytes
    page: int
    pages: int
    plain: bool = field(default=False, compare=False)
    subject: impact.Subject = field(default=impact.Subject(""), compare=False)
    lost: impact.Lost | None = field(default=None, compare=False)


@dataclass(slots=True)
class Report:
    """What `verify` found.

    files: all regular files, the `empty` and the plaintext ones included. suites, epochs: files by their header. plain: bytes
    in sealed files. plaintext: (path, bytes) of files that are not sealed, where that is allowed and where it is damage.
    plaintext_files, plaintext_bytes: those that are allowed.
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
    plaintext: list[tuple[bytes, int]] = field(default_factory=list)
    refused: Suite | None = None

    def add(self, other: Report) -> None:
        """Take in what another report says of other files."""
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(more)
            elif isinstance(mine, list):
                mine.extend(more)
            elif isinstance(mine, int) and not isinstance(mine, Suite):
                setattr(self, each.name, mine + more)
            else:
                setattr(self, each.name, mine or more)

    def sort(self) -> None:
        """Bring everything into the order of the walk."""
        self.damage.sort(key=lambda damage: (damage.path.split(b"/"), damage.page))
        self.unfinished.sort(key=lambda path: path.split(b"/"))
        for found in (self.crashed, self.unreadable, self.plaintext):
            found.sort(key=lambda entry: entry[0].split(b"/"))


def verify(
    io: Backing,
    store: str,
    keys: Keys,
    *,
    touched: Callable[[int], bool],
    newer: Callable[[], Keys] | None = None,
    busy: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    jobs: int = 1,
    meter: Meter | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Authenticate a store.

    touched: ctime in ns -> does the crash rule apply to such a file? newer: the keys as they are now, when an epoch turns up
    that `keys` have not. busy: somebody has the store mounted. jobs: processes; with more than one they are forked, and this
    process must have no other thread. meter: counts the bytes that were read, and holds the rate; it must have as many
    counters. show: told now and then how far it is, in the words of reencrypt.Progress. Raises OSError when the store cannot
    be opened, StoreIoError when a process dies.
    """
    report = Report()
    meter = meter or Meter(jobs)
    check = _Check(io, store, keys, touched=touched, newer=newer, busy=busy, sleep=sleep, done=meter.add)

    def failed(path: bytes, problem: OSError) -> None:
        report.unreadable.append((path, problem.strerror or "unreadable"))

    try:
        spread(io, store, check.paths, report, jobs, meter, failed, show)
    finally:
        check.close()
    report.sort()
    return report


class _Check:
    """What the check of a file needs; in a process that was forked it is a copy."""

    def __init__(
        self,
        io: Backing,
        store: str,
        keys: Keys,
        *,
        touched: Callable[[int], bool],
        newer: Callable[[], Keys] | None,
        busy: bool,
        sleep: Callable[[float], None],
        done: Callable[[int], None],
    ) -> None:
        self._io = io
        self._store = store
        self._keys = keys
        self._newer = newer
        self._touched = touched
        self._busy = busy
        self._sleep = sleep
        self._done = done
        self._file_keys = FileKeys(self._volume_key, keys.settings.cipher, keys.settings.epoch)
        self._buffer = CheckBuffer(filecheck.RUN)
        self._near = Near(io, store)

    def close(self) -> None:
        """Close what is open."""
        self._near.close()

    def _volume_key(self, epoch: int) -> bytes:
        try:
            return self._keys.volume_key(epoch)
        except KeyError:
            if self._newer is None:
                raise
            self._keys = self._newer()
            return self._keys.volume_key(epoch)

    def paths(self, paths: list[bytes]) -> Report:
        """Check files; what went away is left out."""
        report = Report()
        for path in paths:
            try:
                fd = self._near.file(path)
                if fd is None:
                    continue
                try:
                    self._file(report, path, fd)
                finally:
                    self._io.close(fd)
            except OSError as problem:
                report.unreadable.append((path, problem.strerror or "unreadable"))
        self._near.leave()
        return report

    def _file(self, report: Report, path: bytes, fd: int) -> None:
        status = self._io.fstat(fd)
        file = filecheck.File(self._io, fd, self._file_keys, self._buffer, self._sleep, self._done)
        crashed = self._touched(status.st_ctime_ns) and file.is_ours()
        report.files += 1
        allowed = self._keys.settings.plaintext == "read"
        plain = file.refused is None and not crashed and file.is_plaintext()
        if plain:
            report.plaintext.append((path, status.st_size))
        if file.refused is not None:
            report.refused = file.refused
            report.unreadable.append((path, f"the OpenSSL of this host refuses {file.refused.label}"))
        elif plain and allowed:
            report.plaintext_files += 1
            report.plaintext_bytes += status.st_size
        else:
            damaged, redo = filecheck.checked(self._io, self._store, fd, file, busy=self._busy, sleep=self._sleep)
            damaged = _judge(report, path, file, damaged, touched=crashed, redo=redo)
            if damaged:
                lost = None if plain else self._lost(path, file, damaged, status.st_mtime_ns)
                _put_down(report, path, damaged, lost, plain=plain)

    def _lost(self, path: bytes, file: filecheck.File, damaged: list[int], mtime: int) -> list[impact.Lost] | None:
        """Return what is lost with each run of damaged pages of a message block; None for another file."""
        about = impact.subject(path)
        if about.block is None or about.what:
            return None
        runs = filecheck.runs(damaged)
        source = loss.Source(self._read, self._near.names)
        if file.cipher is None:  # nothing in it can be read
            return loss.of_block(source, path, mtime, b"", [(0, 1)]) * len(runs)
        try:
            content, holes = file.plain(damaged, loss.MOST)
        except OSError:
            return [impact.UNKNOWN] * len(runs)
        if [start for start, _ in holes] != [plain_start(first) for first, _ in runs]:
            return [impact.UNKNOWN] * len(runs)  # somebody writes to it
        return loss.of_block(source, path, mtime, memoryview(content), holes)

    def _read(self, path: bytes) -> tuple[bytes, int] | None:
        """Return the plain bytes of a file of the store and its mtime; None when it is damaged, or not there."""
        try:
            fd = self._near.file(path)
            if fd is None:
                return None
            try:
                file = filecheck.File(self._io, fd, self._file_keys, self._buffer, self._sleep, lambda _: None)
                mtime = self._io.fstat(fd).st_mtime_ns
                if file.check():
                    return None
                content, holes = file.plain([], loss.MOST)
            finally:
                self._io.close(fd)
        except OSError:
            return None
        return None if holes else (bytes(content), mtime)


def _put_down(report: Report, path: bytes, damaged: list[int], lost: list[impact.Lost] | None, *, plain: bool) -> None:
    about, runs = impact.subject(path), filecheck.runs(damaged)
    report.damage += [
        Damage(path, first, count, plain, about, sequences)
        for (first, count), sequences in zip(runs, lost or repeat(None), strict=False)
    ]


def _judge(
    report: Report, path: bytes, file: filecheck.File, damaged: list[int], *, touched: bool, redo: bool
) -> list[int]:
    """Put down what was found in a file, and return the pages that are damaged.

    touched: the crash rule applies to it. redo: its rewriting is unfinished.
    """
    if not file.pages:
        report.empty += 1
        return []
    report.pages += file.whole
    report.plain += plain_size(file.whole, file.last_length)
    if file.cipher is not None:
        report.suites[file.cipher.header.suite.label] += 1
        report.epochs[file.cipher.header.epoch] += 1
    if damaged and redo:
        report.unfinished.append(path)
        return []
    if damaged and touched:
        keep = file.pages_to_keep()
        real = [page for page in damaged if page < keep and page not in file.short]
        if real != damaged:
            report.crashed.append((path, keep))
        damaged = real
    return damaged
