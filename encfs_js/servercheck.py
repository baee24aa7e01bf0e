"""Check a store as nats-server keeps it, encrypted by itself or not: every file that has a checksum, a tag or a form.

Reads only. nats-server does not authenticate blocks: their records have hashes that show accidents, not attacks, and do not
cover the lengths of subject and headers. A stream's last block that ends within a record, or with zeros, is what a power cut
leaves: nats-server cuts it there. A file that changes while it is looked at is looked at again.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from encfs_js import impact, jetstream, loss, serverkeys, servernotes, serverstate, serverstore
from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.meter import Meter
from encfs_js.near import Near, portions, spread
from encfs_js.serverstore import Kind, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from encfs_js.backing import Backing
    from encfs_js.serverstore import Content, Place

_LOOKS: Final = 5
_PAUSE: Final = 0.1
_MOST: Final = 1 << 30  # bytes of a file that is read whole; blocks are read up to jetstream.MAX_BLOCK
_SHORT: Final = 4096  # bytes that are read of a key file or a meta.sum, which have 72 at most
_SAID: Final = re.compile(r"(?:byte (\d+): )?(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Damage:
    """Something wrong in a file. offset: in its plain, decompressed bytes; why: in words.

    subject: what the file is; lost: of a message block, the sequences that may be lost. locked: it is wrong because no key
    opens its key file, which may be due to the keys.
    """

    path: bytes
    offset: int
    why: str
    subject: impact.Subject
    lost: impact.Lost | None = None
    locked: bool = False


@dataclass(slots=True)
class Report:
    """What `check` found.

    torn: (path, offset) of last blocks that end within a record. plaintext: (path, bytes) of files in the clear where
    nats-server encrypts. ciphers: files by the cipher they lie there in. size: bytes of all files. opened: key files that one
    of the keys opens.
    """

    files: int = 0
    size: int = 0
    blocks: int = 0
    records: int = 0
    opened: int = 0
    ciphers: Counter[str] = field(default_factory=Counter)
    damage: list[Damage] = field(default_factory=list)
    torn: list[tuple[bytes, int]] = field(default_factory=list)
    plaintext: list[tuple[bytes, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take in what another report says of other files."""
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, each.name, mine + more)

    @property
    def locked(self) -> bool:
        """Whether there are key files, and the keys open none of them: they are the wrong ones, and nothing is known."""
        return not self.opened and any(damage.locked for damage in self.damage)


def has_keys(io: Backing, store: str) -> bool:
    """Tell whether nats-server has encrypted any of a store: whether there is a key file. Raises OSError."""
    return any(place_of(path).kind is Kind.KEY for paths in portions(io, store, lambda *_: None) for path in paths)


def check(
    io: Backing,
    store: str,
    keys: Sequence[bytes],
    *,
    jobs: int = 1,
    meter: Meter | None = None,
    show: Callable[[dict[str, Any]], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Report:
    """Check a store. keys: key, prev_key. The rest is as for `verify.verify`, as are the errors, and CipherMissingError."""
    report = Report()
    meter = meter or Meter(jobs)
    checker = _Checker(io, store, keys, meter, sleep)

    def failed(path: bytes, problem: OSError) -> None:
        report.unreadable.append((path, problem.strerror or "unreadable"))

    try:
        spread(io, store, checker.paths, report, jobs, meter, failed, show)
    finally:
        checker.close()
    report.damage.sort(key=lambda damage: (damage.path.split(b"/"), damage.offset))
    for found in (report.torn, report.plaintext, report.unreadable):
        found.sort(key=lambda entry: entry[0].split(b"/"))
    report.warnings.sort()
    return report


class _Checker:
    """What the check of a file needs; in a process that was forked it is a copy."""

    def __init__(
        self, io: Backing, store: str, keys: Sequence[bytes], meter: Meter, sleep: Callable[[float], None]
    ) -> None:
        self._io = io
        self._keys = keys
        self._meter = meter
        self._sleep = sleep
        self._near = Near(io, store)

    def close(self) -> None:
        """Close what is open."""
        self._near.close()

    def paths(self, paths: list[bytes]) -> Report:
        """Check files; what went away is left out."""
        report = Report()
        for path in paths:
            try:
                self._settled(report, path)
            except OSError as problem:
                if problem.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                    report.unreadable.append((path, problem.strerror or "unreadable"))
        self._near.leave()
        return report

    def _settled(self, report: Report, path: bytes) -> None:
        """Check a file, and again when it has changed meanwhile and something was wrong."""
        for attempt in range(_LOOKS):
            before = self._stamp(path)
            if before is None:
                return
            found = Report(files=1)
            self._file(found, path, before[0], before[2])
            if not (found.damage or found.torn) or attempt == _LOOKS - 1 or self._stamp(path) == before:
                report.add(found)
                return
            self._sleep(_PAUSE)

    def _stamp(self, path: bytes) -> tuple[int, int, int] | None:
        fd = self._near.file(path)
        if fd is None:
            return None
        try:
            status = self._io.fstat(fd)
        finally:
            self._io.close(fd)
        return status.st_size, status.st_ctime_ns, status.st_mtime_ns

    def _raw(self, path: bytes, most: int | None = None) -> bytes | None:
        """Return a file as it lies there, `most` bytes of it; None when there is none.

        Raises OSError, without `most` FormatError for one that is larger than any of nats-server's.
        """
        fd = self._near.file(path)
        if fd is None:
            return None
        try:
            size, done = self._io.fstat(fd).st_size, 0
            if most is None and size > _MOST:
                raise FormatError(f"{os.fsdecode(path)}: {size} bytes are more than nats-server writes there")
            data = bytearray(size if most is None else min(size, most))
            while done < len(data) and (got := self._io.preadv(fd, [memoryview(data)[done:]], done)):
                done += got
        finally:
            self._io.close(fd)
        return bytes(data[:done])

    def _content(self, path: bytes) -> tuple[bytes, Content]:
        """Return the plain bytes of a file, and the closed content that says how it lay there. Raises as open_content does.

        Of a block that is longer than any of nats-server's, the first MAX_BLOCK bytes.
        """
        parent, _, name = path.rpartition(b"/")
        content = serverstore.open_content(self._io, self._near.directory(parent), name, path, self._keys)
        try:
            most = jetstream.MAX_BLOCK if place_of(path).kind is Kind.BLOCK else content.size
            return bytes(content.read(0, min(content.size, most))), content
        finally:
            content.close()

    def _file(self, report: Report, path: bytes, size: int, mtime: int) -> None:
        """Put down what is to be said of a file."""
        place = place_of(path)
        report.size += size
        try:
            if place.kind is Kind.OTHER:
                self._other(path)
                self._meter.add(size)
            elif place.kind is Kind.KEY:
                assert place.asset is not None
                serverkeys.open_key_file(self._raw(path, _SHORT) or b"", place.asset, self._keys, os.fsdecode(path))
                report.opened += 1
            elif place.kind is Kind.SUM:
                pass  # with its meta.inf
            else:
                plain, content = self._content(path)
                self._meter.add(size)
                if content.suite is not None:
                    report.ciphers[content.suite.label] += 1
                elif size and self._is_encrypted(path, place):
                    report.plaintext.append((path, size))
                if not place.staged:
                    self._plain(report, path, place, plain, mtime, content.size)
        except WrongKeyError as problem:
            self._put_down(report, path, problem, mtime, locked=True)
        except FormatError as problem:
            if not place.staged:  # nats-server never reads those, and a crash may have left a part
                self._put_down(report, path, problem, mtime)

    def _put_down(
        self, report: Report, path: bytes, problem: FormatError | WrongKeyError, mtime: int, *, locked: bool = False
    ) -> None:
        """Put down a file that cannot be read, or not from a place on."""
        about = impact.subject(path)
        lost = None
        if about.block is not None and not about.what:
            report.blocks += 1
            (lost,) = loss.of_block(self._source(), path, mtime, b"", [(0, 1)])
        offset, why = _said(problem, os.fsdecode(path))
        report.damage.append(Damage(path, offset, why, about, lost, locked))

    def _is_encrypted(self, path: bytes, place: Place) -> bool:
        """Tell whether a file's stream, raft group or consumer is encrypted: it has a meta.key, or the block has its own."""
        directory = os.path.dirname(path)
        beside = [place.key]
        if place.kind in {Kind.BLOCK, Kind.OLD_INDEX}:
            beside.append(b"../meta.key")
        return any(
            os.path.basename(name) in self._near.names(os.path.normpath(os.path.join(directory, os.path.dirname(name))))
            for name in beside
        )

    def _plain(self, report: Report, path: bytes, place: Place, plain: bytes, mtime: int, content_size: int) -> None:
        """Check the plain content of what nats-server may encrypt; of a block `plain` may be a part. Raises FormatError."""
        name = os.fsdecode(path)
        match place.kind:
            case Kind.META:
                checksum = self._raw(os.path.dirname(path) + b"/meta.sum", _SHORT)
                if checksum is None:
                    raise jetstream.damaged(name, 0, "meta.sum is missing")
                jetstream.check_meta(self._raw(path) or b"", checksum, place.label, name)
                jetstream.parse_meta(plain, name)
            case Kind.CONSUMER:
                serverstate.parse_consumer(plain, name)
            case Kind.INDEX:
                index = serverstate.parse_index(serverstate.open_index(plain, None, place.label, name)[0], name)
                self._belongs(report, path, index)
            case Kind.BLOCK:
                report.blocks += 1
                self._block(report, path, place, plain, mtime, longer=content_size > jetstream.MAX_BLOCK)
            case _:
                pass

    def _other(self, path: bytes) -> None:
        """Check what nats-server leaves plain and has a form. Raises FormatError."""
        about, leaf, name = impact.subject(path), path.rpartition(b"/")[2], os.fsdecode(path)
        parse: Callable[[bytes], object] | None = None
        if about.group is not None and (about.what.startswith("a snapshot") or leaf == b"commit.idx"):
            group, read = about.group, serverstate.parse_commit if leaf == b"commit.idx" else serverstate.parse_snapshot
            parse = lambda raw: read(raw, group, name)  # noqa: E731
        elif about.group is not None and leaf in {b"peers.idx", b"tav.idx"}:
            plain = serverstate.parse_peers if leaf == b"peers.idx" else serverstate.parse_vote
            parse = lambda raw: plain(raw, name)  # noqa: E731
        elif about.owner and leaf in _NOTES:
            parse = lambda raw: _NOTES[leaf](raw, name)  # noqa: E731
        if parse is not None and (raw := self._raw(path)):
            parse(raw)

    def _last(self, directory: bytes) -> int:
        """Return the number of the last block of a directory, 0 if there is none."""
        return max(jetstream.block_numbers(self._near.names(directory)), default=0)

    def _belongs(self, report: Report, path: bytes, index: serverstate.Index) -> None:
        """See whether an index.db is that of its stream's blocks; nats-server reads all blocks if not."""
        directory = os.path.dirname(path)
        last = self._last(directory)
        found = self._read(directory + b"/%d.blk" % last) if last else (b"", 0)
        if found is not None and not serverstate.is_of(index, last, found[0]):
            report.warnings.append(
                f"{os.fsdecode(path)}: older than the last block: nats-server will read all blocks, and messages that limits "
                "or a purge removed since may come back"
            )

    def _block(self, report: Report, path: bytes, place: Place, plain: bytes, mtime: int, *, longer: bool) -> None:
        """Read every record of a block; put down where that is not possible, and go on behind it. Raises FormatError.

        longer: the file has more than these bytes, and more than it may.
        """
        name = os.fsdecode(path)
        block, _ = jetstream.plain_block(plain, None, place.label, name)
        finder, holes = jetstream.Finder(block, place.label), list[tuple[int, int, str]]()
        at = 0
        while at < len(block):
            start = at
            try:
                for record in jetstream.records(memoryview(block)[at:], place.label, name):
                    report.records += 1
                    start = at + record.offset + record.length
                at = len(block)
            except FormatError as problem:
                following = finder.find(start + 1)
                end = len(block) if following is None else following.offset
                holes.append((start, end, _said(problem, name)[1]))
                at = end
        if longer:
            start = holes.pop()[0] if holes and holes[-1][1] == len(block) else len(block)
            holes.append((start, len(block) + 1, "a block longer than any that nats-server writes"))
        directory = os.path.dirname(path)
        if (
            holes
            and holes[-1][1] == len(block)
            and _is_cut(block, holes[-1][0])
            and place.number == self._last(directory)
        ):
            report.torn.append((path, holes.pop()[0]))
        if holes:
            lost = loss.of_block(self._source(), path, mtime, block, [(start, end) for start, end, _ in holes])
            about = impact.subject(path)
            report.damage += [
                Damage(path, start, why, about, cost) for (start, _, why), cost in zip(holes, lost, strict=True)
            ]

    def _source(self) -> loss.Source:
        return loss.Source(self._read, self._near.names)

    def _read(self, path: bytes) -> tuple[bytes, int] | None:
        """Return the plain bytes of a file of the store, of a block the decompressed ones, and its mtime; None: not to be had."""
        try:
            stamp = self._stamp(path)
            if stamp is None:
                return None
            plain, _ = self._content(path)
            if (place := place_of(path)).kind is Kind.BLOCK:
                plain, _ = jetstream.plain_block(plain, None, place.label, os.fsdecode(path))
        except (OSError, FormatError, WrongKeyError):
            return None
        return plain, stamp[2]


_NOTES: Final[dict[bytes, Callable[[bytes, str], object]]] = {
    b"thw.db": servernotes.parse_ttls,
    b"sched.db": servernotes.parse_schedules,
    b"sources.db": servernotes.parse_sources,
}


def _said(problem: FormatError | WrongKeyError, name: str) -> tuple[int, str]:
    """Return the offset that an error says, and what it says without the name of the file that it was met in."""
    match = _SAID.fullmatch(str(problem).removeprefix(f"{name}: "))
    assert match is not None
    return int(match[1] or 0), match[2]


def _is_cut(block: bytes, at: int) -> bool:
    """Tell whether what is at the end of a block is a record whose rest was never written, or only zeros."""
    rest = block[at:]
    length = int.from_bytes(rest[:4], "little") & ~(1 << 31)
    return not rest.strip(b"\0") or len(rest) < jetstream.SHORTEST or len(rest) < length <= jetstream.MAX_RECORD
