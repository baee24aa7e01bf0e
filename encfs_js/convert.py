"""A whole conversion, from the first look to the last comparison: survey, carry, equal and staging in a row.

Without a terminal and without key sources: the command gives what opens the two sides.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from encfs_js import carry, recordcheck, staging
from encfs_js.carry import Job, Outcome
from encfs_js.equal import Comparison, compare
from encfs_js.errors import StoreIoError
from encfs_js.sides import open_reader
from encfs_js.survey import DIRECTORY, is_own, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing
    from encfs_js.format import Suite
    from encfs_js.inspect import Entry
    from encfs_js.recordcheck import Records
    from encfs_js.sides import Side
    from encfs_js.staging import Stage
    from encfs_js.survey import Survey


@dataclass(slots=True)
class Progress:
    """How far a conversion is. state: copying, comparing, records, done. bytes: of both, about."""

    state: str = "counting"
    files: int = 0
    files_done: int = 0
    bytes: int = 0
    bytes_done: int = 0

    def begin(self, state: str, found: Survey) -> None:
        """Start to count for another part of the work."""
        self.state, self.files, self.bytes = state, found.plain_files, found.size
        self.files_done = self.bytes_done = 0

    def as_json(self) -> dict[str, Any]:
        """Return it for the display."""
        names = ("state", "files", "files_done", "bytes", "bytes_done")
        return {name: getattr(self, name) for name in names}


@dataclass(slots=True)
class Result:
    """What came of it. unequal, changed: paths, with a reason. records: None where DST holds another encryption."""

    outcome: Outcome = field(default_factory=Outcome)
    unequal: list[tuple[bytes, str]] = field(default_factory=list)
    changed: list[bytes] = field(default_factory=list)
    records: Records | None = None
    done: bool = False


@dataclass(slots=True)
class Conversion:
    """What to convert. store: SRC, already surveyed as `found`. wanted: what the marker says.

    target_side: opens DST once its stage is there, for a sealed one with the keyring that it finds or makes. random: n -> n
    random bytes. between: is called after every part.
    """

    io: Backing
    store: str
    target: str
    wanted: dict[str, str]
    source: Side
    target_side: Callable[[Stage], Side]
    cipher: Suite
    found: Survey
    random: Callable[[int], bytes]
    progress: Progress
    between: Callable[[], None] = lambda: None


def convert(work: Conversion) -> Result:
    """Do all of it, or what is left. What could not be done is in the result; then the stage stays.

    Raises what `staging` raises, WrongKeyError, CipherMissingError, OSError; what was done stays done.
    """
    stage, result = staging.begin(work.io, work.target, work.wanted), Result()
    try:
        side = work.target_side(stage)
        if stage.marker["phase"] == "copy":
            _fill(work, stage, side, result)
            if result.outcome.failed or result.unequal or result.changed:
                return result
            _records(work, os.path.join(stage.path, "tree"), side, result)
            staging.publish(stage)
        else:
            staging.publish(stage)
            _compare(work, side, stage.top, result, repair=False)
            if result.unequal:
                return result
            _records(work, work.target, side, result)
        _dress(work, stage)
        result.done = True
        work.progress.state = "done"
    finally:
        stage.close()
    return result


def _fill(work: Conversion, stage: Stage, side: Side, result: Result) -> None:
    """Write what is missing, and compare; what a power cut spoilt is written a second time."""
    for attempt in (1, 2):
        work.progress.begin("copying", work.found)
        job = Job(work.io, work.source, side, stage, work.cipher, work.random, _tally(work))
        carry.copy(job, work.store)
        result.outcome = job.outcome
        if job.outcome.failed:
            return
        _compare(work, side, stage.tree, result, repair=attempt == 1)
        if not result.unequal:
            break
    now = survey(work.io, work.store).entries
    before = work.found.entries
    result.changed = sorted(path for path in now.keys() | before.keys() if now.get(path) != before.get(path))


def _compare(work: Conversion, side: Side, target: int, result: Result, *, repair: bool) -> None:
    work.progress.begin("comparing", work.found)
    skipped = {path for path, _ in result.outcome.left_out}
    if not result.outcome.files:  # nothing was written in this run
        skipped = {path for path in work.found.entries if carry.is_left_out(work.source, side, path)}
        result.outcome.left_out = [(path, carry.LEFTOVER) for path in sorted(skipped)]
    comparison = Comparison(work.io, work.source, side, skipped, _tally(work), repair)
    result.unequal = compare(comparison, work.store, target)


def _tally(work: Conversion) -> Callable[[int, int], None]:
    def tally(files: int, size: int) -> None:
        work.progress.files_done += files
        work.progress.bytes_done += size
        work.between()

    return tally


def _records(work: Conversion, store: str, side: Side, result: Result) -> None:
    if work.found.encrypted and work.found.has_store:
        return  # what is sealed there is a store that nats-server encrypts: its blocks are not to be read here
    work.progress.begin("records", work.found)

    def read(entry: Entry) -> bytes:
        reader = open_reader(work.io, side, entry.directory, entry.name, entry.path)
        try:
            data = reader.all()
        finally:
            reader.close()
        _tally(work)(1, len(data))
        return data

    result.records = recordcheck.check(work.io, store, read, work.between)


def _dress(work: Conversion, stage: Stage) -> None:
    """Give DST, if it was made here, and the directories in it, whose renaming touched them, what SRC's have."""
    io, source = work.io, work.io.open(work.store, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        for name in io.listdir(source):
            status = io.stat(name, dir_fd=source, follow_symlinks=False)
            if not is_own(b"", name) and stat.S_ISDIR(status.st_mode):
                io.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=stage.top)
                io.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=stage.top)
        status = io.fstat(source)
    finally:
        io.close(source)
    made = stage.marker.get("made", False)
    if made:
        job = Job(io, work.source, work.source, stage, work.cipher, work.random, lambda _files, _size: None)
        carry.dress(job, stage.top, status)
        io.chmod(stage.top, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)  # for there is something to be removed yet
    staging.clear(stage)
    if made:
        carry.dress(job, stage.top, status)
        io.fsync(stage.top)


def check_room(io: Backing, target: str, found: Survey, *, sealed: bool, staged: int) -> None:
    """Raise StoreIoError when the file system of DST has not the room that it takes. staged: bytes that are there already."""
    at = target
    while not os.path.isdir(at):
        at = os.path.dirname(os.path.abspath(at))
    fd = io.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk = io.statvfs(fd)
    finally:
        io.close(fd)
    need = max(0, (found.room_sealed if sealed else found.room_plain) - staged)
    free = disk.f_bavail * disk.f_frsize
    names = len(found.entries)
    if need > free or (disk.f_files and names > disk.f_favail and not staged):
        short = (
            f"{need} bytes are needed, and {free} are free" if need > free else f"{names} files, and no inodes for them"
        )
        raise StoreIoError(f"{target}: {short}", hint="Make room there, or name a directory on a larger disk.")
