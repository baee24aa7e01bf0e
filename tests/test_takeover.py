"""A worker dies or hangs, and whoever uses the mount sees a pause and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import mounts
import pytest
import takeover
from takeover import DATA, KILLED, Faulty, Load, fails, make_store, mount_again, outcome, sound, standby

from encfs_js import keystore, state
from encfs_js.backing import RENAME_EXCHANGE, RENAME_NOREPLACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
]

lockable = pytest.mark.skipif(bool(takeover.needs_memlock()), reason=takeover.needs_memlock() or "-")
ROOT = os.geteuid() == 0
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """One mount for all that a mount survives."""
    with takeover.faulty_mounted(tmp_path_factory.mktemp("takeover")) as faulty:
        yield faulty
    sound(faulty.mount.store)


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Faulty]]:
    """A mount of a test's own."""
    return functools.partial(takeover.faulty_mounted, tmp_path)


# --- exactly once -------------------------------------------------------------------------------------------------


def renameat2(at: int, old: str, new: str, flags: int) -> None:
    if libc.renameat2(at, old.encode(), at, new.encode(), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def put(at: int, name: str, data: bytes, offset: int = 0) -> None:
    fd = os.open(name, os.O_WRONLY, dir_fd=at)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def cut(at: int, name: str, size: int) -> None:
    fd = os.open(name, os.O_WRONLY, dir_fd=at)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def make(at: int, name: str, flags: int = os.O_EXCL, mode: int = 0o640) -> None:
    os.close(os.open(name, os.O_CREAT | os.O_RDWR | flags, mode, dir_fd=at))


def prepare(at: int) -> None:
    """What a directory holds before an operation on `x` and `y`."""
    for name in ("file", "other"):
        fd = os.open(name, os.O_CREAT | os.O_WRONLY, 0o666, dir_fd=at)
        os.write(fd, name.encode() * 3000)
        os.fsync(fd)
        os.close(fd)
    os.mkdir("empty", dir_fd=at)
    os.mkdir("full", dir_fd=at)
    os.symlink("file", "full/inside", dir_fd=at)


OPERATIONS: dict[str, Callable[[int], Any]] = {
    "unlink": lambda at: os.unlink("file", dir_fd=at),
    "rmdir": lambda at: os.rmdir("empty", dir_fd=at),
    "rename": lambda at: os.rename("file", "x", src_dir_fd=at, dst_dir_fd=at),
    "rename over": lambda at: os.rename("file", "other", src_dir_fd=at, dst_dir_fd=at),
    "rename noreplace": lambda at: renameat2(at, "file", "x", RENAME_NOREPLACE),
    "rename exchange": lambda at: renameat2(at, "file", "full", RENAME_EXCHANGE),
    "link": lambda at: os.link("file", "x", src_dir_fd=at, dst_dir_fd=at),
    "symlink": lambda at: os.symlink("target", "x", dir_fd=at),
    "mkdir": lambda at: os.mkdir("x", 0o750, dir_fd=at),
    "mknod fifo": lambda at: os.mknod("x", stat.S_IFIFO | 0o640, dir_fd=at),
    "create exclusive": lambda at: make(at, "x"),
    "create setuid": lambda at: make(at, "x", os.O_EXCL, 0o4755),
    "open truncate": lambda at: make(at, "file", os.O_TRUNC),
    "truncate": lambda at: cut(at, "file", 5000),
    "truncate to nothing": lambda at: cut(at, "file", 0),
    "grow": lambda at: cut(at, "file", 50_000),
    "write": lambda at: put(at, "file", DATA, 3000),
    "write at the end": lambda at: put(at, "file", DATA, 12_000),
    "write behind the end": lambda at: put(at, "file", DATA, 20_000),
    "chmod": lambda at: os.chmod("file", 0o600, dir_fd=at),
}  # fmt: skip


def snapshot(at: int) -> dict[str, tuple[Any, ...]]:
    """Everything in a directory but inode numbers and times."""
    found = {}
    for directory, _, _, fd in os.fwalk(".", dir_fd=at):
        for name in os.listdir(fd):
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            content: Any = None
            if stat.S_ISREG(info.st_mode):
                with open(os.open(name, os.O_RDONLY, dir_fd=fd), "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(name, dir_fd=fd)
            size = info.st_size if stat.S_ISREG(info.st_mode) else None
            found[f"{directory}/{name}"] = (
                info.st_mode,
                info.st_nlink,
                info.st_uid,
                info.st_gid,
                size,
                content,
            )
    return found


def as_nobody(call: Callable[[], Any]) -> Any:
    """Call as another user, if we are root: a thread of its own has a file system uid of its own."""

    def run() -> Any:
        if ROOT:
            libc.setfsgid(mounts.NOBODY)
            libc.setfsuid(mounts.NOBODY)
        return call()

    return mounts.within(mounts.PATIENCE, run, "an operation", lambda: None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_done_once(faulty: Faulty, name: str) -> None:
    """Killed before every call that changes the store; after the last, and again before the next worker has answered.

    And after the answer, when nothing is to be repeated any more.
    """
    operation = OPERATIONS[name]
    turn = 0

    def killed(*steps: dict[str, Any]) -> bool:
        """Do it with these kills, here and in a plain directory, twice. Returns whether they happened."""
        nonlocal turn
        turn += 1
        fds = []
        for directory in (faulty.plain, faulty.mount.path):
            here = directory / f"{name} {turn}"
            here.mkdir()
            fds.append(os.open(here, os.O_RDONLY | os.O_DIRECTORY))
            close.callback(os.close, fds[-1])
            os.fchmod(fds[-1], 0o777)
            as_nobody(lambda: prepare(fds[-1]))
        before = faulty.mount.status()["takeovers"]
        faulty.plan.write(*steps)
        plain = as_nobody(lambda: outcome(lambda: operation(fds[0])))
        assert as_nobody(lambda: outcome(lambda: operation(fds[1]))) == plain
        if steps[0]["do"] == "pass":
            faulty.plan.wait()
        rest = len(faulty.plan.rest())
        faulty.plan.write()
        assert snapshot(fds[1]) == snapshot(fds[0])
        again = as_nobody(lambda: outcome(lambda: operation(fds[0])))
        assert as_nobody(lambda: outcome(lambda: operation(fds[1]))) == again
        assert snapshot(fds[1]) == snapshot(fds[0])
        if not rest:
            faulty.mount.worker()
            deaths = sum(step["do"] == "kill" for step in steps)
            assert faulty.mount.status()["takeovers"] == before + deaths
        return not rest

    with contextlib.ExitStack() as close:
        calls = 0
        while killed({"call": "change", "skip": calls, "do": "kill"}):
            calls += 1
        assert calls
        last = {"call": "change", "skip": calls - 1, "after": True}
        assert killed(last | {"do": "kill"}, {"call": "strike", "skip": 1, "do": "kill"})
        assert killed(last | {"do": "pass"}, {"call": "strike", "do": "kill"})


@pytest.mark.parametrize(
    ("offset", "sizes"),
    [(3000, (4096, 4 * 4096 + 100)), (12_000, (4096, 2 * 4096 + 100)), (20_000, (4096, 2 * 4096 + 100))],
    ids=["over the end", "at the end", "behind the end"],
)
def test_write_that_got_half_way(faulty: Faulty, offset: int, sizes: tuple[int, ...]) -> None:
    """After whole pages, or within one that was not there before: no existing page is ever written in part."""
    for size in sizes:
        path = faulty.mount.path / f"half {offset} {size}"
        wanted = bytearray(b"before" * 2000)
        path.write_bytes(wanted)
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        faulty.plan.write({"call": "pwrite", "name": path.name, "bytes": size, "do": "kill"})
        os.pwrite(fd, DATA, offset)
        os.fsync(fd)
        assert faulty.plan.rest() == []
        os.close(fd)
        wanted += bytes(max(0, offset - len(wanted)))
        wanted[offset : offset + len(DATA)] = DATA
        assert path.read_bytes() == wanted


SLOW_CALLER = """
import os, sys
what, path = sys.argv[1:]
if what == "write":
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, bytes(30_000), 3000)
elif what == "truncate":
    os.truncate(path, 5000)
else:
    getattr(os, what)(path)
"""


@pytest.fixture
def through(faulty: Faulty) -> Iterator[Faulty]:
    """The same mount, with nobody left behind who waits."""
    yield faulty
    faulty.plan.write()
    faulty.plan.open_gate()
    faulty.mount.worker()


def caller_dies(faulty: Faulty, what: str, path: Path, step: dict[str, Any]) -> None:
    """A worker dies at `step`, and then its caller, before the next worker has come to the request."""
    faulty.plan.close_gate()
    faulty.plan.write(step, {"call": "strike", "skip": 1, "do": "wait"})
    caller = subprocess.Popen([sys.executable, "-c", SLOW_CALLER, what, str(path)])
    try:
        faulty.plan.wait_at_gate()
        assert caller.poll() is None
    finally:
        caller.kill()
        caller.wait(mounts.PATIENCE)
    faulty.plan.open_gate()


def test_request_of_a_caller_that_died_is_not_mixed_up(through: Faulty) -> None:
    """It was done and nobody waits for its answer: the next one that is the same has to be done itself."""
    here = through.mount.path / "caller"
    here.mkdir()
    for what in ("unlink", "mkdir"):
        if what == "unlink":
            (here / what).touch()
        caller_dies(through, what, here / what, {"call": what, "name": what, "after": True, "do": "kill"})
        assert (what in os.listdir(here)) == (what == "mkdir")
        mounts.until(
            lambda what=what: (here / what).exists() == (what == "mkdir"), "the kernel's memory of a name is wrong"
        )
    (here / "unlink").touch()
    (here / "unlink").unlink()
    assert os.listdir(here) == ["mkdir"]
    with pytest.raises(FileExistsError):
        (here / "mkdir").mkdir()
    (here / "mkdir").rmdir()
    (here / "mkdir").mkdir()
    assert os.listdir(here) == ["mkdir"]


def test_file_of_a_caller_that_died_is_sound(alone) -> None:
    """The rest of a write or a cut never comes: the file has to be whole all the same, whatever the clock says."""
    with alone("--no-writeback") as faulty:
        mount, store = faulty.mount, str(faulty.mount.store)
        _, keys, _ = keystore.unlock_store(store, mounts.KEY.encode())
        hours_ahead = time.time_ns() + 5 * state.HOUR_NS
        for what, step, began in (
            ("write", {"bytes": 6 * 4096 + 100}, None),
            ("truncate", {}, None),
            ("truncate", {}, hours_ahead),
        ):
            if began is not None:
                state.save(store, keys, state.State(clean=False, began=began, windows=()))
            path = mount.path / f"{what} {began}"
            path.write_bytes(DATA)
            caller_dies(faulty, what, path, {"call": "pwrite", "name": path.name, "do": "kill"} | step)
            mount.worker()
    mount_again(faulty)
    with mounts.mounted(faulty.mount.store, mount.path) as mount:
        assert (mount.path / "write None").read_bytes()[:3000] == DATA[:3000]
        for name in ("truncate None", f"truncate {hours_ahead}"):
            found = (mount.path / name).read_bytes()
            assert len(found) >= 5000
            assert DATA.startswith(found)


# --- killed under load --------------------------------------------------------------------------------------------


def change_names(directory: Path, stop: Callable[[], bool]) -> None:
    """Every operation on names, each of which must do exactly what it is to do; and a file that has none."""
    directory.mkdir()
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    turn = 0
    while not stop():
        turn += 1
        data = os.urandom(turn % 9000)
        fd = os.open("a", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644, dir_fd=at)
        with pytest.raises(FileExistsError):
            os.open("a", os.O_CREAT | os.O_EXCL | os.O_RDWR, dir_fd=at)
        os.write(fd, data)
        os.fsync(fd)
        os.rename("a", "b", src_dir_fd=at, dst_dir_fd=at)
        os.link("b", "c", src_dir_fd=at, dst_dir_fd=at)
        os.symlink("b", "link", dir_fd=at)
        os.mkdir("d", dir_fd=at)
        os.mknod("fifo", stat.S_IFIFO | 0o600, dir_fd=at)
        os.fsync(at)
        with pytest.raises(FileExistsError):
            renameat2(at, "b", "d", RENAME_NOREPLACE)
        renameat2(at, "b", "e", RENAME_NOREPLACE)
        renameat2(at, "e", "d", RENAME_EXCHANGE)
        assert sorted(os.listdir(at)) == ["c", "d", "e", "fifo", "link"]
        assert (os.stat("d", dir_fd=at).st_nlink, os.readlink("link", dir_fd=at)) == (2, "b")
        os.rmdir("e", dir_fd=at)
        os.unlink("d", dir_fd=at)
        os.rename("fifo", "c", src_dir_fd=at, dst_dir_fd=at)  # takes the last name of the open file
        assert os.fstat(fd).st_nlink == 0
        assert os.pwrite(fd, b"behind", len(data)) == 6
        assert os.pread(fd, 10_000, 0) == data + b"behind"
        os.ftruncate(fd, len(data) // 2)
        assert os.pread(fd, 10_000, 0) == data[: len(data) // 2]
        os.close(fd)
        for name in ("c", "link"):
            os.unlink(name, dir_fd=at)
            with pytest.raises(FileNotFoundError):
                os.unlink(name, dir_fd=at)
    assert os.listdir(at) == []
    os.close(at)


def change_contents(path: Path, stop: Callable[[], bool], flags: int = 0) -> None:
    """Writes anywhere, appends, cuts, growth, syncs and reads of one file, compared with what it has to hold."""
    chance = random.Random(str(path))
    fd, appender = (
        os.open(path, os.O_CREAT | os.O_RDWR | flags, 0o644),
        os.open(path, os.O_WRONLY | os.O_APPEND),
    )
    wanted = bytearray()
    while not stop():
        data, at = chance.randbytes(chance.randrange(1, 40_000)), chance.randrange(len(wanted) + 5000)
        what = chance.random()
        if what < 0.4:
            wanted.extend(bytes(max(0, at - len(wanted))))
            assert os.pwrite(fd, data, at) == len(data)
            wanted[at : at + len(data)] = data
        elif what < 0.7:
            assert os.write(appender, data) == len(data)
            wanted += data
        elif what < 0.8:
            at = chance.randrange(len(wanted) + 5000) if len(wanted) < 2_000_000 else 0
            os.ftruncate(fd, at)
            wanted = wanted[:at] + bytes(max(0, at - len(wanted)))
        elif what < 0.9:
            (os.fsync if what < 0.85 else os.fdatasync)(fd)
        else:
            assert os.pread(fd, len(data), at) == wanted[at : at + len(data)]
            assert os.fstat(fd).st_size == len(wanted)
    os.close(appender)
    assert os.pread(fd, 1 << 30, 0) == wanted
    os.close(fd)
    assert path.read_bytes() == wanted


def list_names(directory: Path, stop: Callable[[], bool]) -> None:
    """What stays in a directory is listed once, whatever comes and goes beside it."""
    names = sorted(f"{i} stays" for i in range(700))
    for name in names:
        (directory / name).touch()
    while not stop():
        (directory / "comes and goes").touch()
        found = sorted(os.listdir(directory))
        found.remove("comes and goes")
        assert found == names
        (directory / "comes and goes").unlink()


@lockable
@pytest.mark.parametrize("options", [(), ("--no-writeback",)], ids=["writeback", "write-through"])
def test_nobody_notices_under_load(tmp_path: Path, options: tuple[str, ...]) -> None:
    store = make_store(tmp_path / "store")
    pauses = []
    chance = random.Random(3)
    with mounts.mounted(store, tmp_path / "mnt", *options) as mount:
        top = mount.path
        (top / "list").mkdir()
        callers = [functools.partial(change_names, top / f"names {i}") for i in range(2)]
        callers.append(functools.partial(list_names, top / "list"))
        callers.append(functools.partial(change_contents, top / "cached"))
        callers.append(functools.partial(change_contents, top / "synced", flags=os.O_DSYNC))
        with Load(*callers) as load:
            for _ in range(10):
                time.sleep(chance.uniform(0.1, 0.3))
                if load.failed():
                    break
                killed = time.perf_counter()
                mount.kill_worker()
                os.statvfs(top)
                pauses.append(1000 * (time.perf_counter() - killed))
        status = mount.status()
        assert status["supervisor"] == mount.process.pid
        assert status["takeovers"] == 10
        assert status["writeback"] == (not options)
        print(f"from kill to answer: {sorted(pauses)[len(pauses) // 2]:.0f} ms, at most {max(pauses):.0f} ms")
    sound(store)


def test_files_that_lost_their_names_go_on(faulty: Faulty) -> None:
    """More of them than a process may have open by default, one of them through several handles."""
    here = faulty.mount.path / "nameless"
    here.mkdir()
    path = here / "several"
    path.write_bytes(DATA)
    reader, writer, appender = (os.open(path, flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND))
    path.unlink()
    faulty.mount.kill_worker()
    os.pwrite(writer, b"new", 5000)
    others = {}
    for i in range(1200):
        fd = os.open(here / str(i), os.O_CREAT | os.O_RDWR)
        others[fd] = b"%d" % i
        os.write(fd, others[fd])
        os.unlink(here / str(i))
    faulty.mount.kill_worker()
    os.write(appender, b"behind")
    os.fsync(writer)
    wanted = DATA[:5000] + b"new" + DATA[5003:] + b"behind"
    assert os.pread(reader, 1 << 20, 0) == wanted
    os.ftruncate(writer, 7000)
    os.close(writer)
    faulty.mount.kill_worker()
    assert os.pread(reader, 1 << 20, 0) == wanted[:7000]
    assert (os.fstat(reader).st_nlink, os.fstat(reader).st_size) == (0, 7000)
    for fd in (reader, appender):
        os.close(fd)
    for fd, data in others.items():
        assert os.pread(fd, 10, 0) == data
        os.close(fd)
    assert os.listdir(here) == []
    assert nameless(faulty.mount) == []


def test_removed_directory_goes_on(faulty: Faulty) -> None:
    """Whoever is in it, or has it open, sees an empty directory, as without a kill."""
    here = faulty.mount.path / "removed"
    here.mkdir()
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    here.rmdir()
    for _ in range(2):
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
        with pytest.raises(FileNotFoundError):
            os.open("new", os.O_CREAT | os.O_RDWR, dir_fd=fd)
        faulty.mount.kill_worker()
    os.close(fd)
    assert nameless(faulty.mount) == []


def test_mapped_file_goes_on(faulty: Faulty) -> None:
    path = faulty.mount.path / "mapped"
    path.write_bytes(DATA)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5000:5003] = b"new"
        faulty.mount.kill_worker()
        memory[6000:6003] = b"NEW"
        memory.flush()
        faulty.mount.kill_worker()
        wanted = DATA[:5000] + b"new" + DATA[5003:6000] + b"NEW" + DATA[6003:]
        assert memory[:] == wanted
    assert path.read_bytes() == wanted


def test_file_that_is_being_synced_is_not_closed(faulty: Faulty) -> None:
    """A worker does not know how many handles there are from before its time: it must not close what it waits for."""
    path = faulty.mount.path / "synced"
    one = os.open(path, os.O_CREAT | os.O_RDWR)
    other = os.open(path, os.O_RDONLY)
    os.write(one, DATA)
    faulty.mount.kill_worker()
    faulty.plan.close_gate()
    faulty.plan.write({"call": "fsync", "do": "doze"}, {"call": "fsync", "name": "synced", "do": "wait"})
    os.fsync(one)  # the disk is slow from now on: syncs are waited for in threads
    said: list[str] = []
    with Load(lambda _: said.append(outcome(lambda: os.fsync(one)))):
        faulty.plan.wait_at_gate()
        os.close(other)
        os.statvfs(faulty.mount.path)
        with open(faulty.mount.path / "takes the next descriptor", "wb") as file:
            file.write(DATA)
            faulty.plan.open_gate()
    os.close(one)
    assert said == ["done"]
    assert path.read_bytes() == DATA


def nameless(mount: mounts.Mount) -> list[str]:
    """What supervisor and workers keep open though it has no name in the store any more, once they had time to let go.

    Only root can see that.
    """
    if not ROOT:
        return []
    status = mount.status()
    found: list[str] = []

    def none_left() -> bool:
        found.clear()
        for pid in (
            status["supervisor"],
            mount.worker(),
            mounts.until(lambda: mount.status()["standby"], "a standby"),
        ):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if target.endswith("(deleted)") and target.startswith(str(mount.store)):
                        found.append(f"{pid}: {target}")
        return not found

    with contextlib.suppress(AssertionError):
        mounts.until(none_left, "nameless files", 10)
    return found


def test_directory_is_listed_across_a_kill(faulty: Faulty) -> None:
    here = faulty.mount.path / "listed"
    here.mkdir()
    names = {f"{i:0200d}" for i in range(1500)}
    for name in names:
        (here / name).touch()
    with os.scandir(here) as entries:
        found = [next(entries).name for _ in range(10)]
        faulty.mount.kill_worker()
        found += [next(entries).name for _ in range(500)]
        faulty.mount.kill_worker()
        found += [entry.name for entry in entries]
    assert sorted(found) == sorted(names)


def test_many_files_and_open_handles(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        for i in range(100):
            (mount.path / f"{i}").mkdir()
            for j in range(100):
                os.mknod(mount.path / f"{i}/{j}", stat.S_IFREG | 0o600)
        opened = {}
        for i in range(100):
            fd = os.open(mount.path / f"{i}/{i}", os.O_RDWR)
            os.write(fd, DATA[i:])
            opened[fd] = DATA[i:]
        killed = time.perf_counter()
        mount.kill_worker()
        os.statvfs(mount.path)
        print(f"10,000 files: from kill to answer {1000 * (time.perf_counter() - killed):.0f} ms")
        for i, (fd, data) in enumerate(opened.items()):
            os.fsync(fd)
            assert os.pread(fd, 1 << 20, 0) == data
            os.close(fd)
            assert (mount.path / f"{i}/{i}").read_bytes() == data
        assert sum(len(names) for _, _, names in os.walk(mount.path)) == 10_000
    sound(store)


# --- given up, or not needed any more -----------------------------------------------------------------------------


def test_hung_worker_is_replaced(faulty: Faulty) -> None:
    faulty.mount.tolerated.append(r"worker \d+ has not been heard of for 3 s: it is replaced$")
    pid = faulty.mount.worker()
    os.kill(pid, signal.SIGSTOP)
    began = time.perf_counter()
    (faulty.mount.path / "hung").write_bytes(DATA)
    print(f"stopped: {time.perf_counter() - began:.1f} s until it was replaced")
    assert faulty.mount.worker() != pid
    assert (faulty.mount.path / "hung").read_bytes() == DATA


def test_supervisor_that_slept_kills_nobody(faulty: Faulty) -> None:
    """To it, as after a jump of its clock, everybody else was silent."""
    pid = faulty.mount.worker()
    faulty.mount.process.send_signal(signal.SIGSTOP)
    try:
        (faulty.mount.path / "served all the while").touch()
        time.sleep(3.5)
    finally:
        faulty.mount.process.send_signal(signal.SIGCONT)
    time.sleep(0.6)
    assert faulty.mount.worker() == pid


CRITICAL = r"CRITICAL: \S+/mnt: given up, and the mount left dead: 5 workers failed within 60 s; the last one, "


def test_given_up_when_no_worker_starts(alone) -> None:
    """As after an upgrade that does not run: the one that stood by is the last."""
    with alone() as faulty:
        mount, plan = faulty.mount, faulty.plan
        standby(mount)
        plan.write({"call": "load", "do": "exit", "stay": True})
        mount.kill_worker()
        assert os.listdir(mount.path) == ["before"]
        mount.expect(r"ERROR: worker \d+, which stood by, ended with exit code 1$")
        mounts.until(lambda: "which stood by, ended" in mount.log(), "the end of those who were to stand by")
        mount.expect(CRITICAL)
        mount.kill_worker()
        mount.given_up()
    mount_again(faulty)


def test_given_up_when_no_worker_can_prepare(alone, tmp_path: Path) -> None:
    log = tmp_path / "daemon.log"
    with alone("--log-file", str(log)) as faulty:
        mount, plan = faulty.mount, faulty.plan
        plan.write({"call": "open", "name": "store", "do": "fail", "errno": errno.EIO, "stay": True})
        mount.tolerated += ["^Traceback"]
        mount.kill_worker()
        mount.given_up()
    assert re.search("given up.*Input/output error", log.read_text())
    mount_again(faulty)


@pytest.mark.parametrize(("way", "number"), [("abort", 6), ("kill", 9)])
def test_given_up_when_a_request_kills_every_worker(alone, way: str, number: int) -> None:
    """Also when it is the kernel that kills them, as it does for the memory that a request takes."""
    with alone() as faulty:
        mount, plan = faulty.mount, faulty.plan
        (mount.path / "poison").touch()
        plan.write({"call": "unlink", "name": "poison", "do": way, "stay": True})
        mount.tolerated += [rf"worker \d+ was killed by signal {number}$", "has taken over$"]
        mount.expect(CRITICAL + rf"\d+, was killed by signal {number}")
        assert fails(lambda: os.unlink(mount.path / "poison"))
        mount.given_up()
    mount_again(faulty)


def test_death_of_the_supervisor_fails_fast(alone) -> None:
    """Also whoever waits for an answer."""
    with alone() as faulty:
        mount, plan = faulty.mount, faulty.plan
        processes = [mount.worker(), standby(mount)]
        plan.close_gate()
        plan.write({"call": "mkdir", "name": "waits", "do": "wait"})
        answers: list[bool] = []
        with Load(lambda _: answers.append(fails((mount.path / "waits").mkdir))):
            plan.wait_at_gate()
            mount.killed = True
            mount.process.kill()
            mount.process.wait(mounts.PATIENCE)
        assert answers == [True]
        assert mount.dead()
        mounts.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in processes), "the workers' end")
        mounts.run("umount", mount.path, key=None)
        assert mounts.entry_at(mount.path) is None
    mount_again(faulty)


# --- unmounted meanwhile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["terminate", "umount"])
def test_unmounted_before_the_next_worker_serves(alone, how: str) -> None:
    with alone() as faulty:
        mount, plan = faulty.mount, faulty.plan
        standby(mount)
        plan.close_gate()
        plan.write({"call": "open", "name": "store", "do": "wait"})
        mount.kill_worker()
        plan.wait_at_gate()
        if how == "terminate":
            mount.process.send_signal(signal.SIGTERM)
        else:
            assert libc.umount2(os.fsencode(mount.path), 0) == 0, ctypes.get_errno()
        mounts.until(lambda: mounts.entry_at(mount.path) is None, "the end of the mount")
        plan.open_gate()
        assert mount.process.wait(mounts.PATIENCE) == 0, mount.log()
    mount_again(faulty)


def test_stopped_with_data_that_is_only_in_memory(alone) -> None:
    with alone() as faulty:
        mount = faulty.mount
        standby(mount)
        (mount.path / "before").write_bytes(bytes(len(DATA)))
        mount.kill_worker()
        (mount.path / "before").write_bytes(DATA)
        mount.kill_worker()
        mount.terminate()
    mount_again(faulty)


def test_worker_dies_at_the_end(alone) -> None:
    """Nothing is mounted any more, and somebody has yet to write down that all went well."""
    with alone() as faulty:
        faulty.plan.write({"call": "save", "do": "kill"})
        faulty.mount.umount()
        assert faulty.plan.rest() == []
    mount_again(faulty)


# --- reload -------------------------------------------------------------------------------------------------------


@lockable
def test_reload_under_load(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        mount.tolerated += KILLED[1:]
        first = mount.worker()
        callers = [functools.partial(change_names, mount.path / "names")]
        callers.append(functools.partial(change_contents, mount.path / "data"))
        with Load(*callers):
            for i in range(1, 4):
                said = mounts.run("reload", mount.path, key=None).stdout
                status = mount.status()
                assert said == f"{mount.path} is served by the new worker {status['worker']}.\n"
                assert status["takeovers"] == i
                assert status["supervisor"] == mount.process.pid
        assert mount.worker() != first
        assert not os.path.exists(f"/proc/{first}")
    sound(store)


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ({"call": "load", "do": "exit"}, "the new worker ended with exit code 1"),
        ({"call": "open", "name": "store", "do": "fail", "errno": errno.EMFILE}, "Too many open files"),
        ({"call": "open", "name": ".encfs_js", "do": "kill"}, "the new worker was killed by signal 9"),
        ({"call": "strike", "do": "abort"}, "the new worker was killed by signal 6"),
    ],
    ids=["does not start", "cannot prepare", "dies preparing", "dies serving"],
)
def test_reload_of_what_does_not_work(faulty: Faulty, step: dict[str, Any], complaint: str) -> None:
    mount, plan = faulty.mount, faulty.plan
    old = mount.worker()
    mounts.until(lambda: mount.status()["standby"], "a standby")
    mount.tolerated += [r"the new worker \d+ .*: the old code goes on$", "^Traceback"]
    fd = os.open(mount.path / "reload", os.O_CREAT | os.O_RDWR)
    os.write(fd, DATA)
    os.fsync(fd)
    # The old worker, which answers nothing more, must not come to the step of the new one.
    plan.write(*([{"call": "load", "do": "pass"}] if step["call"] == "strike" else []), step)
    done = mounts.run("reload", mount.path, key=None, code=28)
    assert complaint in done.stderr
    assert done.stderr.startswith(f"encfs-js: error: {mount.path}: ")
    assert "the mount goes on as before" in done.stderr
    assert plan.rest() == []
    assert os.pread(fd, 1 << 20, 0) == DATA
    os.close(fd)
    if step["call"] == "load":
        assert mount.worker() == old
    mounts.run("reload", mount.path, key=None)
    assert (mount.path / "reload").read_bytes() == DATA


def test_reload_that_failed_is_forgotten(alone) -> None:
    with alone() as faulty:
        standby(faulty.mount)
        faulty.mount.tolerated += [r"the new worker \d+ .*: the old code goes on$", "^Traceback"]
        faulty.plan.write({"call": "open", "name": "store", "do": "fail", "errno": errno.EMFILE})
        mounts.run("reload", faulty.mount.path, key=None, code=28)
        assert faulty.plan.rest() == []
        faulty.mount.umount()
    mount_again(faulty)


def test_commands_that_make_no_sense_change_nothing(faulty: Faulty) -> None:
    mount = faulty.mount
    mounts.until(lambda: mount.status()["standby"], "a standby")
    before = mount.status()
    with contextlib.chdir(mount.store / ".encfs_js"):
        for line in (
            b"",
            b"{",
            b"[]\n",
            b'{"do": "dance"}',
            b'{"do": "reload"}',
            b'{"do": "reload", "options": 7}',
        ):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(mounts.PATIENCE)
                sock.connect("control")
                sock.sendall(line)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(65536)
    assert mount.status() == before
    mounts.run("reload", mount.path, key=None)
    assert mount.alive()


# --- kernels that cannot send requests again ----------------------------------------------------------------------


def test_kernel_that_cannot_resend(alone) -> None:
    with alone(environ={"FAULT_NO_RESEND": "1"}) as faulty:
        mount, plan = faulty.mount, faulty.plan
        mount.expect(
            "WARNING: this kernel cannot send requests again .FUSE_NOTIFY_RESEND, Linux 6.9.: every write goes"
        )
        mount.expect(
            r"CRITICAL: \S+ given up, and the mount left dead: worker \d+ was killed by signal 9, and this kernel"
        )
        status = mount.status()
        assert (status["writeback"], status["standby"]) == (False, None)
        fd = os.open(mount.path / "through", os.O_CREAT | os.O_RDWR)
        os.write(fd, DATA)
        assert os.stat(mount.store / "through").st_size == 5 * 4096
        os.close(fd)
        refused = mounts.run("reload", mount.path, key=None, code=28)
        assert "this kernel cannot send requests again" in refused.stderr
        plan.write({"call": "mkdir", "name": "waits", "do": "kill"})
        assert fails((mount.path / "waits").mkdir)
        mount.given_up()
        assert sum("FUSE_NOTIFY_RESEND" in line for line in mount.complaints()) == 1
    mount_again(faulty)
