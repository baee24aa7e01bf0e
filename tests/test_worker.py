"""What a worker does beside serving requests."""

from __future__ import annotations

import errno
import logging
import os
import resource
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mounts
import pytest
import trio
import trio.testing

from encfs_js import control, journal, keyring, keystore, state, worker, world
from encfs_js.backing import Backing
from encfs_js.errors import KeyringDamagedError
from encfs_js.format import Suite, missing
from encfs_js.journal import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from encfs_js.keyring import Keyring, Keys

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


# --- the keys of a worker that takes over


class Store:
    """A store whose supervisor has keys that may be older than the keyring, and the worlds that were opened of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        document = keyring.create(mounts.KEY.encode(), cipher=Suite.AES, plaintext="refuse", kdf=keyring.Kdf(1, 1, 64))
        keystore.write(str(path), document)
        self.keys = keyring.unlock(keyring.parse(document), mounts.KEY.encode())
        self._opened: list[world.World] = []

    def change(self, change: Callable[[Keyring, Keys], bytes]) -> Keys:
        """Change the keyring, as a command does. Returns the keys of then."""
        found = keystore.update(str(self.path), lambda found: change(found, keyring.renew(found, self.keys)))
        return keyring.renew(found, self.keys)

    def open(self, keys: Keys, io: Backing | None = None, *, resumed: bool = True, **chosen: Any) -> world.World:
        options = {"store": str(self.path), "read_only": False, "cipher": None, "writeback": False} | chosen
        opened = worker.prepare(options, keys, io or Backing(), resumed=resumed)
        self._opened.append(opened)
        return opened

    def make(self, keys: Keys, name: str) -> None:
        """Make a file with these keys."""
        opened = self.open(keys, resumed=False)
        node, fd, _ = opened.tree.create(opened.tree.root, name.encode(), 0o600, 0, 0, exclusive=True)
        os.close(fd)
        opened.files.write(node, 0, name.encode() * 1000, cached=False)
        opened.files.detach(node)
        world.end_run(opened)

    def close(self) -> None:
        for opened in self._opened:
            opened.files.close_all()
            if opened.reserve is not None:
                opened.reserve.close()
            os.close(opened.tree.meta_fd)
            os.close(opened.tree.root_fd)


@pytest.fixture
def store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Store]:
    """Nobody is to complain in the test: what is served goes on."""
    store = Store(tmp_path)
    with caplog.at_level(logging.INFO):
        yield store
    store.close()
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno > logging.INFO] == []


def content(opened: world.World, name: str) -> bytes:
    node, _ = opened.tree.lookup(opened.tree.root, name.encode())
    try:
        return bytes(opened.files.read(node, 0, 1 << 20))
    finally:
        opened.files.detach(node)


def test_a_worker_that_takes_over_has_every_epoch_of_the_keyring(store: Store) -> None:
    store.make(store.keys, "first")
    now = store.change(lambda found, keys: keyring.add_epoch(found, keys, cipher=Suite.CHACHAPOLY))
    store.make(now, "second")
    opened = store.open(store.keys)
    assert (opened.file_keys.suite, opened.file_keys.epoch) == (Suite.CHACHAPOLY, 2)
    assert opened.keys.settings == now.settings
    assert opened.keys.secrets() == now.secrets()
    assert opened.keys.secrets()[1].keys() == {1, 2}
    assert content(opened, "first") == b"first" * 1000
    assert content(opened, "second") == b"second" * 1000


def test_the_first_worker_of_a_mount_takes_the_keys_that_it_is_given(store: Store) -> None:
    """The mount read the keyring when it had the store."""
    store.change(keyring.add_epoch)
    opened = store.open(store.keys, resumed=False)
    assert opened.keys is store.keys
    assert opened.file_keys.epoch == 1


def test_a_dropped_epoch_stays_with_a_worker_that_takes_over(store: Store) -> None:
    """A file that has no name any more, and that no pass could seal anew, may have it until it is closed."""
    store.make(store.keys, "first")
    store.change(keyring.add_epoch)
    now = store.change(lambda found, keys: keyring.drop_epochs(found, keys, [1]))
    assert now.secrets()[1].keys() == {2}
    opened = store.open(store.keys)
    assert opened.file_keys.epoch == 2
    assert opened.keys.secrets()[1] == {1: store.keys.volume_key(1), 2: now.volume_key(2)}
    assert content(opened, "first") == b"first" * 1000


def test_a_cipher_that_the_mount_was_given_stays(store: Store) -> None:
    store.change(lambda found, keys: keyring.add_epoch(found, keys, cipher=Suite.CHACHAPOLY))
    opened = store.open(store.keys, cipher="aes")
    assert (opened.file_keys.suite, opened.file_keys.epoch) == (Suite.AES, 2)
    world.use(opened, world.rekeyed(opened))
    assert (opened.file_keys.suite, opened.file_keys.epoch) == (Suite.AES, 2)


def damage(path: Path) -> None:
    """Leave half of it."""
    os.truncate(path, path.stat().st_size // 2)


def forge(path: Path) -> None:
    """Change a setting without knowing the key."""
    document = path.read_bytes()
    changed = document.replace(b'"plaintext": "refuse"', b'"plaintext": "read"')
    assert changed != document
    path.write_bytes(changed)


def of_another_store(path: Path) -> None:
    path.write_bytes(keyring.create(b"key", cipher=Suite.AES, plaintext="refuse", kdf=keyring.Kdf(1, 1, 64)))


@pytest.mark.parametrize("spoil", [os.unlink, damage, forge, of_another_store])
def test_without_a_keyring_that_can_be_read_the_keys_at_hand_are_used(
    store: Store, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store.make(store.keys, "first")
    for name in ("keyring", "keyring.bak"):
        spoil(store.path / ".encfs_js" / name)
    opened = store.open(store.keys)
    assert opened.keys is store.keys
    assert (opened.file_keys.suite, opened.file_keys.epoch, opened.files.plaintext) == (Suite.AES, 1, False)
    assert content(opened, "first") == b"first" * 1000
    assert "the keyring was not read again" in caplog.text


class Failing(Backing):
    """The disk refuses to have the keyring read."""

    def __init__(self, number: int) -> None:
        self.number = number

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if os.fsdecode(path).endswith(("/keyring", "/keyring.bak")):
            raise OSError(self.number, os.strerror(self.number))
        return super().open(path, flags, mode, dir_fd=dir_fd)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_disk_that_refuses_the_keyring_is_no_reason_to_stop(
    store: Store, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    store.change(keyring.add_epoch)
    assert store.open(store.keys, Failing(number)).keys is store.keys
    assert os.strerror(number) in caplog.text


class Syncing(Backing):
    """Notes which directories and files are synced; `number`: the error that comes of it, 0 for none."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.synced: list[str] = []

    def fsync(self, fd: int) -> None:
        self.synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        super().fsync(fd)


def test_an_epoch_is_used_when_its_keyring_is_on_the_disk(store: Store) -> None:
    """Who has replaced the keyring may not have come to that, and a power cut would bring the old one back."""
    quiet = Syncing()
    store.open(store.keys, quiet)
    assert ".encfs_js" not in quiet.synced
    store.change(keyring.add_epoch)
    io = Syncing()
    opened = store.open(store.keys, io)
    assert opened.file_keys.epoch == 2
    assert ".encfs_js" in io.synced
    assert store.open(store.keys, Syncing(errno.EIO)).file_keys.epoch == 1


def test_the_copy_will_do(store: Store) -> None:
    store.change(keyring.add_epoch)
    damage(store.path / ".encfs_js/keyring")
    opened = store.open(store.keys)
    assert opened.file_keys.epoch == 2
    assert opened.keys.secrets()[1].keys() == {1, 2}


class Replacing(Backing):
    """Somebody replaces the keyring while it is read, one byte at a time: `replace` is called after the first one."""

    def __init__(self, replace: Callable[[], object]) -> None:
        self.replace = replace
        self.bytes_read = 0
        self._ring = -1

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = super().open(path, flags, mode, dir_fd=dir_fd)
        if os.fsdecode(path).endswith("/keyring"):
            self._ring = fd
        return fd

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if fd != self._ring:
            return super().preadv(fd, buffers, offset, flags)
        got = super().preadv(fd, [memoryview(buffers[0])[:1]], offset, flags)
        self.bytes_read += got
        if self.bytes_read == 1:
            self.replace()
        return got

    def close(self, fd: int) -> None:
        if fd == self._ring:
            self._ring = -1
        super().close(fd)


def test_a_keyring_that_is_being_replaced_is_the_old_or_the_new_one(store: Store) -> None:
    length = (store.path / ".encfs_js/keyring").stat().st_size
    io = Replacing(lambda: store.change(keyring.add_epoch))
    opened = store.open(store.keys, io)
    assert io.bytes_read == length
    assert opened.keys is not store.keys
    assert opened.keys.secrets() == store.keys.secrets()
    assert store.open(store.keys).file_keys.epoch == 2


def test_one_number_with_two_keys_is_not_taken(store: Store) -> None:
    """The keyring was put back from a backup, and has got another second epoch since: files of the first one are served."""
    backup = (store.path / ".encfs_js/keyring").read_bytes()
    now = store.change(keyring.add_epoch)
    store.make(now, "second")
    keystore.write(str(store.path), backup)
    store.change(keyring.add_epoch)
    opened = store.open(now)
    assert opened.keys is now
    assert content(opened, "second") == b"second" * 1000
    with pytest.raises(KeyringDamagedError, match="another volume key"):
        world.rekeyed(opened)


def test_a_cipher_that_the_host_refuses_is_not_taken(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be no worker at all. The mount that has another one of its own takes the epoch."""

    def check(suite: Suite) -> None:
        if suite is Suite.CHACHAPOLY:
            raise missing(suite)

    monkeypatch.setattr(world, "check_available", check)
    store.change(lambda found, keys: keyring.add_epoch(found, keys, cipher=Suite.CHACHAPOLY))
    opened = store.open(store.keys)
    assert opened.keys is store.keys
    assert (opened.file_keys.suite, opened.file_keys.epoch) == (Suite.AES, 1)
    assert store.open(store.keys, cipher="aes").file_keys.epoch == 2
    assert store.open(store.keys, read_only=True).file_keys.epoch == 2


def test_epochs_that_the_supervisor_had_no_descriptor_for(tmp_path: Path) -> None:
    """It loses the memory with the keys of the worker that serves; the next worker reads what that one has written."""
    mounts.init(tmp_path / "store")
    with mounts.mounted(tmp_path / "store", tmp_path / "mnt") as mount:
        mount.expect("CRITICAL: too many open files: the next worker would not have the new keys")
        supervisor = mounts.until(lambda: (said := mount.status())["standby"] and said, "a standby")["supervisor"]
        _, keys, _ = keystore.unlock_store(str(mount.store), mounts.KEY.encode())
        keystore.update(str(mount.store), lambda found: keyring.add_epoch(found, keys))
        limits = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)
        taken = {int(name) for name in os.listdir(f"/proc/{supervisor}/fd")}
        _, second = sorted(set(range(len(taken) + 2)) - taken)[:2]
        # One is left, for the connection of who asks.
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (second, limits[1]))
        answer = control.ask(str(mount.store), {"do": "rekey"}, mounts.PATIENCE)
        assert (answer["ok"], answer["how"].split(":")[0]) == (False, "too many open files")
        (mount.path / "second").write_bytes(b"second" * 1000)
        with open(mount.path / "second", "rb") as file:
            os.fsync(file.fileno())
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, limits)
        for _ in range(2):
            mount.kill_worker()
            with open(mount.path / "second", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read() == b"second" * 1000
    header = (tmp_path / "store/second").read_bytes()[:16]
    assert int.from_bytes(header[12:16], "little") == 2
