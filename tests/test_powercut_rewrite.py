"""Power cuts while files are sealed anew: what was synced is there, under the old epoch or the new one, and no epoch is missed.

tests/disk.py says what a disk may have lost. The parts of a rewriting are made small here, so that short files have many.
"""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING, NamedTuple

import decoder
import powerstore
import pytest
from disk import Disk
from othertimes import BEGAN, FAR, QuietRecording
from powercut import SCALE, SEED, Failure, quick
from powerstore import META, REDO_KEY, App, Opened, Settings
from promise import World
from recording import Resize, Sync, SyncBegin, Write

from encfs_js import cli_reencrypt, keyring, keystore, redo, rewrite, steps, times
from encfs_js.format import PAGE, Header, Suite
from encfs_js.reencrypt import Progress, reencrypt
from encfs_js.sealed import FileKeys, SealedFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from disk import State as Found

__all__ = ["quick"]

VOLUME_KEYS = {1: bytes(range(32)), 2: bytes(range(32, 64))}
OLD, NEW = (Suite.CHACHAPOLY, 1), (Suite.AES, 2)
MTIME = 1_600_000_000_123_456_789
LONG = random.Random(1).randbytes(7 * 4064 + 100)
SHORT = b"a metafile" * 30


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(redo, "RUN_BYTES", 3 * PAGE)
    monkeypatch.setattr(redo, "_RUN", 3 * PAGE)


class Timed(QuietRecording):
    """Knows the mtime of every file after every operation, and has a syncfs. times: number -> (index, ns) in order."""

    def __init__(self, root: Path) -> None:
        self.times: dict[int, list[tuple[int, int]]] = {}
        super().__init__(root)
        self.times.clear()  # what was there before has the time that it was given

    def _note(self, op):
        at = super()._note(op)
        if isinstance(op, Write | Resize):
            self.times.setdefault(op.file, []).append((at, BEGAN + at))
        return at

    def utime(self, path, times=None, *, ns=None, dir_fd=None, follow_symlinks=True):
        super().utime(path, times, ns=ns, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        assert ns is not None
        number = self.number(path, dir_fd, follow=follow_symlinks)
        self.times.setdefault(number, []).append((len(self.ops) - 1, ns[1]))

    def syncfs(self, fd):  # noqa: ARG002
        """Every file and directory; nothing is done meanwhile."""
        with self._lock:
            began = [(number, self._note(SyncBegin(number))) for number in sorted(set(self.numbers.values()))]
            for number, at in began:
                self._note(Sync(number, at, data=False))


class Dated(NamedTuple):
    """What was found on the disk, with its mtimes."""

    found: Found
    times: dict[int, list[tuple[int, int]]]

    @property
    def files(self):
        return self.found.files

    @property
    def changed(self):
        return self.found.changed

    def paths(self):
        return self.found.paths()

    def mtime(self, number: int) -> int:
        return max((e for e in self.times.get(number, []) if e[0] <= self.changed[number]), default=(-1, MTIME))[1]

    def write_out(self, root: Path) -> dict[int, int]:
        numbers = self.found.write_out(root)
        for path, number in self.found.paths():
            if number in self.files:
                ns = self.mtime(number)
                os.utime(os.path.join(os.fsencode(root), path), ns=(ns, ns))
        return numbers


class Worker(App):
    """The application, and beside it the process that seals files anew."""

    set_times: list[tuple[int, int, bytes, int]]  # operations before and after, path, ns: set and synced

    def __init__(self, store, io, stack) -> None:
        super().__init__(store, io, stack)
        self.set_times = []

    @property
    def stack(self) -> Opened:
        return self._opened

    @property
    def io(self) -> Timed:
        assert isinstance(self._io, Timed)
        return self._io

    def new_epoch(self) -> None:
        self.stack.files.keys.renew(VOLUME_KEYS.__getitem__, *NEW)

    def rewrite(self, path: bytes) -> None:
        assert steps.run(rewrite.rewrite(self.stack.files, self.stack.node(path)))

    def is_free(self, path: bytes) -> bool:
        """Whether it need not wait at the gate."""
        return self.stack.files.frozen is not self.stack.node(path)

    def set_time(self, path: bytes, ns: int) -> None:
        before, node = self._now, self.stack.node(path)
        self.stack.files.disturbed |= node is self.stack.files.watched
        times.put(self.stack.tree, node, ns, ns)
        self.sync(path)
        self.set_times.append((before, self._now, path, ns))


class Run(NamedTuple):
    recorded: powerstore.Recorded
    io: Timed
    set_times: list[tuple[int, int, bytes, int]]


def record(where: Path, before: Callable[[App], None], then: Callable[[Worker], None], io: type[Timed] = Timed) -> Run:
    """Do `before` under the old epoch and synced, then record what is done when new files get the new one."""
    settings = Settings(FileKeys(VOLUME_KEYS.__getitem__, *OLD, random.Random(2).randbytes))
    kept: list[Worker] = []

    def after(app: App) -> None:
        assert isinstance(app, Worker)
        kept.append(app)
        app.new_epoch()
        then(app)

    def earlier(app: App) -> None:
        before(app)
        for path in app._opened.all_files():
            os.utime(os.path.join(app._store, path), ns=(MTIME, MTIME))

    recorded = powerstore.record(where, settings, earlier, after, app=Worker, io=io)
    return Run(recorded, kept[0].io, kept[0].set_times)


def put(app: App, path: bytes, data: bytes) -> None:
    app.create(path)
    app.write(path, 0, data)
    app.close(path)


def in_any_state(run: Run, seed: str, draws: int, where: Path, allowed: Callable[[bytes, int, int], bool]):
    """Cut at every point. Returns (what was seen of every file: its epoch and whether it was recovered, first failure).

    allowed: whether a file may have that mtime after so many operations.
    """
    seen: set[tuple[bytes, int, bool]] = set()
    states = 0
    for cut, disk, world in run.recorded.replay():
        drawn = set()
        for i in range(draws):
            name = f"{seed}/{cut}/{i}"
            found = Dated(disk.crash(random.Random(name)), run.io.times)
            key = (tuple(found.paths()), tuple(sorted(found.files.items())), tuple(sorted(found.changed.items())))
            if key in drawn:
                continue
            drawn.add(key)
            states += 1

            def also(stack: Opened, found=found, cut=cut) -> str:
                left = [name for name in stack.tree.io.listdir(stack.tree.meta_fd) if name.startswith(b"redo")]
                if left:
                    return f"left behind: {left}"
                redone = {
                    name for name, _ in found.paths() if name.startswith(META + b"/redo") and name[-4:] != b".tmp"
                }
                for path in stack.all_files():
                    full = os.path.join(os.fsencode(where / "found"), path)
                    with open(full, "rb") as file:
                        sealed = file.read()
                    if sealed:
                        decoder.read(sealed, VOLUME_KEYS)
                        header = Header.parse(sealed[:32])
                        if (header.suite, header.epoch) not in {OLD, NEW}:
                            return f"{path!r} has {header}"
                        seen.add((path, header.epoch, bool(redone)))
                    if not allowed(path, os.stat(full).st_mtime_ns, cut):
                        return f"{path!r} has lost its time: {os.stat(full).st_mtime_ns}"
                return ""

            finding = powerstore.judge(run.recorded, found, disk.inodes, world, where, also)  # type: ignore[arg-type]
            if finding:
                return states, seen, Failure(cut, name, found.found.story, finding)
    return states, seen, None


# --- one file ------------------------------------------------------------------------------------------------------


def two_files(app: App) -> None:
    put(app, b"long", LONG)
    put(app, b"short", SHORT)


def test_a_file_of_one_page(quick):
    """Its page carries everything but the mtime: until the inode is on the disk as well that may be the rewriting's."""
    run = record(quick, two_files, lambda app: app.rewrite(b"short"))
    seed = f"short/{SEED}"
    states, seen, failure = in_any_state(
        run, seed, 60 * SCALE, quick, lambda path, ns, _cut: ns == MTIME or (path == b"short" and ns >= BEGAN)
    )
    print(f"{states} states: {seen}")
    assert failure is None
    assert {(b"short", 1, False), (b"short", 2, False), (b"long", 1, False)} == seen


def test_a_longer_file(quick):
    run = record(quick, two_files, lambda app: app.rewrite(b"long"))
    states, seen, failure = in_any_state(run, f"long/{SEED}", 60 * SCALE, quick, lambda _path, ns, _cut: ns == MTIME)
    print(f"{states} states: {seen}")
    assert failure is None
    assert {entry for entry in seen if entry[0] == b"long"} == {
        (b"long", 1, False),
        (b"long", 2, True),
        (b"long", 2, False),
    }


class Recovering(Timed):
    """A recording of a start after a power cut: the files have the inode numbers that they had before."""

    def __init__(self, root: Path, inodes: dict[int, int]) -> None:
        self.inodes = inodes  # as they are here -> as they were
        super().__init__(root)

    def shown(self, found):
        return {"st_ino": self.inodes.get(found.st_ino, FAR + found.st_ino)}


def written_and_synced(io: Timed, path: Path) -> bytes:
    """Change a file after it was finished. Returns its content."""
    fd = io.open(path, os.O_RDWR)
    file = SealedFile(io, fd, FileKeys(VOLUME_KEYS.__getitem__, *NEW, random.Random(4).randbytes))
    file.write(5000, b"since")
    file.sync(datasync=False)
    io.close(fd)
    return LONG[:5000] + b"since" + LONG[5005:]


def test_the_power_fails_again_while_it_is_finished(quick):
    """Of every state in which there is something to finish, and every point of that."""
    run = record(quick, two_files, lambda app: app.rewrite(b"long"))
    states = 0
    for cut, disk, _ in run.recorded.replay():
        for i in range(4 * SCALE):
            found = Dated(disk.crash(random.Random(f"first/{SEED}/{cut}/{i}")), run.io.times)
            if not any(name.startswith(META + b"/redo") and name[-4:] != b".tmp" for name, _ in found.paths()):
                continue
            store = quick / "again"
            store.mkdir()
            inodes = {ino: disk.inodes[number] for ino, number in found.write_out(store).items()}
            io = Recovering(store, inodes)
            root = io.open(store, os.O_RDONLY | os.O_DIRECTORY)
            meta = io.open(META, os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
            assert len(redo.recover(io, root, meta, REDO_KEY)) == 1
            io.close(root)
            io.close(meta)
            finished = len(io.ops)
            changed = written_and_synced(io, store / "long")
            shutil.rmtree(store)
            second = Disk(io.trace)
            was = {number: inodes.get(ino, FAR + ino) for number, ino in second.inodes.items()}
            numbers = dict(second.crash(random.Random(0)).paths())
            there = World({numbers[b"long"]: LONG, numbers[b"short"]: SHORT})
            for at in (*range(io.base, finished + 1), len(io.ops)):
                for op in io.ops[second.at : at]:
                    second.feed(op)
                if at > finished:  # or the redo file came back, and took away what was synced since
                    there = World({numbers[b"long"]: changed, numbers[b"short"]: SHORT})
                for j in range(3):
                    name = f"{cut}/{i}/{at}/{j}"
                    after = Dated(second.crash(random.Random(name)), io.times)

                    def also(stack: Opened, name=name, at=at, finished=finished) -> str:
                        left = [name for name in stack.tree.io.listdir(stack.tree.meta_fd) if name.startswith(b"redo")]
                        time = os.stat(quick / "found/long").st_mtime_ns
                        return "" if not left and (time == MTIME or at > finished) else f"{name}: {left} {time}"

                    recorded = run.recorded._replace(trace=io.trace)
                    finding = powerstore.judge(recorded, after, was, there, quick, also)  # type: ignore[arg-type]
                    assert finding == "", (name, after.found.story)
                    states += 1
    print(f"{states} states")
    assert states > 200


# --- a whole pass, in a store that is in use -----------------------------------------------------------------------------


def many_files(app: App) -> None:
    two_files(app)
    app.mkdir(b"d")
    put(app, b"d/block", LONG[5000:])
    put(app, b"d/index", LONG[:6000])
    put(app, b"d/small", SHORT[:77])
    put(app, b"d/put", SHORT)
    put(app, b"d/loose", SHORT)
    put(app, b"going", LONG[:9000])
    put(app, b"empty", b"")


def in_use(app: Worker, rng: random.Random) -> None:
    """One system call of somebody else, if it need not wait."""
    path = rng.choice([b"d/block", b"d/index", b"d/small", b"short", b"going", b"d/moved"])
    if not app.exists(path) or not app.is_free(path):
        return
    data = rng.randbytes(rng.choice((30, 1057, 4500)))
    match rng.choice(("write", "append", "append", "truncate", "sync", "sync", "unlink", "rename", "put")):
        case "write":
            app.write(path, rng.choice((0, 100, 4032, 5000)), data)
        case "append":
            app.append(path, data)
        case "truncate":
            app.truncate(path, rng.choice((0, 1, 4031, 4032, 6000)))
        case "sync":
            app.sync(path)
        case "unlink" if path == b"going":
            app.unlink(path)
        case "rename" if path in {b"d/block", b"d/moved"} and not app.exists(other := flip(path)):
            app.rename(path, other)
        case "put" if rng.random() < 0.7 and app.is_free(b"d/put"):
            app.put(b"d/put", data, sync=True)
        case "put" if app.is_free(b"d/loose"):
            app.put(b"d/loose", data, sync=False)


def flip(path: bytes) -> bytes:
    return b"d/moved" if path == b"d/block" else b"d/block"


def a_pass(app: Worker, seed: str, share: float) -> Progress:
    """Seal all files anew, while others come between, also where a thread waits for the disk."""
    rng = random.Random(seed)
    progress = Progress()
    work = reencrypt(app.stack.files, progress)
    for turn, step in enumerate(work, 1):
        if rng.random() < share:
            in_use(app, rng)
        if turn % 9 == 4 and app.is_free(b"long"):
            app.set_time(b"long", MTIME + turn)
        if step is not None:
            step()
            if rng.random() < share:
                in_use(app, rng)
    return progress


def times_of_long(run: Run) -> Callable[[bytes, int, int], bool]:
    """The last time that was set and synced, or one that was set since."""

    def allowed(path: bytes, ns: int, cut: int) -> bool:
        if path != b"long":
            return True
        done = [set_to for _, after, _, set_to in run.set_times if after <= cut]
        begun = [set_to for before, after, _, set_to in run.set_times if before < cut < after]
        return ns in {done[-1] if done else MTIME, *begun}

    return allowed


@pytest.mark.parametrize("number", range(4))
def test_a_whole_pass_in_a_store_that_is_in_use(number, quick):
    seed = f"pass/{SEED}/{number}"
    progress: list[Progress] = []
    share = (0.15, 0.3, 0.6, 0.9)[number]
    run = record(quick, many_files, lambda app: progress.append(a_pass(app, seed, share)))
    assert (progress[0].state, progress[0].failed) == ("done", [])
    states, seen, failure = in_any_state(run, seed, 5 * SCALE, quick, times_of_long(run))
    print(f"{states} states of {len(run.io.ops) - run.io.base} operations: {sorted(seen)}")
    assert failure is None
    assert {(b"long", 1, False), (b"long", 2, True), (b"long", 2, False)} <= seen
    assert states > 100
    assert run.set_times


# --- the epoch is dropped ------------------------------------------------------------------------------------------------


def rings() -> tuple[bytes, keyring.Keys]:
    """A keyring of two epochs, and what is in it."""
    first = keyring.create(b"key", cipher=Suite.CHACHAPOLY, plaintext="refuse", kdf=keyring.Kdf(1, 1, 8))
    keys = keyring.unlock(keyring.parse(first), b"key")
    second = keyring.add_epoch(keyring.parse(first), keys, cipher=Suite.AES)
    return second, keyring.renew(keyring.parse(second), keys)


def record_drop(where: Path, monkeypatch, io: type[Timed]) -> Timed:
    """Seal the files of a store anew and drop the old epoch. The command does it, with a recording below it."""
    document, keys = rings()
    store = where / "store"
    (store / ".encfs_js").mkdir(parents=True)
    keystore.write(str(store), document)
    file_keys = FileKeys(keys.volume_key, *OLD, random.Random(3).randbytes)
    settings = Settings(file_keys)
    earlier = QuietRecording(store)
    run = powerstore.State(clean=False, began=BEGAN, windows=())
    with powerstore.opened(store, settings, earlier, run) as first:
        many_files(App(store, earlier, first))
    backing = io(store)
    with powerstore.opened(store, settings, backing, run) as second:
        file_keys.renew(keys.volume_key, *NEW)
        app = Worker(store, backing, second)
        progress = a_pass(app, f"drop/{SEED}", 0.1)
        assert progress.state == "done"
        app.append(b"d/small", b"while it is mounted")
        monkeypatch.setattr(cli_reencrypt, "Backing", lambda: backing)
        monkeypatch.setattr(keystore, "Backing", lambda: backing)
        assert cli_reencrypt._drop(str(store), keys) == [1]
        monkeypatch.undo()
        app.append(b"d/small", b"and after")
    shutil.rmtree(store)
    return backing


def lost_epoch(io: Timed, draws: int, where: Path) -> tuple[set[tuple[int, ...]], str]:
    """Cut at every point. Returns the epochs that keyrings had, and a file that none of them opens."""
    disk, rings_seen = Disk(io.trace), set()
    for cut in range(io.base, len(io.ops) + 1):
        if cut > io.base:
            disk.feed(io.ops[cut - 1])
        for i in range(draws):
            found = disk.crash(random.Random(f"{SEED}/{cut}/{i}"))
            known = tuple(sorted(_epochs(found, where)))
            rings_seen.add(known)
            for path, number in found.paths():
                content = found.files.get(number, b"")
                if path.startswith(META + b"/redo") and not path.endswith(b".tmp"):
                    content = content[PAGE:]
                elif path.startswith(META + b"/"):
                    continue
                if content[:8] == b"ENCFSJS1" and (epoch := Header.parse(content[:32]).epoch) not in known:
                    return rings_seen, f"cut {cut}, draw {i}: {path!r} is of epoch {epoch}, the keyring has {known}"
    return rings_seen, ""


def _epochs(found: Found, where: Path) -> Iterator[int]:
    """Yield the epochs of the keyring, or of its copy."""
    store = where / "keyring"
    (store / ".encfs_js").mkdir(parents=True)
    for path, number in found.paths():
        if path.startswith(META + b"/keyring"):
            (store / os.fsdecode(path)).write_bytes(found.files[number])
    ring, _ = keystore.load(str(store))
    shutil.rmtree(store)
    yield from (epoch.epoch for epoch in ring.epochs)


def test_no_file_of_an_epoch_that_was_dropped(quick, monkeypatch):
    io = record_drop(quick, monkeypatch, Timed)
    rings_seen, finding = lost_epoch(io, 6 * SCALE, quick)
    assert finding == ""
    assert rings_seen == {(1, 2), (2,)}


# --- the tests above can fail ---------------------------------------------------------------------------------------------


class NoSyncOf(Timed):
    """A package that leaves out some of its own syncs."""

    def left_out(self, path: str) -> bool:
        raise NotImplementedError

    def _sync(self, fd, call, *, data):
        if not self.left_out(os.readlink(f"/proc/self/fd/{fd}")):
            super()._sync(fd, call, data=data)


class NoSyncOfTheRedoFile(NoSyncOf):
    def left_out(self, path):
        return path.endswith(".tmp")


class NoSyncOfItsName(NoSyncOf):
    def left_out(self, path):
        return path.endswith(".encfs_js")


class NoSyncOfTheTarget(NoSyncOf):
    def left_out(self, path):
        return path.endswith("/long")


class NoSyncOfItsEnd(NoSyncOf):
    """Every second sync of the directory: that after the redo file was removed."""

    count = 0

    def left_out(self, path):
        self.count += path.endswith(".encfs_js")
        return path.endswith(".encfs_js") and self.count % 2 == 0


def rewritten_and_changed(app: Worker) -> None:
    app.rewrite(b"long")
    app.write(b"long", 100, b"after that")
    app.sync(b"long")


@pytest.mark.parametrize(
    ("io", "then"),
    [
        (NoSyncOfTheRedoFile, lambda app: app.rewrite(b"long")),
        (NoSyncOfItsName, lambda app: app.rewrite(b"long")),
        (NoSyncOfTheTarget, lambda app: app.rewrite(b"long")),
        (NoSyncOfItsEnd, rewritten_and_changed),
    ],
)
def test_a_missing_sync_is_found(io, then, quick):
    run = record(quick, two_files, then, io)
    *_, failure = in_any_state(run, f"faults/{SEED}", 60, quick, lambda _path, _ns, _cut: True)
    print(failure)
    assert failure is not None


def test_the_same_with_all_syncs(quick):
    run = record(quick, two_files, rewritten_and_changed)
    *_, failure = in_any_state(run, f"faults/{SEED}", 60, quick, lambda _path, _ns, _cut: True)
    assert failure is None


def test_a_time_that_is_not_put_back_is_found(quick, monkeypatch):
    monkeypatch.setattr(redo, "_end_copy", lambda io, target, pages, _ns: io.ftruncate(target, pages * PAGE))
    run = record(quick, two_files, lambda app: app.rewrite(b"long"))
    *_, failure = in_any_state(run, f"time/{SEED}", 20, quick, lambda _path, ns, _cut: ns == MTIME)
    assert failure is not None
    assert "has lost its time" in failure.finding


class NoSyncOfAll(Timed):
    def syncfs(self, fd):
        pass


def test_an_epoch_that_is_dropped_too_early_is_found(quick, monkeypatch):
    io = record_drop(quick, monkeypatch, NoSyncOfAll)
    _, finding = lost_epoch(io, 30, quick)
    print(finding)
    assert "the keyring has (2,)" in finding
