"""A full disk: whatever nats-server acknowledged is there after room was made, on the mount as on a plain directory."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import mounts
import nats_world as world
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk"),
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]

MIB = 1 << 20
FILLER = 24 * MIB  # what is removed to make room: it lies beside STORE, on the same disk


def system(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=mounts.PATIENCE)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def small_disk(work: Path, kind: str, mib: int, filler: int = FILLER) -> Iterator[Path]:
    """An ext4 in a loop device, or a tmpfs, of `mib` MiB; with a file `filler` on it that holds so many bytes."""
    disk, image = work / "disk", work / "disk.img"
    disk.mkdir()
    if kind == "tmpfs":
        system("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", disk)
    else:
        with open(image, "wb") as file:
            file.truncate(mib * MIB)
        system("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        system("mount", "-o", "loop", image, disk)
    try:
        with open(disk / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, filler)
        yield disk
    finally:
        while mounts.entry_at(disk) is not None:
            if subprocess.run(["umount", disk], capture_output=True, timeout=mounts.PATIENCE).returncode:
                mounts.detach(disk)
        # "mount -o loop" has asked the kernel to give the loop device back with the last user of the file system.
        image.unlink(missing_ok=True)


def fill_up(top: Path) -> None:
    """Take the last free block of a disk: one large file, then small ones, which find the gaps."""
    for number in range(1000):
        with contextlib.suppress(OSError), open(top / f"fill-up-{number}", "wb", buffering=0) as file:
            while file.write(bytes(100 if number else 65536)) and not number:
                pass
        if os.statvfs(top).f_bavail == 0:
            return
    raise AssertionError("the disk does not get full")


@contextlib.contextmanager
def place(kind: str, store: Path, mountpoint: Path) -> Iterator[tuple[Path, mounts.Mount | None]]:
    """Where the server keeps its store: the plain directory itself, or the mount of it."""
    if kind == "plain":
        yield store, None
    else:
        with mounts.mounted(store, mountpoint) as mount:
            # A full disk deserves a warning, as often as the daemon likes; nothing else is welcome in its log.
            mount.tolerated.append(r"(?i)no space left|full")
            yield mountpoint, mount


class Case(NamedTuple):
    """Where the store lies, the disk and its size, JetStream's sync_interval, and the size of a message."""

    where: str
    disk: str
    mib: int
    sync: str | None
    size: int


CASES = [
    Case(where, disk, mib, sync, size)
    for disk, mib, sync, size in (
        ("ext4", 64, None, 3000),
        ("ext4", 64, "always", 12_000),
        ("tmpfs", 64, None, 3000),
        ("ext4", 300, None, 30_000),
    )
    for where in ("plain", "mount")
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.where}-{c.disk}-{c.mib}-{c.sync or 'default'}")
def test_every_acked_message_survives(tmp_path: Path, case: Case) -> None:
    where, disk, mib, sync, size = case
    names = ["RED", "GREEN", "BLUE"]
    work, mountpoint = tmp_path / "work", tmp_path / "mnt"
    with small_disk(tmp_path, disk, mib) as top:
        store = top / "store"
        store.mkdir()
        if where == "mount":
            mounts.init(store)
        with place(where, store, mountpoint) as (root, mount), world.serving(root, work, sync=sync) as server:
            for name in names:
                world.add_stream(server, name, f"{name}.>")
            acked = world.flood(server, names, size)
            total = sum(len(numbers) for numbers in acked.values()) * size
            assert total > (mib * MIB - FILLER) // 3, f"the disk was full after {total} bytes already"
            assert world.write_errors(server)
            assert server.alive()
            assert mount is None or mount.alive()
            server.stop()
            (top / "filler").unlink()
            server.start()
            for name in names:
                assert world.lost(world.read(server, name), name, acked[name], size) == []
            # There is room again: the streams take messages, and keep them.
            more = {name: world.sample(name, 50, tag="more") for name in names}
            for name in names:
                world.publish(server, more[name])
            server.restart(kill=True)
            for name in names:
                messages = world.read(server, name)
                assert world.lost(messages, name, acked[name], size) == []
                assert [m[1:] for m in messages[-50:]] == [tuple(m) for m in more[name]]
        if where == "mount":
            mounts.verify(store)
            with place(where, store, mountpoint) as (root, _), world.serving(root, work) as server:
                for name in names:
                    assert world.lost(world.read(server, name), name, acked[name], size) == []
            assert mounts.unsealed(store) == []


def test_full_disk_is_mounted_again(tmp_path: Path) -> None:
    """The disk is still full when the machine comes back: the store mounts, and the server reads everything."""
    work, mountpoint, size = tmp_path / "work", tmp_path / "mnt", 3000
    with small_disk(tmp_path, "ext4", 64) as top:
        store = top / "store"
        store.mkdir()
        mounts.init(store)
        with place("mount", store, mountpoint) as (root, _), world.serving(root, work) as server:
            world.add_stream(server, "RED", "RED.>")
            acked = world.flood(server, ["RED"], size)
        with (
            open(top / "last-block", "wb") as file,
            contextlib.suppress(OSError),
        ):  # not even a little room is left
            while True:
                file.write(bytes(4096))
                file.flush()
        for _ in range(2):
            with place("mount", store, mountpoint) as (root, _), world.serving(root, work) as server:
                assert world.lost(world.read(server, "RED"), "RED", acked["RED"], size) == []
        (top / "filler").unlink()
        with place("mount", store, mountpoint) as (root, _), world.serving(root, work) as server:
            world.publish(server, world.sample("RED", 50))
            assert world.lost(world.read(server, "RED"), "RED", acked["RED"], size) == []
        mounts.verify(store)


@pytest.mark.parametrize("disk", ["ext4", "tmpfs"])
def test_no_other_file_takes_the_room_of_an_accepted_write(tmp_path: Path, disk: str) -> None:
    """What write(2) has accepted reaches the disk, although another file fills it up meanwhile."""
    mountpoint, piece = tmp_path / "mnt", bytes(range(256)) * 256
    names = ["first", "second", "third", "fourth", "fifth"]  # as many as nats-server has streams, 8 MiB each
    with small_disk(tmp_path, disk, 32, filler=MIB) as top:
        store = top / "store"
        store.mkdir()
        mounts.init(store)
        with place("mount", store, mountpoint) as (root, _):
            files = {name: os.open(root / name, os.O_RDWR | os.O_CREAT, 0o600) for name in names}
            accepted = dict.fromkeys(names, 0)
            for name in reversed(names):  # the first ones were promised room, the last ones write first
                with contextlib.suppress(OSError):
                    while accepted[name] < 8 * MIB:
                        accepted[name] += os.pwrite(files[name], piece, accepted[name])
            assert sum(accepted.values()) > 8 * MIB
            for file in files.values():
                os.fsync(file)
                os.close(file)
        with place("mount", store, mountpoint) as (root, _):
            for name, size in accepted.items():
                expected = (piece * (size // len(piece) + 1))[:size]
                assert (root / name).read_bytes() == expected, f"{name}: not the {size} bytes that were accepted"
        mounts.verify(store)


def test_guard_closes_on_a_full_disk(tmp_path: Path) -> None:
    """There is no room for a note either, but a damaged stream is protected all the same, now and after a remount."""
    mountpoint, stream = tmp_path / "mnt", "jetstream/$G/streams/RED"
    with small_disk(tmp_path, "ext4", 32, filler=MIB) as top:
        store = top / "store"
        store.mkdir()
        mounts.init(store)
        with place("mount", store, mountpoint) as (root, _):
            (root / stream / "msgs").mkdir(parents=True)
            (root / stream / "msgs" / "1.blk").write_bytes(world.noise("block", 50_000))
        mounts.flip(store / stream / "msgs" / "1.blk", 3 * 4096 + 2000)
        with place("mount", store, mountpoint) as (root, mount):
            assert mount is not None
            fill_up(top)
            mount.expect(r"ERROR: .*1\.blk page 3 .*RED")
            with pytest.raises(OSError) as damage:
                (root / stream / "msgs" / "1.blk").read_bytes()
            assert damage.value.errno == errno.EIO
            with pytest.raises(OSError) as refusal:
                (root / stream / "msgs" / "1.blk").unlink()
            assert refusal.value.errno == errno.EROFS
        mounts.run("guard", "status", store, code=26)
        (top / "filler").unlink()
        with place("mount", store, mountpoint) as (root, _), pytest.raises(OSError) as refusal:
            (root / stream / "msgs" / "1.blk").unlink()
        assert refusal.value.errno == errno.EROFS
