"""System calls made in step in two directories, and everything in which the directories then differ.

`Pair(left, right)` starts, for every user that a case names, one process per directory that makes the calls
(so credentials, descriptors and locks are those of real processes). After every call the answers are compared
(value or errno), then the whole state below the case's directory. Times are compared as relations:
unchanged, fresh (stamped during the call), or a set value. Not compared: inode numbers themselves, st_blocks,
st_blksize, the size of directories, and access times that reading changed.

`random_calls(seed, count)` makes reproducible sequences, `shortest(pair, calls)` reduces a failing one.
This file is also the program of those processes: `python posix_ops.py worker FD UID GID,GID...`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import itertools
import mmap
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CLOCK_REALTIME_COARSE = 5  # the clock that file systems stamp with
HUNG_SECONDS = 100  # a call that takes longer is a hang, not a slow answer
KINDS = ("regular", "dir", "fifo", "block", "char", "socket", "symlink")

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
SYS_FCHMODAT2 = 452
SYS_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}[os.uname().machine]

Answer = tuple[str, Any]
Call = tuple["Who", str, tuple, dict]


class Who(NamedTuple):
    """Who makes a call. gids: the first is the effective one, all of them are the supplementary groups."""

    uid: int
    gids: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.uid}:{','.join(map(str, self.gids))}"


ROOT = Who(0, (0,))


# ---------------------------------------------------------------------------------------------------------
# The process that makes the calls of one user in one directory
# ---------------------------------------------------------------------------------------------------------


def pattern(seed: int, size: int) -> bytes:
    """`size` bytes that differ at every position and for every seed."""
    block = hashlib.shake_128(seed.to_bytes(8, "little")).digest(min(size, 4093) or 1)
    return (block * (size // len(block) + 1))[:size]


def shown(data: bytes) -> Any:
    """Data as it is when short, else its size and digest."""
    return data if len(data) <= 64 else (len(data), hashlib.sha256(data).hexdigest()[:16])


class Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


LIBC = ctypes.CDLL(None, use_errno=True)


def libc(name: str, *args: Any) -> int:
    result: int = getattr(LIBC, name)(*(os.fsencode(a) if isinstance(a, str) else a for a in args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def facts(info: os.stat_result, top: os.stat_result | None = None) -> dict:
    """What of a stat is comparable between two file systems, with raw times and inode number."""
    found = {
        "type": stat.S_IFMT(info.st_mode),
        "mode": oct(stat.S_IMODE(info.st_mode)),
        "nlink": info.st_nlink,
        "uid": info.st_uid,
        "gid": info.st_gid,
        "size": None if stat.S_ISDIR(info.st_mode) else info.st_size,
        "rdev": (os.major(info.st_rdev), os.minor(info.st_rdev)),
        "ino": info.st_ino,
        "atime": info.st_atime_ns,
        "mtime": info.st_mtime_ns,
        "ctime": info.st_ctime_ns,
    }
    if top is not None:
        found["same device"] = info.st_dev == top.st_dev
    return found


class Calls:
    """The calls that a worker can make; every public method is one, paths are relative to the case."""

    def __init__(self) -> None:
        self.base = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        self.fds: dict[str, int] = {}
        self.children: dict[str, int] = {}
        self.umask = 0
        os.umask(0)

    # cases

    def enter(self, case: str) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()
        os.fchdir(self.base)
        os.chdir(case)

    def chdir(self, path: str) -> None:
        os.chdir(path)

    # names

    def mkdir(self, path: str, mode: int = 0o755) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def link(self, old: str, new: str, flags: int = 0) -> None:
        libc("linkat", AT_FDCWD, old, AT_FDCWD, new, flags)

    def link_fd(self, fd: str, new: str) -> None:
        libc("linkat", AT_FDCWD, f"/proc/self/fd/{self.fds[fd]}", AT_FDCWD, new, AT_SYMLINK_FOLLOW)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def readlink(self, path: str) -> str:
        return os.readlink(path)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def renameat2(self, old: str, new: str, flags: int) -> None:
        libc("syscall", SYS_RENAMEAT2, AT_FDCWD, old, AT_FDCWD, new, flags)

    def mkfifo(self, path: str, mode: int = 0o644) -> None:
        os.mkfifo(path, mode)

    def mknod(self, path: str, kind: int, mode: int, major: int = 0, minor: int = 0) -> None:
        os.mknod(path, kind | mode, os.makedev(major, minor))

    def bind(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path)

    def talk(self, path: str) -> bytes:
        """Bind, connect and send through a socket in the file system."""
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind(path)
            server.listen(1)
            client.connect(path)
            client.sendall(b"through the socket")
            end, _ = server.accept()
            with end:
                return end.recv(100)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    # attributes

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def lchmod(self, path: str, mode: int) -> None:
        libc("syscall", SYS_FCHMODAT2, AT_FDCWD, path, mode, AT_SYMLINK_NOFOLLOW)

    def fchmod(self, fd: str, mode: int) -> None:
        os.fchmod(self.fds[fd], mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid)

    def lchown(self, path: str, uid: int, gid: int) -> None:
        os.lchown(path, uid, gid)

    def fchown(self, fd: str, uid: int, gid: int) -> None:
        os.fchown(self.fds[fd], uid, gid)

    def utimensat(self, path: str, atime: tuple | None, mtime: tuple | None = None, flags: int = 0) -> None:
        """atime, mtime: (seconds, nanoseconds or UTIME_*); atime None passes a null pointer (both now)."""
        times = None if atime is None else (Timespec * 2)(Timespec(*atime), Timespec(*(mtime or atime)))
        libc("utimensat", AT_FDCWD, path, times, flags)

    def futimens(self, fd: str, atime: tuple | None, mtime: tuple | None = None) -> None:
        times = None if atime is None else (Timespec * 2)(Timespec(*atime), Timespec(*(mtime or atime)))
        libc("futimens", self.fds[fd], times)

    def access(self, path: str, mode: int) -> bool:
        return os.access(path, mode, effective_ids=True)

    def stat(self, path: str) -> dict:
        return facts(os.stat(path))

    def lstat(self, path: str) -> dict:
        return facts(os.lstat(path))

    def fstat(self, fd: str) -> dict:
        return facts(os.fstat(self.fds[fd]))

    def same_file(self, path: str, other: str) -> bool:
        return os.path.samestat(os.lstat(path), os.lstat(other))

    def times_differ(self, path: str) -> tuple[bool, bool]:
        """Whether mtime differs from atime, and ctime from mtime."""
        info = os.lstat(path)
        return info.st_mtime_ns != info.st_atime_ns, info.st_ctime_ns != info.st_mtime_ns

    def getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(path, name)

    # data

    def truncate(self, path: str, size: int) -> None:
        os.truncate(path, size)

    def ftruncate(self, fd: str, size: int) -> None:
        os.ftruncate(self.fds[fd], size)

    def create(self, path: str, mode: int = 0o644) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))

    def open(self, path: str, flags: int, mode: int = 0o644, fd: str | None = None) -> None:
        """Open and keep as `fd` (closing what had that name), or close at once."""
        number = os.open(path, flags, mode)
        if fd is None:
            os.close(number)
            return
        if fd in self.fds:
            os.close(self.fds[fd])
        self.fds[fd] = number

    def close(self, fd: str) -> None:
        os.close(self.fds.pop(fd))

    def put(self, path: str, seed: int, size: int) -> int:
        """Write a whole new file."""
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
        try:
            return os.write(number, pattern(seed, size))
        finally:
            os.close(number)

    def copy_in(self, source: str, path: str) -> None:
        """Copy a file of the system to an executable one."""
        with open(source, "rb") as original:
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755)
            with open(number, "wb") as copy:
                copy.write(original.read())

    def write(self, fd: str, seed: int, size: int) -> int:
        return os.write(self.fds[fd], pattern(seed, size))

    def pwrite(self, fd: str, seed: int, size: int, offset: int) -> int:
        return os.pwrite(self.fds[fd], pattern(seed, size), offset)

    def read(self, fd: str, size: int) -> Any:
        return shown(os.read(self.fds[fd], size))

    def pread(self, fd: str, size: int, offset: int) -> Any:
        return shown(os.pread(self.fds[fd], size, offset))

    def lseek(self, fd: str, offset: int, whence: int) -> int:
        return os.lseek(self.fds[fd], offset, whence)

    def fsync(self, fd: str) -> None:
        os.fsync(self.fds[fd])

    def fdatasync(self, fd: str) -> None:
        os.fdatasync(self.fds[fd])

    def fallocate(self, fd: str, mode: int, offset: int, size: int) -> None:
        libc(
            "fallocate64",
            self.fds[fd],
            ctypes.c_int(mode),
            ctypes.c_longlong(offset),
            ctypes.c_longlong(size),
        )

    def posix_fallocate(self, fd: str, offset: int, size: int) -> None:
        os.posix_fallocate(self.fds[fd], offset, size)

    def copy_range(self, source: str, target: str, size: int, start: int, to: int) -> int:
        return os.copy_file_range(self.fds[source], self.fds[target], size, start, to)

    def sendfile(self, source: str, target: str, size: int, start: int) -> int:
        return os.sendfile(self.fds[target], self.fds[source], start, size)

    def map_write(self, fd: str, seed: int, size: int, offset: int, sync: bool = False) -> None:
        with mmap.mmap(self.fds[fd], 0) as view:
            view[offset : offset + size] = pattern(seed, size)
            if sync:
                view.flush()

    def map_read(self, fd: str, size: int, offset: int) -> Any:
        with mmap.mmap(self.fds[fd], 0, prot=mmap.PROT_READ) as view:
            return shown(view[offset : offset + size])

    def map_keep(self, fd: str, name: str) -> None:
        """Keep a mapping under a name that `poke` and `peek` use; it outlives the descriptor."""
        self.views = {**getattr(self, "views", {}), name: mmap.mmap(self.fds[fd], 0)}

    def poke(self, name: str, seed: int, size: int, offset: int, sync: bool = False) -> None:
        self.views[name][offset : offset + size] = pattern(seed, size)
        if sync:
            self.views[name].flush()

    def peek(self, name: str, size: int, offset: int) -> Any:
        return shown(self.views[name][offset : offset + size])

    def map_drop(self, name: str) -> None:
        self.views.pop(name).close()

    # locks and programs

    def flock(self, fd: str, how: int) -> None:
        fcntl.flock(self.fds[fd], how)

    def lockf(self, fd: str, how: int, size: int = 0, start: int = 0) -> None:
        fcntl.lockf(self.fds[fd], how, size, start)

    def start(self, path: str, *args: str) -> None:
        self.children[path] = os.posix_spawn(path, [path, *args], {})

    def stop(self, path: str) -> int:
        pid = self.children.pop(path)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 15)
        return os.waitpid(pid, 0)[1]

    def execute(self, path: str, *args: str) -> int:
        return os.waitpid(os.posix_spawn(path, [path, *args], {}), 0)[1]

    # what the comparison looks at

    def observe(self, contents: bool = False) -> dict[str, dict]:
        """The facts of every name below the case's directory, of itself as '.', its contents if wanted."""
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            top = os.fstat(here)
            found = {".": facts(top, top)}
            self._walk(here, "", top, False, found)
            if contents:  # afterwards, for reading a file changes the times of its other names
                self._walk(here, "", top, True, found)
            return found
        finally:
            os.close(here)

    def _walk(self, fd: int, prefix: str, top: os.stat_result, contents: bool, found: dict) -> None:
        for name in os.listdir(fd):
            path = prefix + name
            if not contents:
                found[path] = facts(os.stat(name, dir_fd=fd, follow_symlinks=False), top)
            record = found[path]
            if record["type"] == stat.S_IFDIR:
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
                try:
                    self._walk(below, path + "/", top, contents, found)
                finally:
                    os.close(below)
            elif record["type"] == stat.S_IFLNK and not contents:
                record["target"] = os.readlink(name, dir_fd=fd)
            elif record["type"] == stat.S_IFREG and contents and record["size"] < 1 << 22:
                number = os.open(name, os.O_RDONLY, dir_fd=fd)
                with open(number, "rb", buffering=0) as file:
                    record["content"] = shown(file.read())


def answer(calls: Calls, name: str, args: tuple, kwargs: dict) -> Answer:
    umask = kwargs.pop("umask", 0)
    try:
        os.umask(umask)
        return "ok", getattr(calls, name)(*args, **kwargs)
    except OSError as exc:
        return "error", errno.errorcode.get(exc.errno or 0, exc.errno)
    except (LookupError, ValueError, OverflowError) as exc:  # no such descriptor, or not mappable
        return "refused", type(exc).__name__
    finally:
        os.umask(0)


def work(argv: list[str]) -> None:
    link = Connection(int(argv[0]))
    calls = Calls()
    os.setgroups([int(gid) for gid in argv[2].split(",")])
    os.setgid(int(argv[2].split(",")[0]))
    os.setuid(int(argv[1]))
    while True:
        try:
            name, args, kwargs = link.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            reply: Answer = answer(calls, name, args, kwargs)
        except BaseException as exc:  # the other side must hear of it, whatever it is
            reply = "bug", f"{type(exc).__name__}: {exc}"
        link.send(reply)


# ---------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------


class Worker:
    """One user's process in one directory."""

    def __init__(self, base: str, who: Who, case: str) -> None:
        self.link, far = Pipe()
        with far:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    os.path.abspath(__file__),
                    "worker",
                    str(far.fileno()),
                    str(who.uid),
                    ",".join(map(str, who.gids)),
                ],
                cwd=base,
                pass_fds=[far.fileno()],
            )
        self.name = f"{who} in {base}"
        if case:
            self.enter(case)

    def send(self, name: str, args: tuple, kwargs: dict) -> None:
        self.link.send((name, args, kwargs))

    def receive(self) -> Answer:
        if not self.link.poll(HUNG_SECONDS):
            raise TimeoutError(f"the call of {self.name} hangs")
        try:
            kind, value = self.link.recv()
        except EOFError:
            raise RuntimeError(f"the worker {self.name} died: exit status {self.process.wait(10)}") from None
        if kind == "bug":
            raise RuntimeError(f"the worker {self.name}: {value}")
        return kind, value

    def ask(self, name: str, args: tuple, kwargs: dict) -> Answer:
        self.send(name, args, kwargs)
        return self.receive()

    def enter(self, case: str) -> None:
        entered = self.ask("enter", (case,), {})
        assert entered == ("ok", None), f"{self.name} cannot enter {case}: {entered}"

    def close(self) -> None:
        self.link.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


def coarse() -> int:
    return time.clock_gettime_ns(CLOCK_REALTIME_COARSE)


def tick() -> None:
    """Wait until the clock that file systems stamp with has passed this moment.

    A mere step of it is not enough: since Linux 6.13 a stamp may come from the fine clock and be ahead of it, and what is
    stamped next with the coarse clock gets that same time again.
    """
    start = time.time_ns()
    while coarse() <= start:
        time.sleep(0.0005)


STATIC = ("type", "mode", "nlink", "uid", "gid", "size", "rdev", "same device", "target", "content")
# After these calls contents are compared too; reading more often would keep every page in the cache and so
# hide what a cold read finds.
DATA_CALLS = {
    "put", "write", "pwrite", "truncate", "ftruncate", "open", "map_write", "poke", "copy_range", "sendfile",
    "fallocate", "posix_fallocate", "copy_in", "compare",
}  # fmt: skip
SETTING = {"utimensat", "futimens"}
READING = {
    "read",
    "pread",
    "map_read",
    "peek",
    "execute",
    "start",
    "readlink",
    "copy_range",
    "sendfile",
    "talk",
}


@dataclasses.dataclass
class Side:
    base: str
    workers: dict[Who, Worker] = dataclasses.field(default_factory=dict)
    before: dict[str, dict] = dataclasses.field(default_factory=dict)


class Pair:
    """Two directories in which the same calls are made; every attribute that `Calls` has is a call.

    left is the reference. A call returns the reference's value; `by` says who makes it, `want` what the
    reference has to answer (an errno name, or "ok"). Differences gather in `differences`, the calls of the
    case in `history`. `rescue` is called when a call hangs, and has to free it.
    """

    def __init__(
        self,
        left: str,
        right: str,
        *,
        names: tuple[str, str] = ("ext4", "mount"),
        rescue: Callable[[], None] = lambda: None,
    ) -> None:
        self.rescue = rescue
        self.sides = (Side(left), Side(right))
        self.names = names
        self.current = ""
        self.numbers = itertools.count()
        self.history: list[Call] = []
        self.differences: list[str] = []
        self.known: set[tuple] = set()
        self.times = False
        self.watched = True
        self.missed = False  # whether there were calls since the last look, so that "before" means nothing

    def case(self, label: str, *, times: bool = False) -> Pair:
        """Begin in a fresh directory. times: wait for the clock before each call and compare the times."""
        self.current = f"{next(self.numbers):04d}-{label}"
        self.times = times
        self.history, self.differences, self.known, self.watched = [], [], set(), True
        for side in self.sides:
            os.mkdir(os.path.join(side.base, self.current), 0o755)
            os.chmod(os.path.join(side.base, self.current), 0o755)
            for worker in side.workers.values():
                worker.enter(self.current)
            side.before = self._worker(side, ROOT).ask("observe", (), {})[1]
            side.before["."]["atime"] = None
        return self

    def finish(self) -> None:
        """End every process, so that nothing keeps a mount busy."""
        for side in self.sides:
            for worker in side.workers.values():
                worker.close()
            side.workers.clear()

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Compare only answers inside, and the state once at the end."""
        self.watched = False
        try:
            yield
        finally:
            self.watched = True
        self._compare("compare", coarse())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Calls, name):
            raise AttributeError(name)
        return functools.partial(self.call, name)

    def call(self, name: str, *args: Any, by: Who = ROOT, want: str | None = None, **kwargs: Any) -> Any:
        left, _ = self.answers(by, name, args, kwargs)
        if want is not None:
            got = left[1] if left[0] == "error" else left[0]
            assert got == want, f"{self.names[0]} itself answers {got}, not {want}\n{self.story()}"
        return left[1] if left[0] == "ok" else None

    def answers(self, by: Who, name: str, args: tuple, kwargs: dict) -> tuple[Answer, Answer]:
        """Make one call on both sides, compare answers and state, return both answers."""
        if self.times:
            tick()
        self.history.append((by, name, args, kwargs))
        began = coarse()
        left, right = self._both(by, name, args, kwargs)
        if not self._alike(left, right):
            self._differ("answer", f"{self.names[0]} {left}, {self.names[1]} {right}")
        if self.watched:
            self._compare(name, began)
        else:
            self.missed = True
        return left, right

    def compare(self) -> None:
        """Compare contents too, as at the end of a case."""
        self.history.append((ROOT, "compare", (), {}))
        self._compare("compare", coarse())

    def check(self) -> None:
        """Fail with everything that differed in this case."""
        self.compare()
        if self.differences:
            raise AssertionError("\n".join(["differences:", *self.differences, self.story()]))

    def story(self) -> str:
        lines = (f"  {n:3d} {told(call)}" for n, call in enumerate(self.history, 1))
        return "\n".join([f"the calls in {self.current}:", *lines])

    def _worker(self, side: Side, who: Who) -> Worker:
        if who not in side.workers:
            side.workers[who] = Worker(side.base, who, self.current)
        return side.workers[who]

    def _both(self, who: Who, name: str, args: tuple, kwargs: dict) -> tuple[Answer, Answer]:
        workers = [self._worker(side, who) for side in self.sides]
        for worker in workers:
            worker.send(name, args, kwargs)
        try:
            left, right = (worker.receive() for worker in workers)
        except TimeoutError:
            self.rescue()
            raise
        return left, right

    def _alike(self, left: Answer, right: Answer) -> bool:
        if isinstance(left[1], dict) and isinstance(right[1], dict):  # a stat: its times are compared as state
            return all(left[1].get(key) == right[1].get(key) for key in STATIC)
        return left == right

    def _differ(self, what: str, how: str) -> None:
        self.differences.append(f"  at {len(self.history):3d} {told(self.history[-1])}\n      {what}: {how}")

    def _compare(self, name: str, began: int) -> None:
        contents = name in DATA_CALLS
        (_, left), (_, right) = self._both(ROOT, "observe", (), {"contents": contents})
        assert isinstance(left, dict), f"{self.names[0]}: {left}\n{self.story()}"
        if not isinstance(right, dict):
            self._differ("state", f"{self.names[1]} cannot be listed: {right}")
            return
        found: set[tuple] = set()
        for path in sorted(left.keys() | right.keys()):
            if path not in left or path not in right:
                found.add((path, "exists", path in left, path in right))
                continue
            one, two = left[path], right[path]
            found.update((path, key, one.get(key), two.get(key)) for key in STATIC if one.get(key) != two.get(key))
        found.update(self._moves(left, right))
        if self.times and not self.missed:
            self._compare_times(name, began, left, right)
        for path, key, one, two in sorted(found - self.known, key=repr):
            self._differ(f"{path!r} {key}", f"{self.names[0]} {one}, {self.names[1]} {two}")
        self.known, self.missed = found, False
        for side, now in zip(self.sides, (left, right), strict=True):
            for record in now.values():
                # Looking itself may have changed these.
                if record["type"] in (stat.S_IFDIR, stat.S_IFLNK) or "content" in record or name in READING:
                    record["atime"] = None
                elif name not in SETTING or not far(record["atime"], began):
                    old = same_inode(side.before, record)
                    if old is not None and old["atime"] is None:
                        record["atime"] = None
            side.before = now

    def _moves(self, left: dict, right: dict) -> set[tuple]:
        """Which names share an inode, and under which name the inode was known before this call."""
        found = set()
        maps = []
        for side, now in zip(self.sides, (left, right), strict=True):
            groups: dict[int, str] = {}
            for path in sorted(now):
                groups.setdefault(now[path]["ino"], path)
            old: dict[int, str] = {}
            for path in sorted(side.before):
                old.setdefault(side.before[path]["ino"], path)
            maps.append((groups, old))
        for path in left.keys() & right.keys():
            one, two = left[path]["ino"], right[path]["ino"]
            if maps[0][0][one] != maps[1][0][two]:
                found.add((path, "is the same file as", maps[0][0][one], maps[1][0][two]))
            if not self.missed and maps[0][1].get(one) != maps[1][1].get(two):
                found.add((path, "was before", maps[0][1].get(one), maps[1][1].get(two)))
        return found

    def _compare_times(self, name: str, began: int, left: dict, right: dict) -> None:
        window = began, coarse() + 1_000_000_000
        for path in sorted(left.keys() & right.keys()):
            records = [
                (
                    next((old for old in side.before.values() if old["ino"] == now[path]["ino"]), None),
                    now[path],
                )
                for side, now in zip(self.sides, (left, right), strict=True)
            ]
            for key in ("atime", "mtime", "ctime"):
                if key == "atime" and name in READING:
                    continue
                one, two = (relation(old[key] if old else NEW, now[key], window) for old, now in records)
                if one != two and "unknown" not in {one, two}:
                    self._differ(f"{path!r} {key}", f"{self.names[0]} {one}, {self.names[1]} {two}")


def same_inode(before: dict[str, dict], record: dict) -> dict | None:
    """The record of the same file before the call, under whatever name."""
    return next((old for old in before.values() if old["ino"] == record["ino"]), None)


NEW = -(2**63)  # in place of the old time of a file that was not there


def far(value: int, now: int) -> bool:
    """Whether a time was set by hand, for it is more than an hour away."""
    return abs(value - now) > 3600 * 10**9


def relation(old: int | None, value: int, window: tuple[int, int]) -> str:
    """What happened to a time of a file. old: None where looking may have changed it, NEW for a new file."""
    if old == value:
        return "unchanged"
    if far(value, window[0]):
        return str(value)
    if old is None:
        return "unknown"
    if old < value < window[0] and old != NEW:
        # With write-back the kernel keeps these times. When it drops the inode from its cache, at a moment of its
        # own choice, the times of the store show, which are those of the write-back: later, but before this call.
        return "unchanged"
    return "fresh" if window[0] <= value <= window[1] else "changed, but not to the time of the call"


def told(call: Call) -> str:
    """A call as a line that can be pasted into a case."""
    who, name, args, kwargs = call
    words = [repr(a) if not (isinstance(a, int) and a > 9) else number(name, a) for a in args]
    words += [f"{key}={number(name, value)}" for key, value in kwargs.items()]
    if who != ROOT:
        words.append(f"by=Who({who.uid}, {who.gids})")
    return f"{name}({', '.join(words)})"


def number(name: str, value: Any) -> str:
    if not isinstance(value, int) or isinstance(value, bool):
        return repr(value)
    octal = name in ("chmod", "fchmod", "lchmod", "mkdir", "open", "create", "mkfifo", "mknod") and value > 7
    return oct(value) if octal else str(value)


# ---------------------------------------------------------------------------------------------------------
# Random sequences
# ---------------------------------------------------------------------------------------------------------

USERS = (ROOT, ROOT, ROOT, Who(1001, (1001, 2000)), Who(1001, (1001, 2000)), Who(1002, (1002, 2000)))
SIZES = (0, 1, 100, 4031, 4032, 4033, 4095, 4096, 4097, 8095, 8096, 8097, 12160, 20000)
# No set-group-ID without the group's execute bit: FUSE keeps it where ext4 clears it (documented in test_posix.py).
MODES = (0o777, 0o755, 0o700, 0o644, 0o666, 0o600, 0o000, 0o1777, 0o2775, 0o2755, 0o4755, 0o6777, 0o4644)
FILES = ("a", "b", "c", "D/a", "D/b", "E/a", "E/b", "D/E/a", "E/D/a")
DIRECTORIES = ("D", "E", "D/E", "E/D", "E/E")


def random_calls(seed: int, count: int) -> list[Call]:
    """A sequence that depends on the seed alone, so that any part of it can be run again."""
    dice = random.Random(seed)
    made: list[Call] = [
        (ROOT, "chmod", (".", 0o1777 if seed % 3 == 0 else 0o777), {}),
        *((ROOT, "mkdir", (path, 0o777), {}) for path in DIRECTORIES),
    ]
    while len(made) < count:
        made.append(random_call(dice))
    return made


def random_call(dice: random.Random) -> Call:
    who = dice.choice(USERS)
    # Mostly names that suit the call, now and then a directory where a file is meant and the other way round.
    usual, unusual = (FILES, DIRECTORIES) if dice.random() < 0.94 else (DIRECTORIES, FILES)
    path, other = dice.choice(usual), dice.choice(usual if dice.random() < 0.94 else unusual)
    folder, folder2 = dice.choice(unusual), dice.choice(unusual)
    anything = dice.choice((path, path, folder))
    fd = dice.choice("xy")
    mode, size, seed = dice.choice(MODES), dice.choice(SIZES), dice.randrange(1000)
    umask = {"umask": dice.choice((0, 0o022, 0o007))}
    owner = dice.choice((-1, 0, 1001, 1002)), dice.choice((-1, 0, 1001, 1002, 2000))
    # A fifo must never block the one process that a user has here.
    flags = (
        dice.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR))
        | dice.choice((0, os.O_CREAT, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL))
        | dice.choice((0, 0, 0, os.O_TRUNC))
        | dice.choice((0, 0, 0, 0, os.O_APPEND, os.O_SYNC, os.O_NOFOLLOW))
        | os.O_NONBLOCK
    )
    target = dice.choice((other, "../" + other, "b", "../D", "nothing"))
    moment = (dice.randrange(2**31), 5), (dice.randrange(2**31), 999_999_999)
    menu: list[tuple[int, str, tuple, dict]] = [
        (7, "mkdir", (folder, mode), umask),
        (3, "rmdir", (folder,), {}),
        (7, "unlink", (path,), {}),
        (8, "link", (path, other), {}),
        (3, "symlink", (target, path), {}),
        (8, "rename", (path, other), {}),
        (4, "rename", (folder, folder2), {}),
        (2, "rename", (folder, other), {}),
        (4, "renameat2", (anything, other, dice.choice((RENAME_NOREPLACE, RENAME_EXCHANGE))), {}),
        (1, "mkfifo", (path, mode), umask),
        (1, "mknod", (path, dice.choice((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)), mode), umask),
        (1, "bind", (path,), umask),
        (7, "chmod", (anything, mode), {}),
        (4, "chmod", (folder, 0o777), {}),
        (3, "fchmod", (fd, mode), {}),
        (6, "chown", (anything, *owner), {}),
        (3, "lchown", (anything, *owner), {}),
        (3, "fchown", (fd, *owner), {}),
        (3, "utimensat", (anything, *moment), {}),
        (1, "utimensat", (path, None), {}),
        (1, "utimensat", (path, (0, UTIME_OMIT), (0, UTIME_NOW), AT_SYMLINK_NOFOLLOW), {}),
        (7, "truncate", (path, size), {}),
        (8, "ftruncate", (fd, size), {}),
        (35, "open", (path, flags, mode), {"fd": fd, **umask}),
        (1, "open", (folder, os.O_RDONLY | os.O_DIRECTORY), {"fd": fd}),
        (3, "close", (fd,), {}),
        (8, "put", (path, seed, size), {}),
        (12, "write", (fd, seed, size), {}),
        (12, "pwrite", (fd, seed, size, dice.choice(SIZES)), {}),
        (6, "read", (fd, size), {}),
        (10, "pread", (fd, size, dice.choice(SIZES)), {}),
        (3, "lseek", (fd, size, dice.choice((os.SEEK_SET, os.SEEK_CUR, os.SEEK_END))), {}),
        (6, "map_write", (fd, seed, 50, dice.randrange(50)), {"sync": dice.random() < 0.5}),
        (4, "map_read", (fd, 200, dice.randrange(50)), {}),
        (3, "fsync", (fd,), {}),
        (4, "fstat", (fd,), {}),
        (2, "stat", (anything,), {}),
        (2, "listdir", (folder,), {}),
        (1, "readlink", (path,), {}),
        (2, "access", (anything, dice.choice((os.R_OK, os.W_OK, os.X_OK))), {}),
    ]
    total = dice.randrange(sum(weight for weight, *_ in menu))
    for weight, name, args, kwargs in menu:
        total -= weight
        if total < 0:
            return who, name, args, kwargs
    raise AssertionError("the menu has a choice for every number")


def differs(pair: Pair, calls: list[Call], label: str = "random", *, times: bool = False) -> int | None:
    """Run calls in a fresh directory; how many it took to differ, None if nothing does."""
    pair.case(label, times=times)
    for count, (who, name, args, kwargs) in enumerate(calls, 1):
        pair.answers(who, name, args, dict(kwargs))
        if pair.differences:
            return count
    pair.compare()
    return len(calls) if pair.differences else None


def shortest(pair: Pair, calls: list[Call], *, tries: int = 250, times: bool = False) -> list[Call]:
    """A part of a failing sequence that still fails and from which no single call can be left out."""
    step = max(1, len(calls) // 2)
    while tries > 0:
        at = 0
        shorter = False
        while at < len(calls) and tries > 0:
            part = calls[:at] + calls[at + step :]
            tries -= 1
            count = differs(pair, part, "shorter", times=times) if part else None
            if count is not None:
                calls = part[:count]
                shorter = True
            else:
                at += step
        if step == 1 and not shorter:
            break
        step = max(1, step // 2)
    differs(pair, calls, "shortest", times=times)
    return calls


def main(argv: list[str]) -> int:
    """`posix_ops.py LEFT RIGHT [SEED [COUNT [ROUNDS]]]`: random sequences by hand, one after the other."""
    if argv[0] == "worker":
        work(argv[1:])
        return 0
    first, count, rounds = (int(word) for word in (argv[2:] + ["1", "2000", "1"][len(argv) - 2 :]))
    pair = Pair(*(tempfile.mkdtemp(dir=base) for base in argv[:2]), names=("left", "right"))
    for side in pair.sides:
        os.chmod(side.base, 0o755)
    try:
        for seed in range(first, first + rounds):
            calls = random_calls(seed, count)
            stop = differs(pair, calls)
            print(f"seed {seed}: {'no difference' if stop is None else f'differs at call {stop}'}", flush=True)
            if stop is not None:
                shortest(pair, calls[:stop])
                print("\n".join([*pair.differences, pair.story()]))
                return 1
    finally:
        pair.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
