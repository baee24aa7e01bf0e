"""What a worker does beside serving requests."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

import mounts
import pytest
import trio
import trio.testing

from encfs_js import journal, state, worker
from encfs_js.journal import Entry

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
]


class Files:
    """Files whose disk refuses everything, `times` times."""

    def __init__(self, times: int) -> None:
        self.times, self.calls = times, 0
        self.not_swept, self.swept, self.trimmed = 0, None, 0

    def refill(self) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Tree:
    """A tree that cannot be listed."""

    root = None

    def listing(self, _directory):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


class Room:
    """A reserve that needs none."""

    def make_room_for(self, call):
        return call()


def test_housekeeping_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    files = Files(2)
    world = worker.World({}, None, Tree(), None, files, Room(), state.State(clean=False, began=0, windows=((0, 1),)))

    async def main() -> None:
        with trio.move_on_after(31):
            await worker._keep_house(world, world.reserve)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert files.calls == 6
    assert files.swept is None
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the look at the files after the unclean stop is not finished: Input/output error",
        "the reserve: No space left on device",
        "the reserve: No space left on device",
    ]


def test_what_the_kernel_does_not_know_it_need_not_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that nobody has any more, or whose number is a file's now, is no reason to stop serving."""
    asked = []

    def refused(parent: int, name: bytes) -> None:
        asked.append((parent, name))
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    async def main() -> None:
        operations = SimpleNamespace(answered=trio.Event())
        operations.answered.set()
        await worker._when_answered(operations, "/nowhere", unheard)

    unheard = [Entry(journal.RENAME, 7, b"old", 8, b"new"), Entry(journal.MKDIR, 9, b"made")]
    monkeypatch.setattr(worker.pyfuse3, "invalidate_entry", refused)
    monkeypatch.setattr(worker, "tune", lambda _mountpoint: None)
    trio.run(main)
    assert asked == [(7, b"old"), (8, b"new"), (9, b"made")]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may tune a mount")
def test_reads_are_made_larger(tmp_path: Path) -> None:
    mounts.init(tmp_path / "store")
    with mounts.mounted(tmp_path / "store", tmp_path / "mnt") as mount:
        entry = mounts.entry_at(mount.path)
        assert entry is not None
        with open(f"/sys/class/bdi/0:{entry.minor}/read_ahead_kb", encoding="ascii") as file:
            mounts.until(lambda: (file.seek(0), file.read())[1] == "1024\n", "read-ahead was not raised")
