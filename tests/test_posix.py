"""The mount behaves as ext4 does: the same system calls on both, answers, state and times compared after each.

Most tests are tables in the order of the system calls; then come sequences at random, and what needs several
processes or thousands of names. Where the mount is known to differ, the test says so by name (`test_documented_*`).
Besides these: access times do not move by reading (as with noatime), and no file is longer than 8 TiB.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import stat
from typing import TYPE_CHECKING, Any, Self

import mounts
import posix_ops
import pytest
from posix_ops import (
    AT_SYMLINK_FOLLOW,
    AT_SYMLINK_NOFOLLOW,
    KINDS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    ROOT,
    UTIME_NOW,
    UTIME_OMIT,
    Pair,
    Who,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.root,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(os.geteuid() != 0, reason="makes calls as several users: needs root"),
]

# The users of the tables. Nobody needs an entry in the password file.
A = Who(65534, (65534,))
B = Who(65533, (65533,))
MEMBER = Who(65532, (65532, 65534))  # has A's group as a supplementary one
A_ELSEWHERE = Who(65534, (65533, 65532))  # A without A's own group
IN_A = Who(65532, (65534,))  # another user whose group is A's

PLAIN_KINDS = tuple(kind for kind in KINDS if kind not in ("dir", "symlink"))  # can be linked and replaced
NOT_LINKS = tuple(kind for kind in KINDS if kind != "symlink")
NOT_DIRS = tuple(kind for kind in KINDS if kind != "dir")
O_PATH = os.O_PATH
PAGE_EDGES = (0, 1, 4031, 4032, 4033, 4095, 4096, 4097, 8095, 8096, 8097, 12160, 12161, 40_000)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, mounts.Mount]]:
    """A plain directory and a mount; at the end the store must verify and hold nothing that is not sealed."""
    base = tmp_path_factory.mktemp("posix")
    plain, store = base / "plain", base / "store"
    plain.mkdir()
    plain.chmod(0o755)
    mounts.init(store)
    with mounts.mounted(store, base / "mount") as mount:
        os.chmod(mount.path, 0o755)
        yield plain, mount
    assert mounts.verify(store)
    assert mounts.unsealed(store) == []


@pytest.fixture(scope="module")
def pair(sides: tuple[Path, mounts.Mount]) -> Iterator[Pair]:
    plain, mount = sides
    pair = pair_of(plain, mount.path)
    yield pair
    pair.finish()


def pair_of(plain: Path, path: Path) -> Pair:
    return Pair(str(plain), str(path), rescue=lambda: mounts.abort(mounts.entry_at(path)))


@pytest.fixture
def both(pair: Pair, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A fresh directory on either side; what differs fails the test at its end. Times count where it says so."""
    label = "".join(c if c.isalnum() or c in "_-" else "-" for c in request.node.name)[:60]
    pair.case(label, times="_times" in request.node.name)
    yield pair
    pair.check()


def make(both: Pair, kind: str, path: str, *, by: Who = ROOT, owner: int | None = None) -> None:
    """Create one of each kind of file, of mode 0644 (directories 0755)."""
    match kind:
        case "none":
            return
        case "regular":
            both.create(path, 0o644, by=by, want="ok")
        case "dir":
            both.mkdir(path, 0o755, by=by, want="ok")
        case "fifo":
            both.mkfifo(path, 0o644, by=by, want="ok")
        case "block":
            both.mknod(path, stat.S_IFBLK, 0o644, 1, 2, by=by, want="ok")
        case "char":
            both.mknod(path, stat.S_IFCHR, 0o644, 1, 2, by=by, want="ok")
        case "socket":
            both.bind(path, by=by, want="ok")
        case "symlink":
            both.symlink("test", path, by=by, want="ok")
    if owner is not None:
        both.lchown(path, owner, owner, want="ok")


def remove(both: Pair, kind: str, path: str) -> None:
    if kind == "dir":
        both.rmdir(path, want="ok")
    elif kind != "none":
        both.unlink(path, want="ok")


# --- the differ itself ----------------------------------------------------------------------------------------


def test_two_plain_directories_do_not_differ(tmp_path: Path) -> None:
    pair = plain_pair(tmp_path)
    try:
        for seed in range(2):
            calls = posix_ops.random_calls(seed, 250)
            assert posix_ops.differs(pair, calls, times=True) is None, pair.differences
    finally:
        pair.finish()


def plain_pair(tmp_path: Path) -> Pair:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    return Pair(str(tmp_path / "one"), str(tmp_path / "two"))


def rewrite(path: str, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(data)


TAMPERINGS: dict[str, tuple[Callable[[str], object], str]] = {
    "mode": (lambda top: os.chmod(f"{top}/d", 0o700), "mode"),
    "owner": (lambda top: os.lchown(f"{top}/s", 5, -1), "uid"),
    "group": (lambda top: os.chown(f"{top}/f", -1, 5), "gid"),
    "size": (lambda top: os.truncate(f"{top}/f", 99), "size"),
    "content": (lambda top: rewrite(f"{top}/f", b"x"), "content"),
    "missing": (lambda top: os.unlink(f"{top}/h"), "exists"),
    "additional": (lambda top: os.mkdir(f"{top}/e"), "nlink"),
    "target": (lambda top: (os.unlink(f"{top}/s"), os.symlink("d", f"{top}/s")), "target"),
    "identity": (
        lambda top: (os.unlink(f"{top}/h"), os.link(f"{top}/g", f"{top}/h")),
        "is the same file as",
    ),
    "time set": (lambda top: os.utime(f"{top}/f", ns=(5, 5)), "mtime"),
    "time touched": (lambda top: os.utime(f"{top}/f"), "ctime"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_the_comparison_sees(name: str, tmp_path: Path) -> None:
    """What is changed behind its back on one side alone."""
    tamper, word = TAMPERINGS[name]
    pair = plain_pair(tmp_path)
    try:
        pair.case("tampered", times=True)
        pair.mkdir("d")
        pair.put("f", 1, 100)
        pair.put("g", 1, 100)
        pair.link("f", "h")
        pair.symlink("f", "s")
        pair.check()
        tamper(os.path.join(pair.sides[1].base, pair.current))
        with pytest.raises(AssertionError, match=word):
            pair.check()
        pair.differences.clear()
        pair.chmod(".", 0o711)
        assert not pair.differences, "a known difference is told once"
    finally:
        pair.finish()


def test_a_failing_sequence_is_made_short(tmp_path: Path) -> None:
    """Of a hundred calls the two that matter are left."""
    pair = plain_pair(tmp_path)
    try:
        calls = [(ROOT, "mkdir", (f"d{n}",), {}) for n in range(100)]
        # It differs where the case's own directory is read: its name tells the sides apart through a link.
        os.symlink("/proc/self/fd", tmp_path / "two" / "away")
        calls[30] = (ROOT, "symlink", ("../away", "s"), {})
        calls[60] = (ROOT, "stat", ("s",), {})
        short = posix_ops.shortest(pair, calls)
        assert [name for _, name, _, _ in short] == ["symlink", "stat"]
    finally:
        pair.finish()


# --- every call that takes a path: the errors of path resolution -------------------------------------------------

Step = tuple[str, tuple]
PATH_CALLS: dict[str, Callable[[str], Step]] = {
    "access": lambda p: ("access", (p, os.F_OK)),
    "bind": lambda p: ("bind", (p,)),
    "chmod": lambda p: ("chmod", (p, 0o600)),
    "chown": lambda p: ("chown", (p, 65534, 65534)),
    "lchown": lambda p: ("lchown", (p, 65534, 65534)),
    "link from": lambda p: ("link", (p, "other")),
    "link to": lambda p: ("link", ("file", p)),
    "listdir": lambda p: ("listdir", (p,)),
    "lstat": lambda p: ("lstat", (p,)),
    "mkdir": lambda p: ("mkdir", (p, 0o755)),
    "mkfifo": lambda p: ("mkfifo", (p, 0o644)),
    "mknod": lambda p: ("mknod", (p, stat.S_IFIFO, 0o644)),
    "open": lambda p: ("open", (p, os.O_RDONLY | os.O_NONBLOCK)),
    "open O_CREAT": lambda p: ("open", (p, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)),
    "open O_PATH": lambda p: ("open", (p, O_PATH)),
    "readlink": lambda p: ("readlink", (p,)),
    "rename from": lambda p: ("rename", (p, "other")),
    "rename to": lambda p: ("rename", ("file", p)),
    "rename noreplace": lambda p: ("renameat2", ("file", p, RENAME_NOREPLACE)),
    "rename exchange": lambda p: ("renameat2", ("file", p, RENAME_EXCHANGE)),
    "rmdir": lambda p: ("rmdir", (p,)),
    "stat": lambda p: ("stat", (p,)),
    "symlink": lambda p: ("symlink", ("test", p)),
    "truncate": lambda p: ("truncate", (p, 10)),
    "unlink": lambda p: ("unlink", (p,)),
    "utimensat": lambda p: ("utimensat", (p, (1, 2), (3, 4))),
}
every_path_call = pytest.mark.parametrize("name", PATH_CALLS)


def step(both: Pair, name: str, path: str, by: Who = ROOT) -> None:
    call, args = PATH_CALLS[name](path)
    both.call(call, *args, by=by)
    for leftover in ("other",):
        both.call("rename", leftover, "file") if name.endswith("from") and path != "file" else None


@every_path_call
def test_resolution(name: str, both: Pair) -> None:
    """ENOTDIR, ENOENT, ELOOP, EACCES, ENAMETOOLONG, empty names and odd ones."""
    make(both, "regular", "file")
    both.mkdir("d")
    for kind in NOT_DIRS:
        make(both, kind, f"x-{kind}")
        step(both, name, f"x-{kind}/test")
        step(both, name, f"x-{kind}/")
    both.symlink("loop-b", "loop-a")
    both.symlink("loop-a", "loop-b")
    both.symlink("nowhere", "dangling")
    both.symlink("d", "to-d")
    for path in (
        "nothing/test", "dangling/test", "loop-a", "loop-a/test", "", "d/", "d/.", "d/..", "to-d/", "nothing/",
        "d/../nothing/", ".", "to-d/new", "d//twice", "d/./dot", "dangling",
    ):  # fmt: skip
        step(both, name, path)
    both.mkdir("shut", 0o755)
    make(both, "regular", "shut/file")
    both.chmod("shut", 0o644)
    both.chmod("shut/file", 0o666)
    both.chown(".", 65534, 65534)
    both.chmod(".", 0o755)
    for path in ("shut/file", "shut/new", "shut/file/below"):
        step(both, name, path, A)
    both.chmod("shut", 0o755)
    for path in ("shut/file", "shut/new"):
        step(both, name, path, A)


@every_path_call
def test_name_lengths(name: str, both: Pair) -> None:
    """255 bytes of a name are taken, 256 are not; the same with bytes that are no UTF-8."""
    make(both, "regular", "file")
    for length, filler in itertools.product((255, 256), ("n", "\udcff", "\u00e4")):
        bytes_each = len(os.fsencode(filler))
        path = filler * (length // bytes_each) + "x" * (length % bytes_each)
        assert len(os.fsencode(path)) == length
        step(both, name, path)
        if name in ("link to", "mkdir", "open O_CREAT") and length == 255:
            both.stat(path, want="ok")


def test_path_lengths(both: Pair) -> None:
    """A path of 4,095 bytes is taken, one more is ENAMETOOLONG; every call."""
    make(both, "regular", "file")
    with both.unwatched():
        path = ""
        while len(path) + 128 <= 4000:
            path += "p" * 127 + "/"
            both.mkdir(path[:-1], want="ok")
    full = path + "q" * (4095 - len(path))
    with both.unwatched():
        both.create(full, want="ok")
        both.stat(full, want="ok")
        both.create(full + "q", want="ENAMETOOLONG")
        for name in PATH_CALLS:
            step(both, name, full)
            step(both, name, full + "q")


# --- chmod ----------------------------------------------------------------------------------------------------


def test_chmod(both: Pair) -> None:
    for kind in NOT_LINKS:
        make(both, kind, "n0")
        for mode in (0o111, 0o7777, 0o0, 0o4755, 0o2711, 0o1644, 0o640):
            both.chmod("n0", mode, want="ok")
            assert both.lstat("n0")["mode"] == oct(mode)
        both.symlink("n0", "n1")
        both.chmod("n1", 0o222, want="ok")
        assert both.stat("n1")["mode"] == oct(0o222)
        both.lchmod("n0", 0o333)
        both.lchmod("n1", 0o333)
        both.unlink("n1")
        remove(both, kind, "n0")


def test_chmod_times(both: Pair) -> None:
    """ctime moves with a success, with nothing else; mtime and atime stay."""
    for kind in NOT_LINKS:
        make(both, kind, "n0")
        both.chmod("n0", 0o111, want="ok")
        both.chmod("n0", 0o111, want="ok")
        both.chmod("n0", 0o222, by=A, want="EPERM")
        both.open("n0", os.O_RDONLY | os.O_NONBLOCK, fd="f") if kind in ("regular", "dir", "fifo") else None
        if kind in ("regular", "dir", "fifo"):
            both.fchmod("f", 0o700, want="ok")
            both.close("f")
        remove(both, kind, "n0")


def test_chmod_by_others(both: Pair) -> None:
    """Only the owner may; a group that the caller is not in costs the set-group-ID bit."""
    for kind in ("regular", "dir"):
        make(both, kind, "n0", owner=65534)
        both.chmod("n0", 0o2755, by=A, want="ok")
        assert both.stat("n0")["mode"] == oct(0o2755)
        both.chmod("n0", 0o755, by=A, want="ok")
        both.chmod("n0", 0o2755, by=A_ELSEWHERE, want="ok")
        both.chmod("n0", 0o6755, by=A_ELSEWHERE, want="ok")
        both.chmod("n0", 0o7777, by=A, want="ok")
        for who in (B, MEMBER, IN_A):
            both.chmod("n0", 0o644, by=who, want="EPERM")
        remove(both, kind, "n0")
    for kind in NOT_LINKS:  # the sticky bit by somebody who is not root
        make(both, kind, "n0", owner=65534)
        both.chmod("n0", 0o1644, by=A, want="ok")
        both.chmod("n0", 0o644, by=A, want="ok")
        both.symlink("n0", "n1")
        both.chmod("n1", 0o1755, by=A, want="ok")
        both.chmod("n1", 0o1700, by=B, want="EPERM")
        both.unlink("n1")
        remove(both, kind, "n0")


def test_set_id_bits_end_with_a_change_of_the_data(both: Pair) -> None:
    """By everyone but root, through write, truncate, O_TRUNC and mappings, for executable files and others."""
    for mode, who in itertools.product((0o4777, 0o2777, 0o6777, 0o4766, 0o1777), (ROOT, A, B)):
        for how in ("write", "truncate", "ftruncate", "trunc", "append", "map", "same size", "empty write"):
            both.create("n0", 0o644)
            both.put("n0", 1, 100)
            both.chown("n0", 65534, 65534)
            both.chmod("n0", mode)
            match how:
                case "write":
                    both.open("n0", os.O_WRONLY, fd="f", by=who)
                    both.write("f", 2, 5, by=who)
                    both.fstat("f", by=who)
                case "append":
                    both.open("n0", os.O_WRONLY | os.O_APPEND, fd="f", by=who)
                    both.write("f", 2, 5, by=who)
                case "empty write":
                    both.open("n0", os.O_WRONLY, fd="f", by=who)
                    both.write("f", 2, 0, by=who)
                case "truncate":
                    both.truncate("n0", 10, by=who)
                case "same size":
                    both.truncate("n0", 100, by=who)
                case "ftruncate":
                    both.open("n0", os.O_RDWR, fd="f", by=who)
                    both.ftruncate("f", 200, by=who)
                case "trunc":
                    both.open("n0", os.O_RDWR | os.O_TRUNC, fd="f", by=who)
                case "map":
                    both.open("n0", os.O_RDWR, fd="f", by=who)
                    both.map_write("f", 3, 10, 0, by=who)
            both.unlink("n0")


# --- chown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_chown(kind: str, both: Pair) -> None:
    make(both, kind, "n0")
    both.symlink("n0", "n1")
    chown = "lchown" if kind == "symlink" else "chown"
    for uid, gid in ((123, 456), (0, 0), (-1, 7), (8, -1), (-1, -1), (2**32 - 2, 2**31)):
        both.call(chown, "n0", uid, gid, want="ok")
        both.lchown("n1", uid, gid, want="ok")
        if kind != "symlink":
            both.chown("n1", gid, uid, want="ok")
    # The owner may give it to a group of his, nobody may give it away.
    both.lchown("n0", 65534, 65533)
    for uid, gid in ((-1, 65532), (65534, 65533), (65534, -1)):
        both.call(chown, "n0", uid, gid, by=A_ELSEWHERE, want="ok")
    for uid, gid in ((65533, -1), (0, 0), (-1, 0), (-1, 65531), (65534, 65531)):
        both.call(chown, "n0", uid, gid, by=A_ELSEWHERE, want="EPERM")
    # Others may only ask for nothing.
    both.lchown("n0", 0, 0)
    both.call(chown, "n0", -1, -1, by=A, want="ok")
    for uid, gid in ((65534, -1), (-1, 65534), (65534, 65534), (0, 0)):
        both.call(chown, "n0", uid, gid, by=A, want="EPERM")


@pytest.mark.parametrize("kind", NOT_LINKS)
def test_chown_and_the_set_id_bits(kind: str, both: Pair) -> None:
    make(both, kind, "n0")
    both.symlink("n0", "n1")
    for mode in (0o6555, 0o2755, 0o2745, 0o4755, 0o6644, 0o7777):
        for path, (chown, who, uid, gid) in itertools.product(
            ("n0", "n1"),
            (
                ("chown", ROOT, 65532, 65531),
                ("chown", ROOT, 65534, 65533),
                ("chown", A_ELSEWHERE, 65534, 65532),
                ("chown", A_ELSEWHERE, -1, 65533),
                ("chown", A_ELSEWHERE, -1, -1),
                ("chown", B, -1, -1),
                ("chown", ROOT, -1, -1),
                ("lchown", ROOT, 65534, 65532),
                ("lchown", A_ELSEWHERE, 65534, 65533),
            ),
        ):
            both.chown("n0", 65534, 65533)
            both.chmod("n0", mode)
            both.call(chown, path, uid, gid, by=who)
    if kind == "regular":
        for who, gid in ((ROOT, 65532), (A_ELSEWHERE, 65532), (A_ELSEWHERE, 65531)):
            both.chown("n0", 65534, 65533)
            both.chmod("n0", 0o6755)
            both.open("n0", os.O_RDONLY, fd="f", by=who)
            both.fchown("f", -1, gid, by=who)


def test_chown_times(both: Pair) -> None:
    for kind in KINDS:
        make(both, kind, "n0")
        both.symlink("n0", "n1")
        for path, chown in (
            ("n0", "lchown"),
            ("n1", "lchown"),
            *((("n1", "chown"),) if kind != "symlink" else ()),
        ):
            both.call(chown, path, 65534, 65533, want="ok")
            both.call(chown, path, 65534, 65532, by=A_ELSEWHERE, want="ok")
            both.call(chown, path, 65534, 65532, want="ok")
            both.call(chown, path, -1, -1, want="ok")
            both.call(chown, path, 0, 0, by=A, want="EPERM")
        both.unlink("n1")
        remove(both, kind, "n0")


# --- link -----------------------------------------------------------------------------------------------------


def test_link_times(both: Pair) -> None:
    both.mkdir("d")
    for kind in PLAIN_KINDS:
        make(both, kind, "n0")
        both.link("n0", "n1", want="ok")
        assert both.stat("n0")["nlink"] == 2
        both.link("n1", "d/n2", want="ok")
        both.chmod("n1", 0o201)
        both.chown("n1", 65534, 65533)
        assert both.same_file("n0", "d/n2")
        both.unlink("n0", want="ok")
        both.lstat("n0", want="ENOENT")
        both.unlink("d/n2", want="ok")
        both.unlink("n1", want="ok")
        make(both, kind, "n0")
        both.link("n0", "n1", by=A, want="EPERM" if kind != "regular" else None)
        both.link("n0", "n0", want="EEXIST")
        both.unlink("n0")


def test_link_errors(both: Pair) -> None:
    make(both, "regular", "n0")
    for kind in KINDS:
        make(both, kind, "n1")
        both.link("n0", "n1", want="EEXIST")
        remove(both, kind, "n1")
    both.link("nothing", "n1", want="ENOENT")
    both.mkdir("d")
    both.link("d", "n1", want="EPERM")
    both.link("d", "d/n1", want="EPERM")
    both.chown("d", 65534, 65534)
    both.link("d", "d/n1", by=A)
    both.symlink("n0", "s")
    both.symlink("nothing", "dangling")
    both.link("s", "s1", want="ok")
    assert both.lstat("s1")["type"] == stat.S_IFLNK
    both.link("s", "s2", AT_SYMLINK_FOLLOW, want="ok")
    assert both.lstat("s2")["type"] == stat.S_IFREG
    both.link("dangling", "s3", want="ok")
    both.link("dangling", "s4", AT_SYMLINK_FOLLOW, want="ENOENT")
    both.mkdir("e", 0o755)
    both.chown("e", 65533, 65533)
    make(both, "regular", "d/n0", owner=65534)
    both.link("d/n0", "d/n1", by=A, want="ok")
    both.link("d/n0", "e/n1", by=A, want="EACCES")
    both.chmod("e", 0o777)
    both.link("d/n0", "e/n1", by=A, want="ok")
    both.chmod("d", 0o000)
    both.link("d/n0", "e/n2", by=A, want="EACCES")
    both.open("n0", os.O_RDONLY, fd="f")
    both.unlink("n0")
    both.link_fd("f", "again")  # a file without a name is not linked again


def test_hard_links_in_several_directories(both: Pair) -> None:
    """One inode under many names: data, mode and count are one; renames and removals of some leave the rest."""
    for name in ("d", "e", "d/f"):
        both.mkdir(name)
    both.put("a", 1, 5000)
    names = ["a"]
    for path in ("d/a", "e/a", "d/f/a", "d/b", "e/c"):
        both.link(names[-1], path, want="ok")
        names.append(path)
    both.open("d/f/a", os.O_RDWR, fd="f")
    both.pwrite("f", 2, 100, 4990)
    both.chmod("e/a", 0o640)
    both.unlink("d/a")
    both.truncate("e/c", 4033)
    both.rename("d/f/a", "e/a", want="ok")  # the same file: nothing happens
    both.lstat("d/f/a", want="ok")
    both.rename("a", "d/moved")
    both.rename("d", "g")
    both.put("e/a", 3, 9000)
    both.pread("f", 100, 8950)
    for path in ("g/moved", "g/b", "g/f/a", "e/c", "e/a"):
        both.compare()
        both.unlink(path, want="ok")
        assert both.fstat("f")["nlink"] == {"g/moved": 4, "g/b": 3, "g/f/a": 2, "e/c": 1, "e/a": 0}[path]
    both.pwrite("f", 4, 10, 100)
    both.pread("f", 20, 95)
    both.ftruncate("f", 5)
    both.fstat("f")


# --- mkdir, mkfifo, mknod, symlink, bind -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regular", "dir", "fifo", "block", "char", "socket", "mknod regular", "mknod socket"])
def test_creation(kind: str, both: Pair) -> None:
    """Mode and umask, owner and group, a directory that hands down its group."""

    def create(path: str, mode: int, **more: Any) -> None:
        match kind:
            case "regular":
                both.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode, **more)
            case "dir":
                both.mkdir(path, mode, **more)
            case "fifo":
                both.mkfifo(path, mode, **more)
            case "block" | "char":
                both.mknod(path, stat.S_IFBLK if kind == "block" else stat.S_IFCHR, mode, 259, 70000, **more)
            case "socket":
                both.bind(path, **more)
            case "mknod regular":
                both.mknod(path, stat.S_IFREG, mode, **more)
            case "mknod socket":
                both.mknod(path, stat.S_IFSOCK, mode, **more)

    count = itertools.count()
    for mode, umask in itertools.product((0o755, 0o151, 0o345, 0o7777, 0o2755, 0o0), (0, 0o77, 0o70, 0o501)):
        create(f"m{next(count)}", mode, umask=umask)
    for who in (A, A_ELSEWHERE, B):
        for owner, group, mode in (
            (65534, 65534, 0o755),
            (0, 0, 0o777),
            (0, 65534, 0o775),
            (0, 65533, 0o2777),
            (65534, 7, 0o2755),
        ):
            path = f"d{next(count)}"
            both.mkdir(path)
            both.chown(path, owner, group)
            both.chmod(path, mode)
            create(f"{path}/n", 0o2755, by=who)
            create(f"{path}/m", 0o2775, by=who, umask=0o22)
            create(f"{path}/x", 0o644, by=who, umask=0o22)
    for other in KINDS:
        make(both, other, "there")
        create("there", 0o644)
        remove(both, other, "there")
    both.mkdir("shut", 0o755)
    create("shut/n", 0o644, by=A)
    both.chmod("shut", 0o666)
    create("shut/n", 0o644, by=A)


def test_creation_times(both: Pair) -> None:
    """The new file's times are fresh and the parent's mtime and ctime move; not when it fails."""
    both.mkdir("d", 0o777)
    for kind in KINDS:
        make(both, kind, "d/n0")
        make(both, kind, "d/n1", by=A) if kind not in ("block", "char") else None
        both.mkdir("d/n0", want="EEXIST")
        both.chmod("d", 0o755)
        both.symlink("x", "d/n2", by=A, want="EACCES")
        both.chmod("d", 0o777)
        remove(both, kind, "d/n0")
        if kind not in ("block", "char"):
            remove(both, kind, "d/n1")
    both.create("d/f")
    both.open("d/f", os.O_CREAT | os.O_RDWR)
    both.open("d/f", os.O_CREAT | os.O_RDWR | os.O_EXCL)
    both.open("d/f", os.O_RDWR | os.O_TRUNC)


def test_symlink(both: Pair) -> None:
    for target in (
        "x",
        "../elsewhere",
        "/absolute",
        "t" * 4095,
        "\udcff\udcfe",
        "x" * 59,
        "y" * 60,
        "z" * 61,
        "a//b",
    ):
        both.symlink(target, "s", want="ok")
        assert both.readlink("s") == target
        assert both.lstat("s")["size"] == len(os.fsencode(target))
        both.unlink("s")
    both.symlink("t" * 4096, "s", want="ENAMETOOLONG")
    both.symlink("", "s", want="ENOENT")
    both.put("f", 1, 10)
    path = "f"
    for n in range(41):  # forty are followed, one more is ELOOP
        both.symlink(path, f"l{n}")
        path = f"l{n}"
        if n in (0, 39, 40):
            both.stat(path, want="ELOOP" if n == 40 else "ok")
            both.open(path, os.O_RDONLY)
            both.open(path, os.O_RDONLY | os.O_NOFOLLOW, want="ELOOP")


def test_device_nodes(both: Pair) -> None:
    """Numbers come back as they were given; only root may make them, but anyone the 0:0 of overlay file systems."""
    for n, (major, minor) in enumerate(((0, 0), (1, 3), (255, 255), (4095, 1048575), (259, 4660))):
        for name, kind in (("c", stat.S_IFCHR), ("b", stat.S_IFBLK)):
            both.mknod(f"{name}{n}", kind, 0o600, major, minor, want="ok")
            assert both.lstat(f"{name}{n}")["rdev"] == (major, minor)
    both.chmod(".", 0o777)
    both.mknod("no", stat.S_IFCHR, 0o600, 1, 3, by=A, want="EPERM")
    both.mknod("no", stat.S_IFBLK, 0o600, 1, 3, by=A, want="EPERM")
    both.mknod("whiteout", stat.S_IFCHR, 0o600, 0, 0, by=A, want="ok")
    both.mknod("fifo", stat.S_IFIFO, 0o600, by=A, want="ok")
    both.mknod("dir", stat.S_IFDIR, 0o600, want="EPERM")
    both.mknod("odd", 0o150000, 0o600)
    both.mknod("typeless", 0, 0o600)


def test_fifos_and_sockets_work(both: Pair) -> None:
    both.mkfifo("fifo")
    both.open("fifo", os.O_WRONLY | os.O_NONBLOCK, fd="w", want="ENXIO")
    both.open("fifo", os.O_RDONLY | os.O_NONBLOCK, fd="r", want="ok")
    both.open("fifo", os.O_WRONLY | os.O_NONBLOCK, fd="w", want="ok")
    both.write("w", 1, 50)
    assert both.read("r", 100) == posix_ops.pattern(1, 50)
    both.rename("fifo", "renamed")
    both.write("w", 2, 50)
    both.read("r", 100)
    assert both.talk("socket") == b"through the socket"
    both.open("socket", os.O_RDONLY, want="ENXIO")
    both.truncate("renamed", 0)
    both.truncate("socket", 0)


# --- open -----------------------------------------------------------------------------------------------------

STATES = ("none", "regular", "empty", "dir", "to regular", "to dir", "dangling", "fifo", "socket")


def put_state(both: Pair, state: str) -> None:
    match state:
        case "regular":
            both.put("n0", 1, 5000)
        case "empty":
            both.create("n0", 0o666)
        case "dir" | "fifo" | "socket":
            make(both, state, "n0")
        case "to regular":
            both.put("real", 1, 5000)
            both.symlink("real", "n0")
        case "to dir":
            both.mkdir("real")
            both.symlink("real", "n0")
        case "dangling":
            both.symlink("real", "n0")


def clear_state(both: Pair) -> None:
    for name in ("n0", "real"):
        kind = both.lstat(name)
        if kind is not None:
            both.call("rmdir" if kind["type"] == stat.S_IFDIR else "unlink", name)


@pytest.mark.parametrize("state", STATES)
def test_open_with_every_combination_of_flags(state: str, both: Pair) -> None:
    """O_NONBLOCK is always there: a fifo would block."""
    both.chmod(".", 0o777)
    with both.unwatched():
        put_state(both, state)
    extras = (os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_NOFOLLOW, os.O_DIRECTORY)
    singles = (0, os.O_APPEND, os.O_SYNC, os.O_DSYNC, os.O_NOATIME, os.O_CLOEXEC, O_PATH)
    combinations = [
        accmode | sum(flag for flag, on in zip(extras, chosen, strict=True) if on) | single
        for accmode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
        for chosen in itertools.product((False, True), repeat=len(extras))
        for single in (singles if sum(chosen) <= 1 else (0,))
    ]
    for flags in combinations:
        for who in (ROOT, A):
            changes = flags & (os.O_CREAT | os.O_TRUNC)
            both.watched = bool(changes)
            both.open("n0", flags | os.O_NONBLOCK, 0o640, fd="f", by=who)
            if changes:
                both.watched = False
                clear_state(both)
                put_state(both, state)
    both.watched = True


def test_open_checks_the_mode(both: Pair) -> None:
    """Owner, group, supplementary group and others, each permission, for every way to open."""
    both.put("f", 1, 100)
    both.mkdir("d")
    both.put("d/f", 1, 10)
    both.chown("f", 65534, 65534)
    both.chown("d", 65534, 65534)
    ways = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC)
    for shift, bits in itertools.product((6, 3, 0), range(8)):
        both.chmod("f", bits << shift)
        both.chmod("d", bits << shift)
        both.watched = False
        for who in (A, IN_A, MEMBER, B, ROOT):
            for flags in ways:
                both.open("f", flags, by=who)
            both.put("f", 1, 100)
            for what in (os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK):
                both.access("f", what, by=who)
                both.access("d", what, by=who)
            both.listdir("d", by=who)
            both.stat("d/f", by=who)
            both.create("d/new", by=who)
            both.unlink("d/new", by=who)
            both.unlink("d/new")
        both.watched = True
        both.compare()


def test_open_creates_and_truncates_times(both: Pair) -> None:
    both.mkdir("d", 0o777)
    both.open("d/f", os.O_CREAT | os.O_WRONLY, 0o644)
    both.open("d/f", os.O_CREAT | os.O_RDONLY, 0o644)
    both.put("d/f", 1, 100)
    both.open("d/f", os.O_WRONLY | os.O_TRUNC, want="ok")
    both.open("d/f", os.O_WRONLY | os.O_TRUNC, want="ok")  # empty already: times move all the same
    both.put("d/f", 1, 5000)
    both.open("d/f", os.O_RDWR | os.O_TRUNC, by=A, want="EACCES")
    both.open("d/f", os.O_RDONLY, by=A, want="ok")
    both.open("d/f", os.O_RDWR | os.O_CREAT | os.O_EXCL, want="EEXIST")


def test_open_descriptors_keep_their_rights(both: Pair) -> None:
    """What the mode allowed at open() stays allowed, also under O_CREAT with a mode that allows nothing."""
    both.chmod(".", 0o777)
    both.open("f", os.O_CREAT | os.O_RDWR, 0o000, fd="f", by=A, want="ok")
    both.write("f", 1, 5000, by=A, want="ok")
    both.pread("f", 100, 4000, by=A, want="ok")
    both.open("f", os.O_RDONLY, by=A, want="EACCES")
    both.ftruncate("f", 10, by=A, want="ok")
    both.chown("f", 0, 0)
    both.write("f", 2, 100, by=A, want="ok")
    both.fchmod("f", 0o666, by=A, want="EPERM")
    both.open("g", os.O_CREAT | os.O_WRONLY, 0o444, fd="g", by=A)
    both.pread("g", 10, 0, by=A, want="EBADF")
    both.write("g", 3, 10, by=A, want="ok")
    both.open("g", os.O_RDONLY, fd="h", by=A)
    both.write("h", 3, 10, by=A, want="EBADF")
    both.ftruncate("h", 3, by=A, want="EINVAL")
    both.open("g", O_PATH, fd="p")
    both.read("p", 10, want="EBADF")
    both.fchmod("p", 0o777, want="EBADF")
    both.fstat("p", want="ok")


def test_append(both: Pair) -> None:
    both.put("f", 1, 4000)
    both.open("f", os.O_RDWR | os.O_APPEND, fd="one")
    both.open("f", os.O_RDWR | os.O_APPEND, fd="two")
    for n in range(20):
        both.write("one", n, 37)
        both.write("two", 100 + n, 501)
    both.pwrite("one", 7, 10, 0)  # Linux appends here too
    both.lseek("one", 0, os.SEEK_CUR)
    both.ftruncate("two", 100)
    both.write("one", 9, 5000)
    both.lseek("one", 5, os.SEEK_SET)
    both.read("one", 20)
    both.write("one", 10, 1)


def test_executing_and_writing_exclude_each_other(both: Pair) -> None:
    both.copy_in("/bin/sleep", "sleep")
    both.execute("./sleep", "0", want="ok")
    both.start("./sleep", "60", want="ok")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        both.open("sleep", flags, want="ETXTBSY")
    both.truncate("sleep", 10, want="ETXTBSY")
    both.rename("sleep", "renamed", want="ok")
    both.put("other", 1, 10)
    both.rename("other", "renamed", want="ok")
    both.stop("./sleep")
    both.copy_in("/bin/true", "true")
    both.open("true", os.O_WRONLY, fd="f")
    both.execute("./true", want="ETXTBSY")
    both.close("f")
    both.execute("./true", want="ok")
    both.chmod("true", 0o644)
    both.execute("./true", want="EACCES")
    both.chmod("true", 0o711)
    assert both.execute("./true", by=A) == 0


# --- rename ---------------------------------------------------------------------------------------------------


def test_rename_times(both: Pair) -> None:
    both.mkdir("d")
    for kind in KINDS:
        make(both, kind, "n0")
        both.rename("n0", "n1", want="ok")
        both.lstat("n0", want="ENOENT")
        both.rename("n1", "d/n1", want="ok")
        if kind in PLAIN_KINDS:
            both.link("d/n1", "n0")
            both.rename("n0", "n2", want="ok")
            both.rename("n2", "d/n1", want="ok")  # the same file: both names stay
            both.lstat("n2", want="ok")
            both.unlink("n2")
        both.rename("d/n1", "n3", by=A, want="EACCES")
        both.rename("d/n1", "d/n1", want="ok")
        remove(both, kind, "d/n1")


@pytest.mark.parametrize("kind", KINDS)
def test_rename_over(kind: str, both: Pair) -> None:
    """Every kind over every kind, plain, with NOREPLACE and with EXCHANGE."""
    for other in (*KINDS, "none", "full dir"):
        for flags in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            make(both, kind, "n0")
            if other == "full dir":
                both.mkdir("n1")
                both.create("n1/inside")
            else:
                make(both, other, "n1")
            if flags:
                both.renameat2("n0", "n1", flags)
            else:
                both.rename("n0", "n1")
            both.unlink("n1/inside")
            both.unlink("n0/inside")
            for name in ("n0", "n1"):
                both.unlink(name)
                both.rmdir(name)


@pytest.mark.parametrize("sticky", ["source", "target"])
@pytest.mark.parametrize("kind", KINDS)
def test_rename_and_the_sticky_bit(kind: str, sticky: str, both: Pair) -> None:
    """Who may take a name out of a sticky directory, or replace one in it."""
    both.mkdir("from")
    both.mkdir("to")
    both.chmod("from", 0o1777 if sticky == "source" else 0o777)
    both.chmod("to", 0o1777 if sticky == "target" else 0o777)
    folder = "from" if sticky == "source" else "to"
    for directory, file in itertools.product((65534, 0, 65533), repeat=2):
        both.chown(folder, directory, directory)
        for other in ("none", "regular", "symlink", "dir"):
            if (kind == "dir") != (other == "dir") and other != "none":
                continue
            if sticky == "target" and other == "none":
                continue
            make(both, kind, "from/n", owner=file if sticky == "source" else 65534)
            make(both, other, "to/n", owner=65534 if sticky == "source" else file)
            both.rename("from/n", "from/m", by=A)
            both.rename("from/m", "from/n")
            both.rename("from/n", "to/n", by=A)
            both.rename("to/n", "from/back", by=A)
            with both.unwatched():
                for name in ("from/n", "from/back", "to/n"):
                    both.unlink(name)
                    both.rmdir(name)


def test_rename_directories(both: Pair) -> None:
    for name in ("a", "a/b", "a/b/c", "d", "e"):
        both.mkdir(name)
    both.put("a/b/c/f", 1, 5000)
    both.open("a/b/c/f", os.O_RDWR, fd="f")
    both.open("a/b", os.O_RDONLY | os.O_DIRECTORY, fd="dir")
    both.rename("a", "a/b", want="EINVAL")
    both.rename("a", "a/b/c/x", want="EINVAL")
    both.rename("a/b/c", "a", want="ENOTEMPTY")
    both.rename("a/b", "d/b", want="ok")
    assert both.same_file("d/b/..", "d")
    assert (both.stat("a")["nlink"], both.stat("d")["nlink"]) == (2, 3)
    both.write("f", 2, 6000)
    both.stat("d/b/c/f")
    both.rename("d", "z", want="ok")
    both.create("z/b/c/new", want="ok")
    both.pread("f", 100, 4000)
    both.put("z/b/c/f", 3, 77)
    both.pread("f", 100, 0)
    both.rename("z/b", "e", want="ok")  # over an empty directory
    both.rename("e/c/f", "f", want="ok")
    both.write("f", 4, 10)
    both.rename("e", "z", want="ok")
    both.rename("z", ".", want="EBUSY")
    both.rename("z/.", "y")
    both.rename("z/..", "y")
    both.rename("z/", "y/", want="ok")
    both.renameat2("y", "y/c", RENAME_EXCHANGE, want="EINVAL")
    both.renameat2("y/c", "y", RENAME_EXCHANGE)
    both.mkdir("q")
    both.create("q/1")
    both.renameat2("y", "q", RENAME_EXCHANGE, want="ok")
    both.renameat2("q/c", "f", RENAME_EXCHANGE, want="ok")
    both.renameat2("q", "y", RENAME_EXCHANGE | RENAME_NOREPLACE, want="EINVAL")
    both.renameat2("q", "nothing", RENAME_EXCHANGE, want="ENOENT")
    both.renameat2("q", "new", 64, want="EINVAL")


def test_rename_needs_write_access_to_both(both: Pair) -> None:
    for name in ("mine", "theirs", "open"):
        both.mkdir(name)
    both.chown("mine", 65534, 65534)
    both.chown("theirs", 65533, 65533)
    both.chmod("open", 0o777)
    for kind in ("regular", "dir", "symlink"):
        for source, target in itertools.permutations(("mine", "theirs", "open"), 2):
            for owner in (65534, 65533):
                make(both, kind, f"{source}/n", owner=owner)
                both.rename(f"{source}/n", f"{target}/n", by=A)
                both.renameat2(f"{source}/n", f"{target}/n", RENAME_NOREPLACE, by=B)
                for folder in (source, target):
                    both.unlink(f"{folder}/n")
                    both.rmdir(f"{folder}/n")


def test_rename_leaves_a_whiteout(both: Pair) -> None:
    """RENAME_WHITEOUT, which overlay file systems use: a 0:0 device stands where the name was."""
    both.put("n0", 1, 5000)
    both.renameat2("n0", "n1", RENAME_WHITEOUT, want="ok")
    assert both.lstat("n0")["rdev"] == (0, 0)
    both.renameat2("n1", "n0", RENAME_WHITEOUT, want="ok")
    both.open("n0", os.O_RDONLY, fd="f")
    both.pread("f", 60, 4940)
    both.unlink("n1")
    both.mkdir("d")
    both.renameat2("d", "e", RENAME_WHITEOUT, want="ok")
    both.renameat2("n0", "e/n", RENAME_WHITEOUT | RENAME_EXCHANGE, want="EINVAL")
    both.renameat2("n0", "e/n", RENAME_WHITEOUT | RENAME_NOREPLACE)
    both.renameat2("n0", "e/m", RENAME_WHITEOUT | RENAME_NOREPLACE)


def roots(pair: Pair) -> list[posix_ops.Worker]:
    return [side.workers[ROOT] for side in pair.sides]


# --- rmdir and unlink -----------------------------------------------------------------------------------------


def test_rmdir_times(both: Pair) -> None:
    both.mkdir("d", 0o777)
    both.mkdir("d/e")
    both.rmdir("d/e", want="ok")
    for kind in KINDS:
        both.mkdir("d/e")
        make(both, kind, "d/e/n")
        both.rmdir("d/e", want="ENOTEMPTY")
        remove(both, kind, "d/e/n")
        both.rmdir("d/e", want="ok")
        if kind != "dir":
            make(both, kind, "d/n")
            both.rmdir("d/n", want="ENOTDIR")
            both.unlink("d/n")
    both.mkdir("d/e")
    both.chmod("d", 0o755)
    both.rmdir("d/e", by=A, want="EACCES")
    both.rmdir("d/e/.", want="EINVAL")
    both.rmdir("d/e/..", want="ENOTEMPTY")
    both.unlink("d/e", want="EISDIR")


def test_a_removed_directory_that_is_open(both: Pair) -> None:
    both.mkdir("d")
    both.create("d/f")
    both.open("d", os.O_RDONLY | os.O_DIRECTORY, fd="d")
    both.unlink("d/f")
    both.rmdir("d")
    assert both.fstat("d")["nlink"] == 0
    both.fchmod("d", 0o700)
    both.fsync("d")
    both.fstat("d")
    both.mkdir("e")
    both.open("e", os.O_RDONLY | os.O_DIRECTORY, fd="e")
    both.mkdir("g")
    both.rename("g", "e")
    both.fstat("e")
    both.mkdir("h")
    both.chdir("h", by=B)
    both.rmdir("h")
    for call, args in (
        ("create", ("x",)),
        ("mkdir", ("x",)),
        ("listdir", (".",)),
        ("stat", (".",)),
        ("stat", ("x",)),
    ):
        both.call(call, *args, by=B)


def test_unlink_times(both: Pair) -> None:
    both.mkdir("d")
    for kind in NOT_DIRS:
        make(both, kind, "d/n0")
        if kind in PLAIN_KINDS:
            both.link("d/n0", "n1")
            both.unlink("d/n0", want="ok")
            both.rename("n1", "d/n0")
        both.unlink("d/n0", by=A, want="EACCES")
        both.unlink("d/n0", want="ok")
    both.mkdir("d/e")
    both.unlink("d/e", want="EISDIR")


@pytest.mark.parametrize("remover", ["unlink", "rmdir"])
def test_removal_and_the_sticky_bit(remover: str, both: Pair) -> None:
    both.mkdir("d")
    for mode in (0o1777, 0o777, 0o1755):
        both.chmod("d", mode)
        for kind in ("dir",) if remover == "rmdir" else NOT_DIRS:
            for directory, file in itertools.product((65534, 0, 65533), repeat=2):
                both.chown("d", directory, directory)
                make(both, kind, "d/n", owner=file)
                both.call(remover, "d/n", by=A)
                both.call(remover, "d/n")


def test_files_live_on_without_a_name(both: Pair) -> None:
    """Unlinked, or replaced by a rename, or their directory removed: an open file stays whole."""
    both.mkdir("d")
    for how in ("unlink", "rename", "exchange"):
        both.put("d/f", 1, 10_000)
        both.open("d/f", os.O_RDWR, fd="f")
        both.open("d/f", os.O_RDONLY, fd="g", by=A)
        both.open("d/f", os.O_WRONLY | os.O_APPEND, fd="h")
        match how:
            case "unlink":
                both.unlink("d/f")
            case "rename":
                both.put("new", 2, 300)
                both.rename("new", "d/f")
            case "exchange":
                both.put("new", 2, 300)
                both.renameat2("new", "d/f", RENAME_EXCHANGE)
                both.unlink("new")
        assert both.fstat("f")["nlink"] == 0
        both.unlink("d/f")
        both.create("d/f")  # the backing file system may give it the same inode number one day
        both.put("d/f", 5, 20)
        both.fchmod("f", 0o600)
        both.fchown("f", 65534, 65533)
        both.futimens("f", (7, 8), (9, 10))
        both.fstat("f")
        both.pread("g", 50, 9980, by=A)
        both.pwrite("f", 3, 5000, 8000)
        both.write("h", 4, 50)
        both.fsync("f")
        both.pread("g", 100, 12_990, by=A)
        both.ftruncate("f", 4032)
        both.read("g", 60, by=A)
        both.fstat("g", by=A)
        both.ftruncate("f", 0)
        both.fstat("g", by=A)
        both.write("h", 6, 70)
        both.map_read("f", 60, 0)
        both.link_fd("f", "back")
        for fd in "fh":
            both.close(fd)
        both.close("g", by=A)
        both.unlink("d/f")
    both.put("d/f", 1, 10)
    both.open("d/f", os.O_RDWR, fd="f")
    both.unlink("d/f")
    both.rmdir("d", want="ok")
    both.write("f", 2, 10_000)
    both.pread("f", 100, 9_950)


@pytest.mark.parametrize("kind", NOT_LINKS)
def test_a_file_without_a_name_keeps_its_attributes(kind: str, both: Pair) -> None:
    """Held by a descriptor that only names it (O_PATH), or by an open fifo or directory."""
    for flags in (O_PATH, os.O_RDWR | os.O_NONBLOCK if kind == "fifo" else os.O_RDONLY):
        if flags != O_PATH and kind in ("block", "char", "socket"):
            continue
        make(both, kind, "n0")
        both.open("n0", flags, fd="f", want="ok")
        remove(both, kind, "n0")
        assert both.fstat("f")["nlink"] == 0
        make(both, kind, "n0")  # it may get the inode number of the other, if that is let go
        both.fstat("f")
        if flags != O_PATH:
            both.fchmod("f", 0o600)
            both.fchown("f", 5, 6)
            both.futimens("f", (1, 2), (3, 4))
            both.fstat("f")
        remove(both, kind, "n0")


# --- truncate and ftruncate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["path", "descriptor"])
def test_truncate_times(through: str, both: Pair) -> None:
    """Up and down over every page edge; what comes back is zeros; times move, through a descriptor also without a change
    of size."""
    both.times = True
    both.put("f", 1, 20_000)
    both.open("f", os.O_RDWR, fd="f")

    def cut(size: int, **more: Any) -> None:
        both.truncate("f", size, **more) if through == "path" else both.ftruncate("f", size, **more)

    for low, high in itertools.product(PAGE_EDGES[::2], PAGE_EDGES[1::2]):
        both.times = low in (4031, 4033) and high in (4032, 8096)
        cut(high, want="ok")
        if through == "descriptor":
            cut(high, want="ok")
        cut(low, want="ok")
        cut(high, want="ok")
        both.pwrite("f", low + high, 3, max(high - 2, 0))
    both.times = True
    cut(-1, want="EINVAL")
    cut(0)
    if through == "descriptor":
        cut(0)


def test_truncate_errors_times(both: Pair) -> None:
    both.put("f", 1, 100)
    both.truncate("f", 10, by=A, want="EACCES")
    both.chmod("f", 0o666)
    both.truncate("f", 10, by=A, want="ok")
    both.mkdir("d")
    both.truncate("d", 0, want="EISDIR")
    both.open("f", os.O_RDONLY, fd="r")
    both.ftruncate("r", 0, want="EINVAL")
    both.ftruncate("r", -1, want="EINVAL")
    both.chmod("f", 0o200)
    both.chown("f", 65534, 65534)
    both.truncate("f", 5, by=A, want="ok")
    both.chmod("f", 0o400)
    both.truncate("f", 0, by=A, want="EACCES")
    both.open("f", os.O_RDWR, fd="rw")
    both.unlink("f")
    both.ftruncate("rw", 50)
    both.fstat("rw")


def test_sizes_that_no_file_can_have(both: Pair) -> None:
    """More than ext4 can hold is EFBIG at once, and the file is as it was."""
    both.put("f", 1, 100)
    both.open("f", os.O_RDWR, fd="f")
    for size in (999_999_999_999_999, 1 << 60, (1 << 63) - 1):
        both.truncate("f", size, want="EFBIG")
        both.ftruncate("f", size, want="EFBIG")
    both.lseek("f", -1, os.SEEK_SET, want="EINVAL")


# --- utimensat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_utimensat_times(kind: str, both: Pair) -> None:
    both.times = True
    make(both, kind, "n0")
    nofollow = AT_SYMLINK_NOFOLLOW if kind == "symlink" else 0
    now, omit = (0, UTIME_NOW), (0, UTIME_OMIT)
    for atime, mtime in (
        ((1_900_000_000, 0), (1_950_000_000, 0)),
        ((100_000_000, 100_000_000), (200_000_000, 200_000_000)),
        ((1, 999_999_999), (2, 1)),
        (now, (5, 6)),
        ((7, 8), now),
        (omit, (9, 10)),
        ((11, 12), omit),
        (now, now),
        (omit, omit),
        (now, omit),
        (omit, now),
        ((2**31, 0), (2**32, 0)),
        ((-1, 5), (-(2**31), 0)),
        ((2**33, 1), (2**33 + 2**32, 999_999_999)),
        ((0, 0), (0, 0)),
    ):
        both.utimensat("n0", atime, mtime, nofollow, want="ok")
    both.utimensat("n0", None, None, nofollow, want="ok")
    both.utimensat("n0", (1, 1_000_000_000), (1, 0), nofollow, want="EINVAL")
    both.utimensat("n0", (1, 0), (1, -1), nofollow, want="EINVAL")
    if kind == "symlink":
        both.create("test")
        both.utimensat("n0", (3, 4), (5, 6), want="ok")  # through the link


def test_utimensat_needs_rights_times(both: Pair) -> None:
    """Now is for everyone who may write, other times for the owner alone, nothing at all for everyone."""
    now, omit, moment = (0, UTIME_NOW), (0, UTIME_OMIT), (1_900_000_000, 7)
    for kind in ("regular", "dir", "fifo"):
        for owner, mode in ((0, 0o644), (0, 0o666), (65534, 0o444), (65534, 0o000), (65533, 0o666)):
            make(both, kind, "n0", owner=owner)
            both.chmod("n0", mode)
            for atime, mtime in (
                (now, now), (omit, omit), (moment, moment), (omit, moment), (moment, omit), (now, omit), (omit, now),
                (now, moment),
            ):  # fmt: skip
                both.utimensat("n0", atime, mtime, by=A)
            both.utimensat("n0", None, by=A)
            remove(both, kind, "n0")


def test_times_that_were_set_stay(both: Pair) -> None:
    """Under a write that is still in the cache, a later chmod, a close, a rename, and the other way round."""
    both.open("f", os.O_CREAT | os.O_RDWR, fd="f")
    both.write("f", 1, 10_000)
    both.utimensat("f", (11, 12), (13, 14))
    both.chmod("f", 0o600)
    both.rename("f", "g")
    both.fsync("f")
    both.close("f")
    both.open("g", os.O_RDWR, fd="f")
    both.write("f", 2, 10)
    both.futimens("f", (15, 16), (17, 18))
    both.fdatasync("f")
    both.close("f")
    both.link("g", "h")
    both.chown("h", 65534, 65534)
    both.open("h", os.O_RDWR, fd="f")
    both.futimens("f", (0, UTIME_OMIT), (19, 20))
    both.pwrite("f", 3, 10, 100)
    both.close("f")


# --- data -----------------------------------------------------------------------------------------------------


def test_writes_times(both: Pair) -> None:
    both.open("f", os.O_CREAT | os.O_RDWR, fd="f")
    both.write("f", 1, 100)
    both.write("f", 1, 0)
    both.pwrite("f", 2, 10, 10)
    both.read("f", 10)
    both.pwrite("f", 2, 10, 9000)
    both.fsync("f")
    both.close("f")
    both.open("f", os.O_RDWR | os.O_SYNC, fd="f")
    both.write("f", 3, 5000)
    both.ftruncate("f", 100)
    both.ftruncate("f", 100)
    both.map_write("f", 4, 10, 0, sync=True)
    both.close("f")


def test_writes_at_page_edges(both: Pair) -> None:
    both.open("f", os.O_CREAT | os.O_RDWR, fd="f")
    for n, (edge, shift, size) in enumerate(
        itertools.product((4032, 4096, 8096, 8192, 12_160), (-2, -1, 0, 1), (1, 2, 4064))
    ):
        both.watched = n % 8 == 0
        both.pwrite("f", n, size, edge + shift)
        both.pread("f", 60, edge + shift - 10)
    both.watched = True
    both.compare()


def test_sparse_writes_read_as_zeros(both: Pair) -> None:
    both.open("f", os.O_CREAT | os.O_RDWR, fd="f")
    for offset in (100, 4032, 9000, 70_000, 1_000_003):
        both.lseek("f", offset, os.SEEK_SET)
        both.write("f", offset, 7)
        both.pread("f", 60, offset - 55)
        both.pread("f", 60, offset // 2)
    both.lseek("f", 0, os.SEEK_END)
    both.lseek("f", 10_000, os.SEEK_END)
    both.read("f", 10)
    both.pread("f", 10, 1_000_005)
    both.pread("f", 10, 2_000_000)
    both.ftruncate("f", 50_000)
    both.ftruncate("f", 120_000)
    both.pread("f", 64, 69_990)


def test_mappings_and_descriptors_see_each_other(both: Pair) -> None:
    both.put("f", 1, 20_000)
    both.open("f", os.O_RDWR, fd="f")
    both.open("f", os.O_RDONLY, fd="g", by=B)
    both.map_keep("f", "view")
    both.poke("view", 2, 50, 4000)
    both.pread("g", 60, 3995, by=B)
    both.pwrite("f", 3, 50, 8090)
    both.peek("view", 60, 8085)
    both.poke("view", 4, 5000, 10_000, sync=True)
    both.close("f")
    both.poke("view", 5, 10, 19_990)  # through the mapping alone
    both.pread("g", 50, 19_960, by=B)
    both.rename("f", "moved")
    both.unlink("moved")
    both.poke("view", 6, 10, 0)
    both.pread("g", 50, 0, by=B)
    both.map_drop("view")
    both.fstat("g", by=B)
    both.put("small", 1, 10)
    both.open("small", os.O_RDONLY, fd="r")
    both.map_write("r", 1, 5, 0)  # refused: the descriptor is not for writing
    both.map_read("r", 10, 0)


def test_copies_inside(both: Pair) -> None:
    both.put("f", 1, 50_000)
    both.open("f", os.O_RDONLY, fd="f")
    both.open("g", os.O_CREAT | os.O_RDWR, fd="g")
    both.copy_range("f", "g", 20_000, 100, 4000)
    both.sendfile("f", "g", 5000, 4030)
    both.copy_range("f", "g", 10, 60_000, 0)


def test_seek_for_data(both: Pair) -> None:
    """A file without holes answers alike."""
    both.put("f", 1, 10_000)
    both.open("f", os.O_RDWR, fd="f")
    both.fsync("f")
    for offset in (0, 5, 9_999, 10_000, 20_000):
        both.lseek("f", offset, os.SEEK_DATA)
        both.lseek("f", offset, os.SEEK_HOLE)


def test_posix_fallocate(both: Pair) -> None:
    both.put("f", 1, 100)
    both.open("f", os.O_RDWR, fd="f")
    for offset, size in ((0, 10), (50, 100), (10_000, 5_000), (0, 20_000)):
        both.posix_fallocate("f", offset, size, want="ok")
    both.posix_fallocate("f", 0, 0, want="EINVAL")
    both.posix_fallocate("f", -1, 10, want="EINVAL")


def test_documented_fallocate_is_not_supported(both: Pair, pair: Pair) -> None:
    """There are no holes to make and no blocks to reserve: EOPNOTSUPP, and programs write instead."""
    both.put("f", 1, 100)
    both.open("f", os.O_RDWR, fd="f")
    for mode in (0, 1, 3, 0x10):
        answer = roots(pair)[1].ask("fallocate", ("f", mode, 0, 50), {})
        assert answer == ("error", errno.errorcode[errno.EOPNOTSUPP])


def test_documented_truncate_by_path_to_the_same_size_is_no_change(both: Pair, pair: Pair) -> None:
    """With the writeback cache the kernel keeps a file's times itself, and sees no change here."""
    both.put("f", 1, 100)
    for worker, moves in zip(roots(pair), (True, False), strict=True):
        worker.ask("utimensat", ("f", (1, 2), (3, 4)), {})
        assert worker.ask("truncate", ("f", 100), {}) == ("ok", None)
        assert (worker.ask("stat", ("f",), {})[1]["mtime"] != 3_000_000_004) is moves


def test_documented_no_extended_attributes(both: Pair, pair: Pair) -> None:
    """Not kept: the kernel would ask for one before every write. EOPNOTSUPP where ext4 says that there is none."""
    both.create("f")
    assert [worker.ask("getxattr", ("f", "user.x"), {}) for worker in roots(pair)] == [
        ("error", "ENODATA"),
        ("error", errno.errorcode[errno.EOPNOTSUPP]),
    ]


def test_documented_devices_do_not_open(both: Pair, pair: Pair) -> None:
    """The mount is nodev and nosuid, as every FUSE mount is by default."""
    both.mknod("null", stat.S_IFCHR, 0o666, 1, 3)
    assert [worker.ask("open", ("null", os.O_RDWR), {}) for worker in roots(pair)] == [
        ("ok", None),
        ("error", "EACCES"),
    ]


def test_documented_set_group_id_without_execute_stays(both: Pair, pair: Pair) -> None:
    """Such a file is no program, the bit once meant mandatory locks. ext4 clears it at a write by a stranger to the
    group, the kernel's FUSE does not ask the daemon to."""
    both.put("f", 1, 10)
    both.chmod("f", 0o2666)
    both.stat("f", by=B)
    modes = []
    for end, root in zip((side.workers[B] for side in pair.sides), roots(pair), strict=True):
        assert end.ask("open", ("f", os.O_WRONLY), {"fd": "f"}) == ("ok", None)
        assert end.ask("write", ("f", 1, 5), {}) == ("ok", 5)
        modes.append(root.ask("stat", ("f",), {})[1]["mode"])
        assert root.ask("chmod", ("f", 0o666), {}) == ("ok", None)
    assert modes[0] == oct(0o666)
    assert modes[1] in (oct(0o666), oct(0o2666))


# --- locks, several processes ---------------------------------------------------------------------------------


def test_locks(both: Pair) -> None:
    both.put("f", 1, 100)
    both.chmod("f", 0o666)
    for who in (A, B):
        both.open("f", os.O_RDWR, fd="f", by=who)
    shared, exclusive, no = fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_EX | fcntl.LOCK_NB, "EAGAIN"
    both.flock("f", exclusive, by=A, want="ok")
    both.flock("f", exclusive, by=B, want=no)
    both.flock("f", shared, by=B, want=no)
    both.flock("f", shared, by=A, want="ok")
    both.flock("f", shared, by=B, want="ok")
    both.flock("f", exclusive, by=A, want=no)
    both.flock("f", fcntl.LOCK_UN, by=B, want="ok")
    both.flock("f", exclusive, by=A, want="ok")
    both.lockf("f", exclusive, 10, 0, by=B, want="ok")
    both.lockf("f", exclusive, 10, 5, by=A, want=no)
    both.lockf("f", exclusive, 10, 10, by=A, want="ok")
    both.lockf("f", shared, 0, 0, by=B, want=no)
    both.close("f", by=A)
    both.lockf("f", shared, 0, 0, by=B, want="ok")
    both.flock("f", exclusive, by=B, want="ok")


def test_two_processes_append(both: Pair) -> None:
    """Nothing is lost or torn when two processes append to one file in turns and at once."""
    both.chmod(".", 0o777)
    both.create("f", 0o666)
    both.chmod("f", 0o666)
    for who in (A, B):
        both.open("f", os.O_WRONLY | os.O_APPEND, fd="f", by=who)
    for n in range(30):
        both.watched = n % 10 == 0
        both.write("f", n, 100 + 37 * n, by=(A, B)[n % 2])
    both.watched = True
    for side in both.sides:
        workers = [side.workers[who] for who in (A, B)]
        before = os.path.getsize(os.path.join(side.base, both.current, "f"))
        for n in range(200):
            for worker, seed in zip(workers, (1, 2), strict=True):
                worker.send("write", ("f", 1000 * seed + n, 333), {})
            for worker in workers:
                assert worker.receive() == ("ok", 333)
        with open(os.path.join(side.base, both.current, "f"), "rb") as file:
            file.seek(before)
            added = file.read()
        records = [added[at : at + 333] for at in range(0, len(added), 333)]
        for seed in (1, 2):
            mine = [posix_ops.pattern(1000 * seed + n, 333) for n in range(200)]
            assert [record for record in records if record in set(mine)] == mine, (
                f"appends of one process in {side.base}"
            )
        assert len(records) == 400
        os.unlink(os.path.join(side.base, both.current, "f"))


# --- at random ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_calls(seed: int, pair: Pair) -> None:
    """Hundreds of calls by several users in a small name space; a failure shows the shortest sequence."""
    times = seed >= 6
    calls = posix_ops.random_calls(seed, 150 if times else 450)
    stop = posix_ops.differs(pair, calls, f"random-{seed}", times=times)
    if stop is not None:
        first = "\n".join([*pair.differences, pair.story()])
        posix_ops.shortest(pair, calls[:stop], times=times)
        pair.check()
        raise AssertionError(f"seed {seed}: differed at call {stop}, but not again:\n{first}")


def test_random_calls_without_writeback(tmp_path: Path) -> None:
    """The same where the daemon keeps sizes and times, not the kernel."""
    plain, store, path = tmp_path / "plain", tmp_path / "store", tmp_path / "mount"
    plain.mkdir(mode=0o755)
    mounts.init(store)
    with mounts.mounted(store, path, "--no-writeback"):
        os.chmod(path, 0o755)
        pair = pair_of(plain, path)
        try:
            for seed, count, times in ((31, 150, True), (32, 400, False)):
                calls = posix_ops.random_calls(seed, count)
                stop = posix_ops.differs(pair, calls, times=times)
                if stop is not None:
                    posix_ops.shortest(pair, calls[:stop], times=times)
                assert stop is None, "\n".join([*pair.differences, pair.story()])
        finally:
            pair.finish()
    assert mounts.verify(store)


# --- directories ----------------------------------------------------------------------------------------------


class Dirent(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_ulong),
        ("off", ctypes.c_long),
        ("reclen", ctypes.c_ushort),
        ("type", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    )


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.opendir.restype = ctypes.c_void_p
LIBC.readdir.restype = ctypes.POINTER(Dirent)
LIBC.readdir.argtypes = LIBC.telldir.argtypes = LIBC.rewinddir.argtypes = LIBC.closedir.argtypes = [ctypes.c_void_p]
LIBC.telldir.restype = ctypes.c_long
LIBC.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Directory:
    """opendir(3) and its companions."""

    def __init__(self, path: Path) -> None:
        self.stream = LIBC.opendir(os.fsencode(path))
        assert self.stream, os.strerror(ctypes.get_errno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        LIBC.closedir(self.stream)

    def next(self) -> Dirent | None:
        entry = LIBC.readdir(self.stream)
        return entry.contents if entry else None

    def names(self, limit: int = 1 << 30) -> list[bytes]:
        found: list[bytes] = []
        while len(found) < limit and (entry := self.next()) is not None:
            found.append(entry.name)
        return found

    def tell(self) -> int:
        place: int = LIBC.telldir(self.stream)
        return place

    def seek(self, place: int) -> None:
        LIBC.seekdir(self.stream, place)

    def rewind(self) -> None:
        LIBC.rewinddir(self.stream)


@pytest.fixture(params=["ext4", "mount"])
def folder(request: pytest.FixtureRequest, sides: tuple[Path, mounts.Mount]) -> Path:
    """A fresh directory, on the plain side (the test itself is right) and on the mount (the mount is)."""
    base = sides[0] if request.param == "ext4" else sides[1].path
    path: Path = base / f"folder-{request.node.name}"[:200].replace("[", "-").replace("]", "")
    path.mkdir()
    return path


def fill(folder: Path, count: int, prefix: str = "n") -> set[bytes]:
    names = {f"{prefix}{n:05d}" for n in range(count)}
    for name in names:
        os.close(os.open(folder / name, os.O_CREAT | os.O_WRONLY))
    return {os.fsencode(name) for name in names}


def test_listing_thousands_while_names_come_and_go(folder: Path) -> None:
    """Every name that was there all the time is listed exactly once; no name twice; the rest may or may not be."""
    stay = fill(folder, 2000, "stay")
    go = sorted(fill(folder, 600, "go"))
    with Directory(folder) as directory:
        seen: list[bytes] = []
        for n in range(600):
            seen += directory.names(4)
            os.unlink(folder / os.fsdecode(go[n]))
            os.close(os.open(folder / f"come{n:05d}", os.O_CREAT | os.O_WRONLY))
        seen += directory.names()
        assert len(seen) == len(set(seen)), "a name was listed twice"
        assert stay <= set(seen), f"{len(stay - set(seen))} names were not listed"
        come = {os.fsencode(f"come{n:05d}") for n in range(600)}
        assert set(seen) <= stay | set(go) | come | {b".", b".."}
        directory.rewind()
        assert set(directory.names()) == stay | come | {b".", b".."}
    assert set(os.listdir(os.fsencode(folder))) == stay | come


def test_deleting_all_that_is_listed_empties_a_directory(folder: Path) -> None:
    fill(folder, 1500)
    with Directory(folder) as directory:
        while (entry := directory.next()) is not None:
            if entry.name not in (b".", b".."):
                os.unlink(os.path.join(os.fsencode(folder), entry.name))
    assert os.listdir(folder) == []
    os.rmdir(folder)


def test_telldir_and_seekdir(folder: Path) -> None:
    fill(folder, 700)
    with Directory(folder) as directory:
        places: list[tuple[int, bytes]] = []
        while True:
            place = directory.tell()
            entry = directory.next()
            if entry is None:
                break
            places.append((place, entry.name))
        assert len({name for _, name in places}) == 702
        for place, name in places[::-37] + places[:5] + places[-5:]:
            directory.seek(place)
            entry = directory.next()
            assert entry is not None
            assert entry.name == name
        place, name = places[350]
        directory.seek(place)
        assert directory.names() == [name for _, name in places[350:]]
        directory.rewind()
        assert directory.names() == [name for _, name in places]


def test_listings_tell_type_and_inode(folder: Path) -> None:
    os.mkdir(folder / "dir")
    os.symlink("x", folder / "symlink")
    os.mkfifo(folder / "fifo")
    os.close(os.open(folder / "regular", os.O_CREAT | os.O_WRONLY))
    os.link(folder / "regular", folder / "again")
    for entry in os.scandir(folder):
        info = os.lstat(entry.path)
        assert entry.inode() == info.st_ino
        assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(info.st_mode)
        assert entry.is_symlink() == stat.S_ISLNK(info.st_mode)
        assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(info.st_mode)
    with Directory(folder) as directory:
        own = {e.name: e.ino for e in iter(directory.next, None) if e.name in (b".", b"..")}
    assert own == {b".": os.stat(folder).st_ino, b"..": os.stat(folder.parent).st_ino}


def test_names_of_any_bytes(folder: Path) -> None:
    """Everything but a slash and a zero byte, up to 255 bytes; not only UTF-8, and told apart by case."""
    top = os.fsencode(folder)
    names = {bytes([byte]) * 3 for byte in range(1, 256) if byte != ord("/")}
    names |= {
        bytes([b for b in range(1, 256) if b != ord("/")][:254]) + b"\xff",
        b"\xff" * 255,
        "\u00e4".encode() * 127,
        b"Aa",
        b"aA",
    }
    names -= {b"..."}
    for name in names:
        with open(os.path.join(top, name), "wb") as file:
            file.write(name)
    assert set(os.listdir(top)) == names
    for name in names:
        with open(os.path.join(top, name), "rb") as file:
            assert file.read() == name
        os.rename(os.path.join(top, name), os.path.join(top, name[:250] + b"-moved"[: 255 - min(len(name), 250)]))
    assert len(os.listdir(top)) == len(names)


# --- the mount alone ------------------------------------------------------------------------------------------


def test_links_and_renames_do_not_leave_the_mount(sides: tuple[Path, mounts.Mount]) -> None:
    plain, mount = sides
    (plain / "outside").write_bytes(b"outside")
    (mount.path / "inside").write_bytes(b"inside")
    for call in (os.link, os.rename):
        for source, target in (
            (plain / "outside", mount.path / "new"),
            (mount.path / "inside", plain / "new"),
        ):
            with pytest.raises(OSError) as caught:
                call(source, target)
            assert caught.value.errno == errno.EXDEV
    os.unlink(plain / "outside")
    os.unlink(mount.path / "inside")


def test_statfs(sides: tuple[Path, mounts.Mount]) -> None:
    """The backing file system's numbers, in one unit; longest name 255."""
    plain, mount = sides
    one, two = os.statvfs(plain), os.statvfs(mount.path)
    assert two.f_bsize == two.f_frsize
    assert two.f_namemax == 255
    whole = one.f_blocks * one.f_frsize
    assert abs(two.f_blocks * two.f_frsize - whole) <= whole // 100
    assert two.f_files == one.f_files
    assert 0 < two.f_bavail * two.f_frsize <= one.f_blocks * one.f_frsize


def test_documented_no_unnamed_files(sides: tuple[Path, mounts.Mount]) -> None:
    """O_TMPFILE: EOPNOTSUPP, after which programs make a named file."""
    with pytest.raises(OSError) as caught:
        os.close(os.open(sides[1].path, os.O_TMPFILE | os.O_RDWR, 0o600))
    assert caught.value.errno == errno.EOPNOTSUPP


def test_what_was_made_is_there_after_a_remount(tmp_path: Path) -> None:
    """A random tree, unmounted and mounted again: nothing but access times has changed."""
    plain, store, path = tmp_path / "plain", tmp_path / "store", tmp_path / "mount"
    plain.mkdir(mode=0o755)
    mounts.init(store)
    calls = posix_ops.random_calls(77, 500)
    half = len(calls) // 2
    with mounts.mounted(store, path):
        os.chmod(path, 0o755)
        pair = pair_of(plain, path)
        try:
            stop = posix_ops.differs(pair, calls[:half], "before")
            assert stop is None, pair.differences
        finally:
            pair.finish()
    assert mounts.verify(store)
    with mounts.mounted(store, path):
        later = pair_of(plain, path)
        try:
            later.current = pair.current
            later.compare()
            for who, name, args, kwargs in calls[half:]:
                later.answers(who, name, args, dict(kwargs))
            later.check()
        finally:
            later.finish()
    assert mounts.unsealed(store) == []
