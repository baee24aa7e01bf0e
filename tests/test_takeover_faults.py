"""What can go wrong around a takeover: the disk below, the limits of the process, the place of the mount, prying eyes."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import mounts
import pytest
import takeover
from takeover import DATA, KILLED, Faulty, make_store, mount_again, outcome, sound, standby

from encfs_js import keystore, state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
]
as_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of its own"),
]
PAGE = 4096


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Faulty]]:
    """A mount of a test's own."""
    return functools.partial(takeover.faulty_mounted, tmp_path)


def system(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=mounts.PATIENCE)
    assert done.returncode == 0, f"{command}: {done.stderr}"


class Disk:
    """An ext4 of 48 MiB in a file, mounted at `top`."""

    def __init__(self, where: Path) -> None:
        self.top, self.image = where / "disk", where / "disk.img"
        self.top.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(48 << 20)
        system("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", self.image)
        self.mount()

    def mount(self) -> None:
        system("mount", "-o", "loop", self.image, self.top)

    def end(self) -> None:
        while mounts.entry_at(self.top) is not None:
            if subprocess.run(["umount", self.top], capture_output=True, timeout=mounts.PATIENCE).returncode:
                mounts.detach(self.top)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    try:
        yield disk
    finally:
        disk.end()


def free(top: Path) -> int:
    found = os.statvfs(top)
    return found.f_bavail * found.f_frsize


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


# --- the disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--no-writeback",)], ids=["writeback", "write-through"])
@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of its own")
def test_full_disk(alone, disk: Disk, options: tuple[str, ...]) -> None:
    """Who was told that his data are on the disk finds them, and everybody else an error, however often a worker dies."""
    with alone(*options, store=make_store(disk.top / "store")) as faulty:
        mount = faulty.mount
        mount.tolerated.append("the disk is full: the reserve of")
        acked = []
        filler = disk.top / "filler"
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free(disk.top) - (6 << 20))
        for i in range(1000):
            if i % 8 == 7 and len(mount.log().splitlines()) < 40:
                mount.kill_worker()
            path = mount.path / str(i)
            said = outcome(lambda: write_synced(path, DATA * 10))  # noqa: B023
            if said != "done":
                assert said == "ENOSPC"
                break
            acked.append(path.name)
        else:
            raise AssertionError("the disk does not get full")
        mount.kill_worker()
        assert outcome(lambda: write_synced(mount.path / "more", DATA * 10)) == "ENOSPC"
        mount.kill_worker()
        for name in acked:
            assert (mount.path / name).read_bytes() == DATA * 10
        filler.unlink()
        write_synced(mount.path / "more", DATA * 10)
    mount_again(faulty)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of its own")
def test_disk_becomes_read_only(alone, disk: Disk) -> None:
    """As the kernel makes it after an error: it can be read as long as it can be, and nothing that was synced is lost."""
    with alone(store=make_store(disk.top / "store")) as faulty:
        mount = faulty.mount
        with open(mount.path / "before", "rb") as file:
            os.fsync(file.fileno())
        system("mount", "-o", "remount,abort", disk.top)
        with contextlib.suppress(OSError):
            os.mkdir(disk.top / "this makes the kernel notice")
        assert outcome(lambda: write_synced(mount.path / "new", DATA)) == "EROFS"
        assert outcome((mount.path / "before").unlink) == "EROFS"
        assert (mount.path / "before").read_bytes() == DATA
        mount.kill_worker()
        assert (mount.path / "before").read_bytes() == DATA
        assert outcome(lambda: write_synced(mount.path / "new", DATA)) == "EROFS"
        mount.expect("ERROR: .* its file system has become read-only")
    disk.end()
    disk.mount()
    mount_again(faulty)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of its own")
def test_disk_is_gone(alone, disk: Disk) -> None:
    """Unmounted below us: who has it goes on, the next worker does not find it, and the mount dies with the reason."""
    with alone(store=make_store(disk.top / "store")) as faulty:
        mount = faulty.mount
        pid = mount.worker()
        system("umount", "--lazy", disk.top)
        assert (mount.path / "before").read_bytes() == DATA
        write_synced(mount.path / "after", DATA)
        mount.tolerated += [*KILLED, r"worker \d+ ended with exit code \d+$", "^Traceback"]
        mount.expect("CRITICAL: .*given up, .* no encfs_js store")
        os.kill(pid, signal.SIGKILL)
        mount.given_up()
    mounts.until(lambda: subprocess.run(["mount", "-o", "loop", disk.image, disk.top]).returncode == 0, "the disk")
    mount_again(faulty)
    with mounts.mounted(mount.store, mount.path) as again:
        assert (again.path / "after").read_bytes() == DATA


def test_errors_of_the_disk_reach_who_asks(alone) -> None:
    with alone() as faulty:
        mount, plan = faulty.mount, faulty.plan
        path = mount.path / "file"
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        os.write(fd, DATA)
        os.fsync(fd)
        plan.write({"call": "fsync", "name": "file", "do": "fail", "errno": errno.EIO})
        os.write(fd, DATA)
        assert outcome(lambda: os.fsync(fd)) == "EIO"
        os.fsync(fd)
        mount.kill_worker()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        plan.write({"call": "preadv", "name": "file", "skip": 2, "do": "fail", "errno": errno.EIO, "stay": True})
        assert outcome(lambda: os.pread(fd, 1 << 20, 0)) == "EIO"
        mount.kill_worker()
        assert outcome(lambda: os.pread(fd, 1 << 20, 0)) == "EIO"
        plan.write()
        assert os.pread(fd, 1 << 20, 0) == DATA * 2
        mount.expect("ERROR: file: .* already accepted, are lost: Input/output error")
        plan.write({"call": "pwrite", "name": "file", "do": "fail", "errno": errno.EIO})
        os.pwrite(fd, bytes(5000), 0)
        assert outcome(lambda: os.fsync(fd)) == "EIO"
        os.fsync(fd)
        os.close(fd)
    mount_again(faulty)


def test_disk_fails_at_the_very_end(alone) -> None:
    """Nothing is mounted any more: no worker after it could do better, and the exit code says it."""
    with alone() as faulty:
        mount, plan = faulty.mount, faulty.plan
        plan.write({"call": "save", "do": "fail", "errno": errno.EIO, "stay": True})
        mount.expect("CRITICAL: .* unmounted, but what was written last may not be on the disk: Input/output error")
        mounts.run("umount", mount.path, key=None)
        assert mount.process.wait(mounts.PATIENCE) == 25
        mount.killed = True
        assert mounts.entry_at(mount.path) is None
    mount_again(faulty)


# --- the clock ----------------------------------------------------------------------------------------------------


def test_clock_was_set_back_before_a_crash(tmp_path: Path) -> None:
    """The run began, so it was noted, hours after all that it wrote: its torn files are cut as any others are."""
    store = make_store(tmp_path / "store")
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        write_synced(mount.path / "torn", DATA)
        _, keys, _ = keystore.unlock_store(str(store), mounts.KEY.encode())
        began = state.load(str(store), keys).began + 5 * state.HOUR_NS
        state.save(str(store), keys, state.State(clean=False, began=began, windows=()))
        mount.kill()
    os.truncate(store / "torn", 3 * PAGE)
    with mounts.mounted(store, tmp_path / "mnt", expect=("WARNING: torn: cut from",)) as mount:
        found = (mount.path / "torn").read_bytes()
        assert 2 * PAGE < len(found) < 3 * PAGE
        assert DATA.startswith(found)
    sound(store)


# --- limits and places --------------------------------------------------------------------------------------------


def test_limit_of_open_files(tmp_path: Path) -> None:
    """Who opens one more gets EMFILE; the daemon and what is open go on, also through a takeover."""
    store = make_store(tmp_path / "store")
    limited = ["prlimit", "--nofile=96:96", *mounts.COMMAND]
    with mounts.mounted(store, tmp_path / "mnt", program=limited) as mount:
        mount.tolerated += KILLED
        opened: list[int] = []
        while True:
            path = mount.path / str(len(opened))
            said = outcome(lambda: opened.append(os.open(path, os.O_CREAT | os.O_RDWR)))  # noqa: B023
            if said != "done":
                break
            os.write(opened[-1], DATA)
        assert said == "EMFILE"
        assert len(opened) > 40
        mount.kill_worker()
        for fd in opened:
            os.fsync(fd)
        mount.kill_worker()
        for fd in opened:
            assert os.pread(fd, 1 << 20, 0) == DATA
        for fd in opened:
            os.close(fd)
        write_synced(mount.path / "again", DATA)
        assert (mount.path / "again").read_bytes() == DATA
        for i in range(len(opened)):
            assert (mount.path / str(i)).read_bytes() == DATA
    sound(store)


@pytest.mark.parametrize("how", ["terminate", "umount"])
def test_directory_above_the_mountpoint_moves(tmp_path: Path, how: str) -> None:
    store = make_store(tmp_path / "store")
    above, moved = tmp_path / "above", tmp_path / "moved"
    with mounts.mounted(store, above / "mnt") as mount:
        mount.tolerated += KILLED
        (mount.path / "file").write_bytes(DATA)
        with pytest.raises(OSError, match="busy"):
            mount.path.rmdir()
        above.rename(moved)
        mount.path, mount.log_file = moved / "mnt", moved / mount.log_file.name
        try:
            mount.kill_worker()
            assert (mount.path / "file").read_bytes() == DATA
            assert mounts.run("status", mount.path, key=None)
            mounts.run("reload", mount.path, key=None)
            if how == "terminate":
                mount.terminate()
            else:
                mount.umount()
        finally:
            mounts.detach(moved / "mnt")
    sound(store)


def test_two_at_once(tmp_path: Path) -> None:
    """Of two supervisors that are started for one store one mounts it, and the other says who has it."""
    store = make_store(tmp_path / "store")
    mountpoints = [tmp_path / "a", tmp_path / "b"]
    children = []
    for mountpoint in mountpoints:
        mountpoint.mkdir()
        command = [*mounts.COMMAND, "mount", str(store), str(mountpoint)]
        children.append(
            subprocess.Popen(command, env=mounts.environment(mounts.KEY), stderr=subprocess.PIPE, text=True)
        )
    try:
        said = [child.communicate(timeout=mounts.PATIENCE)[1] for child in children]
        codes = [child.returncode for child in children]
        assert sorted(codes) == [0, 18]
        winner, loser = codes.index(0), codes.index(18)
        assert str(mountpoints[winner]) in said[loser]
        assert mounts.entry_at(mountpoints[loser]) is None
        (mountpoints[winner] / "file").write_bytes(DATA)
        mounts.run("umount", mountpoints[winner], key=None)
    finally:
        for child in children:
            child.kill()
            child.wait(mounts.PATIENCE)
        for mountpoint in mountpoints:
            mounts.detach(mountpoint)
    sound(store)


# --- files that are not sealed yet --------------------------------------------------------------------------------


def test_plain_files_are_left_alone_and_sealed_whole(tmp_path: Path) -> None:
    """A worker dies at every step of sealing one in place; and of those that are only read nothing is taken."""
    store = tmp_path / "store"
    make_store(store, plaintext="read")
    names = [f"plain {i}" for i in range(20)]
    for name in names:
        (store / name).write_bytes(DATA)
    with takeover.faulty_mounted(tmp_path, store=store) as faulty:
        mount, plan = faulty.mount, faulty.plan
        mount.tolerated.append("finished the rewriting that a crash had interrupted")
        mount.kill_worker()
        assert (mount.path / names[0]).read_bytes() == DATA
        assert (store / names[0]).read_bytes() == DATA
        for point, name in enumerate(names[1:]):
            plan.write({"call": "change", "skip": point, "do": "kill"})
            with open(mount.path / name, "r+b", buffering=0) as file:
                file.seek(6000)
                file.write(b"new")
                os.fsync(file.fileno())
            done = bool(plan.rest())
            plan.write()
            assert (mount.path / name).read_bytes() == DATA[:6000] + b"new" + DATA[6003:]
            if done:
                break
        assert done
        assert point > 3
        for name in names[point + 2 :]:
            assert (mount.path / name).read_bytes() == DATA
    mount_again(faulty)


# --- keys ---------------------------------------------------------------------------------------------------------

SPY = """#!/bin/sh
{ cat /proc/$$/environ; ls -l /proc/$$/fd; } >> "$0.saw"
exec %s "$@"
"""


def of_process(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def kib(pid: int, field: str) -> int:
    """A figure of /proc/PID/status."""
    line = next(line for line in of_process(pid, "status").decode().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into these processes")
def test_keys_are_in_memory_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store")
    _, keys, _ = keystore.unlock_store(str(store), mounts.KEY.encode())
    keyring_key, volume_keys = keys.secrets()
    secrets = [mounts.KEY.encode()]
    for secret in (keyring_key, *volume_keys.values()):
        secrets += [secret, secret.hex().encode(), base64.b64encode(secret)]
    spy = tmp_path / "bin/fusermount3"
    spy.parent.mkdir()
    spy.write_text(SPY % shutil.which("fusermount3"))
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", str(spy.parent) + os.pathsep + os.environ["PATH"])
    with mounts.mounted(store, tmp_path / "mnt") as mount:
        mount.kill_worker()
        pids = {"supervisor": mount.process.pid, "worker": mount.worker(), "standby": standby(mount)}
        (mount.path / "file").write_bytes(DATA)
        seen = {"log": mount.log().encode(), "status": json.dumps(mount.status()).encode()}
        for name, pid in pids.items():
            seen |= {f"{name}'s {what}": of_process(pid, what) for what in ("cmdline", "environ")}
            limits = of_process(pid, "limits").decode()
            assert re.search(r"Max core file size +0 +0 ", limits), f"{name} may leave a core file"
            assert kib(pid, "VmLck") or name == "standby", f"{name} has no memory locked"
        for name, pid in pids.items():
            keys_of = [
                fd for fd in os.listdir(f"/proc/{pid}/fd") if "memfd:keys" in os.readlink(f"/proc/{pid}/fd/{fd}")
            ]
            assert len(keys_of) == (name == "supervisor"), f"{name} has them open {len(keys_of)} times"
            for fd in keys_of:
                with pytest.raises(PermissionError):
                    os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY | os.O_TRUNC)
        resident = kib(pids["supervisor"], "VmRSS")
        print(f"supervisor: {resident} KiB resident, worker: {kib(pids['worker'], 'VmRSS')} KiB")
        assert resident < 15 << 10
        mount.terminate()
    saw = (tmp_path / "bin/fusermount3.saw").read_bytes()
    assert saw.count(b"_FUSE_COMMFD=") == 1
    assert b"memfd" not in saw
    seen["fusermount3's environment"] = saw
    for path in (store / ".encfs_js").iterdir():
        if path.name != "reserve" and path.is_file():
            seen[path.name] = path.read_bytes()
    for where, text in seen.items():
        assert not any(secret in text for secret in secrets), f"a key is in {where}"


NOBODY_LOOKS = """
set -e
encfs-js init store > init.log
mkdir mnt
encfs-js mount store mnt
trap 'encfs-js umount mnt' EXIT
python - store <<'END'
import ctypes, errno, os, sys
from encfs_js import control
libc = ctypes.CDLL(None, use_errno=True)
while True:
    status = control.ask(sys.argv[1], {"do": "status"}, 60)
    if status["standby"]:
        break
for name in "supervisor", "worker", "standby":
    pid = status[name]
    assert os.stat(f"/proc/{pid}/status").st_uid == 0, f"{name} can be dumped"
    for what in "environ", "mem", "fd/0", "maps":
        try:
            os.close(os.open(f"/proc/{pid}/{what}", os.O_RDONLY))
        except PermissionError:
            continue
        sys.exit(f"{name}: /proc/PID/{what} can be opened")
    if libc.ptrace(16, pid, 0, 0) == 0 or ctypes.get_errno() != errno.EPERM:
        sys.exit(f"{name} can be attached to")
print("nothing to be seen by user", os.geteuid())
END
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_processes_are_closed_to_their_own_user() -> None:
    """Without privileges, in a mount namespace with a /dev/fuse that users may open, as udev makes it."""
    with tempfile.TemporaryDirectory(prefix="encfs_js-nobody-") as home:
        os.chown(home, mounts.NOBODY, mounts.NOBODY)
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        device = 'set -e; mknod -m 666 fuse c 10 229; mount --bind fuse /dev/fuse; exec "$@"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", device, "-", *mounts.command_as_user(mounts.NOBODY), "bash", "-c", NOBODY_LOOKS],
            cwd=home,
            env=mounts.environment(mounts.KEY) | {"HOME": home, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=mounts.PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"nothing to be seen by user {mounts.NOBODY}\n"
