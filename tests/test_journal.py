"""What a worker leaves behind for the next one: the journal, the kernel's unanswered requests, and the store itself."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import struct
import time
from typing import TYPE_CHECKING

import pytest

from encfs_js import journal, resend, revive
from encfs_js.backing import META, RENAME_EXCHANGE, RENAME_NOREPLACE, Backing
from encfs_js.guard import Guard
from encfs_js.journal import Entry, Journal
from encfs_js.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LONGEST = Entry(journal.RENAME, 2**63, b"\xff" * 255, 7, b"\x01" * 255, ino=2**64 - 1, other=9, flags=2, pid=2**22)
OTHER = Entry(journal.UNLINK, 3, b"name", ino=4, pid=77)

# --- the journal --------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """The worker was killed."""


class Memory(bytearray):
    """Shared memory of a worker that is killed at its n-th store."""

    stores_left = 1000

    def __setitem__(self, key, value) -> None:
        if not self.stores_left:
            raise Interrupted
        self.stores_left -= 1
        super().__setitem__(key, value)


def test_record_is_whole_or_not_there() -> None:
    for stores in range(10):
        memory = Memory(journal.SIZE)
        first = Journal(memory)
        first.note(OTHER)
        first.strike()
        memory.stores_left = stores
        try:
            first.note(LONGEST)
        except Interrupted:
            assert Journal(memory).noted() == []
        else:
            assert Journal(memory).noted() == [LONGEST]
            break
    else:
        raise AssertionError("never written")
    assert stores > 1


def test_answered_request_is_struck_out_and_counted() -> None:
    memory = bytearray(journal.SIZE)
    notes = Journal(memory)
    notes.note(LONGEST)
    assert Journal(memory).noted() == [LONGEST]
    notes.strike()
    assert Journal(memory).noted() == []
    notes.strike()
    assert journal.answered(memory) == 2


def test_what_was_done_is_kept_until_it_is_answered() -> None:
    """However many workers die before that, and whatever else they do."""
    memory = bytearray(journal.SIZE)
    Journal(memory).note(LONGEST)
    second = Journal(memory)
    second.go_on(lambda _: True)
    second.strike()  # of a request that nobody notes
    second.note(OTHER)
    third = Journal(memory)
    assert set(third.noted()) == {LONGEST, OTHER}
    third.go_on(lambda _: True)
    third.strike()
    third.note(OTHER._replace(name=b"not done"))
    fourth = Journal(memory)
    fourth.go_on(lambda entry: entry.name != b"not done")
    assert set(fourth.noted()) == {LONGEST, OTHER}
    assert not fourth.repeats(OTHER._replace(name=b"not done"))
    assert fourth.repeats(OTHER._replace(ino=0))
    assert set(Journal(memory).noted()) == {LONGEST, OTHER}  # it is not answered yet
    fourth.strike()
    assert not fourth.repeats(OTHER)
    assert Journal(memory).noted() == [LONGEST]
    fifth = Journal(memory)
    fifth.go_on(lambda _: False)
    assert fifth.noted() == []
    assert not fifth.repeats(LONGEST)


def test_many_workers_die() -> None:
    memory = bytearray(journal.SIZE)
    for i in range(60):
        notes = Journal(memory)
        notes.go_on(lambda _: True)
        notes.note(LONGEST._replace(pid=i))
    notes = Journal(memory)
    notes.go_on(lambda _: True)
    assert notes.repeats(LONGEST._replace(pid=0))
    assert notes.repeats(LONGEST._replace(pid=59))


@pytest.mark.parametrize(
    "change",
    [
        {"op": 1},
        {"parent": 1},
        {"name": b"x"},
        {"new_parent": 1},
        {"new_name": b"x"},
        {"flags": 1},
        {"pid": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_request_is_not_taken_for_it(change: dict[str, int | bytes]) -> None:
    memory = bytearray(journal.SIZE)
    Journal(memory).note(LONGEST)
    notes = Journal(memory)
    notes.go_on(LONGEST.same_request)
    assert not notes.repeats(LONGEST._replace(**change))
    assert notes.repeats(LONGEST._replace(ino=0, other=0))


def test_file_that_is_being_changed_is_known_until_the_answer() -> None:
    memory = bytearray(journal.SIZE)
    notes = Journal(memory)
    assert notes.changing() == 0
    notes.change(2**63 + 1)
    assert Journal(memory).changing() == 2**63 + 1
    notes.strike()
    assert Journal(memory).changing() == 0
    notes.change(5)
    second = Journal(memory)
    second.go_on(lambda _: True)
    assert second.changing() == 0


# --- requests -----------------------------------------------------------------------------------------------------

RESENT = 1 << 63
NODE, PID = 42, 4711


def request(opcode: int, body: bytes = b"", *, unique: int = RESENT | 2, node: int = NODE) -> bytes:
    return struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, node, 1000, 1000, PID, 0) + body


class Kernel:
    """The other end of /dev/fuse."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)

    def send(self, *requests: bytes) -> None:
        for one in requests:
            self.ours.send(one)

    def unanswered(self) -> tuple[list[Entry], list[int]]:
        found = resend.unanswered(self.theirs.fileno())
        assert self.ours.recv(100) == struct.pack("=IiQ", 16, 7, 0)
        return found


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.ours.close()
    kernel.theirs.close()


# Layouts as in <linux/fuse.h>: fuse_mknod_in, fuse_mkdir_in, fuse_create_in, fuse_link_in, fuse_rename_in, fuse_rename2_in.
REQUESTS = [
    (request(6, b"name\0target\0"), Entry(journal.SYMLINK, NODE, b"name", pid=PID)),
    (request(8, struct.pack("=IIII", 0o10644, 0, 0o22, 0) + b"na\xffme\0"), Entry(journal.MKNOD, NODE, b"na\xffme", pid=PID)),
    (request(9, struct.pack("=II", 0o755, 0o22) + b"name\0"), Entry(journal.MKDIR, NODE, b"name", pid=PID)),
    (request(10, b"name\0"), Entry(journal.UNLINK, NODE, b"name", pid=PID)),
    (request(11, b"name\0"), Entry(journal.RMDIR, NODE, b"name", pid=PID)),
    (request(12, struct.pack("=Q", 43) + b"old\0new\0"), Entry(journal.RENAME, NODE, b"old", 43, b"new", pid=PID)),
    (request(13, struct.pack("=Q", 44) + b"name\0"), Entry(journal.LINK, 44, b"", NODE, b"name", pid=PID)),
    (request(35, struct.pack("=IIII", 0o102, 0o100644, 0o22, 0) + b"name\0"), Entry(journal.CREATE, NODE, b"name", pid=PID)),
    (
        request(45, struct.pack("=QII", 43, 2, 0) + b"old\0new\0"),
        Entry(journal.RENAME, NODE, b"old", 43, b"new", flags=2, pid=PID),
    ),
]  # fmt: skip


def test_unanswered_requests_are_told(kernel: Kernel) -> None:
    write = request(16, struct.pack("=QQIIQII", 1, 0, 1 << 20, 0, 0, 0, 0) + bytes(1 << 20))
    getattr_ = request(3, bytes(16))
    kernel.send(write, *(raw for raw, _ in REQUESTS), getattr_)
    assert kernel.unanswered() == ([entry for _, entry in REQUESTS], [])


def test_nothing_is_unanswered(kernel: Kernel) -> None:
    assert kernel.unanswered() == ([], [])


def test_new_requests_end_what_was_sent_again(kernel: Kernel) -> None:
    kernel.send(request(10, b"a\0"), request(10, b"new\0", unique=4), request(10, b"newer\0", unique=6))
    entries, _ = kernel.unanswered()
    assert [entry.name for entry in entries] == [b"a"]


def test_forgotten_nodes_and_interrupts(kernel: Kernel) -> None:
    """Neither are sent again. They come before, between and behind requests."""
    batch = struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 50, 1, 51, 9)
    kernel.send(
        request(2, struct.pack("=Q", 1), unique=0, node=49),
        request(36, struct.pack("=Q", 8), unique=0),
        request(10, b"a\0"),
        request(42, batch, unique=0, node=0),
    )
    entries, forgotten = kernel.unanswered()
    assert [entry.name for entry in entries] == [b"a"]
    assert forgotten == [49, 50, 51]


def test_init_request() -> None:
    flags = 1 << 39 | 1 << 16
    new = request(26, struct.pack("=IIIII44x", 7, 45, 65536, flags & 0xFFFFFFFF, flags >> 32), unique=2)
    old = request(26, struct.pack("=IIII", 7, 31, 65536, 1 << 16), unique=2)
    assert resend.init_flags(new) == flags
    assert resend.init_flags(old) == 1 << 16
    copy = resend.copy_of_init(new)
    assert (copy[:8], copy[16:]) == (new[:8], new[16:])
    assert struct.unpack_from("=Q", copy, 8)[0] not in {0, 2, RESENT | 2}


# --- the store ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A store without its files of our own, with a directory `d` in it."""
    (tmp_path / META).mkdir()
    (tmp_path / "d").mkdir()
    for name in ("a", "b", "d/c"):
        (tmp_path / name).write_text(name)
    os.link(tmp_path / "a", tmp_path / "same as a")
    (tmp_path / "empty").mkdir()
    tree = Tree(Backing(), str(tmp_path), Guard(str(tmp_path)), give_to_caller=False)
    revive.walk(tree)
    return tree


def ino(path: Path) -> int:
    return path.lstat().st_ino


D = -1  # the inode number of the directory `d`, where an entry has it


@pytest.mark.parametrize(
    ("entry", "do"),
    [
        (Entry(journal.UNLINK, 1, b"a"), lambda top: (top / "a").unlink()),
        (Entry(journal.UNLINK, D, b"c"), lambda top: (top / "d/c").unlink()),
        (Entry(journal.RMDIR, 1, b"empty"), lambda top: (top / "empty").rmdir()),
        (Entry(journal.RENAME, 1, b"a", 1, b"new"), lambda top: (top / "a").rename(top / "new")),
        (Entry(journal.RENAME, 1, b"a", D, b"c"), lambda top: (top / "a").rename(top / "d/c")),
        (Entry(journal.RENAME, 1, b"d", 1, b"empty"), lambda top: (top / "d").rename(top / "empty")),
        (Entry(journal.RENAME, 1, b"a", 1, b"new", flags=RENAME_NOREPLACE), lambda top: (top / "a").rename(top / "new")),
        (Entry(journal.RENAME, 1, b"a", 1, b"d", flags=RENAME_EXCHANGE), lambda top: exchange(top / "a", top / "d")),
        (Entry(journal.LINK, D, b"", 1, b"new"), lambda top: os.link(top / "b", top / "new")),
        (Entry(journal.SYMLINK, 1, b"new"), lambda top: (top / "new").symlink_to("a")),
        (Entry(journal.MKDIR, D, b"new"), lambda top: (top / "d/new").mkdir()),
        (Entry(journal.MKNOD, 1, b"new"), lambda top: os.mkfifo(top / "new")),
        (Entry(journal.CREATE, 1, b"new"), lambda top: (top / "new").touch()),
    ],
    ids=lambda value: None if callable(value) else f"{value.op} {value.flags} {value.name.decode()}",
)  # fmt: skip
def test_the_store_says_whether_it_was_done(
    tree: Tree, tmp_path: Path, entry: Entry, do: Callable[[Path], None]
) -> None:
    d = ino(tmp_path / "d")
    if D in {entry.parent, entry.new_parent}:
        entry = entry._replace(**{name: d for name in ("parent", "new_parent") if getattr(entry, name) == D})
    noted = revive.complete(tree, entry)
    assert noted is not None
    assert noted.same_request(entry)
    assert not revive.done(tree, noted)
    do(tmp_path)
    following = Tree(Backing(), str(tmp_path), Guard(str(tmp_path)), give_to_caller=False)
    revive.walk(following)
    assert revive.done(following, noted)


def exchange(one: Path, other: Path) -> None:
    Backing.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), RENAME_EXCHANGE)


@pytest.mark.parametrize("op", [journal.SYMLINK, journal.MKDIR, journal.MKNOD, journal.CREATE])
def test_what_is_there_already_is_not_noted(tree: Tree, op: int) -> None:
    """Making it fails, or opens it, as often as it is asked for."""
    assert revive.complete(tree, Entry(op, 1, b"a")) is None
    assert revive.complete(tree, Entry(journal.LINK, 1, b"", 1, b"a")) is None


@pytest.mark.parametrize(
    "entry",
    [
        Entry(journal.UNLINK, 1, b"nothing"),
        Entry(journal.RMDIR, 1, b"nothing"),
        Entry(journal.RENAME, 1, b"nothing", 1, b"a"),
        Entry(journal.RENAME, 1, b"nothing", 1, b"nothing else"),
        Entry(journal.RENAME, 1, b"nothing", 1, b"a", flags=RENAME_EXCHANGE),
        Entry(journal.RENAME, 1, b"a", 1, b"nothing", flags=RENAME_EXCHANGE),
        Entry(journal.RENAME, 1, b"a", 1, b"b", flags=RENAME_NOREPLACE),
        Entry(journal.RENAME, 1, b"a", 1, b"same as a"),  # two names of one file: rename(2) does nothing
    ],
    ids=lambda entry: f"{entry.op} {entry.flags} {entry.name.decode()} {entry.new_name.decode()}",
)
def test_what_fails_or_does_nothing_was_not_done(tree: Tree, entry: Entry) -> None:
    noted = revive.complete(tree, entry)
    assert noted is None or not revive.done(tree, noted)


def test_what_a_lost_directory_held_was_not_done(tree: Tree) -> None:
    assert not revive.done(tree, Entry(journal.MKDIR, 10**15, b"x"))
    assert not revive.done(tree, Entry(journal.LINK, 1, b"", 10**15, b"x"))
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        revive.complete(tree, Entry(journal.MKDIR, 10**15, b"x"))


def test_every_name_is_known_again(tree: Tree, tmp_path: Path) -> None:
    names = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if META not in path.parts}
    assert set(tree.nodes) == {1} | {ino(path) for path in names.values()}
    for name, path in names.items():
        parent, _, last = name.rpartition("/")
        directory = tree.root if not parent else tree.nodes[ino(tmp_path / parent)]
        assert directory.children[last.encode()] is tree.nodes[ino(path)]
        assert (directory, last.encode()) in tree.nodes[ino(path)].names
    assert sorted(name for _, name in tree.nodes[ino(tmp_path / "a")].names) == [b"a", b"same as a"]
    assert META.encode() not in tree.root.children


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_time_of_a_walk(tmp_path: Path, count: int) -> None:
    """The inode map of a large store. What it has to take is said, and decides nothing: others use the machine as well."""
    top = tmp_path / "store"
    (top / META).mkdir(parents=True)
    for directory in range(count // 100):
        (top / str(directory)).mkdir()
        at = os.open(top / str(directory), os.O_RDONLY)
        for i in range(100):
            os.mknod(f"{i}.blk", stat.S_IFREG | 0o600, dir_fd=at)
        os.close(at)
    try:
        times = []
        for _ in range(2):
            tree = Tree(Backing(), str(top), Guard(str(top)), give_to_caller=False)
            began = time.perf_counter()
            revive.walk(tree)
            times.append(time.perf_counter() - began)
            assert len(tree.nodes) == 1 + count + count // 100
        print(f"{count} files: {min(times):.3f} s to have the inode map back, at most {max(times):.3f} s")
    finally:
        shutil.rmtree(top)
