"""The commands of the keyring, what a transcript (tests/cli/key.txt) cannot show: terminals, kills, mounts in use, a TPM."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import mounts
import pytest
import swtpm

from encfs_js import cli, keydocument, keyring, keystore
from encfs_js.format import Suite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHEAP = keyring.Kdf(iterations=1, lanes=1, memory_kib=64)
KEY = "correct horse"
CODE = re.compile(r"[0-9A-Z]{5}(?:-[0-9A-Z]{5}){6}")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store whose one key is found quickly."""
    path = tmp_path / "store"
    path.mkdir()
    keystore.write(str(path), keyring.create(KEY.encode(), cipher=Suite.AES, plaintext="refuse", kdf=CHEAP))
    return path


def run(*arguments: str | Path, key: str | None = KEY, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    return mounts.run(*arguments, key=key, code=code)


def secret_file(tmp_path: Path, content: str) -> Path:
    path = tmp_path / f"secret-{content[:8].strip()}"
    path.write_text(content)
    path.chmod(0o600)
    return path


def slots(store: Path) -> list[tuple[int, str]]:
    answer = json.loads(run("key", "list", store, "--json", key=None).stdout)
    return [(slot["id"], slot["kind"]) for slot in answer["slots"]]


def opens(store: Path, key: str) -> bool:
    """Whether the key opens the store, by a command of the user's."""
    return {0: True, 12: False}[run("verify", store, key=key, code=None).returncode]


# --- a person ---------------------------------------------------------------------------------------------------------


def at_a_terminal(arguments: list[str | Path], answers: list[tuple[str, str]]) -> tuple[int, str]:
    """Run a command at a terminal of its own and answer its prompts, in their order; its exit code and the screen."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("JS_KEY", None)
        os.execv(sys.executable, [sys.executable, "-m", "encfs_js", *map(str, arguments)])
    screen, left = "", list(answers)
    try:
        while True:
            ready, _, _ = select.select([terminal], [], [], mounts.PATIENCE)
            assert ready, f"no answer: {screen}"
            try:
                screen += os.read(terminal, 4096).decode()
            except OSError:  # the terminal's other end is closed
                break
            if left and screen.endswith(left[0][0]):
                os.write(terminal, left.pop(0)[1].encode() + b"\n")
    finally:
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(terminal)
    assert not left, screen
    return os.waitstatus_to_exitcode(status), screen


def test_keys_are_typed_and_not_shown(store: Path) -> None:
    asked = ["Key: ", "New key: ", "The same key again: "]
    change = ["key", "change", store]
    code, screen = at_a_terminal(change, list(zip(asked, [KEY, "open sesame", "open sesam"], strict=True)))
    assert code == 11
    assert "not the same" in screen
    assert opens(store, KEY)
    code, screen = at_a_terminal(change, [("Key: ", "wrong one")])
    assert code == 12
    assert "New key" not in screen
    code, screen = at_a_terminal(change, list(zip(asked, [KEY, "open sesame", "open sesame"], strict=True)))
    assert code == 0
    assert "sesame" not in screen
    assert KEY not in screen
    assert not opens(store, KEY)
    code, screen = at_a_terminal(["key", "add", store, "--recovery"], [("Key: ", "open sesame")])
    assert code == 0
    [printed] = CODE.findall(screen)
    code, _ = at_a_terminal(["verify", store], [("Key: ", printed.lower().replace("-", " "))])
    assert code == 0


@pytest.mark.parametrize("length", [1, 7, 8, 65536])
def test_keys_of_any_length(store: Path, tmp_path: Path, length: int) -> None:
    new = secret_file(tmp_path, "k" * length + "\n")
    done = run("key", "add", store, "--new-key-file", new)
    assert ("can be guessed" in done.stderr) == (length < 8)
    assert "k" * length not in done.stdout + done.stderr or length == 1
    done = run("key", "remove", store, "1", "--key-file", new, key=None)
    assert "can be guessed" not in done.stderr
    assert not opens(store, KEY)
    assert run("verify", store, "--key-file", new, key=None).returncode == 0


def test_a_new_key_is_not_taken_from_the_environment(store: Path) -> None:
    """There stands the present one, if any."""
    done = run("key", "change", store, "--key-file", secret_file(store.parent, KEY), key="brand new", code=11)
    assert "no new key" in done.stderr
    assert opens(store, KEY)


# --- what is printed once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["add", "change"])
@pytest.mark.parametrize("where", ["full disk", "closed pipe"])
def test_a_code_that_nobody_got_opens_nothing(store: Path, command: str, where: str) -> None:
    if where == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [*mounts.COMMAND, "key", command, str(store), "--recovery"],
            env=mounts.environment(KEY), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, text=True,
            timeout=mounts.PATIENCE,
        )  # fmt: skip
    finally:
        os.close(out)
    assert done.returncode == 25
    lines = done.stderr.splitlines()
    assert lines[0].startswith("encfs-js: error: the recovery code could not be printed: ")
    assert lines[1].startswith("encfs-js: hint: No slot has it any more")
    assert len(lines) == 2
    assert slots(store) == [(1, "key")]
    assert opens(store, KEY)


@pytest.mark.parametrize("command", ["add", "change"])
@pytest.mark.parametrize("where", [">&-", "> /dev/null", "<&- >&- 2>&-"])
def test_no_code_is_made_where_printing_it_fails_unseen(store: Path, command: str, where: str) -> None:
    """Python prints to a stdout that is closed without an error: the one key would have been lost."""
    before = (store / ".encfs_js/keyring").read_bytes()
    line = shlex.join([*mounts.COMMAND, "key", command, str(store), "--recovery"])
    done = subprocess.run(
        ["sh", "-c", f"{line} {where}"],
        env=mounts.environment(KEY), capture_output=True, text=True, timeout=mounts.PATIENCE,
    )  # fmt: skip
    assert done.returncode == 25
    assert done.stdout == ""
    if "2>&-" not in where:
        assert done.stderr.startswith("encfs-js: error: the recovery code would be printed to /dev/null")
    assert (store / ".encfs_js/keyring").read_bytes() == before


def test_other_commands_do_without_their_output(store: Path, tmp_path: Path) -> None:
    new = secret_file(tmp_path, "new key")
    line = shlex.join([*mounts.COMMAND, "key", "change", str(store), "--new-key-file", str(new)])
    done = subprocess.run(
        ["sh", "-c", f"{line} <&- >&- 2>&-"], env=mounts.environment(KEY), timeout=mounts.PATIENCE, check=False
    )
    assert done.returncode == 0
    assert opens(store, "new key")
    for name in ("keyring", "keyring.bak", "keyring.lock"):  # which had the numbers 0 to 2 to themselves
        assert b"slot 1" not in (store / ".encfs_js" / name).read_bytes()


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that takes nothing until somebody reads, and how much is in it."""
    reader, writer = os.pipe()
    try:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b"." * 4096)
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def test_killed_before_the_code_is_seen_the_old_key_opens(store: Path) -> None:
    """The worst moment of `change --recovery`: the code is in the keyring, and on nobody's paper."""
    with full_pipe() as (_, writer):
        child = subprocess.Popen(
            [*mounts.COMMAND, "key", "change", str(store), "--recovery"],
            env=mounts.environment(KEY), stdin=subprocess.DEVNULL, stdout=writer,
        )  # fmt: skip
        try:
            mounts.until(lambda: len(slots(store)) == 2, "the slot of the code")
            time.sleep(0.1)
            assert child.poll() is None, "it did not wait for its reader"
        finally:
            child.kill()
            child.wait()
    assert slots(store) == [(1, "key"), (2, "recovery")]
    assert opens(store, KEY)
    run("key", "remove", store, "2")


def test_the_code_is_seen_before_the_old_key_goes(store: Path) -> None:
    with full_pipe() as (reader, writer):
        child = subprocess.Popen(
            [*mounts.COMMAND, "key", "change", str(store), "--recovery"],
            env=mounts.environment(KEY), stdin=subprocess.DEVNULL, stdout=writer,
        )  # fmt: skip
        try:
            mounts.until(lambda: len(slots(store)) == 2, "the slot of the code")
            text = os.read(reader, 4096)  # room for the code
            assert child.wait(mounts.PATIENCE) == 0
        finally:
            child.kill()
            child.wait()
        text += os.read(reader, 4096)
    [code] = CODE.findall(text.decode())
    assert slots(store) == [(1, "recovery")]
    assert opens(store, code)
    assert not opens(store, KEY)


# --- two at once ------------------------------------------------------------------------------------------------------


def at_once(*commands: list[str | Path]) -> list[subprocess.CompletedProcess[str]]:
    done: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda c=c: done.append(run(*c, code=None))) for c in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def test_of_two_changes_of_one_key_one_wins(store: Path, tmp_path: Path) -> None:
    """Both were told the present key. The second must not overwrite what the first one was told is the new key."""
    names = ["first new key", "other new key", "third new key"]
    files = [secret_file(tmp_path, name) for name in names]
    done = at_once(*(["key", "change", store, "--new-key-file", file] for file in files))
    assert sorted(d.returncode for d in done) == [0, 12, 12]
    assert [opens(store, name) for name in names].count(True) == 1
    assert not opens(store, KEY)
    assert slots(store) == [(1, "key")]


def test_keys_that_are_added_at_once_are_all_there(store: Path, tmp_path: Path) -> None:
    files = [secret_file(tmp_path, f"{i} new key") for i in range(3)]
    done = at_once(*(["key", "add", store, "--new-key-file", file] for file in files))
    assert [d.returncode for d in done] == [0] * 3, done
    assert slots(store) == [(i, "key") for i in range(1, 5)]
    for i in range(3):
        assert opens(store, f"{i} new key")


def test_one_key_never_gets_two_slots(store: Path, tmp_path: Path) -> None:
    new = secret_file(tmp_path, "new key")
    done = at_once(*[["key", "add", store, "--new-key-file", new]] * 3)
    assert sorted(d.returncode for d in done) == [0, 36, 36]
    assert len(slots(store)) == 2


@pytest.mark.parametrize(
    ("meanwhile", "code", "says"),
    [
        ("add", 0, "slot 1 (key) has the new key now"),
        ("replace", 12, "message authentication failed"),
        ("remove", 12, "message authentication failed"),
        ("the same", 36, "slot 2 has this key already"),
        ("move", 36, "the key opens slot 2 now, no more slot 1"),
        ("always", 18, "other commands change its keyring all the time"),
    ],
)
def test_slots_that_change_between_the_look_and_the_lock(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meanwhile: str,
    code: int,
    says: str,
) -> None:
    """Another command gets the lock first: the key is tried anew, and nobody's slot is overwritten."""
    update, happened = keystore.update, []

    def too_late(path: str, change: object, **more: object) -> keyring.Keyring:
        if not happened or meanwhile == "always":
            happened.append(True)
            found, keys, _ = keystore.unlock_store(path, KEY.encode())
            added = keyring.add_slot(found, keys, "key", b"theirs%d" % len(happened), kdf=CHEAP)
            if meanwhile == "replace":
                added = keyring.replace_slot(found, keys, 1, "key", b"theirs", kdf=CHEAP)
            elif meanwhile == "remove":
                added = keyring.remove_slot(keyring.parse(added), keys, 1)
            elif meanwhile == "the same":
                added = keyring.add_slot(found, keys, "key", b"new key", kdf=CHEAP)
            elif meanwhile == "move":
                added = keyring.replace_slot(keyring.parse(added), keys, 1, "key", b"their other", kdf=CHEAP)
                added = keyring.replace_slot(keyring.parse(added), keys, 2, "key", KEY.encode(), kdf=CHEAP)
            update(path, lambda _: added)
        return update(path, change, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(keystore, "update", too_late)
    monkeypatch.setenv("JS_KEY", KEY)
    new = secret_file(tmp_path, "new key")
    assert cli.run(["key", "change", str(store), "--new-key-file", str(new)]) == code
    out, err = capsys.readouterr()
    assert says in out + err
    found, _ = keystore.load(str(store))
    theirs = {
        "add": b"theirs1",
        "replace": b"theirs",
        "remove": b"theirs1",
        "move": b"their other",
        "always": b"theirs9",
    }
    keyring.unlock(found, theirs.get(meanwhile, KEY.encode()))
    keyring.unlock(found, b"new key" if code == 0 or meanwhile == "the same" else theirs.get(meanwhile, b""))


def test_a_forged_keyring_is_no_other_command(store: Path, tmp_path: Path) -> None:
    """Its copy opens, so the key is right; the slots of the forged one are not waited for, nor blessed."""
    found, _ = keystore.load(str(store))
    forged = json.loads(keydocument.write_out(found))
    forged["slots"][0]["label"] = "not what it was"
    summed = keydocument.canonical({name: value for name, value in forged.items() if name != "checksum"})
    forged["checksum"] = hashlib.sha256(summed).hexdigest()
    path = store / ".encfs_js/keyring"
    path.write_text(json.dumps(forged))
    before = path.read_bytes()
    new = secret_file(tmp_path, "new key")
    done = run("key", "add", store, "--new-key-file", new, code=13)
    assert "does not authenticate" in done.stderr
    assert path.read_bytes() == before
    # What the warning of the command says helps.
    assert f"cp -p {path}.bak {path}" in done.stderr
    shutil.copy2(f"{path}.bak", path)
    run("key", "add", store, "--new-key-file", new)


def settled(mount: mounts.Mount) -> None:
    """Wait until a worker serves and the next one stands by."""
    mounts.until(lambda: mount.status()["worker"] and mount.status()["standby"], "both workers")


# --- while the store is mounted ---------------------------------------------------------------------------------------


@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
def test_a_mount_goes_on_without_the_key_it_was_made_with(store: Path, tmp_path: Path) -> None:
    """Writing goes on all the time; the key is changed, its slot is removed, and neither kill nor reload needs it."""
    new = secret_file(tmp_path, "new key")
    with mounts.mounted(store, tmp_path / "mnt", key=KEY) as mount:
        written, stop = [], threading.Event()

        def write() -> None:
            while not stop.is_set():
                data = os.urandom(9000)
                path = mount.path / f"{len(written)}"
                path.write_bytes(data)
                written.append(data)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            mounts.until(lambda: len(written) > 5, "files")
            run("key", "change", store, "--new-key-file", new)
            run("key", "add", store, "--recovery", "--key-file", new, key=None)
            run("key", "remove", store, "1", "--key-file", new, key=None)
            for act in (mount.kill_worker, lambda: run("reload", mount.path, key=None)):
                before = len(written)
                settled(mount)
                act()
                mounts.until(lambda before=before: len(written) > before + 5, "files after that")
        finally:
            stop.set()
            writer.join()
        for number, data in enumerate(written):
            assert (mount.path / f"{number}").read_bytes() == data
    assert run("mount", store, tmp_path / "mnt", key=KEY, code=None).returncode == 12
    assert run("mount", store, tmp_path / "mnt", key="new key", code=None).returncode == 12
    assert slots(store) == [(2, "recovery")]


@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
def test_a_file_from_a_backup_opens_again(store: Path, tmp_path: Path) -> None:
    """Its epoch was dropped since. On a mounted store, and the key has changed since, too."""
    exported, new = tmp_path / "exported", secret_file(tmp_path, "new key")
    with mounts.mounted(store, tmp_path / "mnt", key=KEY) as mount:
        (mount.path / "file").write_bytes(b"of the first epoch")
    shutil.copy(store / "file", tmp_path / "backup")
    run("key", "export", store, exported, key=None)
    run("key", "change", store, "--new-key-file", new)
    run("reencrypt", store, "--new-epoch", "--drop-epochs", "--key-file", new, key=None)
    shutil.copy(tmp_path / "backup", store / "old")
    run("verify", store, "--key-file", new, key=None, code=22)
    expected = r"old.*does not authenticate|guard"
    with mounts.mounted(store, tmp_path / "mnt", "--key-file", str(new), expect=(expected,)) as mount:
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "old").read_bytes()
        done = run("key", "import", store, exported, "--key-file", new, "--json", key=None)
        assert json.loads(done.stdout)["taken"] == [1]
        assert done.stderr == ""
        assert (mount.path / "old").read_bytes() == b"of the first epoch"
        assert (mount.path / "file").read_bytes() == b"of the first epoch"
    run("verify", store, "--key-file", new, key=None)


# --- a TPM ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[swtpm.Swtpm]:
    if reason := swtpm.needs_swtpm():
        pytest.skip(reason)
    with swtpm.running(tmp_path / "tpm") as found:
        yield found


def config(tmp_path: Path, chip: swtpm.Swtpm, keys_file: str = "keys", password: str = "open") -> Path:
    path = tmp_path / f"{keys_file}-{password}.yaml"
    path.write_text(
        f"jetstream:\n  tpm:\n    keys_file: {tmp_path / keys_file}\n    encryption_password: {password}\n    tcti: {chip.tcti}\n"
    )
    path.chmod(0o600)
    return path


def test_a_store_whose_key_the_tpm_keeps(tmp_path: Path, chip: swtpm.Swtpm) -> None:
    store, file = tmp_path / "new", config(tmp_path, chip)
    done = run("init", store, "--config", file, key="not this one")
    assert f"key add {store} --config {file} --recovery" in done.stdout
    assert slots(store) == [(1, "tpm")]
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    for options in (("--config", file), ("--config", file, "--tpm")):
        run("verify", store, *options, key="not this one")
    done = run("key", "add", store, "--config", file, "--recovery", key=None)
    [code] = CODE.findall(done.stdout)
    # Of another password no key comes, and no other source is tried.
    wrong = config(tmp_path, chip, password="wrong")
    done = run("verify", store, "--config", wrong, "--tpm", key=code, code=30)
    assert "encfs-js: error: " in done.stderr
    # Without the TPM there is the paper.
    chip.pull_the_plug()
    assert run("verify", store, "--config", file, key=None, code=None).returncode == 29
    assert opens(store, code)
    run("key", "change", store, "--slot", "1", "--new-key-file", secret_file(tmp_path, "a key string"), key=code)
    assert slots(store) == [(1, "key"), (2, "recovery")]
    assert opens(store, "a key string")


def test_a_key_goes_to_the_tpm(store: Path, tmp_path: Path, chip: swtpm.Swtpm) -> None:
    file = config(tmp_path, chip)
    wrong = run("key", "change", store, "--config", file, "--new-tpm", key="wrong", code=12)
    assert "message authentication failed" in wrong.stderr
    assert not (tmp_path / "keys").exists(), "a key was made for a store that did not open"
    done = run("key", "change", store, "--config", file, "--new-tpm", "--json")
    assert json.loads(done.stdout) == {"store": str(store), "slot": 1, "kind": "tpm"}
    assert not opens(store, KEY)
    run("verify", store, "--config", file, key=None)
    run("key", "add", store, "--config", file, "--new-tpm", key=None, code=11)  # the block is for the new one
    sealed = (tmp_path / "keys").read_bytes()
    other = config(tmp_path, chip, "other")
    run("key", "add", store, "--config", file, "--new-key-file", secret_file(tmp_path, KEY), key=None)
    done = run("key", "add", store, "--config", file, "--new-tpm", code=36)
    assert "slot 1 has this key already" in done.stderr  # the same keys_file is the same key
    run("key", "change", store, "--slot", "1", "--config", other, "--new-tpm")
    run("verify", store, "--config", other, key=None)
    assert run("verify", store, "--config", file, key=None, code=None).returncode == 12
    assert (tmp_path / "keys").read_bytes() == sealed
    done = run("key", "add", store, "--config", file, "--tpm", "--new-tpm", code=2)
    assert "--tpm and --new-tpm" in done.stderr


@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
def test_a_mount_with_the_tpm_needs_it_only_once(tmp_path: Path, chip: swtpm.Swtpm) -> None:
    store, file = tmp_path / "new", config(tmp_path, chip)
    run("init", store, "--config", file, key=None)
    with mounts.mounted(store, tmp_path / "mnt", "--config", str(file)) as mount:
        (mount.path / "file").write_bytes(b"hello")
        chip.pull_the_plug()
        mount.kill_worker()
        settled(mount)
        run("reload", mount.path, key=None)
        assert (mount.path / "file").read_bytes() == b"hello"
