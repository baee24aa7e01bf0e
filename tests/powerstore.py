"""Power cuts under a whole store: the parts of a mount without FUSE, driven by paths, recorded, cut, and opened again.

`App` is the application: what it does goes through Tree and Files as a request of the kernel does, and is noted as what
the application may rely on. `opened` is what a mount does when it starts, up to the first request.
"""

from __future__ import annotations

import datetime as dt
import os
import random
import shutil
import stat
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from disk import Disk
from othertimes import BEGAN, DAY_NS, AfterCut, QuietRecording
from powercut import VOLUME_KEYS, Failure
from promise import World

from encfs_js import redo, sweep
from encfs_js.errors import IntegrityError
from encfs_js.files import Files
from encfs_js.format import MAGIC
from encfs_js.guard import Guard
from encfs_js.reserve import Reserve
from encfs_js.sealed import FileKeys
from encfs_js.state import State
from encfs_js.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from disk import State as Found
    from recording import Recording, Trace

    from encfs_js.backing import Backing
    from encfs_js.format import Suite
    from encfs_js.tree import Node

CUT = State(clean=False, began=BEGAN + DAY_NS, windows=((BEGAN, BEGAN + DAY_NS),))
REDO_KEY = bytes(32)
META = b".encfs_js"


class Opened(NamedTuple):
    """A store that is open for writing."""

    tree: Tree
    files: Files

    def node(self, path: bytes) -> Node:
        node = self.tree.root
        for name in filter(None, path.split(b"/")):
            node, _ = self.tree.lookup(node, name)
        return node

    def read(self, path: bytes) -> bytes:
        node = self.node(path)
        content = bytes(self.files.read(node, 0, 1 << 20)) if self.files.size(node) else b""
        assert len(content) == self.files.size(node)
        self.files.detach(node)
        return content

    def all_files(self, path: bytes = b"") -> Iterator[bytes]:
        for _, name in self.tree.listing(self.node(path)):
            below = path + b"/" + name if path else name
            mode = self.tree.stat(self.node(below)).st_mode
            if stat.S_ISDIR(mode):
                yield from self.all_files(below)
            elif stat.S_ISREG(mode):
                yield below


@cache
def file_keys(suite: Suite) -> FileKeys:
    return FileKeys(VOLUME_KEYS.__getitem__, suite, 1, random.Random(2).randbytes)


class Settings(NamedTuple):
    """keys: of the store's files; plaintext: files that are not sealed are shown."""

    keys: FileKeys
    plaintext: bool = False


@contextmanager
def opened(store: Path, settings: Settings, io: Backing, run: State) -> Iterator[Opened]:
    """Open a store as mount.py does when its state is `run`, and sweep it at once if the last stop was unclean."""
    tree = Tree(io, str(store), Guard(str(store)), give_to_caller=False)
    redo.recover(io, tree.root_fd, tree.meta_fd, REDO_KEY)
    reserve = Reserve(io, tree.meta_fd)
    files = Files(
        tree,
        settings.keys,
        run,
        REDO_KEY,
        reserve,
        lambda: dt.datetime.now(dt.UTC),
        plaintext=settings.plaintext,
        writeback=True,
    )
    try:
        if run.windows:
            for _ in sweep.sweep(tree, files):
                pass
        yield Opened(tree, files)
    finally:
        files.close_all()
        reserve.close()
        for fd in (tree.root_fd, tree.meta_fd):
            io.close(fd)


class Step(NamedTuple):
    """What the application did: operations recorded before and after it, and what it means for whom."""

    before: int
    after: int
    begins: Callable[[World], None] | None
    ends: Callable[[World], None] | None = None


class Recorded(NamedTuple):
    trace: Trace
    steps: list[Step]
    start: dict[int, bytes]
    settings: Settings

    def replay(self) -> Iterator[tuple[int, Disk, World]]:
        """Every point at which the power can be cut."""
        disk, world = Disk(self.trace), World(self.start)
        begun = ended = 0
        for cut in range(self.trace.base, len(self.trace.ops) + 1):
            if cut > self.trace.base:
                disk.feed(self.trace.ops[cut - 1])
            while ended < len(self.steps) and self.steps[ended].after <= cut:
                if begun == ended:
                    _begin(self.steps[begun], world)
                    begun += 1
                if (ends := self.steps[ended].ends) is not None:
                    ends(world)
                ended += 1
            if begun == ended < len(self.steps) and self.steps[begun].before < cut:
                _begin(self.steps[begun], world)
                begun += 1
            yield cut, disk, world


def _begin(step: Step, world: World) -> None:
    if step.begins is not None:
        step.begins(world)


class App:
    """An application on an open store. Every method is one system call, but for `put`."""

    def __init__(self, store: Path, io: Recording, stack: Opened) -> None:
        self._store = os.fsencode(store)
        self._io = io
        self._opened = stack
        self.steps: list[Step] = []

    def _number(self, path: bytes) -> int:
        return self._io.number(os.path.join(self._store, path))

    def _split(self, path: bytes) -> tuple[Node, bytes]:
        directory, name = os.path.split(path)
        return self._opened.node(directory), name

    def _did(
        self, before: int, begins: Callable[[World], None] | None, ends: Callable[[World], None] | None = None
    ) -> None:
        self.steps.append(Step(before, len(self._io.ops), begins, ends))

    @property
    def _now(self) -> int:
        return len(self._io.ops)

    def exists(self, path: bytes) -> bool:
        return os.path.lexists(os.path.join(self._store, path))

    def size(self, path: bytes) -> int:
        return self._opened.files.size(self._opened.node(path))

    def create(self, path: bytes) -> None:
        files = self._opened.files
        node, fd, found = self._opened.tree.create(*self._split(path), 0o600, 0, 0, exclusive=True)
        files.adopt(node, fd, writable=True, found=found)
        files.open(node, write=True)

    def open(self, path: bytes) -> None:
        self._opened.files.open(self._opened.node(path), write=True)

    def close(self, path: bytes) -> None:
        self._opened.files.release(self._opened.node(path), write=True, direct=False)

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        before, number = self._now, self._number(path)
        node = self._opened.node(path)
        assert self._opened.files.write(node, offset, data, cached=True) == len(data)
        self._opened.files.detach(node)
        self._did(before, lambda world: world.of(number).write(offset, data))

    def append(self, path: bytes, data: bytes) -> None:
        self.write(path, self.size(path), data)

    def truncate(self, path: bytes, size: int) -> None:
        before, number = self._now, self._number(path)
        node = self._opened.node(path)
        assert self._opened.files.truncate(node, size)
        self._opened.files.detach(node)
        self._did(before, lambda world: world.of(number).truncate(size))

    def sync(self, path: bytes) -> None:
        before, number = self._now, self._number(path)
        node = self._opened.node(path)
        self._opened.files.attach(node)
        self._io.fsync(node.fd)
        self._opened.files.detach(node)
        token = len(self.steps)
        self._did(before, lambda w: w.of(number).sync_begins(token), lambda w: w.of(number).sync_ends(token))

    def sync_directory(self, path: bytes) -> None:
        before = self._now
        fd = self._io.open(os.path.join(self._store, path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._io.fsync(fd)
        self._io.close(fd)

        def ends(world: World) -> None:
            for put, contents in world.puts.items():
                if os.path.dirname(put) == path:
                    world.settled[put] = len(contents) - 1

        self._did(before, None, ends)

    def mkdir(self, path: bytes) -> None:
        self._opened.tree.mkdir(*self._split(path), 0o700, 0, 0)

    def unlink(self, path: bytes) -> None:
        self._opened.tree.unlink(*self._split(path))

    def rmdir(self, path: bytes) -> None:
        self._opened.tree.rmdir(*self._split(path))

    def rename(self, old: bytes, new: bytes) -> None:
        self._opened.tree.rename(*self._split(old), *self._split(new), 0)

    def put(self, path: bytes, data: bytes, *, sync: bool) -> None:
        """nats-server's way to replace a small file. sync: as with `sync_interval: always`."""
        temporary = path + b".tmp"
        if self.exists(temporary):
            self.truncate(temporary, 0)
            self.open(temporary)
        else:
            self.create(temporary)
        self.write(temporary, 0, data)
        if sync:
            self.sync(temporary)
        self.close(temporary)
        before, earlier = self._now, [self._opened.read(path)] if self.exists(path) else []
        self.rename(temporary, path)
        if not sync:
            self._did(before, lambda world: world.forget(path))
            return
        self._did(before, lambda world: world.put(path, data, earlier))
        self.sync_directory(os.path.dirname(path))


def record(
    where: Path,
    settings: Settings,
    before: Callable[[App], None],
    then: Callable[[App], None],
    plain: Mapping[str, bytes] = MappingProxyType({}),
    *,
    app: type[App] = App,
    io: type[QuietRecording] | None = None,
) -> Recorded:
    """Make a store, let an application do `before` in a run that ends cleanly, and record what it does `then`.

    plain: files that lie in the store unsealed.
    """
    store = where / "store"
    (store / ".encfs_js").mkdir(parents=True)
    for name, content in plain.items():
        (store / name).write_bytes(content)
    earlier = QuietRecording(store)
    with opened(store, settings, earlier, State(clean=False, began=DAY_NS, windows=())) as first:
        before(App(store, earlier, first))
        contents = {path: first.read(path) for path in first.all_files()}
    backing = (io or QuietRecording)(store)
    start = {backing.number(os.path.join(os.fsencode(store), path)): content for path, content in contents.items()}
    with opened(store, settings, backing, State(clean=False, began=BEGAN, windows=())) as second:
        application = app(store, backing, second)
        then(application)
        trace = backing.trace
    shutil.rmtree(store)
    return Recorded(trace, application.steps, start, settings)


def judge(
    recorded: Recorded,
    found: Found,
    inodes: dict[int, int],
    world: World,
    where: Path,
    also: Callable[[Opened], str] | None = None,
) -> str:
    """Open the store as it was found and say what is wrong with it, or an empty string."""
    store = where / "found"
    store.mkdir()
    try:
        numbers = found.write_out(store)
        names = {path: number for path, number in found.paths() if number in found.files}
        with opened(store, recorded.settings, AfterCut(recorded.trace.base, found, numbers, inodes), CUT) as stack:
            if any(b"orphan" in name for name in os.listdir(os.fsencode(store / ".encfs_js"))):
                return "a redo file lost its target"
            plaintext = recorded.settings.plaintext
            headless = {path for path in names if plaintext and _headless(path, names, found, world)}
            finding = _wrong_files(stack, names, headless, world) or _wrong_names(stack, names, world)
            return finding or (also(stack) if also else "")
    finally:
        shutil.rmtree(store)


def _headless(path: bytes, names: dict[bytes, int], found: Found, world: World) -> bool:
    """FORMAT.md 2.2: where plaintext may lie, a file whose first page never reached the disk is taken for some of it.

    It is shown as it is then, which is allowed only where nothing was synced.
    """
    return not world.of(names[path]).least and not found.files[names[path]].startswith(MAGIC)


def _wrong_files(stack: Opened, names: dict[bytes, int], headless: set[bytes], world: World) -> str:
    for path in stack.all_files():
        try:
            content = stack.read(path)
        except IntegrityError as error:
            return f"{path!r} cannot be read: {error}"
        if path not in headless and (finding := world.of(names[path]).wrong(content)):
            return f"{path!r}: {finding}"
    expected = {path for path in names if not path.startswith(META + b"/")}
    return "" if set(stack.all_files()) == expected else "a name is missing"


def _wrong_names(stack: Opened, names: dict[bytes, int], world: World) -> str:
    for path, contents in world.puts.items():
        settled = world.settled.get(path)
        if path not in names:
            if settled is not None:
                return f"{path!r} is missing"
        elif stack.read(path) not in contents[settled or 0 :]:
            return f"{path!r} is neither the old nor the new file"
    return ""


def search(recorded: Recorded, seed: str, draws: int, where: Path) -> tuple[int, Failure | None]:
    """Cut at every point; how many different states were judged, and the first that breaks a promise."""
    judged = set()
    for cut, disk, world in recorded.replay():
        seen = set()
        for i in range(draws):
            name = f"{seed}/{cut}/{i}"
            found = disk.crash(random.Random(name))
            state_of_disk = (
                tuple((path, number) for path, number in found.paths()),
                tuple(sorted(found.files.items())),
                tuple(sorted((number, at >= recorded.trace.base) for number, at in found.changed.items())),
            )
            key = hash(state_of_disk)
            if key in seen:
                continue
            seen.add(key)
            judged.add(key)
            if finding := judge(recorded, found, disk.inodes, world, where):
                return len(judged), Failure(cut, name, found.story, finding)
    return len(judged), None
