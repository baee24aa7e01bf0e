"""Power cuts under one sealed file: plans of plain operations, carried out, recorded, cut at every point, and judged."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import decoder
import pytest
from disk import Disk
from promise import Promise
from recording import Recording

from encfs_js import crash
from encfs_js.backing import Backing
from encfs_js.format import DamagedPageError, Suite
from encfs_js.sealed import FileKeys, SealedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from recording import Trace

SCALE = int(os.environ.get("POWERCUT_SCALE", "1"))
SEED = int(os.environ.get("POWERCUT_SEED", "0"))
VOLUME_KEYS = {1: bytes(range(32))}
EDGES = (0, 1, 100, 4031, 4032, 4033, 8095, 8096, 8097, 12160, 12161, 16224, 20288, 30000)


@pytest.fixture
def quick(tmp_path):
    """A directory in memory if there is one: thousands of stores are made there, and nothing in it has to last."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="powercut-") as path:
        yield Path(path)


class Step(NamedTuple):
    """One plain operation: how many operations had been recorded before and after it, and what it was to do.

    instead: what the file held afterwards if the operation failed half way.
    """

    before: int
    after: int
    word: str
    numbers: tuple[int, ...] = ()
    data: bytes = b""
    instead: bytes | None = None


class Recorded(NamedTuple):
    """A plan that was carried out on the file with that number in the trace."""

    trace: Trace
    number: int
    steps: list[Step]


class FullDisk(Recording):
    """A recording whose file cannot grow beyond `limit` bytes while that is set; what it has can be written again."""

    limit: int | None = None

    def pwrite(self, fd, data, offset):
        if self.limit is not None and offset + len(data) > self.limit:
            data = memoryview(data)[: max(self.limit - offset, 0)]
            if not data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


class Variant(NamedTuple):
    """The code under test. The tests' own faults replace a part of it."""

    sealed: type[SealedFile] = SealedFile
    backing: type[FullDisk] = FullDisk
    trim: Callable[..., Any] = crash.trim


REAL = Variant()
Plan = list[tuple[Any, ...]]


def draw_plan(rng: random.Random, length: int) -> Plan:
    """Plain operations on one file, whose offsets love the ends of pages.

    A third of the plans stays near the first page's end, where a file takes a new id now and then (FORMAT.md 2.1).
    """
    small = rng.random() < 0.33
    edges = EDGES[:9] if small else EDGES

    def edge() -> int:
        return max(0, rng.choice(edges) + rng.choice((0, 0, 0, -1, 1, -30, 1057)))

    words = ["append"] * rng.choice((1, 4, 8)) + ["write"] * rng.choice((0, 2)) + ["truncate"] * rng.choice((0, 1, 3))
    words += ["empty"] * rng.choice((0, 0, 1)) + ["reopen"] * rng.choice((0, 1)) + ["full"] * rng.choice((0, 1))
    words += ["sync"] * rng.choice((1, 1, 3)) + ["datasync"] * rng.choice((0, 1))
    if small:
        words = [
            "append",
            "append",
            "write",
            "truncate",
            "truncate",
            "reopen",
            "reopen",
            "full",
            "full",
            "sync",
        ]
    plan: Plan = [("write", 0, rng.choice(edges) or 5000, 0), ("sync",), ("reopen",)] if rng.random() < 0.7 else []
    for i in range(1, length + 1):
        size = rng.choice((1, 30, 300, 1057, 1057, 4064, 5000, 9000))
        match rng.choice(words):
            case "append":
                plan.append(("append", size, i))
            case "write":
                plan.append(("write", edge(), size, i))
            case "truncate":
                plan.append(("truncate", edge()))
            case "empty":
                plan.append(("truncate", 0))
            case "full":
                plan.append(("full", rng.choice((0, 1024, 4096, 5120, 8192))))
            case word:
                plan.append((word,))
    return plan


def carry_out(plan: Plan, suite: Suite, where: Path, variant: Variant = REAL) -> Recorded:
    """Do the plan on a real sealed file in the empty directory `where`, and record it."""
    path = where / "file"
    path.write_bytes(b"")
    io = variant.backing(where, sync=False)
    keys = FileKeys(VOLUME_KEYS.__getitem__, suite, 1, random.Random(0).randbytes)
    fd = io.open(path, os.O_RDWR | os.O_CLOEXEC)
    steps: list[Step] = []
    try:
        file = variant.sealed(io, fd, keys)
        for word, *numbers in plan:
            before, instead = len(io.ops), None
            data = b""
            if word in {"append", "write"}:
                data = random.Random(numbers[-1]).randbytes(numbers[-2])
                numbers[:] = [file.size if word == "append" else numbers[0]]
            try:
                if data:
                    done = file.write(numbers[0], data)
                    instead = whole(file) if done < len(data) else None
                elif word == "truncate":
                    file.truncate(numbers[0])
                elif word.endswith("sync"):
                    file.sync(word == "datasync")
                elif word == "reopen":
                    file = variant.sealed(io, fd, keys)
            except OSError:
                assert io.limit is not None
                instead = whole(file)
            io.limit = os.fstat(fd).st_size + numbers[0] if word == "full" else None
            steps.append(Step(before, len(io.ops), word, tuple(numbers), data, instead))
        return Recorded(io.trace, io.number(fd), steps)
    finally:
        io.close(fd)
        path.unlink()


def whole(file: SealedFile) -> bytes:
    """All plain bytes of a small file."""
    content = bytes(file.read(0, file.size))
    assert len(content) == file.size
    return content


def replay(recorded: Recorded) -> Iterator[tuple[int, Disk, Promise]]:
    """Every point at which the power can be cut: how many operations were done, the disk, and what is promised."""
    disk, promise = Disk(recorded.trace), Promise()
    begun = ended = 0
    for cut in range(recorded.trace.base, len(recorded.trace.ops) + 1):
        if cut > recorded.trace.base:
            disk.feed(recorded.trace.ops[cut - 1])
        while ended < len(recorded.steps) and recorded.steps[ended].after <= cut:
            if begun == ended:
                _begins(promise, recorded.steps[begun], begun)
                begun += 1
            if recorded.steps[ended].word.endswith("sync"):
                promise.sync_ends(ended)
            ended += 1
        if begun == ended < len(recorded.steps) and recorded.steps[begun].before < cut:
            _begins(promise, recorded.steps[begun], begun)
            begun += 1
        yield cut, disk, promise


def _begins(promise: Promise, step: Step, token: int) -> None:
    match step.word:
        case "append" | "write":
            promise.write(step.numbers[0], step.data)
        case "truncate":
            promise.truncate(step.numbers[0])
        case "sync" | "datasync":
            promise.sync_begins(token)
    if step.instead is not None:
        promise.becomes(step.instead)


# --- looking for a state that breaks the promise -----------------------------------------------------------------------


class Failure(NamedTuple):
    """A state that breaks the promise: after how many operations, from which seed, what was found, what is wrong."""

    cut: int
    seed: str
    story: list[str]
    finding: str


class Judge:
    """Brings sealed contents back to life as a mount does after an unclean stop, and looks at them.

    states: how many different ones were seen, of all files.
    """

    def __init__(self, suite: Suite, variant: Variant = REAL) -> None:
        self._io = Backing()
        self._keys = FileKeys(VOLUME_KEYS.__getitem__, suite, 1, random.Random(1).randbytes)
        self._variant = variant
        self.states = self.trimmed = 0

    def wrong(self, sealed: bytes, promise: Promise) -> str:
        """What is wrong with a file that was found like that, or an empty string."""
        self.states += 1
        fd = os.memfd_create("file")
        try:
            os.pwrite(fd, sealed, 0)
            expected = decoder.crash_rule(sealed, VOLUME_KEYS)
            if self._variant.trim(self._io, fd, self._keys) is not None:
                self.trimmed += 1
            after = os.pread(fd, os.fstat(fd).st_size, 0)
            if self._variant is REAL and len(after) != (expected.sealed_size if expected else len(sealed)):
                return f"trimmed from {len(sealed)} to {len(after)} bytes, but FORMAT.md says {expected}"
            return self._wrong_after(fd, after, promise)
        except DamagedPageError as damage:
            return f"page {damage.page} cannot be read"
        except decoder.Damage as damage:
            return f"another decoder refuses page {damage.page}"
        finally:
            os.close(fd)

    def trim(self, io: Backing, fd: int) -> None:
        self._variant.trim(io, fd, self._keys)

    def _wrong_after(self, fd: int, sealed: bytes, promise: Promise) -> str:
        if crash.trim(self._io, fd, self._keys) is not None:
            return "the crash rule still finds something after it was applied"
        file = SealedFile(self._io, fd, self._keys)
        if file.damage is not None:
            return f"page {file.damage} is damaged"
        content = whole(file)
        if content != decoder.read(sealed, VOLUME_KEYS):
            return "another decoder reads something else"
        if finding := promise.wrong(content):
            return finding
        file.write(file.size, b"and life goes on" * 300)
        if whole(SealedFile(self._io, fd, self._keys)) != content + b"and life goes on" * 300:
            return "the file cannot be appended to"
        return ""


def search(recorded: Recorded, judge: Judge, seed: str, draws: int, where: Path) -> Failure | None:
    """Cut at every point and draw `draws` states at each; the same content is not judged twice at one point.

    Of the files that need the crash rule every eighth loses its power once more while the rule is applied.
    """
    for cut, disk, promise in replay(recorded):
        seen = set()
        for i in range(draws):
            name = f"{seed}/{cut}/{i}"
            state = disk.crash(random.Random(name), [recorded.number])
            sealed = state.files[recorded.number]
            if sealed in seen:
                continue
            seen.add(sealed)
            trimmed = judge.trimmed
            if finding := judge.wrong(sealed, promise):
                return Failure(cut, name, state.story, finding)
            if (
                judge.trimmed > trimmed
                and judge.trimmed % 8 == 0
                and (found := _again(sealed, judge, promise, name, where))
            ):
                return found._replace(cut=cut, story=[*state.story, "then, while it was trimmed:", *found.story])
    return None


def _again(sealed: bytes, judge: Judge, promise: Promise, name: str, where: Path) -> Failure | None:
    """Cut the power while the crash rule is applied."""
    (where / "file").write_bytes(sealed)
    io = FullDisk(where, sync=False)
    fd = io.open(where / "file", os.O_RDWR | os.O_CLOEXEC)
    judge.trim(io, fd)
    number = io.number(fd)
    io.close(fd)
    (where / "file").unlink()
    disk = Disk(io.trace)
    for cut in range(io.base, len(io.ops)):
        disk.feed(io.ops[cut])
        for i in range(4):
            state = disk.crash(random.Random(f"{name}/{cut}/{i}"), [number])
            if finding := judge.wrong(state.files[number], promise):
                return Failure(cut, f"{name}/{cut}/{i}", state.story, finding)
    return None


def failing(
    plan: Plan, suite: Suite, seed: str, draws: int, where: Path, variant: Variant = REAL
) -> tuple[Failure | None, Judge]:
    """The first failure of a plan, and who judged its states."""
    judge = Judge(suite, variant)
    return search(carry_out(plan, suite, where, variant), judge, seed, draws, where), judge


def shortest(plan: Plan, fails: Callable[[Plan], Failure | None], tries: int = 300) -> tuple[Plan, Failure]:
    """Leave out of a failing plan what it does not need to fail."""
    failure = fails(plan)
    assert failure is not None
    size = len(plan)
    while size:
        at = 0
        while at < len(plan) and tries > 0:
            tries -= 1
            fewer = plan[:at] + plan[at + size :]
            if found := fails(fewer):
                plan, failure = fewer, found
            else:
                at += size
        size //= 2
    return plan, failure
