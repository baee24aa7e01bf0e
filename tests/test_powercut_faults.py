"""The power cut tests can fail: faults that are put into the code under test are found, and their plans made small."""

from __future__ import annotations

import os
import random

import powercut
import powerstore
import pytest
from othertimes import QuietRecording
from powercut import SEED, FullDisk, Variant, failing, quick
from powerstore import App, Settings, file_keys
from test_powercut import PLAIN, earlier_run, published, replaced, sealed_in_place

from encfs_js import crash
from encfs_js.format import PAGE, Suite, capacity, pages_for, plain_start
from encfs_js.sealed import SealedFile

__all__ = ["quick"]


def nothing(*_):
    return None


class ForgetsToSync(FullDisk):
    """Says that it synced."""

    def _sync(self, fd, call, *, data):
        pass


class WritesHalves(FullDisk):
    """Writes every page in two halves."""

    def pwrite(self, fd, data, offset):
        done = 0
        while done < len(data):
            half = data[done : done + PAGE // 2]
            try:
                taken = super().pwrite(fd, half, offset + done)
            except OSError:
                if not done:
                    raise
                break
            done += taken
            if taken < len(half):
                break
        return done


class CutsFirst(SealedFile):
    """Shrinks the file by one page too many and then writes that page again, as a longer file."""

    __slots__ = ()

    def truncate(self, size):
        last = pages_for(size) - 1
        if 0 <= last < self.pages - 1:
            tail = bytes(self.read(plain_start(last), size - plain_start(last)))
            self._io.ftruncate(self.fd, last * PAGE)
            self._seal(last, [tail + bytes(capacity(last) - len(tail))], len(tail))
            _, error = self._put(last, 1)
            if error is not None:
                self.load()
                raise error
            self.pages, self.size = last + 1, size
        else:
            super().truncate(size)


class LeavesTheCutToTheKernel(SealedFile):
    """Shrinks without a sync of its own, also where the next write takes a new file id."""

    __slots__ = ()

    def truncate(self, size):
        io = self._io
        self._io = Unsynced(io)
        try:
            super().truncate(size)
        finally:
            self._io = io


class Unsynced:
    def __init__(self, io):
        self._io = io

    def __getattr__(self, name):
        return nothing if name in {"fsync", "fdatasync"} else getattr(self._io, name)


def trims_one_page_too_many(io, fd, keys):
    sizes = crash.trim(io, fd, keys)
    pages = os.fstat(fd).st_size // PAGE
    if sizes is not None and pages > 1:
        io.ftruncate(fd, (pages - 1) * PAGE)
        crash.trim(io, fd, keys)
    return sizes


FAULTS = {
    "a sync that does nothing": Variant(backing=ForgetsToSync),
    "a page written in two halves": Variant(backing=WritesHalves),
    "a file cut too far and written again": Variant(sealed=CutsFirst),
    "a new file id before the cut is synced": Variant(sealed=LeavesTheCutToTheKernel),
    "a trim of one page too many": Variant(trim=trims_one_page_too_many),
    "no trim": Variant(trim=nothing),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_made_small(fault, quick):
    variant = FAULTS[fault]
    for number in range(200):
        seed = f"{fault}/{SEED}/{number}"
        rng = random.Random(seed)
        plan = powercut.draw_plan(rng, rng.choice((4, 8, 14)))
        failure, _ = failing(plan, Suite.AES, seed, 12, quick, variant)
        if failure:
            break
    else:
        pytest.fail("never found")
    small, found = powercut.shortest(plan, lambda p: failing(p, Suite.AES, seed, 12, quick, variant)[0])
    print(number, small, found)
    assert len(small) <= 8


class OwnSyncsOnly(QuietRecording):
    """Syncs what the application asks to sync, and nothing that the package syncs on its own account."""

    asked = False

    def _sync(self, fd, call, *, data):
        if self.asked:
            super()._sync(fd, call, data=data)


class Asking(App):
    def sync(self, path):
        self._io.asked = True
        super().sync(path)
        self._io.asked = False

    def sync_directory(self, path):
        self._io.asked = True
        super().sync_directory(path)
        self._io.asked = False


class ForgetsToSyncFirst(App):
    """Renames what it did not sync, and takes it for safe."""

    def sync(self, path):
        if not path.endswith(b".tmp"):
            super().sync(path)


@pytest.mark.parametrize(
    ("app", "io", "way", "plaintext"),
    [
        (ForgetsToSyncFirst, QuietRecording, replaced, "refuse"),
        (Asking, OwnSyncsOnly, published, "refuse"),
        (Asking, OwnSyncsOnly, sealed_in_place, "read"),
    ],
)
def test_a_missing_sync_is_found(app, io, way, plaintext, quick):
    settings = Settings(file_keys(Suite.AES), plaintext == "read")
    recorded = powerstore.record(quick, settings, earlier_run, way, PLAIN[plaintext], app=app, io=io)
    _, failure = powerstore.search(recorded, f"{way.__name__}/{SEED}", 60, quick)
    print(failure)
    assert failure is not None
