"""A new epoch and another cipher for a store that is there: while it is mounted and in use, and while it is not."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import mounts
import pytest

from encfs_js import control

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
]

SMALL, LARGE = 60, 6
MIB = 1 << 20


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def fill(top: Path) -> dict[str, bytes]:
    """Write small and large files below `top`. Returns path to content."""
    made = {f"streams/S{n % 3}/meta-{n}.inf": content(n, 100 + 70 * n) for n in range(SMALL)}
    made |= {f"streams/S{n % 3}/msgs/{n}.blk": content(1000 + n, 2 * MIB + 1234 * n) for n in range(LARGE)}
    made["streams/S0/empty"] = b""
    for name, data in made.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(data)
    return made


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A store of epoch 1, chachapoly, that is not mounted, and what is in it."""
    mounts.init(tmp_path / "store")
    with mounts.mounted(tmp_path / "store", tmp_path / "mnt") as mount:
        made = fill(mount.path)
    return tmp_path / "store", made


def inspected(store: Path) -> dict[str, Any]:
    return json.loads(mounts.run("inspect", store, "--json", key=None).stdout)


def epochs_of_files(store: Path) -> set[tuple[str, int]]:
    return {(group["suite"], group["epoch"]) for group in inspected(store)["files"]}


def epochs_of_keyring(store: Path) -> list[int]:
    return [epoch["epoch"] for epoch in inspected(store)["epochs"]]


def reencrypt(store: Path, *options: str, code: int = 0) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(mounts.run("reencrypt", store, "--json", *options, code=code).stdout)
    return answer


def pass_of(store: Path) -> dict[str, Any]:
    """What the daemon says of its pass."""
    found: dict[str, Any] = control.ask(str(store), {"do": "status"}, mounts.PATIENCE)["reencrypt"]
    return found


@contextlib.contextmanager
def running(store: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own; it is not left behind."""
    process = subprocess.Popen(
        [*mounts.COMMAND, "reencrypt", str(store), *options],
        env=mounts.environment(mounts.KEY), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        if not process.stdout.closed:
            print(process.communicate(timeout=mounts.PATIENCE))


def check(store: Path, mountpoint: Path, made: dict[str, bytes]) -> None:
    """Mount it, and see that everything is there; `verify` says the same."""
    with mounts.mounted(store, mountpoint) as mount:
        assert mounts.contents(mount.path) == made
    assert mounts.verify(store)["sound"]


# --- not mounted --------------------------------------------------------------------------------------------------


def test_new_epoch_and_cipher_and_the_old_epoch_dropped(store, tmp_path: Path) -> None:
    path, made = store
    before = {file: (os.stat(file).st_mtime_ns, os.stat(file).st_ino) for file in mounts.files(path)}
    answer = reencrypt(path, "--new-epoch", "--cipher", "aes")
    assert (answer["done"], answer["state"], answer["files"]) == (True, "done", SMALL + LARGE)
    assert (answer["cipher"], answer["epoch"], answer["dropped_epochs"]) == ("aes", 2, [])
    assert answer["bytes"] == answer["bytes_done"] == sum(os.path.getsize(file) for file in mounts.files(path))
    assert epochs_of_files(path) == {("aes", 2)}
    assert epochs_of_keyring(path) == [1, 2]
    assert {file: (os.stat(file).st_mtime_ns, os.stat(file).st_ino) for file in mounts.files(path)} == before
    check(path, tmp_path / "mnt", made)
    answer = reencrypt(path, "--drop-epochs")
    assert (answer["files"], answer["dropped_epochs"]) == (0, [1])
    assert epochs_of_keyring(path) == [2]
    check(path, tmp_path / "mnt", made)


def test_another_cipher_without_a_new_epoch(store, tmp_path: Path) -> None:
    path, made = store
    assert reencrypt(path, "--cipher", "AES")["epoch"] == 1
    assert epochs_of_files(path) == {("aes", 1)}
    assert reencrypt(path)["files"] == 0
    check(path, tmp_path / "mnt", made)


def test_what_people_see(store) -> None:
    path, _ = store
    done = mounts.run("reencrypt", path, "--new-epoch", "--drop-epochs")
    size = sum(os.path.getsize(file) for file in mounts.files(path)) / MIB
    assert done.stdout == (
        f"{path}: sealed anew with chachapoly, epoch 2: {SMALL + LARGE} files, {size:.1f} MiB\n"
        "Dropped from the keyring: 1 epoch (1)\n"
    )
    assert done.stderr == ""
    assert mounts.run("reencrypt", path).stdout == f"{path}: sealed anew with chachapoly, epoch 2: nothing\n"


@pytest.mark.parametrize("mounted", [False, True])
def test_a_progress_bar_on_a_terminal(store, tmp_path: Path, mounted: bool) -> None:
    path, _ = store
    with contextlib.ExitStack() as opened:
        if mounted:
            opened.enter_context(mounts.mounted(path, tmp_path / "mnt"))
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*mounts.COMMAND, "reencrypt", str(path), "--new-epoch", "--rate", "8"],
            env=mounts.environment(mounts.KEY) | {"TERM": "xterm", "COLUMNS": "120"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:
            while part := terminal.read(65536):
                shown += part
        assert process.wait(mounts.PATIENCE) == 0
    text = shown.decode()
    assert re.search(r"running.*━.*/12\.\d MiB.*\d+ of 66 files.* MB/s.*\d:\d\d:\d\d", text), text
    assert "done" in text


def test_killed_again_and_again_and_repeated_it_comes_to_its_end(store, tmp_path: Path) -> None:
    path, made = store
    with running(path, "--new-epoch", "--cipher", "aes", "--rate", "6") as process:
        mounts.until(lambda: ("aes", 2) in epochs_of_files(path), "the first file of the new epoch")
        process.kill()
        process.wait(mounts.PATIENCE)
    for pause in (0.4, 0.7, 0.55):
        with running(path, "--rate", "4") as process:
            time.sleep(pause)
            process.kill()
            process.wait(mounts.PATIENCE)
    assert len(epochs_of_files(path)) == 2, "it was killed before its end"
    answer = reencrypt(path)
    assert 0 < answer["files"] < SMALL + LARGE
    assert epochs_of_files(path) == {("aes", 2)}
    check(path, tmp_path / "mnt", made)


def test_interrupted_it_ends_in_good_order(store, tmp_path: Path) -> None:
    path, made = store
    with running(path, "--new-epoch", "--rate", "3") as process:
        mounts.until(lambda: ("chachapoly", 2) in epochs_of_files(path), "the first file of the new epoch")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=mounts.PATIENCE)
    assert process.returncode == 38
    assert re.search(r"stopped, \d+ of 66 files are done", err), err
    assert not [name for name in os.listdir(path / ".encfs_js") if name.startswith("redo")]
    check(path, tmp_path / "mnt", made)
    reencrypt(path)
    check(path, tmp_path / "mnt", made)


def test_two_at_once_and_a_mount_meanwhile_are_refused(store, tmp_path: Path) -> None:
    path, _ = store
    with running(path, "--new-epoch", "--rate", "3"):
        mounts.until(lambda: inspected(path)["mounted"], "the lock")
        assert "is in use by process" in mounts.run("reencrypt", path, code=18).stderr
        (tmp_path / "mnt").mkdir(exist_ok=True)
        mounts.run("mount", path, tmp_path / "mnt", code=18)


def test_a_damaged_file_is_named_and_keeps_its_epoch_in_the_keyring(store, tmp_path: Path) -> None:
    path, made = store
    mounts.flip(path / "streams/S1/msgs/1.blk", 8192 + 77)
    done = mounts.run("reencrypt", path, "--new-epoch", "--drop-epochs", code=38)
    assert "1 file could not be sealed anew: streams/S1/msgs/1.blk" in done.stderr
    assert "encfs-js verify" in done.stderr
    assert epochs_of_keyring(path) == [1, 2]
    mounts.flip(path / "streams/S1/msgs/1.blk", 8192 + 77)
    mounts.run("guard", "clear", path)
    assert reencrypt(path, "--drop-epochs")["dropped_epochs"] == [1]
    check(path, tmp_path / "mnt", made)


def test_no_epoch_is_dropped_while_a_file_cannot_be_told(store) -> None:
    path, _ = store
    (path / "streams/planted").write_bytes(b"ENCFSJS1" + bytes(4088))
    done = mounts.run("reencrypt", path, "--new-epoch", "--drop-epochs", code=38)
    assert "none was dropped" in done.stderr
    assert epochs_of_keyring(path) == [1, 2]


def test_a_wrong_key_changes_nothing(store) -> None:
    path, _ = store
    before = mounts.snapshot(path)
    mounts.run("reencrypt", path, "--new-epoch", key="another", code=12)
    assert mounts.snapshot(path) == before


# --- mounted ------------------------------------------------------------------------------------------------------


class Load:
    """Somebody who appends to, rewrites, cuts, renames and removes files, and knows what must be there."""

    def __init__(self, top: Path, made: dict[str, bytes], seed: int) -> None:
        self.top, self.expected, self.random = top, dict(made), random.Random(seed)
        self.problems: list[BaseException] = []
        self.turns = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join(mounts.PATIENCE)
        assert not self.problems, self.problems

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
                self.turns += 1
        except BaseException as problem:
            self.problems.append(problem)

    def _turn(self) -> None:
        name = self.random.choice(sorted(self.expected))
        path, data = self.top / name, self.expected[name]
        what = self.random.choice(["append", "append", "change", "cut", "rename", "remove", "replace", "read", "new"])
        if ".blk" in name and what in {"remove", "replace"}:
            what = "change"  # there is to be something to do for a while
        part = self.random.randbytes(self.random.randrange(1, 3000))
        if what == "append":
            with open(path, "ab") as file:
                file.write(part)
                file.flush()
                if self.random.random() < 0.3:
                    os.fsync(file.fileno())
            self.expected[name] = data + part
        elif what == "change" and data:
            at = self.random.randrange(len(data))
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(part)
            self.expected[name] = data[:at] + part + data[at + len(part) :]
        elif what == "cut":
            size = len(data) - self.random.randrange(min(len(data), 20_000) + 1)
            os.truncate(path, size)
            self.expected[name] = data[:size]
        elif what == "rename":
            new = f"{name}-{self.turns}"[:200]
            path.rename(self.top / new)
            self.expected[new] = self.expected.pop(name)
        elif what == "remove" and len(self.expected) > 30:
            path.unlink()
            del self.expected[name]
        elif what == "replace":
            temporary = path.with_name("temporary")
            temporary.write_bytes(part)
            temporary.rename(path)
            self.expected[name] = part
        elif what == "new":
            (self.top / f"new-{self.turns}").write_bytes(part)
            self.expected[f"new-{self.turns}"] = part
        else:
            assert path.read_bytes() == data


@pytest.mark.parametrize("options", [(), ("--no-writeback",)])
def test_under_load_nothing_is_lost(store, tmp_path: Path, options: tuple[str, ...]) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt", *options) as mount:
        with Load(mount.path, made, 1) as load:
            answer = reencrypt(path, "--new-epoch", "--cipher", "aes", "--rate", "20")
            assert answer["done"]
            turns = load.turns
            assert reencrypt(path, "--new-epoch", "--drop-epochs")["dropped_epochs"][:1] == [1]
            assert load.turns > turns > 10
        assert mounts.contents(mount.path) == load.expected
        assert epochs_of_files(path) == {("aes", 3)}
    assert epochs_of_keyring(path) == [3]
    check(path, tmp_path / "mnt", load.expected)


def test_new_files_at_once(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt") as mount:
        with running(path, "--new-epoch", "--cipher", "aes", "--rate", "2"):
            mounts.until(lambda: (pass_of(path) or {}).get("state") == "running", "the pass")
            (mount.path / "new").write_bytes(b"new")
            os.sync()
            assert mounts.suite_of(path / "new") == "aes"
            mounts.run("reencrypt", path, "--stop", key=None)
        state = mounts.until(lambda: (found := pass_of(path))["state"] == "stopped" and found, "the stop")
        assert state["files_done"] < state["files"]
        assert len(epochs_of_files(path)) == 2
        assert mounts.contents(mount.path) == made | {"new": b"new"}
    check(path, tmp_path / "mnt", made | {"new": b"new"})


def test_a_worker_that_is_killed_has_a_successor_that_goes_on(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt") as mount, Load(mount.path, made, 2) as load:
        mount.tolerated.append("finished the rewriting that a crash had interrupted")
        with running(path, "--new-epoch", "--cipher", "aes", "--rate", "6", "--json") as process:
            mounts.until(lambda: (pass_of(path) or {}).get("state") == "running", "the pass")
            for _ in range(6):
                mount.kill_worker()
                time.sleep(0.2)
            out, err = process.communicate(timeout=mounts.PATIENCE)
        assert process.returncode == 0, err
        assert json.loads(out)["done"]
        assert mount.status()["takeovers"] == 6
    assert epochs_of_files(path) == {("aes", 2)}
    check(path, tmp_path / "mnt", load.expected)


def test_a_mount_that_is_killed_is_mounted_again_and_the_command_does_the_rest(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt") as mount, running(path, "--new-epoch", "--rate", "5") as process:
        mounts.until(lambda: ("chachapoly", 2) in epochs_of_files(path), "the first file of the new epoch")
        mount.kill()
        process.wait(mounts.PATIENCE)
        assert process.returncode == 38
    with mounts.mounted(path, tmp_path / "mnt") as mount:
        mount.tolerated.append("finished the rewriting that a crash had interrupted")
        assert 0 < reencrypt(path)["files"] <= SMALL + LARGE
        assert mounts.contents(mount.path) == made
    assert epochs_of_files(path) == {("chachapoly", 2)}
    check(path, tmp_path / "mnt", made)


def test_the_command_interrupted_the_daemon_goes_on(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt"):
        with running(path, "--new-epoch", "--rate", "12") as process:
            mounts.until(lambda: (pass_of(path) or {}).get("state") == "running", "the pass")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=mounts.PATIENCE)
        assert process.returncode == 130
        assert "the daemon goes on" in err
        mounts.until(lambda: pass_of(path)["state"] == "done", "the end of the pass")
    assert epochs_of_files(path) == {("chachapoly", 2)}
    check(path, tmp_path / "mnt", made)


def test_unmounted_in_the_middle(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt") as mount, running(path, "--new-epoch", "--rate", "3") as process:
        mounts.until(lambda: (pass_of(path) or {}).get("files_done"), "the pass")
        mount.umount()
        process.wait(mounts.PATIENCE)
        assert process.returncode == 38
    assert not [name for name in os.listdir(path / ".encfs_js") if name.startswith("redo")]
    check(path, tmp_path / "mnt", made)


def test_the_keys_of_a_new_epoch_outlive_reload_and_takeover(store, tmp_path: Path) -> None:
    path, _ = store
    with mounts.mounted(path, tmp_path / "mnt") as mount:
        mounts.until(lambda: mount.status()["standby"], "a standby from before the new epoch")
        reencrypt(path, "--new-epoch", "--drop-epochs")
        mount.kill_worker()
        (mount.path / "after").write_bytes(b"x" * 10_000)
        mount.tolerated.append("has taken over")
        mounts.run("reload", mount.path, key=None)
        assert (mount.path / "after").read_bytes() == b"x" * 10_000
        assert epochs_of_files(path) == {("chachapoly", 2)}


def test_an_open_file_without_a_name_goes_on_after_its_epoch_was_dropped(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt") as mount, open(mount.path / "streams/S0/msgs/0.blk", "r+b") as file:
        os.unlink(mount.path / "streams/S0/msgs/0.blk")
        assert reencrypt(path, "--new-epoch", "--drop-epochs")["dropped_epochs"] == [1]
        mount.kill_worker()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == made["streams/S0/msgs/0.blk"]
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())


def test_a_time_that_is_set_meanwhile_stays(store, tmp_path: Path) -> None:
    path, _ = store
    with mounts.mounted(path, tmp_path / "mnt") as mount:
        file = mount.path / "streams/S0/msgs/0.blk"
        with running(path, "--new-epoch", "--rate", "4"):
            second = 1_500_000_000
            while (pass_of(path) or {}).get("state") != "done":
                second += 1
                os.utime(file, (second, second))
                time.sleep(0.02)
        assert os.stat(path / "streams/S0/msgs/0.blk").st_mtime == second


@pytest.mark.parametrize(
    ("option", "code", "said"), [("--read-only", 38, "read-only"), ("--cipher=aes", 10, "own, aes")]
)
def test_a_mount_that_cannot_do_it_says_so(store, tmp_path: Path, option: str, code: int, said: str) -> None:
    path, _ = store
    with mounts.mounted(path, tmp_path / "mnt", option):
        before = inspected(path)["settings"]
        done = mounts.run("reencrypt", path, "--new-epoch", "--cipher", "chachapoly", code=code)
        assert said in done.stderr
        assert inspected(path)["settings"] == before


def test_a_daemon_that_cannot_read_the_keyring_keeps_its_keys(store, tmp_path: Path) -> None:
    path, made = store
    with mounts.mounted(path, tmp_path / "mnt") as mount:
        ring = path / ".encfs_js/keyring"
        good = ring.read_bytes()
        for name in ("keyring", "keyring.bak"):
            (path / ".encfs_js" / name).write_bytes(good[:-40])
        answer = control.ask(str(path), {"do": "rekey"}, mounts.PATIENCE)
        assert (answer["ok"], answer["code"]) == (False, 13)
        for name in ("keyring", "keyring.bak"):
            (path / ".encfs_js" / name).write_bytes(good)
        assert mounts.contents(mount.path) == made


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@pytest.mark.parametrize("mounted", [False, True])
def test_a_disk_without_room_for_a_copy(tmp_path: Path, mounted: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=True)
    try:
        mounts.init(disk / "store")
        with mounts.mounted(disk / "store", tmp_path / "mnt") as mount:
            (mount.path / "large").write_bytes(content(1, 14 * MIB))
        with contextlib.ExitStack() as opened:
            if mounted:
                mount = opened.enter_context(mounts.mounted(disk / "store", tmp_path / "mnt"))
                mount.expect("sealing the files anew stopped: No space left on device")
            done = mounts.run("reencrypt", disk / "store", "--new-epoch", code=38)
            assert "No space left on device" in done.stderr
        with mounts.mounted(disk / "store", tmp_path / "mnt") as mount:
            assert (mount.path / "large").read_bytes() == content(1, 14 * MIB)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_verify_takes_nothing_for_damage_that_is_being_rewritten(store, tmp_path: Path) -> None:
    path, _ = store
    with (
        mounts.mounted(path, tmp_path / "mnt"),
        running(path, "--new-epoch", "--cipher", "aes", "--rate", "8", "--json") as process,
    ):
        looks = 0
        while process.poll() is None:
            found = mounts.verify(path)
            assert (found["sound"], found["unfinished"]) == (True, [])
            looks += 1
        assert process.returncode == 0
        assert looks > 1
